"""A decoder's sizes: by name, or from a Hugging Face config.json.

The decoder is the one of Llama: grouped-query attention, a gated MLP, RMS norms.

    q [heads d, H]   k, v [kv_heads d, H]   o [H, heads d]   gate, up [I, H]   down [H, I]

H hidden, I intermediate, d head_dim, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Architectures whose decoder layer has these seven linear layers.
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3")
_QKV_BIAS = ("qwen2",)
_QK_NORM = ("qwen3", "gemma3_text")
_FOUR_NORMS = ("gemma2", "gemma3_text")
_TIED = ("gemma", "gemma2", "gemma3_text")  # where config.json leaves it out
_HEAD_DIM = {"gemma": 256, "gemma2": 256, "gemma3_text": 256}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a dense decoder.

    `biases` and `norms` count elements in one layer besides the seven matrices.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    head_dim: int
    tied: bool = False
    biases: int = 0
    norms: int = 0  # 0: two of `hidden`

    @property
    def query(self) -> int:
        """Width of the queries: heads * head_dim."""
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of one layer's linear layers, by name."""
        h, i = self.hidden, self.intermediate
        return {
            "q_proj": (self.query, h),
            "k_proj": (self.key_value, h),
            "v_proj": (self.key_value, h),
            "o_proj": (h, self.query),
            "gate_proj": (i, h),
            "up_proj": (i, h),
            "down_proj": (h, i),
        }

    @property
    def linear_parameters(self) -> int:
        """Of all layers: what is packed."""
        return self.layers * sum(n * k for n, k in self.linears.values())

    @property
    def layer_extras(self) -> int:
        """Norm weights and biases of one layer."""
        return self.biases + (self.norms or 2 * self.hidden)

    @property
    def root_parameters(self) -> int:
        """Embeddings, head (unless tied) and the last norm: dense, outside the layers."""
        return (1 if self.tied else 2) * self.vocab * self.hidden + self.hidden

    @property
    def dense_parameters(self) -> int:
        """What stays in 16 bits beside packed layers."""
        return self.root_parameters + self.layers * self.layer_extras

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.dense_parameters


def _llama(name, hidden, intermediate, layers, heads, kv_heads, vocab, tied=False) -> Shape:
    return Shape(
        name, hidden, intermediate, layers, heads, kv_heads, vocab, hidden // heads, tied
    )  # fmt: skip


SHAPES = {
    shape.name: shape
    for shape in (
        _llama("SmolLM2-135M", 576, 1536, 30, 9, 3, 49152, tied=True),
        _llama("SmolLM2-360M", 960, 2560, 32, 15, 5, 49152, tied=True),
        _llama("SmolLM2-1.7B", 2048, 8192, 24, 32, 32, 49152, tied=True),
        _llama("TinyLlama-1.1B", 2048, 5632, 22, 32, 4, 32000),
        _llama("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 128256, tied=True),
        _llama("Llama-3.2-3B", 3072, 8192, 28, 24, 8, 128256, tied=True),
        _llama("LLaMA-7B", 4096, 11008, 32, 32, 32, 32000),
        _llama("LLaMA-13B", 5120, 13824, 40, 40, 40, 32000),
        _llama("LLaMA-33B", 6656, 17920, 60, 52, 52, 32000),
        _llama("LLaMA-65B", 8192, 22016, 80, 64, 64, 32000),
        _llama("Llama-2-7B", 4096, 11008, 32, 32, 32, 32000),
        _llama("Llama-2-13B", 5120, 13824, 40, 40, 40, 32000),
        _llama("Llama-2-70B", 8192, 28672, 80, 64, 8, 32000),
        _llama("Mistral-7B", 4096, 14336, 32, 32, 8, 32000),
        _llama("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128256),
        _llama("Llama-3.1-70B", 8192, 28672, 80, 64, 8, 128256),
        _llama("Llama-3.1-405B", 16384, 53248, 126, 128, 8, 128256),
    )
}


def load_shape(model: str | Path) -> Shape:
    """The shape of a known name (in any case), of a folder with a config.json, or of such a file.

    Raises ValueError for anything else, saying what is known.
    """
    for name, shape in SHAPES.items():
        if name.lower() == str(model).lower():
            return shape
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        close = difflib.get_close_matches(str(model), SHAPES, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"model {str(model)!r}: expected a folder with a config.json, a config.json, or one of "
            f"{', '.join(SHAPES)}{hint}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    name = path.absolute().parent.name if path.name == "config.json" else path.stem
    try:
        return shape_from_config(config, name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def shape_from_config(config: Mapping[str, Any], name: str) -> Shape:
    """The shape that a Hugging Face config.json describes (its `text_config`, where it has one).

    Raises ValueError for an architecture with other layers than those above, and for a size that is
    absent or no positive whole number.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"expected an object, got {type(config).__name__}")
    config = config.get("text_config") or config
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(
            f"model_type: expected one of {', '.join(_FAMILIES)} (dense decoders with a gated "
            f"MLP), got {family!r}"
        )

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}: expected a positive whole number, got {value!r}")
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    kv_heads = size("num_key_value_heads", heads)
    head_dim = size("head_dim", _HEAD_DIM.get(family, max(1, hidden // heads)))
    biases = 0
    if family in _QKV_BIAS or config.get("attention_bias"):
        biases = (heads + 2 * kv_heads) * head_dim + (0 if family in _QKV_BIAS else hidden)
    intermediate = size("intermediate_size")
    if config.get("mlp_bias"):
        biases += 2 * intermediate + hidden
    norms = (4 if family in _FOUR_NORMS else 2) * hidden
    norms += 2 * head_dim if family in _QK_NORM else 0
    return Shape(
        name, hidden, intermediate, size("num_hidden_layers"), heads, kv_heads,
        size("vocab_size"), head_dim, bool(config.get("tie_word_embeddings", family in _TIED)),
        biases, norms,
    )  # fmt: skip
