// What simd/*.inc lean on; include it before opening the anonymous namespace.
#pragma once

#include <stdint.h>
#include <string.h>

#include "halfbyte/dropout_format.h"
#include "halfbyte/dtype.h"
#include "support/scalar.h"
