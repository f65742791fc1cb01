"""A causal language model small enough for tests, built here: no download, no fixed files.

Llama architecture, 2 layers, hidden size 48, odd intermediate size 100, a byte-level BPE
tokenizer trained on a few sentences with a ChatML template.
"""

import json
from pathlib import Path

import gguf
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, START, END = "<pad>", "<|im_start|>", "<|im_end|>"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

WORDS = ["red", "green", "blue", "black", "white", "brown", "grey", "pink"]


def build_tokenizer(*, pad: str | None = PAD, eos: str | None = END, template: str | None = CHATML):
    """A byte-level BPE tokenizer with ChatML's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sentences = [f"What colour is the {w} thing? The {w} thing is {w}." for w in WORDS]
    tokenizer.train_from_iterator(sentences + ["user\n", "assistant\n", "system\n"] * 8, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=eos)
    fast.add_special_tokens({"additional_special_tokens": [START, END]})
    fast.chat_template = template
    return fast


def build_config(**changes) -> LlamaConfig:
    """The model's configuration."""
    settings = {
        "vocab_size": 320,
        "hidden_size": 48,
        "intermediate_size": 100,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,  # large enough for a frozen head to tell tokens apart
    }
    return LlamaConfig(**(settings | changes))


def save_model(folder: Path, **tokenizer_options) -> Path:
    """Save model and tokenizer to `folder`; returns it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(build_config())
    model.save_pretrained(folder)
    build_tokenizer(**tokenizer_options).save_pretrained(folder)
    return folder


def save_gguf(path: Path) -> Path:
    """Save the same kind of model as a float16 GGUF file; returns its path."""
    torch.manual_seed(0)
    config = build_config()
    state = LlamaForCausalLM(config).state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_gguf_tokenizer(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in state.items():
        if name != "lm_head.weight":  # tied
            values = tensor.to(torch.float16 if tensor.dim() == 2 else torch.float32).numpy()
            writer.add_tensor(names.get_name(name, (".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_gguf_tokenizer(writer: gguf.GGUFWriter) -> None:
    model = json.loads(build_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    tokens += [f"<unused{index}>" for index in range(320 - len(tokens))]
    special = (PAD, START, END)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([
        gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens
    ])  # fmt: skip
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHATML)


def colour_rows(count: int = 24) -> list[dict]:
    """Prompt-completion rows that a tiny model learns in a few steps."""
    return [
        {"prompt": f"What colour is thing {i}?", "completion": "The thing is red."}
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: list) -> Path:
    """Write rows as JSONL; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
