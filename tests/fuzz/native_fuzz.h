// One random call of a native operation, judged: it must throw `Error`, the same one whatever the
// variant, or give what the reference variant gives, and write nothing outside its outputs.
#pragma once

#include <cstdint>
#include <string>

namespace halfbyte::fuzz {

// The call of `seed`: which operation, what shapes, dtypes, block sizes and values, and what is
// wrong with it (about every second call). Returns "" or a sentence that says what went wrong.
std::string run_case(uint64_t seed);

}  // namespace halfbyte::fuzz
