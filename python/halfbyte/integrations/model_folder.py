"""A model's folder read and written tensor by tensor: config.json and sharded safetensors.

    ModelFolder   which weights there are, each loaded alone: a dense tensor or an `NF4Weight`
    ShardWriter   takes tensors one after another and writes them at once

Memory is that of the tensors a caller holds; files are mapped, and nothing is gathered. A shard's
header, which stands before the data it describes, gets its place in advance and is padded with
spaces, as the format allows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from halfbyte import checkpoint
from halfbyte.integrations.safetensors_files import INDEX, NAMES, SafetensorsFolder, read_json
from halfbyte.nf4_weight import NF4Weight

CONFIG = "config.json"
SHARD_BYTES = 5 * 10**9
_STATE = ".quant_state.bitsandbytes__"
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx"}
_ENTRIES_A_WEIGHT, _HEADER_ENTRY = 6, 200
_ALIGNMENT = 8


class ModelFolder:
    """The weights in a Hugging Face folder, dense or in bitsandbytes' 4-bit layout.

    path    the folder
    config  config.json as a dictionary
    names   names of all weights in file order; a packed weight's statistics belong to its name

    Raises ValueError for what is no such folder, and for quantized weights of another kind.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_json(self.path / CONFIG)
        self._tensors = SafetensorsFolder(self.path)
        keys = self._tensors.entries
        self._packed = {key.partition(_STATE)[0] for key in keys if _STATE in key}
        self._check_quantization()
        self._entries = {name: checkpoint.entry_names(keys, name) for name in sorted(self._packed)}
        inside = {
            entry for name, found in self._entries.items() for entry in found if entry != name
        }
        self.names = [key for key in keys if key not in inside]

    @property
    def packed(self) -> bool:
        """Whether linear layers are in 4 bits."""
        return bool(self._packed)

    def is_packed(self, name: str) -> bool:
        """Whether this weight is in 4 bits."""
        return name in self._packed

    def load(self, name: str) -> torch.Tensor | NF4Weight:
        """One weight as it is stored; ValueError names what does not fit."""
        if name not in self._packed:
            return self._tensors.map(name)
        entries = {entry: self._tensors.map(entry) for entry in self._entries[name]}
        return checkpoint.from_entries(entries, name)

    def shape(self, name: str) -> torch.Size:
        """The dense shape of a weight."""
        if name in self._packed:
            return self.load(name).shape
        return self._tensors.entries[name].shape

    def dense(self, name: str) -> torch.Tensor:
        """One weight in float32."""
        value = self.load(name)
        if isinstance(value, NF4Weight):
            return value.dequantize(torch.float32)
        return value.to(torch.float32, copy=True)

    def copy_other_files(self, target: Path) -> None:
        """Copy tokenizer, chat template, generation settings: all files but weights and config."""
        for file in sorted(self.path.iterdir()):
            weights = file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")
            if file.is_file() and not weights and file.name != CONFIG:
                shutil.copyfile(file, target / file.name)

    def _check_quantization(self) -> None:
        method = (self.config.get("quantization_config") or {}).get("quant_method")
        if method not in (None, "bitsandbytes", "halfbyte"):
            raise ValueError(
                f"{self.path}: expected 16-bit or 4-bit (bitsandbytes layout) weights, got {method}"
            )
        if (method is None) == self.packed:
            found = "packed" if self.packed else "dense"
            raise ValueError(
                f"{self.path}: {CONFIG} says quantized by {method}, weights are {found}"
            )
        experts = [name for name in sorted(self._packed) if not name.endswith(".weight")]
        if experts:
            raise ValueError(f"{self.path}: {experts[0]}: packed experts cannot be rewritten here")


class ShardWriter:
    """Writes tensors, in the order they come, to model*.safetensors in `folder`.

    names        all weights that may come; their number is what the headers leave room for
    shard_bytes  a new file is begun before this size is passed

    `close()` ends the last file and, for several files, writes the index. `nbytes` is the sum of
    what was added, `files` their final number.
    """

    def __init__(self, folder: Path, names: Iterable[str], shard_bytes: int = SHARD_BYTES) -> None:
        room = sum(len(name) + _HEADER_ENTRY for name in names) * _ENTRIES_A_WEIGHT + 1024
        self._header_bytes = -(-room // _ALIGNMENT) * _ALIGNMENT
        self._folder = folder
        self._limit = shard_bytes
        self._shards: list[list[str]] = []
        self._file = None
        self.nbytes = 0

    @property
    def files(self) -> int:
        return len(self._shards)

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write `tensors`; those of one call go into one file."""
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if self._file is None or (self._size and self._size + size > self._limit):
            self._begin()
        self._size += size
        self.nbytes += size
        for name, tensor in tensors.items():
            if tensor.numel() * tensor.element_size() % _ALIGNMENT:
                # Readers view tensors in place, so what follows must stay aligned: these go last.
                self._unaligned.append((name, tensor))
            else:
                self._write(name, tensor)

    def close(self) -> None:
        """End the last file; name the files."""
        self._end()
        count = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            name = f"model-{number:05d}-of-{count:05d}.safetensors"
            name = name if count > 1 else "model.safetensors"
            self._temporary(number).rename(self._folder / name)
            weight_map |= dict.fromkeys(names, name)
        if count > 1:
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _temporary(self, number: int) -> Path:
        return self._folder / f"shard-{number}.part"

    def _begin(self) -> None:
        self._end()
        self._shards.append([])
        self._file = self._temporary(len(self._shards)).open("wb")
        self._file.seek(8 + self._header_bytes)
        self._size = self._offset = 0
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._unaligned: list[tuple[str, torch.Tensor]] = []

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._offset, self._offset + data.nbytes],
        }
        self._shards[-1].append(name)
        self._file.write(data)
        self._offset += data.nbytes

    def _end(self) -> None:
        if self._file is None:
            return
        for name, tensor in sorted(self._unaligned, key=lambda item: -item[1].element_size()):
            self._write(name, tensor)
        header = json.dumps(self._header).encode()
        assert len(header) <= self._header_bytes
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(8, "little"))
        self._file.write(header.ljust(self._header_bytes))
        self._file.close()
        self._file = None
