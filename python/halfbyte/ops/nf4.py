"""Quantize, double quantize and dequantize (formulas: `halfbyte.nf4_weight`, formats: the C++
headers `codebook.h`, `nf4_format.h`, `dynamic8_format.h`).

A packed weight travels through operators as
    packed uint8 [ceil(count / 2)]; absmax float32 | uint8 [blocks]; nested_absmax float32 [nested];
    offset float32 [1]; codebook; levels float32 [16] and nested_map float32 [256], None = standard
where float32 statistics may also be int32 bit patterns.
"""

from __future__ import annotations

import math

import torch

from halfbyte._native import _C, stream_of, thread_count
from halfbyte.ops import define

DOUBLE_QUANT_BLOCK = 256
WEIGHT_SCHEMA = (
    "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? offset, str codebook, "
    "Tensor? levels, Tensor? nested_map, int block_size"
)


def _quantize_outputs(weight, block_size):
    count = weight.numel()
    packed = weight.new_empty((count + 1) // 2, dtype=torch.uint8)
    absmax = weight.new_empty(-(-count // block_size), dtype=torch.float32)
    return packed, absmax


def _quantize(weight, codebook, block_size):
    weight = weight.contiguous()
    packed, absmax = _quantize_outputs(weight, block_size)
    _C.quantize_4bit(
        weight, codebook, block_size, packed, absmax, thread_count(), stream_of(weight)
    )
    return packed, absmax


def _double_quantize(absmax, offset):
    absmax = absmax.contiguous()
    codes, nested_absmax = _double_quantize_fake(absmax, offset)
    _C.double_quantize(absmax, offset, codes, nested_absmax, thread_count(), stream_of(absmax))
    return codes, nested_absmax


def _double_quantize_fake(absmax, offset):
    codes = torch.empty_like(absmax, dtype=torch.uint8)
    nested = absmax.new_empty(-(-absmax.numel() // DOUBLE_QUANT_BLOCK))
    return codes, nested


def _dequantize(*args):
    *weight, shape, dtype = args
    out = torch.empty(shape, dtype=dtype, device=weight[0].device)
    if out.is_cpu:
        _C.advise_huge_pages(out)
    _dequantize_into(*weight, out)
    return out


def _dequantize_into(*args):
    *weight, out = args
    _C.dequantize_4bit(weight, out, thread_count(), stream_of(out))


def _dequantize_fake(packed, *weight_and_shape):
    *_, shape, dtype = weight_and_shape
    return packed.new_empty(shape, dtype=dtype)


define(
    "quantize_4bit(Tensor weight, str codebook, int block_size) -> (Tensor packed, Tensor absmax)",
    _quantize,
    lambda weight, codebook, block_size: _quantize_outputs(weight, block_size),
)
define(
    "double_quantize(Tensor absmax, Tensor offset) -> (Tensor codes, Tensor nested_absmax)",
    _double_quantize,
    _double_quantize_fake,
)
define(
    f"dequantize_4bit({WEIGHT_SCHEMA}, SymInt[] shape, ScalarType dtype) -> Tensor",
    _dequantize,
    _dequantize_fake,
)
define(
    f"dequantize_4bit_into({WEIGHT_SCHEMA}, Tensor(a!) out) -> ()",
    _dequantize_into,
    lambda *args: None,
)


def weight_bytes(count: int, block_size: int, double_quant: bool) -> int:
    """Bytes of codes and statistics of `count` elements (standard tables not stored)."""
    blocks = math.ceil(count / block_size)
    statistics = 4 * blocks
    if double_quant:
        statistics = blocks + 4 * math.ceil(blocks / DOUBLE_QUANT_BLOCK) + 4
    return math.ceil(count / 2) + statistics
