"""TRL's SFTTrainer, with the language-model head run on completion tokens only.

TRL's fused head scores every position on a CPU and masks afterwards. With M tokens in a batch,
C of them in completions and a vocabulary of V, the head costs M * V * K multiplications forward
and twice that backward, of which (M - C) / M are thrown away. Here a forward hook on the
backbone hands the head the C hidden states that have a label, as one sequence:

    hidden [B, T, K], labels [B, T]  ->  hidden [1, C + 1, K], labels [1, C + 1]

(the extra position pays for the head's own shift by one). Losses and gradients are the same sums;
soft-capping, logit scales and auxiliary losses stay TRL's.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from halfbyte.finetune.encode import IGNORED
from halfbyte.finetune.errors import FinetuneError
from halfbyte.finetune.metrics import EvalRecord, MetricsLog, StepRecord, peak_rss_bytes
from halfbyte.finetune.report import Report
from halfbyte.finetune.sampler import SimilarLengthSampler


class CompletionTrainer(SFTTrainer):
    """SFTTrainer whose loss costs what its completion tokens cost.

    group_by_length: draw training rows by `SimilarLengthSampler` rather than at random.
    """

    def __init__(self, *args: Any, group_by_length: bool, **kwargs: Any) -> None:
        self._group_by_length = group_by_length
        super().__init__(*args, **kwargs)
        self._learned: torch.Tensor | None = None  # [B, T - 1]: position t predicts a label
        self._counts = [0, 0]  # tokens, completion tokens
        self.model.get_base_model().base_model.register_forward_hook(self._keep_learned)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Summed loss of the completion tokens over `num_items_in_batch` (default: their count)."""
        if return_outputs:
            raise NotImplementedError("logits are never built; expected return_outputs=False")
        labels = inputs["labels"]
        self._learned = labels[:, 1:] != IGNORED
        compact = nn.functional.pad(labels[:, 1:][self._learned], (1, 0), value=IGNORED)
        try:
            return super().compute_loss(
                model, {**inputs, "labels": compact[None]}, False, num_items_in_batch
            )
        finally:
            self._learned = None

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        if not self._group_by_length:
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(ids) for ids in rows["input_ids"]]
        # A batch of similar length is what all processes take at once: each gets its own part.
        batch = self.args.train_batch_size * self.accelerator.num_processes
        return SimilarLengthSampler(lengths, batch, self.args.seed)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward. Raises FinetuneError on a loss of inf or nan, before any update."""
        loss = super().training_step(*args, **kwargs)
        inputs = kwargs["inputs"] if "inputs" in kwargs else args[1]
        self._counts[0] += int(inputs["attention_mask"].sum())
        self._counts[1] += int((inputs["labels"][:, 1:] != IGNORED).sum())
        if not torch.isfinite(loss):
            raise FinetuneError(
                f"step {self.state.global_step + 1}: expected a finite loss, got {loss.item()}; "
                "try a smaller --lr, a longer --warmup or --dtype fp32"
            )
        return loss

    def take_counts(self) -> tuple[int, int]:
        """Tokens and completion tokens that all processes trained on since the last call."""
        counts, self._counts = self._counts, [0, 0]
        tokens, learned = self.accelerator.reduce(torch.tensor(counts), "sum").tolist()
        return tokens, learned

    def peak_rss_bytes(self) -> int:
        """The largest of all processes."""
        return int(self.accelerator.gather(torch.tensor([peak_rss_bytes()])).max())

    def _keep_learned(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Forward hook of the backbone: keep the hidden states that predict a label."""
        if self._learned is not None:
            hidden = output.last_hidden_state[:, :-1][self._learned]
            output.last_hidden_state = nn.functional.pad(hidden, (0, 0, 0, 1))[None]
        return output

    @torch.no_grad()
    def held_out_loss(self) -> tuple[float, int]:
        """(mean loss in nats, tokens) over all completion tokens of the held-out rows.

        Weighted by tokens, so it does not depend on how rows fall into batches, nor batches to
        processes.
        """
        was_training = self.model.training
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        # compute_loss scales by the number of processes, as the mean of their gradients needs.
        processes = self.accelerator.num_processes
        for rows, counts in self._my_held_out_batches():
            batch = self._prepare_inputs(self.data_collator(rows))
            loss = self.compute_loss(self.model, batch, num_items_in_batch=torch.tensor(1))
            if counts:
                sums[0] += loss.item() / processes
                sums[1] += int((batch["labels"][:, 1:] != IGNORED).sum())
        self._metrics["eval"].clear()
        self.model.train(was_training)
        total, tokens = self.accelerator.reduce(sums, "sum").tolist()
        return total / tokens, int(tokens)

    def _my_held_out_batches(self) -> Iterator[tuple[list[dict[str, Any]], bool]]:
        """Every n-th batch for this one of n processes, and whether it counts.

        All get equally many, because TRL exchanges numbers at each: where they run out, the last
        one comes again and does not count.
        """
        rows, size = self.eval_dataset, self.args.eval_batch_size
        starts = list(range(0, len(rows), size))
        for i in range(self.accelerator.process_index, len(starts), self.accelerator.num_processes):
            yield [rows[j] for j in range(starts[i], min(starts[i] + size, len(rows)))], True
        if self.accelerator.process_index >= (len(starts) - 1) % self.accelerator.num_processes + 1:
            yield [rows[j] for j in range(starts[-1], len(rows))], False


class MetricsCallback(TrainerCallback):
    """Turns Trainer's logs into records, and measures the held-out loss every `eval_every` steps.

    Every record goes to the log first, then to the report.
    """

    def __init__(self, log: MetricsLog, report: Report, eval_every: int | None) -> None:
        self.log = log
        self.report = report
        self.eval_every = eval_every
        self.trainer: CompletionTrainer | None = None
        self._start = self._last = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock; each process drops out its own elements."""
        if args.process_index:
            torch.manual_seed(args.seed + args.process_index)
        self.report.train_begin(state.max_steps)
        self._start = self._last = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **_: Any,
    ) -> None:
        """Record one step, and measure the held-out loss when it is due."""
        if "loss" not in logs:
            return
        tokens, learned = self.trainer.take_counts()
        now = time.perf_counter()
        record = StepRecord(
            step=state.global_step,
            loss=float(logs["loss"]),
            lr=float(logs["learning_rate"]),
            grad_norm=float(logs["grad_norm"]),
            tokens=tokens,
            completion_tokens=learned,
            tokens_per_s=tokens / (now - self._last),
            peak_rss_bytes=self.trainer.peak_rss_bytes(),
            elapsed_s=now - self._start,
        )
        self._emit(record)
        due = self.eval_every and state.global_step % self.eval_every == 0
        if due and state.global_step < state.max_steps:
            self.evaluate(state.global_step)
        self._last = time.perf_counter()

    def evaluate(self, step: int) -> EvalRecord | None:
        """Measure and record the held-out loss, if rows are held out."""
        assert self.trainer is not None
        if self.trainer.eval_dataset is None:
            return None
        loss, tokens = self.trainer.held_out_loss()
        elapsed = time.perf_counter() - self._start if step else 0.0
        record = EvalRecord(step, loss, tokens, elapsed)
        self._emit(record)
        return record

    def _emit(self, record: StepRecord | EvalRecord) -> None:
        self.log.write(record)
        self.report.record(record)
