"""Whole-tensor torch algebra that says what every operation computes. Imports torch only; slow.

The first of three oracles: the scalar C++ reference is checked against this, and every other kernel
against the scalar reference. Tables (levels, thresholds, the dynamic map) are arguments, so that
each exists once in the tree.
"""

from __future__ import annotations

import torch


def blocks_of(flat: torch.Tensor, block_size: int) -> torch.Tensor:
    """[blocks, block_size], zero-padded: the flattened tensor in blocks."""
    padding = -flat.numel() % block_size
    return torch.nn.functional.pad(flat, (0, padding)).view(-1, block_size)


def _reciprocal(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(inverse, lift) with x / absmax = x * lift * inverse: 1 / absmax and 1, or 0 for absmax = 0.

    Where 1 / absmax overflows (a subnormal absmax) both factors are scaled by 2^100.
    """
    inverse = 1.0 / absmax
    tiny = inverse.isinf() & (absmax > 0)
    inverse = torch.where(tiny, 1.0 / (absmax * 2.0**100), inverse)
    return torch.where(absmax > 0, inverse, 0.0), torch.where(tiny, 2.0**100, 1.0)


def quantize(
    weight: torch.Tensor,
    thresholds: torch.Tensor,
    code_of_rank: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed uint8, absmax float32): x = w * (1 / absmax), code_of_rank[#{t : x > threshold}]."""
    blocks = blocks_of(weight.reshape(-1).float(), block_size)
    absmax = blocks.abs().amax(1)
    inverse, lift = _reciprocal(absmax)
    x = (blocks * lift[:, None] * inverse[:, None]).view(-1)[: weight.numel() + weight.numel() % 2]
    if x.numel() < weight.numel() + weight.numel() % 2:
        x = torch.nn.functional.pad(x, (0, 1))
    rank = torch.bucketize(x, thresholds)  # right=False: #{t : t < x}
    codes = code_of_rank[rank].to(torch.uint8)
    return codes[0::2] << 4 | codes[1::2], absmax


def encode_dynamic(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Nearest of the 256 ascending `values` by exact (float64) midpoints; a tie goes down."""
    middles = (values[1:].double() + values[:-1].double()) / 2
    return torch.bucketize(x.double(), middles).to(torch.uint8)


def double_quantize(
    absmax: torch.Tensor, offset: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8, nested_absmax float32) of absmax - offset in blocks of 256."""
    blocks = blocks_of(absmax - offset, 256)
    if absmax.numel() % 256:
        blocks[-1, absmax.numel() % 256 :] = 0
    nested = blocks.abs().amax(1)
    inverse, lift = _reciprocal(nested)
    codes = encode_dynamic(blocks * lift[:, None] * inverse[:, None], values)
    return codes.view(-1)[: absmax.numel()], nested


def scales(
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
    values: torch.Tensor,
) -> torch.Tensor:
    """float32 scale of each block: absmax, or map[absmax] * nested_absmax + offset."""
    if nested_absmax is None:
        return absmax
    assert offset is not None, "double quantization has an offset"
    nested = nested_absmax.repeat_interleave(256)[: absmax.numel()]
    return values[absmax.long()] * nested + offset


def dequantize(
    packed: torch.Tensor,
    block_scales: torch.Tensor,
    levels: torch.Tensor,
    block_size: int,
    shape: torch.Size,
    dtype: torch.dtype,
) -> torch.Tensor:
    """levels[code] * scale in float32, rounded to `dtype`."""
    flat = packed.reshape(-1)
    codes = torch.stack((flat >> 4, flat & 15), 1).view(-1)[: shape.numel()]
    per_element = block_scales.repeat_interleave(block_size)[: shape.numel()]
    return (levels[codes.long()] * per_element).to(dtype).view(shape)


_MASK64 = 2**64 - 1


def dropout_factor(p: float, seed: int, rows: int, columns: int) -> torch.Tensor:
    """[rows, columns] float64: 1 / (1 - p) where kept, 0 where dropped (see dropout_format.h)."""
    threshold = int(p * 2**32 + 0.5)  # 2^32 and no hash reaches it: everything dropped
    column = torch.arange(columns, dtype=torch.int64)
    kept = torch.empty(rows, columns, dtype=torch.bool)
    for row in range(rows):
        key = _splitmix64((seed + (row + 1) * 0x9E3779B97F4A7C15) & _MASK64)
        h = column ^ (key & 0xFFFFFFFF)
        h = ((h ^ h >> 16) * 0x21F0AAAD) & 0xFFFFFFFF
        h = h ^ (key >> 32)
        h = ((h ^ h >> 15) * 0x735A2D97) & 0xFFFFFFFF
        kept[row] = (h ^ h >> 15) >= threshold
    return kept.double() / (1 - p) if p < 1 else torch.zeros(rows, columns, dtype=torch.float64)


def _splitmix64(z: int) -> int:
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & _MASK64
    return z ^ z >> 31


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scaling: float,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """y in float64 from a dense `weight`; differentiable in x, lora_a, lora_b and bias."""
    x = x.double()
    y = x @ weight.double().T
    if bias is not None:
        y = y + bias.double()
    if lora_a is not None:
        assert lora_b is not None, "lora_a and lora_b come together"
        dropped = x if mask is None else x * mask.view(x.shape)
        y = y + scaling * (dropped @ lora_a.double().T) @ lora_b.double().T
    return y
