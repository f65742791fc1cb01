"""torch.library operators over the native kernels: validate, allocate, call.

Every operator has a schema, a CPU kernel and a fake, and no autograd of its own (see
`halfbyte.autograd`).
"""

from __future__ import annotations

import torch

from halfbyte._native import _C

library = torch.library.Library("halfbyte", "DEF")


def define(schema: str, kernel, fake) -> None:
    """Registers one operator of the `halfbyte` namespace."""
    name = schema.split("(", 1)[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    library.impl(name, kernel, "CPU")
    library.impl(name, _no_cuda(name), "CUDA")
    torch.library.register_fake(f"halfbyte::{name}", fake, lib=library)


def _no_cuda(name: str):
    def kernel(*args, **kwargs):
        raise RuntimeError(f"halfbyte::{name}: {_C.cuda_why_not()}")

    return kernel
