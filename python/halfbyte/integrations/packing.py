"""A weight packed from a stream of its values, so that it is never dense as a whole.

    packer = Packer(name, shape, dtype, block_size, double_quant, codebook)
    for piece in pieces: packer.feed(piece)        # flat, in order, any length
    weight = packer.finish()                       # bit for bit `quantize_4bit` of the whole

Memory: the packed weight, its scales in float32 and one piece.
"""

from __future__ import annotations

import math

import torch

from halfbyte.integrations.safetensors_files import ModelFileError
from halfbyte.nf4_weight import NF4Weight, quantize_4bit


class Packer:
    """Packs one weight of `shape`, whose values are rounded to `dtype` first.

    ModelFileError, with `name` and an index, for a value that is not finite and for too many or too
    few values.
    """

    def __init__(
        self,
        name: str,
        shape: torch.Size,
        dtype: torch.dtype,
        block_size: int = 64,
        double_quant: bool = True,
        codebook: str = "nf4",
    ) -> None:
        self.name, self.shape, self.dtype = name, shape, dtype
        self.block_size, self.double_quant, self.codebook = block_size, double_quant, codebook
        self.count = shape.numel()
        self.packed = torch.empty((self.count + 1) // 2, dtype=torch.uint8)
        self.absmax = torch.empty(math.ceil(self.count / block_size), dtype=torch.float32)
        self.done = 0  # values packed so far, a multiple of the block size until the end
        self.rest = torch.empty(0, dtype=dtype)  # values short of a block

    def feed(self, values: torch.Tensor) -> None:
        """Takes the next values; they may be overwritten afterwards."""
        values = values.to(self.dtype)
        if self.done + len(self.rest) + len(values) > self.count:
            raise ModelFileError(f"{self.name}: expected {self.count} values, got more")
        if len(self.rest):
            values = torch.cat((self.rest, values))
        whole = len(values) // self.block_size * self.block_size
        self._pack(values[:whole])
        self.rest = values[whole:].clone()

    def finish(self) -> NF4Weight:
        self._pack(self.rest)
        if self.done != self.count:
            raise ModelFileError(f"{self.name}: expected {self.count} values, got {self.done}")
        absmax, nested_absmax, offset = self.absmax, None, None
        if self.double_quant:
            # The second stage of `quantize_4bit`, which needs all scales at once.
            offset = absmax.mean().reshape(1) if absmax.numel() else absmax.new_zeros(1)
            if not torch.isfinite(offset):
                raise ModelFileError(
                    f"{self.name}: expected scales with a finite mean, got {offset.item()}; "
                    "quantize without double quantization"
                )
            absmax, nested_absmax = torch.ops.halfbyte.double_quantize(absmax, offset)
        return NF4Weight(
            packed=self.packed,
            absmax=absmax,
            shape=self.shape,
            dtype=self.dtype,
            block_size=self.block_size,
            codebook=self.codebook,
            nested_absmax=nested_absmax,
            offset=offset,
        )

    def _pack(self, values: torch.Tensor) -> None:
        if not len(values):
            return
        try:
            part = quantize_4bit(values, self.codebook, self.block_size, double_quant=False)
        except ValueError:
            check_finite(values, self.name, self.done)
            raise
        block = self.done // self.block_size
        self.packed[self.done // 2 : self.done // 2 + len(part.packed)] = part.packed
        self.absmax[block : block + len(part.absmax)] = part.absmax
        self.done += len(values)


def check_finite(values: torch.Tensor, name: str, first: int = 0) -> None:
    """ModelFileError for an infinity or a NaN; `first` is the flat index of values[0]."""
    if not (values.is_floating_point() and len(values)):
        return
    if all(torch.isfinite(end) for end in torch.aminmax(values)):  # a NaN is both ends
        return
    index = int((~torch.isfinite(values)).nonzero()[0, 0])
    raise ModelFileError(
        f"{name}: expected finite values, got {values[index].item()} at index {first + index}"
    )
