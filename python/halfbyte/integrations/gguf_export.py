"""A Llama-family model, adapters merged in, written as a GGUF file tensor by tensor.

    f16    matrices in float16
    q8_0   blocks of 32 with a float16 scale: 8.5 bits a parameter
    q4_0   the same with 4 bits: 4.5; embedding and head in q8_0

Vectors are float32; a matrix whose rows are no multiple of 32 stays float16. llama.cpp rotates
neighbouring rows of q and k where transformers rotates the two halves of a head, so their rows are
reordered: (head, half, i) -> (head, i, half).

An adapter alone is written as llama.cpp's `--lora` file: A and B in float32, the reordering on B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from halfbyte.integrations.gguf_tokenizer import add_tokenizer
from halfbyte.integrations.merging import LoraFile, MergedWeights

TYPES = {
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
_MODELS = ("llama", "mistral")
_BLOCK = 32
_CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_CHATML_TEMPLATE = """{{ range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""


@dataclass(frozen=True)
class Exported:
    """Tensors written, their bytes, and how many matrices stayed float16 for their shape."""

    tensors: int
    nbytes: int
    left_f16: int


def load_config(folder: Path) -> PretrainedConfig:
    """The model's configuration; ValueError unless it can be expressed in llama.cpp's `llama`."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in _MODELS:
        raise ValueError(f"{folder}: expected a model of llama or mistral, got {config.model_type}")
    for name, wanted in (
        ("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False),
        ("sliding_window", None),
    ):  # fmt: skip
        if getattr(config, name, wanted) != wanted:
            raise ValueError(f"{folder}: {name}: expected {wanted}, got {getattr(config, name)}")
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"{folder}: rope_type: expected default, linear or llama3, got {kind}")
    return config


def write_model(
    merged: MergedWeights, tokenizer: PreTrainedTokenizerBase, path: Path, kind: str, name: str
) -> Exported:
    """Write W' of `merged` to `path`; `kind` is one of TYPES, `name` the model's.

    Raises ValueError for models, tensors and tokenizers that the format does not hold.
    """
    if kind not in TYPES:
        raise ValueError(f"type: expected one of {', '.join(TYPES)}, got {kind!r}")
    config = load_config(merged.base.path)
    places = _places(merged, config)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    factors = _rope_factors(config)
    types = {}
    if factors is not None:
        _announce(writer, "rope_freqs.weight", factors.shape, gguf.GGMLQuantizationType.F32)
    for source, target in places.items():
        shape = merged.base.shape(source)
        types[source] = _type_of(target, shape, kind)
        _announce(writer, target, shape, types[source])
    left = sum(t == gguf.GGMLQuantizationType.F16 and kind != "f16" for t in types.values())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for source in places:
            writer.write_tensor_data(_encode(merged, config, source, types[source]))
    finally:
        writer.close()
    return Exported(len(places) + (factors is not None), path.stat().st_size, left)


def write_adapter(merged: MergedWeights, path: Path, name: str) -> Exported:
    """Write the one adapter of `merged` for llama.cpp's `--lora`."""
    config = load_config(merged.base.path)
    places = _places(merged, config)
    ((adapter, _),) = merged.adapters
    alpha = float(adapter.config.get("lora_alpha", 8))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for layer in adapter.layers:
        a, b = _factors(adapter, layer, alpha, config)
        target = places[f"{layer}.weight"]
        writer.add_tensor(f"{target}.lora_a", a.numpy())
        writer.add_tensor(f"{target}.lora_b", b.numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return Exported(2 * len(adapter.layers), path.stat().st_size, 0)


def modelfile(file_name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Ollama's Modelfile for a GGUF file beside it: stop token, ChatML's template where it is that.

    For another template Ollama goes by the one in the GGUF file.
    """
    lines = [f"FROM ./{file_name}"]
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "X"}], tokenize=False, add_generation_prompt=True
        )
        if text.endswith(_CHATML.format("X")):
            lines.append(f'TEMPLATE """{_CHATML_TEMPLATE}"""')
    if tokenizer.eos_token:
        lines.append(f'PARAMETER stop "{tokenizer.eos_token}"')
    return "\n".join(lines) + "\n"


def _places(merged: MergedWeights, config: PretrainedConfig) -> dict[str, str]:
    """{transformers' name: GGUF's} of what is written; ValueError for what has no place."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    places = {}
    for name in merged.names:
        if name.endswith("rotary_emb.inv_freq") or (
            name == "lm_head.weight" and config.tie_word_embeddings
        ):
            continue
        target = table.get_name(name, (".weight",))
        if target is None:
            raise ValueError(f"{merged.base.path}: {name}: a Llama in GGUF has no such tensor")
        places[name] = target
    return places


def _add_shape(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    if head * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head)
        writer.add_value_length(head)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rope_factors(config: PretrainedConfig) -> np.ndarray | None:
    """What Llama 3 divides each rotary frequency by, [head / 2]; None without."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turns = rope["original_max_position_embeddings"] / (2 * math.pi)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    frequencies = rope["rope_theta"] ** (-np.arange(0, head, 2, dtype=np.float64) / head)
    smooth = np.clip((turns * frequencies - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _type_of(target: str, shape: torch.Size, kind: str) -> gguf.GGMLQuantizationType:
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    if shape[-1] % _BLOCK:
        return gguf.GGMLQuantizationType.F16
    if kind == "q4_0" and target in ("token_embd.weight", "output.weight"):
        return gguf.GGMLQuantizationType.Q8_0
    return TYPES[kind][0]


def _announce(
    writer: gguf.GGUFWriter, name: str, shape: torch.Size, kind: gguf.GGMLQuantizationType
) -> None:
    sizes = gguf.quant_shape_to_byte_shape(tuple(shape), kind)
    writer.add_tensor_info(name, sizes, np.dtype(np.uint8), math.prod(sizes), raw_dtype=kind)


def _encode(
    merged: MergedWeights, config: PretrainedConfig, name: str, kind: gguf.GGMLQuantizationType
) -> np.ndarray:
    weight = _reorder(merged.dense(name), name.removesuffix(".weight"), config)
    data = gguf.quants.quantize(weight.numpy(), kind)
    if kind == gguf.GGMLQuantizationType.F16 and not np.isfinite(data).all():
        raise ValueError(f"{name}: expected values that float16 holds, got larger ones")
    return data


def _reorder(rows: torch.Tensor, layer: str, config: PretrainedConfig) -> torch.Tensor:
    """q's and k's rows (head, half, i) -> (head, i, half); others as they are."""
    if layer.endswith("self_attn.q_proj"):
        heads = config.num_attention_heads
    elif layer.endswith("self_attn.k_proj"):
        heads = config.num_key_value_heads
    else:
        return rows
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.transpose(1, 2).reshape(rows.shape).contiguous()


def _factors(
    adapter: LoraFile, layer: str, alpha: float, config: PretrainedConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) such that alpha / R is their scaling, which is all that the format knows."""
    a, b = adapter.factors(layer)
    ratio = adapter.scaling(layer) * adapter.rank(layer) / alpha
    return a, _reorder(b * ratio, layer, config)
