"""TRL's SFTTrainer, with the language-model head run on completion tokens only.

TRL's fused head scores every position on a CPU and masks afterwards. With M tokens in a batch,
C of them in completions and a vocabulary of V, the head costs M * V * K multiplications forward
and twice that backward, of which (M - C) / M are thrown away. Here a forward hook on the
backbone hands the head the C hidden states that have a label, as one sequence:

    hidden [B, T, K], labels [B, T]  ->  hidden [1, C + 1, K], labels [1, C + 1]

(the extra position pays for the head's own shift by one). Losses and gradients are the same sums;
soft-capping, logit scales and auxiliary losses stay TRL's.

A step whose loss or gradients are not finite changes nothing: it ends the run or is skipped.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from halfbyte.finetune import saving
from halfbyte.finetune.checkpoints import Checkpoint
from halfbyte.finetune.encode import IGNORED
from halfbyte.finetune.errors import NonFinite
from halfbyte.finetune.interruption import Interruption
from halfbyte.finetune.metrics import EvalRecord, MetricsLog, StepRecord, peak_rss_bytes
from halfbyte.finetune.nonfinite import bad_gradient, bad_tensor
from halfbyte.finetune.report import Report
from halfbyte.finetune.sampler import SimilarLengthSampler

SKIPS_IN_A_ROW = 10


class CompletionTrainer(SFTTrainer):
    """SFTTrainer whose loss costs what its completion tokens cost.

    group_by_length: draw training rows by `SimilarLengthSampler` rather than at random.
    skip_non_finite: skip a step that is not finite, rather than raise NonFinite.
    """

    def __init__(
        self, *args: Any, group_by_length: bool, skip_non_finite: bool, **kwargs: Any
    ) -> None:
        self._group_by_length = group_by_length
        self._skip_non_finite = skip_non_finite
        super().__init__(*args, **kwargs)
        self.checkpoint: Checkpoint | None = None  # where this run goes on from
        self.save: Callable[[], object] | None = None  # writes a checkpoint
        self.skipped: str | None = None  # why the last step was
        self._skips = 0  # in a row
        self._bad_loss: str | None = None
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
        """Forward and backward. A loss of inf or nan is noted for `_clip_grad_norm`, and 0 here."""
        loss = super().training_step(*args, **kwargs)
        inputs = kwargs["inputs"] if "inputs" in kwargs else args[1]
        self._counts[0] += int(inputs["attention_mask"].sum())
        self._counts[1] += int((inputs["labels"][:, 1:] != IGNORED).sum())
        if torch.isfinite(loss):
            return loss
        if self._bad_loss is None:
            where = bad_tensor(self.model.get_base_model().base_model, inputs)
            self._bad_loss = f"expected a finite loss, got {loss.item()}" + (
                f": {where}" if where else ""
            )
        return torch.zeros_like(loss)

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """The norm before clipping; nan if the step is skipped. All that is bad is met here, before
        the optimizer steps."""
        problem, self._bad_loss = self._bad_loss, None
        problem = problem or bad_gradient(self.model)
        if self.accelerator.num_processes > 1:
            bad = self.accelerator.reduce(torch.tensor(int(problem is not None)), "sum").item()
            problem = problem or ("another process's loss is not finite" if bad else None)
        if problem is None:
            norm = super()._clip_grad_norm(model)
            if torch.isfinite(norm):
                self.skipped, self._skips = None, 0
                return norm
            problem = f"expected a finite norm of the gradients, got {norm.item()}"
        self._skips += 1
        if not self._skip_non_finite or self._skips == SKIPS_IN_A_ROW:
            row = f" ({self._skips} steps in a row)" if self._skips > 1 else ""
            raise NonFinite(
                f"step {self.state.global_step + 1}: {problem}; nothing was changed{row}; "
                "try a smaller --lr, a longer --warmup or --dtype fp32"
            )
        self.skipped = problem
        model.zero_grad()  # without gradients the optimizer leaves everything as it is
        return torch.tensor(torch.nan)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer calls this where `CheckpointCallback` asked for it."""
        assert self.save is not None
        self.save()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer calls this where the uninterrupted run would be about to make the next step."""
        if self.checkpoint is not None:
            saving.restore_generators(self.checkpoint)

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

    def __init__(
        self, log: MetricsLog, report: Report, eval_every: int | None, elapsed_s: float = 0.0
    ) -> None:
        self.log = log
        self.report = report
        self.eval_every = eval_every
        self.trainer: CompletionTrainer | None = None
        self._elapsed_before = elapsed_s
        self._start = self._last = time.perf_counter()

    @property
    def elapsed_s(self) -> float:
        """Training time, that of the run this one goes on from included."""
        return self._elapsed_before + time.perf_counter() - self._start

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock; each process drops out its own elements."""
        if args.process_index:
            torch.manual_seed(args.seed + args.process_index)
        self.report.train_begin(state.max_steps, state.global_step)
        self._start = self._last = time.perf_counter()

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader,
        **_: Any,
    ) -> None:
        """Tell the sampler, however deep it is wrapped, which epoch it is in."""
        batches = train_dataloader.batch_sampler
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        batches.sampler.set_epoch(int(state.epoch or 0))

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
        state.log_history.clear()  # the records are in the log
        skipped = self.trainer.skipped
        if skipped is not None:
            self.report.fact("skipped", f"step {state.global_step}: {skipped}")
        tokens, learned = self.trainer.take_counts()
        record = StepRecord(
            step=state.global_step,
            loss=float(logs["loss"]) if skipped is None else math.nan,
            lr=float(logs["learning_rate"]),
            grad_norm=float(logs["grad_norm"]),
            tokens=tokens,
            completion_tokens=learned,
            tokens_per_s=tokens / (time.perf_counter() - self._last),
            peak_rss_bytes=self.trainer.peak_rss_bytes(),
            elapsed_s=self.elapsed_s,
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
        record = EvalRecord(step, loss, tokens, self.elapsed_s if step else 0.0)
        self._emit(record)
        if self.trainer.args.report_to:
            self.trainer.log({"eval_loss": loss})
        return record

    def _emit(self, record: StepRecord | EvalRecord) -> None:
        self.log.write(record)
        self.report.record(record)


class CheckpointCallback(TrainerCallback):
    """Says when a checkpoint is due: every `save_every` steps (0: never) and when interrupted."""

    def __init__(self, save_every: int, interruption: Interruption) -> None:
        self.save_every = save_every
        self.interruption = interruption

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Trainer records, evaluates and then saves the step that was made."""
        due = self.save_every and state.global_step % self.save_every == 0
        stop = self.interruption.pending is not None
        if stop:
            control.should_training_stop = True
        if stop or (due and state.global_step < state.max_steps):
            control.should_save = True
