"""Loss and perplexity of a causal language model on text that it has not seen.

    loss = -1/C sum_t log softmax(logits[t - 1])[label_t]      over the C labelled tokens, in nats
    perplexity = exp(loss)

The backbone runs once a batch; the model's own head runs on `chunk` labelled positions at a time,
its scales and soft-capping included, and its logits [chunk, V] are scored in float32. No logits of
a whole sequence are ever held. A long text is cut into windows that overlap:

    window i   tokens [i stride, i stride + length), labels on those that no window before scored
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100
CHUNK = 512
Sample = tuple[Sequence[int], Sequence[int]]  # ids [T], labels [T]: the id, or IGNORED


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats a labelled token, over `tokens` of them."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def windows(ids: Sequence[int], length: int, stride: int) -> Iterator[Sample]:
    """(ids, labels) of windows of at most `length`, each token but the first labelled once."""
    if length < 2:
        raise ValueError(f"max_length: expected at least 2, got {length}")
    if not 1 <= stride < length:
        raise ValueError(f"stride: expected 1 to {length - 1}, got {stride}")
    scored = 1
    for start in range(0, len(ids), stride):
        window = ids[start : start + length]
        end = start + len(window)
        if end > scored:
            first = scored - start
            yield window, [IGNORED] * first + list(window[first:])
            scored = end
        if end == len(ids):
            return


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel | PeftModel,
    samples: Sequence[Sample],
    batch: int = 8,
    chunk: int = CHUNK,
) -> Evaluation:
    """The mean over all labelled tokens of `samples`, so it does not depend on their batches.

    Samples are taken in order of length, padded on the right. Raises ValueError without labels, and
    for a loss that is not finite.
    """
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    ordered = sorted(samples, key=lambda sample: len(sample[0]))
    try:
        for start in range(0, len(ordered), batch):
            loss, tokens = _score(model, ordered[start : start + batch], chunk)
            total, count = total + loss, count + tokens
    finally:
        model.train(was_training)
    if not count:
        raise ValueError("data: expected at least one token to score, got none")
    if not math.isfinite(total):
        raise ValueError(f"expected a finite loss, got {total}")
    return Evaluation(total / count, count)


def _score(model: nn.Module, samples: Sequence[Sample], chunk: int) -> tuple[float, int]:
    """(summed loss, labelled tokens) of one batch."""
    dense = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone = dense.base_model
    device = next(model.parameters()).device
    longest = max(len(ids) for ids, _ in samples)

    def padded(rows: list[Sequence[int]], value: int) -> torch.Tensor:
        filled = [list(row) + [value] * (longest - len(row)) for row in rows]
        return torch.tensor(filled, device=device)

    ids = padded([ids for ids, _ in samples], 0)
    labels = padded([labels for _, labels in samples], IGNORED)[:, 1:]
    mask = padded([[1] * len(ids) for ids, _ in samples], 0)
    output = backbone(input_ids=ids, attention_mask=mask, use_cache=False)
    learned = labels != IGNORED
    hidden, wanted = output.last_hidden_state[:, :-1][learned], labels[learned]
    total = 0.0
    for start in range(0, len(wanted), chunk):
        logits = _head(dense, backbone, output, hidden[None, start : start + chunk])
        losses = nn.functional.cross_entropy(
            logits.float(), wanted[start : start + chunk], reduction="none"
        )
        total += losses.sum(dtype=torch.float64).item()
    return total, len(wanted)


def _head(dense: nn.Module, backbone: nn.Module, output: Any, hidden: torch.Tensor) -> torch.Tensor:
    """logits [T, V] of `hidden` [1, T, K] by the model's own forward pass, its backbone stood in
    for by what it gave."""
    output.last_hidden_state = hidden
    backbone.forward = lambda *args, **kwargs: output
    try:
        dummy = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        return dense(input_ids=dummy, use_cache=False).logits[0]
    finally:
        del backbone.forward


def harness(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    batch: int = 8,
    max_length: int | None = None,
    limit: int | None = None,
    include_path: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Results of lm-evaluation-harness for each task, through its own Hugging Face model class.
    `include_path` is a folder of task files besides those that it has.

    Raises ModuleNotFoundError without lm_eval, ValueError for a task that it does not know.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if lost := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(f"tasks: expected names that lm_eval knows, got {', '.join(lost)}")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=max_length)
    return simple_evaluate(wrapped, tasks=tasks, limit=limit, task_manager=manager)["results"]
