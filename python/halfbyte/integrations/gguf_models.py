"""A GGUF file as a transformers model: its configuration, tensor names, row order and tokenizer.

llama.cpp stores the rows of a Llama attention's q and k with the two halves of a head interleaved;
transformers wants the halves one after the other: row (head, j, i) -> (head, i, j) with i in (0,
1). Names come from the `gguf` package's tables, configuration keys and tokenizers from
transformers'.

Rotary frequencies that the file scales one by one (`rope_freqs.weight`) are Llama 3's; they become
`rope_parameters`, and any others are refused, as is a `rope.scaling.type` that is not carried over.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_TOKENIZER_MAPPING,
    convert_gguf_tokenizer,
)

from halfbyte.integrations.gguf_files import GgufFile
from halfbyte.integrations.safetensors_files import ModelFileError

# GGUF's name of an architecture, which for these is also transformers' model_type.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3")
_PERMUTED = ("llama",)
_ROPE = "rope_freqs.weight"
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


class GgufModel:
    """The tensors of a file under transformers' names.

    `place(names)` finds each name's tensor; `pieces` then yields a tensor's values in order.
    """

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.path = file.path
        self.architecture = self._text("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise ModelFileError(
                f"{file.path}: expected an architecture among {', '.join(ARCHITECTURES)}, "
                f"got {self.architecture!r}"
            )
        self.config = self._config()
        self.placed: dict[str, str] = {}

    def place(self, names: list[str]) -> list[str]:
        """Finds the tensors of `names`; returns those of the file that none of them is."""
        arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        table = gguf.get_tensor_name_map(arch, self.config.num_hidden_layers)
        for name in names:
            base, _, suffix = name.rpartition(".")
            stored = f"{table.get_name(base)}.{suffix}"
            if stored in self.file.tensors:
                self.placed[name] = stored
        return sorted(set(self.file.tensors) - {*self.placed.values(), _ROPE})

    def shape(self, name: str) -> torch.Size:
        return self.file.tensors[self.placed[name]].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.file.tensors[self.placed[name]].dtype

    def nbytes(self, name: str) -> int:
        return self.file.tensors[self.placed[name]].nbytes

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        stored = self.placed[name]
        heads = self._heads(stored)
        if heads is None:
            return self.file.pieces(stored)
        shape = self.shape(name)
        size, rest = divmod(shape[0], heads) if heads else (0, 1)
        if rest or size % 2:
            raise ModelFileError(
                f"{self.path}: {stored}: expected rows for {heads} heads of even size, "
                f"got {list(shape)}"
            )
        inner = shape[1:].numel()
        rearrange = functools.partial(_halves_apart, size=size, inner=inner)
        return self.file.pieces(stored, size if len(shape) > 1 else 1, rearrange)

    def _heads(self, stored: str) -> int | None:
        if self.architecture not in _PERMUTED:
            return None
        if ".attn_q." in stored:
            return self.config.num_attention_heads
        return self.config.num_key_value_heads if ".attn_k." in stored else None

    def _text(self, key: str) -> str:
        value = self.file.metadata.get(key)
        if not isinstance(value, str):
            raise ModelFileError(f"{self.path}: {key}: expected a string, got {value!r}")
        return value

    def _config(self) -> PretrainedConfig:
        metadata = self.file.metadata
        layers = metadata.get(f"{self.architecture}.block_count")
        if type(layers) is not int or not 1 <= layers <= len(self.file.tensors):
            raise ModelFileError(
                f"{self.path}: {self.architecture}.block_count: expected 1 to "
                f"{len(self.file.tensors)}, as many as there are tensors, got {layers!r}"
            )
        self._check_scaling()
        values = {
            name: metadata[f"{prefix}.{key}"]
            for prefix in (self.architecture, "tokenizer")
            for key, name in GGUF_CONFIG_MAPPING[prefix].items()
            if name is not None and f"{prefix}.{key}" in metadata
        }
        values["tie_word_embeddings"] = "output.weight" not in self.file.tensors
        tokens = metadata.get("tokenizer.ggml.tokens")
        if "vocab_size" not in values and isinstance(tokens, list):
            values["vocab_size"] = len(tokens)
        try:
            if _ROPE in self.file.tensors:
                values["rope_parameters"] = self._rope_parameters(values)
            return AutoConfig.for_model(self.architecture, **values)
        except ModelFileError:
            raise
        except Exception as error:  # whatever class transformers checks with
            raise ModelFileError(f"{self.path}: not a configuration: {error}") from None

    def _check_scaling(self) -> None:
        scaling = self.file.metadata.get(f"{self.architecture}.rope.scaling.type", "none")
        if scaling != "none":
            raise ModelFileError(
                f"{self.path}: rope.scaling.type: expected none, got {scaling!r}, for which a "
                "configuration cannot be made from a GGUF file"
            )

    def _rope_parameters(self, values: dict[str, Any]) -> dict[str, Any]:
        """Llama 3's scaling of rotary frequencies, if that is what the file's factors are."""
        stored = torch.cat([piece.float() for piece in self.file.pieces(_ROPE)])
        theta = float(values.get("rope_theta", 10000.0))
        found = _LLAMA3 | {"factor": float(stored.max()), "rope_theta": theta}
        periods = 2 * math.pi * theta ** (torch.arange(len(stored)).double() / len(stored))
        low, high, context = (
            found["low_freq_factor"],
            found["high_freq_factor"],
            found["original_max_position_embeddings"],
        )
        smooth = ((context / periods - low) / (high - low)).clamp(0, 1)
        expected = 1 / ((1 - smooth) / found["factor"] + smooth)
        if not torch.allclose(expected.float(), stored, rtol=1e-3):
            raise ModelFileError(f"{self.path}: {_ROPE}: expected Llama 3's factors, got others")
        return found

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that the file describes."""
        metadata = self.file.metadata
        parts = {
            group: {
                name: metadata[f"tokenizer.{key}"]
                for key, name in keys.items()
                if f"tokenizer.{key}" in metadata
            }
            for group, keys in GGUF_TOKENIZER_MAPPING.items()
        }
        settings = parts["tokenizer_config"]
        if parts["tokenizer"].get("tokenizer_type") == "llama":
            settings.setdefault("add_bos_token", True)  # llama.cpp's default
        try:
            tokens = parts["tokenizer"]["tokens"]
            for name, key in _SPECIAL.items():
                number = metadata.get(f"tokenizer.ggml.{key}")
                settings[name] = None if number is None else tokens[number]
            backend, _ = convert_gguf_tokenizer(self.architecture, parts["tokenizer"])
            return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
        except Exception as error:  # whatever class the tokenizers' builders raise
            raise ModelFileError(f"{self.path}: tokenizer: cannot be built: {error!r}") from None

    def save_tokenizer(self, folder: Path) -> None:
        self.tokenizer().save_pretrained(folder)


def _halves_apart(rows: torch.Tensor, size: int, inner: int) -> torch.Tensor:
    """Whole heads of `size` rows of `inner` values, from llama.cpp's order to transformers'."""
    values = rows.reshape(-1, size // 2, 2, inner)
    return values.transpose(1, 2).reshape(rows.shape)
