"""Packed weights as checkpoint entries, in bitsandbytes' key layout.

P.weight                              uint8 [ceil(N K / 2), 1]
P.weight.absmax                       uint8 (double-quantized) or float32
P.weight.quant_map                    float32 [16]
P.weight.nested_absmax                float32          double-quantized only
P.weight.nested_quant_map             float32 [256]    double-quantized only
P.weight.quant_state.bitsandbytes__nf4   uint8 bytes of JSON: quant_type, blocksize, dtype, shape,
                                      and nested_blocksize, nested_dtype, nested_offset
"""

from __future__ import annotations

import functools
import json
import math
from typing import Any, overload

import torch

from halfbyte._native import _C
from halfbyte.nf4_weight import CODEBOOKS, NF4Weight
from halfbyte.ops.nf4 import DOUBLE_QUANT_BLOCK

_STATE = "quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@functools.cache
def standard_levels(codebook: str) -> torch.Tensor:
    return torch.tensor(_C.codebook_levels(codebook), dtype=torch.float32)


@functools.cache
def standard_nested_map() -> torch.Tensor:
    return torch.tensor(_C.signed_dynamic_map(), dtype=torch.float32)


@overload
def as_float(tensor: torch.Tensor) -> torch.Tensor: ...
@overload
def as_float(tensor: None) -> None: ...
def as_float(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """float32 statistics from their int32 bit patterns (or as they are); shares memory."""
    return (
        tensor.view(torch.float32) if tensor is not None and tensor.dtype == torch.int32 else tensor
    )


def entry_names(state: dict, prefix: str) -> list[str]:
    """Keys of `state` that belong to the packed weight `prefix`, which ends in "weight"."""
    names = [prefix, *(f"{prefix}.{part}" for part in _PARTS)]
    names += [f"{prefix}.{_STATE}{codebook}" for codebook in CODEBOOKS]
    return [name for name in names if name in state]


def empty_weight(
    shape: torch.Size, dtype: torch.dtype, block_size: int, double_quant: bool, codebook: str
) -> NF4Weight:
    """A packed weight without data, on the meta device: a place to load one into."""
    blocks = math.ceil(shape.numel() / block_size)

    def empty(count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(count, dtype=dtype, device="meta")

    nested = math.ceil(blocks / DOUBLE_QUANT_BLOCK)
    return NF4Weight(
        packed=empty(math.ceil(shape.numel() / 2), torch.uint8),
        absmax=empty(blocks, torch.uint8 if double_quant else torch.float32),
        shape=shape,
        dtype=dtype,
        block_size=block_size,
        codebook=codebook,
        nested_absmax=empty(nested, torch.float32) if double_quant else None,
        offset=empty(1, torch.float32) if double_quant else None,
    )


def to_entries(weight: NF4Weight, prefix: str) -> dict[str, torch.Tensor]:
    """Checkpoint entries of `weight` under `prefix` ("layer.weight").

    Tensors share the weight's memory; standard tables are copies.
    """
    state = {
        "quant_type": weight.codebook,
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    device = weight.packed.device
    levels = as_float(weight.levels)
    entries = {
        prefix: weight.packed.reshape(-1, 1),
        f"{prefix}.absmax": as_float(weight.absmax),
        f"{prefix}.quant_map": _own(standard_levels(weight.codebook), device)
        if levels is None
        else levels,
    }
    if weight.nested_absmax is not None and weight.offset is not None:
        nested_map = as_float(weight.nested_map)
        entries[f"{prefix}.nested_absmax"] = as_float(weight.nested_absmax)
        entries[f"{prefix}.nested_quant_map"] = (
            _own(standard_nested_map(), device) if nested_map is None else nested_map
        )
        state["nested_blocksize"] = DOUBLE_QUANT_BLOCK
        state["nested_dtype"] = "float32"
        state["nested_offset"] = as_float(weight.offset).item()
    text = json.dumps(state).encode()
    entries[f"{prefix}.{_STATE}{weight.codebook}"] = torch.frombuffer(
        bytearray(text), dtype=torch.uint8
    )
    return entries


def _own(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy: entries that share memory are refused or dropped by writers of checkpoints."""
    return table.to(device, copy=True)


def from_entries(state: dict, prefix: str) -> NF4Weight:
    """The packed weight stored under `prefix`; ValueError names what is missing or does not fit."""
    codebook = next((c for c in CODEBOOKS if f"{prefix}.{_STATE}{c}" in state), None)
    if codebook is None:
        raise ValueError(
            f"{prefix}: expected an entry {prefix}.{_STATE}nf4 (or fp4, int4), got none"
        )
    header = _parse_header(state[f"{prefix}.{_STATE}{codebook}"], f"{prefix}.{_STATE}{codebook}")
    double_quant = "nested_blocksize" in header
    shape = torch.Size(header["shape"])
    blocks = math.ceil(shape.numel() / header["blocksize"])

    def part(name: str, dtype: torch.dtype, count: int) -> torch.Tensor:
        key = f"{prefix}.{name}" if name else prefix
        tensor = state.get(key)
        if tensor is None:
            raise ValueError(f"{key}: expected {dtype} [{count}], got no such entry")
        if not name and tensor.is_floating_point():  # bnb_4bit_quant_storage: bytes in floats
            tensor = tensor.contiguous().view(torch.uint8)
        if tensor.dtype != dtype or tensor.numel() != count:
            raise ValueError(
                f"{key}: expected {dtype} [{count}], got {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{key}: expected finite values, got an infinity or a NaN")
        return tensor.reshape(-1)

    offset = nested_absmax = nested_map = None
    if double_quant:
        nested_absmax = part("nested_absmax", torch.float32, math.ceil(blocks / DOUBLE_QUANT_BLOCK))
        nested_map = _unless_equal(
            part("nested_quant_map", torch.float32, 256), standard_nested_map()
        )
        offset = torch.tensor(
            [header["nested_offset"]], dtype=torch.float32, device=nested_absmax.device
        )
    return NF4Weight(
        packed=part("", torch.uint8, math.ceil(shape.numel() / 2)),
        absmax=part("absmax", torch.uint8 if double_quant else torch.float32, blocks),
        shape=shape,
        dtype=_DTYPES[header["dtype"]],
        block_size=header["blocksize"],
        codebook=codebook,
        nested_absmax=nested_absmax,
        offset=offset,
        levels=_unless_equal(part("quant_map", torch.float32, 16), standard_levels(codebook)),
        nested_map=nested_map,
    )


def _unless_equal(table: torch.Tensor, standard: torch.Tensor) -> torch.Tensor | None:
    """None for the standard table, which needs no copy of its own."""
    return None if torch.equal(table.cpu(), standard) else table


def _parse_header(tensor: torch.Tensor, key: str) -> dict:
    try:
        header = json.loads(bytes(tensor.cpu().tolist()).decode())
    except (TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise ValueError(f"{key}: expected JSON bytes, got {error}") from None
    problems = []
    if not isinstance(header, dict):
        raise ValueError(f"{key}: expected a JSON object, got {type(header).__name__}")
    shape: Any = header.get("shape")
    sizes = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    if not sizes or math.prod(max(n, 1) for n in shape) >= 2**63:
        problems.append(f"shape {shape!r}")
    block_size = header.get("blocksize")
    if not isinstance(block_size, int) or block_size not in {2**i for i in range(5, 13)}:
        problems.append(f"blocksize {block_size!r}")
    if not isinstance(header.get("dtype"), str) or header["dtype"] not in _DTYPES:
        problems.append(f"dtype {header.get('dtype')!r}")
    codebook = key.rpartition("__")[2]
    if header.get("quant_type", codebook) != codebook:
        problems.append(f"quant_type {header['quant_type']!r}")
    if header.get("nested_blocksize", DOUBLE_QUANT_BLOCK) != DOUBLE_QUANT_BLOCK:
        problems.append(f"nested_blocksize {header['nested_blocksize']!r}")
    offset: Any = header.get("nested_offset")
    if "nested_blocksize" in header and not (
        type(offset) in (float, int) and abs(offset) <= torch.finfo(torch.float32).max
    ):
        problems.append(f"nested_offset {header.get('nested_offset')!r}")
    if problems:
        raise ValueError(f"{key}: cannot read {', '.join(problems)}")
    return header
