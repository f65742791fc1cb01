"""Where a model's tensors come from: a Hugging Face folder, dense or packed, or a GGUF file.

Both kinds offer the same: `config`; `place(names)`, which finds the tensors of the model's own
names and returns what is left over; then by name `shape`, `dtype`, `nbytes` and `pieces`: the
values in order, flat, about a MB at a time. A folder also maps tensors without a copy, and has
packed weights.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from halfbyte import checkpoint
from halfbyte.integrations.gguf_files import GgufFile
from halfbyte.integrations.gguf_models import GgufModel
from halfbyte.integrations.safetensors_files import (
    Entry,
    ModelFileError,
    SafetensorsFolder,
    read_json,
)
from halfbyte.nf4_weight import NF4Weight

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
)
_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4|int4)")


class FolderModel:
    """A folder with config.json and safetensors; `packed` are its packed weights' keys.

    Keys may lack or have the base model's prefix ("model."): `place` takes either.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = read_json(path / "config.json")
        self.folder = SafetensorsFolder(path)
        layers = self.settings.get("num_hidden_layers", 1)
        if type(layers) is not int or not 0 <= layers <= len(self.folder.entries):
            raise ModelFileError(
                f"{path / 'config.json'}: num_hidden_layers: expected at most "
                f"{len(self.folder.entries)}, as many as there are tensors, got {layers!r}"
            )
        self.packed = {m[1] for name in self.folder.entries if (m := _STATE.fullmatch(name))}
        self.placed: dict[str, str] = {}
        self.config = self._config()

    def _config(self) -> PretrainedConfig:
        try:
            return AutoConfig.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever class transformers checks with
            reason = " ".join(str(error).split())
            raise ModelFileError(f"{self.path / 'config.json'}: {reason}") from None

    def model_name(self, stored: str, names: set[str], prefix: str) -> str:
        """The model's name for a stored tensor: with or without the base model's prefix."""
        for name in (stored, f"{prefix}.{stored}", stored.removeprefix(f"{prefix}.")):
            if name in names:
                return name
        return stored

    def place(self, names: list[str], prefix: str = "") -> list[str]:
        known = set(names)
        statistics = {e for key in self.packed for e in self._entry_names(key)} - self.packed
        left = []
        for stored in self.folder.entries:
            name = self.model_name(stored, known, prefix)
            if name in known:
                self.placed[name] = stored
            elif stored not in statistics:
                left.append(stored)
        return sorted(left)

    def _entry_names(self, key: str) -> list[str]:
        return checkpoint.entry_names(self.folder.entries, key)

    def entry(self, name: str) -> Entry:
        return self.folder.entries[self.placed[name]]

    def shape(self, name: str) -> torch.Size:
        return self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.entry(name).dtype

    def nbytes(self, name: str) -> int:
        return self.entry(name).nbytes

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        entry = self.entry(name)
        return (piece.view(entry.dtype) for piece in entry.file.pieces(entry))

    def is_packed(self, name: str) -> bool:
        return self.placed.get(name) in self.packed

    def packed_weight(self, name: str, mapped: bool) -> NF4Weight:
        """The packed weight `name`, in memory of its own or its codes and scales `mapped`."""
        key = self.placed[name]
        large = (key, f"{key}.absmax") if mapped else ()
        state = {
            entry: self.folder.map(entry) if entry in large else self.folder.read(entry)
            for entry in self._entry_names(key)
        }
        try:
            return checkpoint.from_entries(state, key)
        except ValueError as error:
            raise ModelFileError(f"{self.entry(name).file.path}: {error}") from None

    def ask_for_statistics(self) -> None:
        """Starts the reading of all that mapping the packed weights looks at, without waiting."""
        for key in self.packed:
            for name in self._entry_names(key):
                if name not in (key, f"{key}.absmax"):
                    self.folder.entries[name].file.ask_for(self.folder.entries[name])

    def tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path, local_files_only=True)

    def save_tokenizer(self, folder: Path) -> None:
        """Its files as they are."""
        for name in _TOKENIZER_FILES:
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, folder / name)


def open_model(path: str | Path) -> FolderModel | GgufModel:
    """The model at `path`; ModelFileError where there is none that can be read."""
    path = Path(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelFileError(f"{path}: expected a config.json in it, got none")
        return FolderModel(path)
    if not path.is_file():
        raise ModelFileError(f"{path}: no such file or folder")
    return GgufModel(GgufFile(path))
