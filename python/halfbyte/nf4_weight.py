"""A weight in 4 bits: packed codes and their scales.

    scale[b] = max |w| over block b of the row-major flattened weight
    code[i]  = index of the level nearest to w[i] / scale[i // block_size]
    w'[i]    = level[code[i]] * scale[i // block_size]

With double quantization (QLoRA, section 3) the scales are stored as 8-bit codes:
`scale[b] = map[absmax[b]] * nested_absmax[b // 256] + offset`; 4.127 bits a parameter at block size
64 instead of 4.5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

import halfbyte.ops.nf4  # noqa: F401  (registers the operators)
from halfbyte.ops.lora_linear import row_parts

CODEBOOKS = ("nf4", "fp4", "int4")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True, eq=False)
class NF4Weight:
    """Packed codes and statistics of one weight. Tensors are shared, never copied or changed.

    =============  ==================  ================================================
    packed         [ceil(count / 2)]   uint8, two codes a byte, the first in the high nibble
    absmax         [blocks]            float32, or uint8 codes when double-quantized
    nested_absmax  [ceil(blocks/256)]  float32, double-quantized only
    offset         [1]                 float32, double-quantized only
    levels         [16]                float32; None: the code book's own
    nested_map     [256]               float32; None: the signed dynamic map
    =============  ==================  ================================================

    float32 statistics may be held as int32 bit patterns. `shape` is the dense shape and `dtype`
    what `dequantize()` yields unless told otherwise.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    block_size: int = 64
    codebook: str = "nf4"
    nested_absmax: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    levels: torch.Tensor | None = None
    nested_map: torch.Tensor | None = None

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by field name."""
        names = ("packed", "absmax", "nested_absmax", "offset", "levels", "nested_map")
        return {name: t for name in names if (t := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        """Bytes that this weight takes, statistics and own tables included."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.nbytes / max(1, self.shape.numel())

    def op_args(self) -> tuple:
        """The weight's arguments of the operators in `halfbyte.ops`."""
        return (
            self.packed,
            self.absmax,
            self.nested_absmax,
            self.offset,
            self.codebook,
            self.levels,
            self.nested_map,
            self.block_size,
        )

    def dequantize(
        self, dtype: torch.dtype | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The dense weight: float32 product of level and scale, rounded to `dtype`.

        `out`, contiguous and of this weight's shape, receives it instead of a new tensor.
        """
        if out is not None:
            if out.shape != self.shape or dtype not in (None, out.dtype):
                raise ValueError(
                    f"out: expected {dtype or 'float'} {list(self.shape)}, "
                    f"got {out.dtype} {list(out.shape)}"
                )
            torch.ops.halfbyte.dequantize_4bit_into(*self.op_args(), out)
            return out
        dtype = dtype or self.dtype
        if dtype not in _FLOATS:
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
        return torch.ops.halfbyte.dequantize_4bit(*self.op_args(), list(self.shape), dtype)

    def row_panels(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(slice of rows, those rows [n, K] dense in float32), of a few MB each; 2-D weights."""
        n, k = self.shape
        for rows, part in row_parts(self.op_args(), n, k, torch.float32.itemsize):
            shape = [rows.stop - rows.start, k]
            yield rows, torch.ops.halfbyte.dequantize_4bit(*part, shape, torch.float32)

    def __repr__(self) -> str:
        kind = f"{self.codebook}, block {self.block_size}"
        kind += ", double-quantized" if self.double_quant else ""
        return f"NF4Weight({list(self.shape)}, {kind}, {self.bits_per_parameter:.3f} bits)"


def quantize_4bit(
    weight: torch.Tensor,
    codebook: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
) -> NF4Weight:
    """Quantizes `weight` (any shape; float32, bfloat16 or float16) to 4 bits.

    `codebook`: "nf4", "fp4" or "int4"; `block_size`: a power of two from 32 to 4096. Raises
    ValueError for a non-finite value, with its flat index. The offset of double quantization is
    torch.mean of the scales.
    """
    if codebook not in CODEBOOKS:
        raise ValueError(f"codebook: expected nf4, fp4 or int4, got {codebook!r}")
    if (
        not isinstance(block_size, int)
        or not 32 <= block_size <= 4096
        or block_size.bit_count() != 1
    ):
        raise ValueError(f"block_size: expected a power of two from 32 to 4096, got {block_size}")
    if weight.dtype not in _FLOATS:
        raise ValueError(f"weight: expected float32, bfloat16 or float16, got {weight.dtype}")
    if weight.is_meta:
        raise ValueError("weight: expected a tensor with data, got one on the meta device")
    packed, absmax = torch.ops.halfbyte.quantize_4bit(weight.detach(), codebook, block_size)
    nested_absmax = offset = None
    if double_quant:
        offset = absmax.mean().reshape(1) if absmax.numel() else absmax.new_zeros(1)
        if not torch.isfinite(offset):
            raise ValueError(
                f"weight: expected scales with a finite mean, got {offset.item()} (largest "
                f"{absmax.max().item()}); quantize with double_quant=False"
            )
        absmax, nested_absmax = torch.ops.halfbyte.double_quantize(absmax, offset)
    return NF4Weight(
        packed=packed,
        absmax=absmax,
        shape=weight.shape,
        dtype=weight.dtype,
        block_size=block_size,
        codebook=codebook,
        nested_absmax=nested_absmax,
        offset=offset,
    )


def quantize_nf4(
    weight: torch.Tensor, block_size: int = 64, double_quant: bool = True
) -> NF4Weight:
    """`quantize_4bit` with the NF4 code book."""
    return quantize_4bit(weight, "nf4", block_size, double_quant)
