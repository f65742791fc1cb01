"""Text from one frozen base with any of several adapters.

The base is loaded once; `use(name)` chooses which of PEFT's adapters is added to it, `use(None)`
none of them. With a chat template an answer continues the conversation, without one each text is
completed for itself. The conversation stays when the adapter changes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature 0 takes the most likely one; seed is that of the first
    answer, and one more for each later one."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected more than 0 and at most 1, got {self.top_p}")

    def settings(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        if self.temperature == 0:
            drawn = dict.fromkeys(drawn)
        return {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0, **drawn}


@dataclass(frozen=True)
class Answer:
    """One answer: its adapter, its text without special tokens, its tokens, the seconds it took."""

    adapter: str | None
    text: str
    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Chat:
    """A conversation with a causal language model, or with a `PeftModel` and its adapters."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling or Sampling()
        self.adapters = list(model.peft_config) if isinstance(model, PeftModel) else []
        self.active: str | None = self.adapters[0] if self.adapters else None
        self.messages: list[dict[str, str]] = []
        self._answers = 0

    def use(self, adapter: str | None) -> None:
        """Answer with this adapter from now on; None: the base alone."""
        if adapter is not None and adapter not in self.adapters:
            known = ", ".join([*self.adapters, "none"])
            raise ValueError(f"adapter {adapter!r}: expected one of {known}")
        if adapter is not None:
            self.model.set_adapter(adapter)
        self.active = adapter

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages = []

    def answer(self, text: str, emit: Callable[[str], None] = lambda piece: None) -> Answer:
        """The model's answer to `text`; `emit` gets it piece by piece, as it comes.

        Raises ValueError, and keeps the conversation, if there are not enough positions.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        inputs = self._encode(messages, text)
        length = inputs["input_ids"].shape[1]
        streamer = _Pieces(self.tokenizer, emit)
        torch.manual_seed(self.sampling.seed + self._answers)
        begin = time.perf_counter()
        with torch.no_grad(), self._chosen():
            ids = self.model.generate(
                **inputs,
                **self.sampling.settings(),
                streamer=streamer,
                eos_token_id=self._ends(),
                pad_token_id=self._pad(),
            )[0, length:]
        seconds = time.perf_counter() - begin
        answer = self.tokenizer.decode(ids, skip_special_tokens=True)
        self._answers += 1
        if self.tokenizer.chat_template:
            self.messages = [*messages, {"role": "assistant", "content": answer}]
        return Answer(self.active, answer, len(ids), seconds)

    def _chosen(self) -> contextlib.AbstractContextManager:
        off = self.active is None and isinstance(self.model, PeftModel)
        return self.model.disable_adapter() if off else contextlib.nullcontext()

    def _encode(self, messages: list[dict[str, str]], text: str) -> dict[str, torch.Tensor]:
        templated = bool(self.tokenizer.chat_template)
        if templated:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        inputs = self.tokenizer(text, add_special_tokens=not templated, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        if not length:
            raise ValueError("expected a text of at least one token, got none")
        config = self.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        if positions and length + self.sampling.max_new_tokens > positions:
            raise ValueError(
                f"expected at most the model's {positions} positions, got {length} tokens and "
                f"{self.sampling.max_new_tokens} new ones"
            )
        device = next(self.model.parameters()).device
        return {key: inputs[key].to(device) for key in ("input_ids", "attention_mask")}

    def _ends(self) -> list[int] | None:
        ends = self.model.generation_config.eos_token_id
        found = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        return sorted(found - {None}) or None

    def _pad(self) -> int | None:
        """Nothing is padded here; transformers wants a token all the same."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad


class _Pieces(TextStreamer):
    """Hands text on instead of printing it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by `generate` with each piece of text."""
        if text:
            self._emit(text)
