"""GGUF files (versions 2 and 3, little-endian) read from a mapping, every field checked.

    "GGUF" | version u32 | tensors u64 | pairs u64
    pairs:    key string, type u32, value        string: length u64, UTF-8 bytes
    tensors:  name string, dims u32, sizes u64 (fastest first), type u32, offset u64
    data:     from the next multiple of `general.alignment`, offsets relative to it

Block sizes and dequantization are the `gguf` package's. Tensors are dequantized a few rows at a
time into float32; F16 and BF16 come as they are. Whatever does not fit is a `ModelFileError`,
before any tensor is made.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from halfbyte.integrations.safetensors_files import PIECE, ModelFileError, open_file, read_fully

VERSIONS = (2, 3)
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_ARRAY = 1 << 24  # a vocabulary is far smaller; as Python objects this many fit memory
_MAX_DIMS = 4
_MAX_ALIGNMENT = 1 << 20
_FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
# Kinds of whole numbers, which are no weights.
_WHOLE = {GGMLQuantizationType[name] for name in ("I8", "I16", "I32", "I64")}


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies: `shape` is the dense shape, rows last to first as in torch."""

    name: str
    kind: GGMLQuantizationType
    shape: torch.Size
    start: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """What its pieces come in."""
        return _FLOATS.get(self.kind, torch.float32)

    @property
    def row_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size


class GgufFile:
    """One file: `metadata` by key, `tensors` by name, the weights read a few rows at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor, self.size = open_file(path)
        self._close = weakref.finalize(self, os.close, self.descriptor)
        if self.size < 24:
            raise ModelFileError(f"{path}: expected at least 24 bytes, got {self.size}")
        with mmap.mmap(self.descriptor, self.size, access=mmap.ACCESS_READ) as data:
            reader = _Reader(path, data)
            tensor_count, pair_count = _counts(reader)
            self.metadata = _metadata(reader, pair_count)
            alignment = self._alignment()
            listed = [_tensor_fields(reader) for _ in range(tensor_count)]
            self.data_start = -(-reader.at // alignment) * alignment
        self.tensors: dict[str, GgufTensor] = {}
        for fields in listed:
            tensor = self._tensor(*fields, alignment)
            if tensor.name in self.tensors:
                raise ModelFileError(f"{path}: {tensor.name}: is there twice")
            self.tensors[tensor.name] = tensor
        self._check_overlap()

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", 32)
        fits = type(alignment) is int and 1 <= alignment <= _MAX_ALIGNMENT
        if not fits or alignment.bit_count() != 1:
            raise ModelFileError(
                f"{self.path}: general.alignment: expected a power of two up to {_MAX_ALIGNMENT}, "
                f"got {alignment!r}"
            )
        return alignment

    def _tensor(
        self, name: str, sizes: tuple[int, ...], kind: int, offset: int, alignment: int
    ) -> GgufTensor:
        where = f"{self.path}: {name}"
        try:
            kind = GGMLQuantizationType(kind)
        except ValueError:
            raise ModelFileError(f"{where}: type {kind} is not known") from None
        if kind in _WHOLE:
            raise ModelFileError(f"{where}: expected a type of weights, got {kind.name}")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not sizes or min(sizes) < 1 or math.prod(sizes) >= 2**63 or sizes[0] % block:
            raise ModelFileError(
                f"{where}: expected sizes from 1, the first a multiple of {block} for {kind.name}, "
                f"got {list(sizes)}"
            )
        nbytes = math.prod(sizes) // block * block_bytes
        start = self.data_start + offset
        if offset % alignment or start + nbytes > self.size:
            raise ModelFileError(
                f"{where}: expected {nbytes} bytes within the file's {self.size}, at a multiple of "
                f"{alignment}, got offset {offset} from byte {self.data_start}"
            )
        return GgufTensor(name, kind, torch.Size(reversed(sizes)), start, nbytes)

    def _check_overlap(self) -> None:
        reached = self.data_start
        for tensor in sorted(self.tensors.values(), key=lambda t: t.start):
            if tensor.start < reached:
                raise ModelFileError(
                    f"{self.path}: {tensor.name}: begins at byte {tensor.start}, before the tensor "
                    f"ahead of it ends at {reached}"
                )
            reached = tensor.start + tensor.nbytes

    def pieces(
        self,
        name: str,
        group: int = 1,
        rearrange: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Iterator[torch.Tensor]:
        """The tensor's values in order, flat, each piece valid until the next one is taken.

        A piece is a multiple of `group` rows [rows, K], which `rearrange` may put in another order.
        """
        tensor = self.tensors[name]
        columns = tensor.shape[-1]
        rows = tensor.shape.numel() // columns
        step = max(1, PIECE // (4 * columns * group)) * group
        buffer = torch.empty(min(step, rows) * tensor.row_bytes, dtype=torch.uint8)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            raw = buffer[: count * tensor.row_bytes]
            place = tensor.start + first * tensor.row_bytes
            read_fully(self.descriptor, raw, place, f"{self.path}: {name}")
            values = self._values(tensor, raw).reshape(count, columns)
            yield (values if rearrange is None else rearrange(values)).reshape(-1)

    def _values(self, tensor: GgufTensor, raw: torch.Tensor) -> torch.Tensor:
        if tensor.kind in _FLOATS:
            return raw.view(tensor.dtype)
        if tensor.kind is GGMLQuantizationType.F64:
            return raw.view(torch.float64).float()
        blocks = raw.numpy().reshape(-1, tensor.row_bytes)
        try:
            with np.errstate(all="ignore"):  # a NaN scale is found where values are used
                return torch.from_numpy(dequantize(blocks, tensor.kind))
        except NotImplementedError:
            raise ModelFileError(
                f"{self.path}: {tensor.name}: {tensor.kind.name} cannot be dequantized"
            ) from None


class _Reader:
    """A place in the mapped file; reading past the end is a ModelFileError."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def need(self, count: int, what: str) -> None:
        if count > len(self.data) - self.at:
            raise ModelFileError(
                f"{self.path}: {what} at byte {self.at}: expected {count} more bytes, "
                f"the file ends after {len(self.data) - self.at}"
            )

    def scalars(self, code: str, count: int, what: str) -> tuple:
        size = count * struct.calcsize(code)
        self.need(size, what)
        values = struct.unpack_from(f"<{count}{code}", self.data, self.at)
        self.at += size
        return values

    def scalar(self, code: str, what: str) -> Any:
        return self.scalars(code, 1, what)[0]

    def string(self, what: str) -> str:
        length = self.scalar("Q", what)
        self.need(length, what)
        text = self.data[self.at : self.at + length]
        self.at += length
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelFileError(f"{self.path}: {what}: not UTF-8: {error}") from None


def _counts(reader: _Reader) -> tuple[int, int]:
    magic = bytes(reader.scalars("B", 4, "magic"))
    version, tensors, pairs = reader.scalar("I", "version"), *reader.scalars("Q", 2, "counts")
    if magic != b"GGUF":
        raise ModelFileError(f"{reader.path}: expected a GGUF file, got first bytes {magic!r}")
    if version not in VERSIONS:
        raise ModelFileError(
            f"{reader.path}: expected GGUF version 2 or 3, little-endian, got {version:#x}"
        )
    # The shortest a pair (13 bytes) and a tensor (24) can be: a count that cannot be right is
    # refused before a loop is run for it.
    reader.need(13 * pairs + 24 * tensors, f"{pairs} pairs and {tensors} tensors")
    return tensors, pairs


def _metadata(reader: _Reader, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(count):
        key = reader.string("a key")
        if key in found:
            raise ModelFileError(f"{reader.path}: {key}: is there twice")
        found[key] = _value(reader, reader.scalar("I", key), key)
    return found


def _value(reader: _Reader, kind: int, key: str) -> Any:
    if kind == _STRING:
        return reader.string(key)
    if kind == _ARRAY:
        element, count = reader.scalar("I", key), reader.scalar("Q", key)
        if count > _MAX_ARRAY:
            raise ModelFileError(
                f"{reader.path}: {key}: expected at most {_MAX_ARRAY} values, got {count}"
            )
        if element == _STRING:
            reader.need(8 * count, key)
            return [reader.string(key) for _ in range(count)]
        if element in _SCALARS:
            return list(reader.scalars(_SCALARS[element], count, key))
        raise ModelFileError(f"{reader.path}: {key}: an array of type {element} cannot be read")
    if kind not in _SCALARS:
        raise ModelFileError(f"{reader.path}: {key}: a value of type {kind} cannot be read")
    value = reader.scalar(_SCALARS[kind], key)
    return bool(value) if kind == _BOOL else value


def _tensor_fields(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name = reader.string("a tensor's name")
    dims = reader.scalar("I", name)
    if not 1 <= dims <= _MAX_DIMS:
        raise ModelFileError(f"{reader.path}: {name}: expected 1 to {_MAX_DIMS} sizes, got {dims}")
    sizes = reader.scalars("Q", dims, name)
    return name, sizes, reader.scalar("I", name), reader.scalar("Q", name)
