"""A tokenizer of transformers written into a GGUF file, as llama.cpp reads it.

    gpt2    byte-level BPE (GPT-2, SmolLM2, Llama 3): tokens, merges, and the name of the rule that
            cuts text into words, which llama.cpp has built in
    llama   BPE with byte fallback over "▁" (Llama 2, Mistral): tokens and scores

llama.cpp's `llama` merges the adjacent pair whose joined piece has the highest score. A merge list
is that exactly if each piece has one rank, that of all its splits: score = -rank. Lists for which
this does not hold are refused, as are words cut by another rule: ids would differ silently.
"""

from __future__ import annotations

import json
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE = "▁"


def add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> None:
    """Write tokens, merges or scores, special tokens and chat template.

    vocabulary  rows of the model's embedding; ids without a token become unused ones

    Raises ValueError for a tokenizer that llama.cpp would not follow.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer: expected a tokenizer.json, got {type(tokenizer).__name__}")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    model = rules["model"]
    if model["type"] != "BPE":
        raise ValueError(f"tokenizer: expected BPE, got {model['type']}")
    ids = tokenizer.get_vocab()
    if max(ids.values()) >= vocabulary:
        raise ValueError(
            f"tokenizer: expected ids below the model's {vocabulary}, got {max(ids.values())}"
        )
    tokens = [f"[PAD{number}]" for number in range(vocabulary)]
    for token, number in ids.items():
        tokens[number] = token
    if _is_byte_level(rules):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_words_rule(rules))
        writer.add_token_list(tokens)
        writer.add_token_merges([" ".join(pair) for pair in _merges(model)])
    elif model.get("byte_fallback"):
        prefix = _adds_space(rules)
        scores = _scores(model, tokens)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_add_space_prefix(prefix)
    else:
        raise ValueError("tokenizer: expected byte-level BPE, or BPE with byte fallback")
    writer.add_token_types(_types(rules, tokens, set(ids.values()), tokenizer.unk_token_id))
    _add_special(writer, tokenizer)


def _parts(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer."""
    if step is None:
        return []
    return step[inner] if step["type"] == "Sequence" else [step]


def _is_byte_level(rules: dict[str, Any]) -> bool:
    words = _parts(rules["pre_tokenizer"], "pretokenizers")
    return any(part["type"] == "ByteLevel" for part in words)


def _words_rule(rules: dict[str, Any]) -> str:
    """llama.cpp's name of the rule that cuts text into words."""
    words = _parts(rules["pre_tokenizer"], "pretokenizers")
    kinds = [part["type"] for part in words]
    plain = rules["normalizer"] is None and not words[-1]["add_prefix_space"]
    own_regex = words[-1].get("use_regex", True)
    if plain and kinds == ["ByteLevel"] and own_regex:
        return "gpt-2"
    if plain and kinds == ["Digits", "ByteLevel"] and own_regex and words[0]["individual_digits"]:
        return "smollm"
    if plain and kinds == ["Split", "ByteLevel"] and not own_regex:
        isolated = words[0]["behavior"] == "Isolated" and not words[0]["invert"]
        if isolated and words[0]["pattern"] == {"Regex": _LLAMA3_WORDS}:
            return "llama-bpe"
    raise ValueError(
        "tokenizer: expected words cut as by GPT-2, SmolLM2 or Llama 3, got "
        f"{' and '.join(kinds)} with other settings"
    )


def _adds_space(rules: dict[str, Any]) -> bool:
    """Whether a space is put before the text; ValueError for other rewriting."""
    before = _parts(rules["normalizer"], "normalizers")
    words = _parts(rules["pre_tokenizer"], "pretokenizers")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    if not words and before in ([replace], [prepend, replace]):
        return prepend in before
    metaspace = len(words) == 1 and words[0]["type"] == "Metaspace" and not before
    if metaspace and words[0]["replacement"] == _SPACE and words[0].get("split") is False:
        return words[0]["prepend_scheme"] != "never"
    raise ValueError(f"tokenizer: expected spaces to become {_SPACE!r} and nothing else")


def _merges(model: dict[str, Any]) -> list[list[str]]:
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """-rank of each merged piece; pieces that no merge makes come last."""
    vocabulary, ranks = set(model["vocab"]), {}
    pairs = {tuple(pair) for pair in _merges(model)}
    last = None
    for left, right in _merges(model):
        piece = left + right
        if piece != last and piece in ranks:
            raise ValueError(
                f"tokenizer: expected one rank of {piece!r} in the merges, got several"
            )
        last = piece
        ranks.setdefault(piece, len(ranks))
    for piece in ranks:
        for cut in range(1, len(piece)):
            split = piece[:cut], piece[cut:]
            if split not in pairs and vocabulary.issuperset(split):
                raise ValueError(
                    f"tokenizer: expected a merge of {split[0]!r} and {split[1]!r}, got none: "
                    "these merges cannot be told by scores"
                )
    return [-float(ranks.get(token, len(ranks) + number)) for number, token in enumerate(tokens)]


def _types(
    rules: dict[str, Any], tokens: list[str], known: set[int], unknown: int | None
) -> list[int]:
    kinds = [
        gguf.TokenType.NORMAL if number in known else gguf.TokenType.UNUSED
        for number in range(len(tokens))
    ]
    if rules["model"].get("byte_fallback"):
        for number, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                kinds[number] = gguf.TokenType.BYTE
    for added in rules["added_tokens"]:
        kinds[added["id"]] = (
            gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        )
    if unknown is not None and rules["model"].get("byte_fallback"):
        kinds[unknown] = gguf.TokenType.UNKNOWN
    return kinds


def _add_special(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
