"""bitsandbytes' names for what halfbyte does, as far as its own tests of 4-bit weights and AdamW
call them. Every number comes from halfbyte; here are names, argument orders and views only.

    functional   quantize_4bit, dequantize_4bit, gemv_4bit, QuantState, ...
    nn           Linear4bit, LinearNF4, LinearFP4, Params4bit
    optim        Adam*, AdamW* and their paged forms
    matmul_4bit  A deq(B)^T + bias, differentiable in A and bias

What bitsandbytes offers beyond that is there as a name that raises `NotOffered`: the test files
mention it when they are imported.
"""

import types

from bitsandbytes_shim import functional, nn, optim
from bitsandbytes_shim.absent import NotOffered, absent
from bitsandbytes_shim.functional import matmul_4bit

__all__ = ["NotOffered", "functional", "matmul_4bit", "nn", "optim"]

bmm_cublas = absent("bmm_cublas")
matmul = absent("matmul")
matmul_cublas = absent("matmul_cublas")
research = types.SimpleNamespace(
    matmul_fp8_mixed=absent("matmul_fp8_mixed"),
    matmul_fp8_global=absent("matmul_fp8_global"),
    switchback_bnb=absent("switchback_bnb"),
)
