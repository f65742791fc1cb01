"""safetensors files read with every field checked, mapped without a copy, written shard by shard.

    [8 bytes: header length n, little-endian][n bytes: JSON][data]
    JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}

A folder is one file, or several and an index `{"weight_map": {name: file name}}`.

Checked before any tensor is made: lengths fit the file; the JSON is an object without a name twice;
dtypes are known; shapes are not negative and their bytes are `end - begin`; the tensors cover the
data without a gap or an overlap; an index names files of its own folder that hold those tensors.
Whatever does not fit is a `ModelFileError`.

Checksums: `__metadata__["halfbyte.sha256:" + name]` is the SHA-256 of "name dtype [shape]", a zero
byte and the tensor's bytes, so that a changed header shows as well. Other readers pass over it.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import stat
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHECKSUM = "halfbyte.sha256:"
INDEX = "model.safetensors.index.json"
PIECE = 1 << 20  # bytes read at a time
_MAX_HEADER = 100_000_000  # the format's own limit
_MAX_JSON = 256 << 20


class ModelFileError(ValueError):
    """A model file that cannot be used as it is; the message names the file and the tensor."""


# Live mappings and their addresses: which memory may be given back to the system (see
# `mapping_of`).
_MAPPINGS: weakref.WeakKeyDictionary[mmap.mmap, int] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes [start, start + nbytes) of `file`."""

    file: SafetensorsFile
    name: str
    dtype: torch.dtype
    shape: torch.Size
    start: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.file.path}: {self.name}"


class SafetensorsFile:
    """One file, its header checked. Tensors are read in pieces, or mapped without a copy."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mapping: mmap.mmap | None = None
        self._lock = threading.Lock()
        self.descriptor, self.size = open_file(path)
        self._close = weakref.finalize(self, os.close, self.descriptor)
        header, self.data_start = self._read_header()
        self.metadata = self._metadata(header.pop("__metadata__", {}))
        self.entries = {name: self._entry(name, fields) for name, fields in header.items()}
        self._check_cover()

    def _read_header(self) -> tuple[dict[str, Any], int]:
        if self.size < 8:
            raise ModelFileError(f"{self.path}: expected at least 8 bytes, got {self.size}")
        length = int.from_bytes(os.pread(self.descriptor, 8, 0), "little")
        if not 2 <= length <= min(_MAX_HEADER, self.size - 8):
            raise ModelFileError(
                f"{self.path}: expected a header of 2 to {min(_MAX_HEADER, self.size - 8)} bytes, "
                f"got a length of {length}"
            )
        text = os.pread(self.descriptor, length, 8)
        if text[:1] != b"{":
            raise ModelFileError(f"{self.path}: expected a JSON object as header, got {text[:8]!r}")
        return parse_json(text, f"{self.path}: header"), 8 + length

    def _metadata(self, value: Any) -> dict[str, str]:
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise ModelFileError(f"{self.path}: __metadata__: expected strings by name")
        return value

    def _entry(self, name: str, fields: Any) -> Entry:
        where = f"{self.path}: {name}"
        if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
            raise ModelFileError(f"{where}: expected dtype, shape and data_offsets, got {fields!r}")
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ModelFileError(f"{where}: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        if not _sizes(shape) or len(shape) > 64:
            raise ModelFileError(f"{where}: expected a list of sizes as shape, got {shape!r}")
        if not _sizes(offsets) or len(offsets) != 2:
            raise ModelFileError(f"{where}: expected two data_offsets, got {offsets!r}")
        begin, end = offsets
        if not begin <= end <= self.size - self.data_start:
            raise ModelFileError(
                f"{where}: expected offsets within {self.size - self.data_start} bytes of data, "
                f"got {offsets}"
            )
        count = math.prod(shape) * DTYPES[dtype].itemsize
        if count != end - begin:
            raise ModelFileError(
                f"{where}: expected {count} bytes for {dtype} {shape}, got {end - begin}"
            )
        if math.prod(max(size, 1) for size in shape) >= 2**63:
            raise ModelFileError(f"{where}: expected sizes below 2^63 as shape, got {shape}")
        start = self.data_start + begin
        return Entry(self, name, DTYPES[dtype], torch.Size(shape), start, end - begin)

    def _check_cover(self) -> None:
        reached = self.data_start
        for entry in sorted(self.entries.values(), key=lambda e: (e.start, e.nbytes)):
            if entry.start != reached:
                raise ModelFileError(
                    f"{entry}: expected to begin at byte {reached} of the file, where the tensor "
                    f"before it ends, got {entry.start}"
                )
            reached += entry.nbytes
        if reached != self.size:
            raise ModelFileError(
                f"{self.path}: expected {reached} bytes as the header says, got {self.size}"
            )

    def pieces(self, entry: Entry) -> Iterator[torch.Tensor]:
        """The tensor's bytes in order, as uint8 views of one buffer, each valid until the next."""
        buffer = torch.empty(min(PIECE, entry.nbytes), dtype=torch.uint8)
        for start in range(0, entry.nbytes, PIECE):
            piece = buffer[: min(PIECE, entry.nbytes - start)]
            read_fully(self.descriptor, piece, entry.start + start, str(entry))
            yield piece

    def read(self, entry: Entry) -> torch.Tensor:
        """A copy of the tensor."""
        data = torch.empty(entry.nbytes, dtype=torch.uint8)
        read_fully(self.descriptor, data, entry.start, str(entry))
        return data.view(entry.dtype).reshape(entry.shape)

    def map(self, entry: Entry) -> torch.Tensor:
        """The tensor over the file's own pages, or a copy where the file does not align it.

        Pages are shared with every process that maps the file until one writes to them, which
        leaves the file as it is. The file must not shrink while it is mapped.
        """
        if entry.nbytes == 0 or entry.start % entry.dtype.itemsize:
            return self.read(entry)
        with self._lock:
            if self.mapping is None:
                self.mapping = _map(self.descriptor, self.size, self.path)
        data = torch.frombuffer(
            self.mapping, dtype=torch.uint8, offset=entry.start, count=entry.nbytes
        )
        return data.view(entry.dtype).reshape(entry.shape)

    def ask_for(self, entry: Entry) -> None:
        """Starts the reading of the tensor into the page cache, without waiting."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, entry.start, entry.nbytes, os.POSIX_FADV_WILLNEED)

    def digest(self, entry: Entry) -> str:
        """The tensor's checksum, as computed from what the file holds."""
        sha = checksum(entry.name, entry.dtype, entry.shape)
        for piece in self.pieces(entry):
            sha.update(piece.numpy())
        return sha.hexdigest()

    def stored_digest(self, entry: Entry) -> str | None:
        """The tensor's checksum as the file states it; None where it states none."""
        return self.metadata.get(CHECKSUM + entry.name)


class SafetensorsFolder:
    """A folder's tensors: those of `model.safetensors`, or of the files that its index names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        index = path / INDEX
        placed = self._weight_map(index) if index.is_file() else None
        names = sorted({*placed.values()}) if placed is not None else self._file_names()
        self.files = [SafetensorsFile(path / name) for name in names]
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            for name, entry in file.entries.items():
                if name in self.entries:
                    raise ModelFileError(f"{entry}: is in {self.entries[name].file.path} as well")
                self.entries[name] = entry
        for name, file in (placed or {}).items():
            if name not in self.entries or self.entries[name].file.path.name != file:
                raise ModelFileError(f"{path / file}: {name}: named by the index, but not there")

    def _file_names(self) -> list[str]:
        names = sorted(f.name for f in self.path.glob("*.safetensors"))
        if "model.safetensors" in names:
            return ["model.safetensors"]
        if len(names) != 1:
            raise ModelFileError(
                f"{self.path}: expected model.safetensors or {INDEX}, got {names or 'neither'}"
            )
        return names

    def _weight_map(self, index: Path) -> dict[str, str]:
        placed = read_json(index).get("weight_map")
        if not isinstance(placed, dict) or not placed:
            raise ModelFileError(f"{index}: expected a weight_map of file names by tensor")
        for name, file in placed.items():
            plain = isinstance(file, str) and file not in ("", ".", "..")
            if not plain or any(c in file for c in "/\\\0") or not file.endswith(".safetensors"):
                raise ModelFileError(
                    f"{index}: {name}: expected the name of a .safetensors file in this folder, "
                    f"got {file!r}"
                )
        return placed

    def map(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        return entry.file.map(entry)

    def read(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        return entry.file.read(entry)

    def check(self, name: str) -> str:
        """What is wrong with the tensor's checksum: "" where it holds."""
        entry = self.entries[name]
        stored = entry.file.stored_digest(entry)
        if stored is None:
            return "has no checksum"
        found = entry.file.digest(entry)
        return "" if found == stored else f"expected sha256 {stored[:16]}..., got {found[:16]}..."


def mapping_of(tensor: torch.Tensor) -> tuple[mmap.mmap, int] | None:
    """The mapping that holds `tensor`'s memory and the offset in it; None: memory of its own."""
    address, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    for mapping, start in list(_MAPPINGS.items()):
        if start <= address and address + size <= start + len(mapping):
            return mapping, address - start
    return None


def checksum(name: str, dtype: torch.dtype, shape: torch.Size) -> Any:
    """A SHA-256 that has taken in what the header says of the tensor."""
    return hashlib.sha256(f"{name} {NAMES[dtype]} {list(shape)}\0".encode())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ModelFileError where there is none."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ModelFileError(f"{path}: expected at most {_MAX_JSON} bytes of JSON")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from None


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name is there twice")
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def open_file(path: Path) -> tuple[int, int]:
    """(descriptor, size) of a regular file; a pipe or a device would block or never end."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ModelFileError(f"{path}: expected a regular file")
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be opened: {error.strerror}") from None
    return descriptor, os.fstat(descriptor).st_size


def read_fully(descriptor: int, target: torch.Tensor, offset: int, where: str) -> None:
    """Fills the uint8 `target` from the file; ModelFileError if the file ends first."""
    view = memoryview(target.numpy())
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise ModelFileError(f"{where}: cannot be read: {error.strerror}") from None
        if count == 0:
            raise ModelFileError(f"{where}: expected {len(view)} bytes, the file ends at {done}")
        done += count


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _map(descriptor: int, size: int, path: Path) -> mmap.mmap:
    # Private and writable: a stray write must not kill the process and never reaches the file.
    # No reserve: the kernel need not hold memory back for pages that nobody writes.
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        mapping = mmap.mmap(descriptor, size, flags, mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be mapped: {error}") from None
    _MAPPINGS[mapping] = torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr()
    return mapping
