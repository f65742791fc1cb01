"""torch.library operators over the native kernels: validate, allocate, call.

Every operator has a schema, one kernel for CPU and CUDA tensors, and a fake, and no autograd of its
own (see `halfbyte.autograd`). On CUDA it runs on torch's current stream; without a CUDA library or
driver it raises `halfbyte._C.Error`, which says what is missing.
"""

from __future__ import annotations

import torch

library = torch.library.Library("halfbyte", "DEF")


def define(schema: str, kernel, fake) -> None:
    """Registers one operator of the `halfbyte` namespace."""
    name = schema.split("(", 1)[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    library.impl(name, kernel, "CPU")
    library.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"halfbyte::{name}", fake, lib=library)
