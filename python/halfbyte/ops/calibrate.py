"""Scale search and error feedback (formulas: the C++ header `calibrate.h`). CPU tensors only.

search_scales   weight [N, K], moments float32 [K] -> scales float32 [ceil(N K / block_size)]
feedback_codes  weight float32 [N, K], scales, coefficients float32 [K, K], order int64 [K];
                changes errors float32 [N, K]; -> codes uint8 [N, K]
"""

from __future__ import annotations

import math

import torch

from halfbyte._native import _C, thread_count
from halfbyte.ops import define


def _search_scales(weight, moments, codebook, block_size):
    weight, moments = weight.contiguous(), moments.contiguous()
    scales = _search_scales_fake(weight, moments, codebook, block_size)
    _C.search_scales(weight, moments, codebook, block_size, scales, thread_count())
    return scales


def _search_scales_fake(weight, moments, codebook, block_size):
    return weight.new_empty(math.ceil(weight.numel() / block_size), dtype=torch.float32)


def _feedback_codes(weight, scales, coefficients, order, triangular, codebook, block_size, errors):
    weight, scales, coefficients = (t.contiguous() for t in (weight, scales, coefficients))
    codes = torch.empty_like(weight, dtype=torch.uint8)
    _C.feedback_codes(
        weight, scales, coefficients, order.contiguous(), triangular, codebook, block_size,
        errors, codes, thread_count(),
    )  # fmt: skip
    return codes


define(
    "search_scales(Tensor weight, Tensor moments, str codebook, int block_size) -> Tensor",
    _search_scales,
    _search_scales_fake,
)
define(
    "feedback_codes(Tensor weight, Tensor scales, Tensor coefficients, Tensor order, "
    "bool triangular, str codebook, int block_size, Tensor(a!) errors) -> Tensor",
    _feedback_codes,
    lambda weight, *args: torch.empty_like(weight, dtype=torch.uint8),
)
