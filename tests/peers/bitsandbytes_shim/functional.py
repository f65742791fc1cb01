"""bitsandbytes.functional's 4-bit part over `halfbyte.NF4Weight`.

A packed tensor has shape [bytes, 1]; its transpose [1, bytes] stands for W^T, as in bitsandbytes.
`dequantize_blockwise` is the one 8-bit function: optimizer states are read through it.
"""

from __future__ import annotations

import json

import torch

import halfbyte
from bitsandbytes_shim.absent import absent
from halfbyte import checkpoint
from halfbyte.nf4_weight import NF4Weight

NESTED_BLOCK = 256

_STATE = "quant_state.bitsandbytes__"


class QuantState:
    """Statistics of a packed weight under bitsandbytes' attribute names."""

    def __init__(
        self, absmax, shape=None, code=None, blocksize=None, quant_type=None, dtype=None,
        offset=None, state2=None,
    ):  # fmt: skip
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.dtype = dtype
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.offset = offset
        self.state2 = state2
        self.nested = state2 is not None

    @classmethod
    def of(cls, weight: NF4Weight) -> QuantState:
        code = checkpoint.as_float(weight.levels)
        state2 = None
        if weight.double_quant:
            nested_map = checkpoint.as_float(weight.nested_map)
            nested_map = checkpoint.standard_nested_map() if nested_map is None else nested_map
            state2 = cls(
                checkpoint.as_float(weight.nested_absmax),
                code=nested_map,
                blocksize=NESTED_BLOCK,
                dtype=torch.float32,
            )
        return cls(
            checkpoint.as_float(weight.absmax),
            weight.shape,
            checkpoint.standard_levels(weight.codebook) if code is None else code,
            weight.block_size,
            weight.codebook,
            weight.dtype,
            None if state2 is None else checkpoint.as_float(weight.offset).reshape(()),
            state2,
        )

    @classmethod
    def from_dict(cls, entries: dict, device=None) -> QuantState:
        """From `as_dict()`, packed or not, or from a state dict's entries under any prefix."""
        short = {
            key[key.rindex(_STATE) if _STATE in key else key.rfind(".") + 1 :]: value
            for key, value in entries.items()
        }
        header = next((key for key in short if key.startswith(_STATE)), None)
        if header is None:
            values = {k: v for k, v in short.items() if not isinstance(v, torch.Tensor)}
            short = {k: v for k, v in short.items() if isinstance(v, torch.Tensor)}
            header = _STATE + values["quant_type"]
            short[header] = torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)
        count = torch.Size(json.loads(bytes(short[header].tolist()))["shape"]).numel()
        packed = torch.empty((count + 1) // 2, dtype=torch.uint8)
        named = {f"weight.{key}": value.cpu() for key, value in short.items()}
        return cls.of(checkpoint.from_entries({"weight": packed, **named}, "weight")).to(device)

    def __getattr__(self, name: str):
        # state dict keys are looked up as attributes: "quant_state.bitsandbytes__nf4"
        if name.startswith("bitsandbytes__") and name.endswith(self.__dict__["quant_type"]):
            return self.as_dict(packed=True)[f"quant_state.{name}"]
        raise AttributeError(f"QuantState has no attribute {name!r}")

    def weight(self, packed: torch.Tensor) -> NF4Weight:
        """The packed weight that `packed` [bytes, 1] or [1, bytes] and this state make."""
        return NF4Weight(
            packed=packed.detach().contiguous().reshape(-1).view(torch.uint8),
            absmax=self.absmax,
            shape=torch.Size(self.shape),
            dtype=self.dtype,
            block_size=self.blocksize,
            codebook=self.quant_type,
            nested_absmax=self.state2.absmax if self.nested else None,
            offset=self.offset.reshape(1) if self.nested else None,
            levels=self.code,
            nested_map=self.state2.code if self.nested else None,
        )

    def as_dict(self, packed: bool = False) -> dict:
        entries = checkpoint.to_entries(self.weight(torch.empty(0, dtype=torch.uint8)), "weight")
        entries = {k.removeprefix("weight."): v for k, v in entries.items() if k != "weight"}
        if packed:
            return entries
        header = json.loads(bytes(entries.pop(_STATE + self.quant_type).tolist()))
        return {**entries, **header, "shape": tuple(self.shape)}

    def to(self, device) -> QuantState:
        """Moves the statistics, in place."""
        for name in ("absmax", "code", "offset"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.to(device))
        if self.nested:
            self.state2.to(device)
        return self

    def __eq__(self, other) -> bool:
        if not isinstance(other, QuantState):
            return False
        names = ("absmax", "shape", "code", "dtype", "blocksize", "quant_type", "offset", "state2")
        pairs = [(getattr(self, name), getattr(other, name)) for name in names]
        return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)

    __hash__ = None


def quantize_4bit(
    A, absmax=None, out=None, blocksize=64, compress_statistics=False, quant_type="fp4",
    quant_storage=torch.uint8,
) -> tuple[torch.Tensor, QuantState]:  # fmt: skip
    """(packed [bytes, 1] viewed as `quant_storage`, state)."""
    weight = halfbyte.quantize_4bit(A, quant_type, blocksize or 64, compress_statistics)
    state = QuantState.of(weight)
    if absmax is not None:
        absmax.copy_(state.absmax)
    packed = weight.packed.view(quant_storage).reshape(-1, 1)
    return (packed if out is None else out.copy_(packed)), state


def dequantize_4bit(
    A, quant_state=None, absmax=None, out=None, blocksize=64, quant_type="fp4"
) -> torch.Tensor:
    if quant_state is None:
        code = checkpoint.standard_levels(quant_type)
        quant_state = QuantState(absmax, out.shape, code, blocksize, quant_type, out.dtype)
    dense = quant_state.weight(A).dequantize(out=out)
    return dense.t() if A.shape[0] == 1 else dense


def quantize_fp4(A, absmax=None, out=None, blocksize=64, compress_statistics=False):
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4")


def quantize_nf4(A, absmax=None, out=None, blocksize=64, compress_statistics=False):
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4")


def dequantize_fp4(A, quant_state=None, absmax=None, out=None, blocksize=64):
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def dequantize_nf4(A, quant_state=None, absmax=None, out=None, blocksize=64):
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def matmul_4bit(A, B, quant_state, out=None, bias=None) -> torch.Tensor:
    """A W^T + bias for B [1, bytes]; A W + bias, through the dense weight, for B [bytes, 1]."""
    weight = quant_state.weight(B)
    if B.shape[0] == 1:
        result = halfbyte.nf4_linear(A, weight, bias)
    else:
        result = A @ weight.dequantize(A.dtype)
        result = result if bias is None else result + bias
    return result if out is None else out.copy_(result)


def gemv_4bit(A, B, out=None, transposed_A=False, transposed_B=False, state=None):
    return matmul_4bit(A, B.reshape(1, -1), state, out)


def dequantize_blockwise(A, quant_state=None, absmax=None, code=None, out=None, blocksize=4096):
    """code[A] * absmax, a scale a block. The block is what the number of scales says: tests pass
    bitsandbytes' own size, whatever the optimizer's is."""
    block = next(size for size in (256, blocksize) if -(-A.numel() // size) == absmax.numel())
    scales = absmax.repeat_interleave(block)[: A.numel()].reshape(A.shape)
    return code[A.long()] * scales


def get_4bit_type(typename, device=None, blocksize=64) -> torch.Tensor:
    return checkpoint.standard_levels(typename).to(device)


def create_normal_map(offset=0.9677083, use_extra_value=True) -> torch.Tensor:
    """The NF4 levels, padded with zeros to bitsandbytes' 256 entries."""
    return torch.cat([checkpoint.standard_levels("nf4"), torch.zeros(240)]).sort().values


def create_dynamic_map(signed=True, max_exponent_bits=7, total_bits=8) -> torch.Tensor:
    """The 8-bit map; unsigned as the header `dynamic8_format.h` defines it, to fp32 rounding."""
    if signed:
        return checkpoint.standard_nested_map()
    points = [torch.linspace(0.1, 1, 2 ** (i + 1) + 1) for i in range(7)]
    decades = [(p[1:] + p[:-1]) / 2 * 10.0 ** (i - 6) for i, p in enumerate(points)]
    return torch.cat([*decades, torch.tensor([0.0, 1.0])]).sort().values


percentile_clipping = absent("percentile_clipping")
quantize_blockwise = absent("quantize_blockwise")
dequantize = absent("dequantize")
