"""One fine-tuning run, from settings to files.

check    everything that can be wrong, before a weight is read (plan.py)
load     the base in 16 or 32 bits, packed to 4 bits layer by layer; LoRA by PEFT
train    held-out loss and a sample answer; TRL's loop with halfbyte's 8-bit AdamW; again
write    adapter/ (PEFT's format), metrics.jsonl, loss.png, config.yaml, run.json (last)

Checkpoints are saved while it trains, `--resume` goes on from the newest (saving.py); they are
removed when run.json is there.

Under torchrun or `accelerate launch` every process runs all of this on its part of each batch, and
process 0 alone reports and writes (processes.py).
"""

import contextlib
import dataclasses
import logging
import os
import platform
import shlex
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
import trl
import yaml
from peft import LoraConfig, PeftModel
from transformers import TrainerState, set_seed
from transformers.trainer_callback import PrinterCallback

import halfbyte
from halfbyte.finetune import base as bases
from halfbyte.finetune import checkpoints, processes, saving
from halfbyte.finetune.chart import draw_loss_curve
from halfbyte.finetune.checkpoints import Checkpoint
from halfbyte.finetune.config import FinetuneConfig
from halfbyte.finetune.encode import (
    EncodedRows,
    Sample,
    render_prompt,
)
from halfbyte.finetune.errors import FinetuneError, Interrupted, NonFinite
from halfbyte.finetune.files import (
    is_disk_full,
    remove_leftovers,
    replace_file,
    replace_folder,
    write_json,
    write_text,
)
from halfbyte.finetune.interruption import Interruption
from halfbyte.finetune.metrics import EvalRecord, MetricsLog
from halfbyte.finetune.page import write_page
from halfbyte.finetune.plan import RESULT_FILES, Plan, check
from halfbyte.finetune.report import Report, SampleAnswers, format_bytes
from halfbyte.finetune.saving import Saver
from halfbyte.finetune.trainer import CheckpointCallback, CompletionTrainer, MetricsCallback
from halfbyte.integrations.calibrate import calibrate_model, row_windows
from halfbyte.integrations.layer_streaming import stream_layers
from halfbyte.integrations.transformers import NF4Config
from halfbyte.optim import AdamW8bit, PagedAdamW8bit


@dataclass(frozen=True)
class RunResult:
    """What came out. Losses are nats a completion token; times in seconds."""

    base_name: str
    base_origin: str
    before: EvalRecord | None
    after: EvalRecord | None
    sample: SampleAnswers | None
    steps: int
    tokens: int
    train_s: float
    total_s: float
    peak_rss_bytes: int
    files: dict[str, Path]


def finetune(config: FinetuneConfig, report: Report | None = None) -> RunResult:
    """Run `config`. Raises FinetuneError for whatever the user can put right, and Interrupted when
    a signal ended the training of the run's only process."""
    report = report if report is not None and processes.is_first() else Report()
    start = time.perf_counter()
    with quiet_libraries(), processes.joined(), _told_what_is_saved(config.out):
        plan = check(config, report)
        identity = saving.identity_of(plan)
        checkpoint = saving.find(plan, identity)
        if config.resume:
            report.fact("resume", _where_it_goes_on(checkpoint))
        model = load(plan, report)
        return train(plan, model, report, start, identity, checkpoint)


def load(plan: Plan, report: Report) -> PeftModel:
    """The base with its linear layers in 4 bits, and LoRA on them."""
    config = plan.config
    if plan.base.is_packed:
        report.stage("mapping the packed base model")
        model = bases.load_model(plan.base, plan.dtype)
    else:
        packing = NF4Config(
            block_size=config.block_size,
            double_quant=config.double_quant,
            codebook=config.codebook,
        )
        if config.calibrate:
            report.stage("calibrating the 4-bit base on the training rows")
            model = bases.load_dense(plan.base, plan.dtype)
            windows = row_windows(sample.input_ids for sample in plan.train.samples)
            calibrate_model(model, windows, config=packing)
        else:
            report.stage("reading the base model and packing it to 4 bits")
            model = bases.load_model(plan.base, plan.dtype, packing)
    dense = plan.parameters * plan.dtype.itemsize
    packed = _bytes_of(model)
    set_seed(config.seed)
    model = peft.get_peft_model(
        model,
        LoraConfig(
            r=config.rank,
            lora_alpha=int(config.alpha) if config.alpha.is_integer() else config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(config.target_modules) or "all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    if config.stream_layers:
        stream_layers(model)
    trainable, _ = model.get_nb_trainable_parameters()
    kind = {torch.bfloat16: "bf16", torch.float32: "fp32"}[plan.dtype]
    report.fact(
        "model",
        f"{format_bytes(dense)} in {kind} -> {format_bytes(packed)} with 4-bit linear layers; "
        f"LoRA rank {config.rank}: {trainable / 1e6:.2f} M trainable parameters",
    )
    return model


def train(
    plan: Plan,
    model: PeftModel,
    report: Report,
    start: float,
    identity: dict[str, Any],
    checkpoint: Checkpoint | None,
) -> RunResult:
    """Evaluate, train, evaluate, write. `start` is when the run began (perf_counter); `checkpoint`
    is where it goes on."""
    config, record = plan.config, checkpoint.record if checkpoint is not None else None
    if processes.is_first():
        config.out.mkdir(parents=True, exist_ok=True)
        if record is None:
            checkpoints.remove_all(config.out)
    log = MetricsLog(
        config.out / "metrics.jsonl" if processes.is_first() else None,
        record.metrics if record is not None else 0,
    )
    callback = MetricsCallback(log, report, config.eval_every, record.elapsed_s if record else 0.0)
    saver = Saver(plan, log, identity)
    with (
        _abandoned_on_error(log),
        tempfile.TemporaryDirectory() as scratch,
        Interruption(report.stage) as interruption,
    ):
        with _tensorboard_folder(config.out / "tensorboard"):
            trainer = build_trainer(plan, model, callback, scratch)
        callback.trainer, trainer.checkpoint = trainer, checkpoint
        trainer.save = lambda: saver.save(trainer, callback.elapsed_s)
        trainer.add_callback(CheckpointCallback(config.save_every, interruption))
        if record is None:
            if plan.held_out is not None:
                report.stage("measuring the held-out loss of the 4-bit base")
            with interruption.at_once():
                callback.evaluate(0)
                saver.answer = _answer(plan, model)
        else:
            saver.answer = record.answer
        _make_steps(trainer, report)
        train_s, steps_end = callback.elapsed_s, log.sync()
        try:
            with interruption.at_once():
                callback.evaluate(trainer.state.global_step)
                result = _result(plan, trainer, log, saver.answer, train_s, start)
                if processes.is_first():
                    _write(plan, model, log, result)
        except Interrupted:
            saver.save(trainer, train_s, steps_end)
            raise
    if processes.is_first():
        checkpoints.remove_all(config.out)
    report.finish(result)
    return result


def _make_steps(trainer: CompletionTrainer, report: Report) -> None:
    """The optimizer steps that are left; all state is that of the last one when this returns."""
    checkpoint = trainer.checkpoint
    try:
        if checkpoint is None:
            trainer.train()
        elif checkpoint.record.step < checkpoint.record.steps:
            trainer.train(resume_from_checkpoint=str(checkpoint.folder))
        else:  # the run was stopped between its last step and its results
            trainer._load_from_checkpoint(str(checkpoint.folder))
            state = TrainerState.load_from_json(str(checkpoint.folder / "trainer_state.json"))
            trainer.state = state
    finally:
        report.train_end()


def _result(
    plan: Plan,
    trainer: CompletionTrainer,
    log: MetricsLog,
    answer_before: str | None,
    train_s: float,
    start: float,
) -> RunResult:
    """What the run came to, with the trained model's answer."""
    before = log.evals[0] if log.evals else None
    after = log.evals[-1] if log.evals else None
    sample = None
    if answer_before is not None:
        sample = SampleAnswers(plan.prompt, answer_before, _answer(plan, trainer.model))
    return RunResult(
        plan.base.name, plan.base.origin, before, after, sample, len(log.steps),
        sum(record.tokens for record in log.steps), train_s, time.perf_counter() - start,
        trainer.peak_rss_bytes(), _files_of(plan.config),
    )  # fmt: skip


@contextlib.contextmanager
def _tensorboard_folder(folder: Path) -> Iterator[None]:
    """Where tensorboard's callback, made meanwhile, will write, if nothing else was said."""
    name = "TENSORBOARD_LOGGING_DIR"
    given = os.environ.get(name)
    os.environ.setdefault(name, str(folder))
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]


def _files_of(config: FinetuneConfig) -> dict[str, Path]:
    names = [name for name in RESULT_FILES if config.report or name != "report.html"]
    return {name: config.out / name for name in names}


def build_trainer(
    plan: Plan, model: PeftModel, callback: MetricsCallback, scratch: str
) -> CompletionTrainer:
    config = plan.config
    arguments = trl.SFTConfig(
        output_dir=scratch,
        per_device_train_batch_size=config.batch,
        per_device_eval_batch_size=config.batch,
        gradient_accumulation_steps=config.accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.steps or -1,
        learning_rate=config.lr,
        lr_scheduler_type=(
            "constant_with_warmup" if config.schedule == "constant" else config.schedule
        ),
        warmup_steps=config.warmup,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        bf16=False,  # the model itself is in the compute type: no autocast, no copies
        use_cpu=True,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        save_strategy="no",
        eval_strategy="no",
        report_to=list(config.report_to) or "none",
    )
    trainer = CompletionTrainer(
        model,
        arguments,
        train_dataset=_dataset(plan.train.samples),
        # By length, so that little is padded; the loss is a sum over tokens in any order.
        eval_dataset=(
            _dataset(sorted(plan.held_out.samples, key=lambda sample: len(sample.input_ids)))
            if plan.held_out is not None
            else None
        ),
        processing_class=plan.tokenizer,
        group_by_length=config.group_by_length,
        skip_non_finite=config.non_finite == "skip",
        callbacks=[callback],
        optimizer_cls_and_kwargs=(
            PagedAdamW8bit if config.paged_optimizer else AdamW8bit,
            {"lr": config.lr, "weight_decay": config.weight_decay},
        ),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def _write(plan: Plan, model: PeftModel, log: MetricsLog, result: RunResult) -> None:
    """Write everything; run.json goes last, so a folder with it is a whole run."""
    out = plan.config.out
    for name in RESULT_FILES:
        remove_leftovers(out, name)
    (out / "run.json").unlink(missing_ok=True)
    with replace_folder(out / "adapter") as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's card of empty headings
    log.close()
    with replace_file(out / "loss.png") as file:
        draw_loss_curve(file, f"{result.base_name}, 4-bit QLoRA", log.steps, log.evals)
    settings = plan.config.as_dict() | {"resume": False}
    write_text(out / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    summary = {
        "base": {"source": str(plan.base.source), "origin": plan.base.origin},
        "config": settings,
        "data": {
            "train": _counts(plan.train),
            "held_out": _counts(plan.held_out) if plan.held_out is not None else None,
        },
        "held_out_before": dataclasses.asdict(result.before) if result.before else None,
        "held_out_after": dataclasses.asdict(result.after) if result.after else None,
        "sample": dataclasses.asdict(result.sample) if result.sample else None,
        "processes": processes.count(),
        "steps": result.steps,
        "tokens": result.tokens,
        "train_s": result.train_s,
        "total_s": result.total_s,
        "peak_rss_bytes": result.peak_rss_bytes,
        "versions": versions(),
        "machine": machine(),
    }
    if plan.config.report:
        write_page(
            out / "report.html", f"{result.base_name}, 4-bit QLoRA", summary, log.steps, log.evals
        )
    write_json(out / "run.json", summary)


def machine() -> str:
    """The processor, and what may be used of it."""
    return f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of everything that has a say in the numbers."""
    modules = (halfbyte, torch, transformers, peft, trl)
    return {"python": platform.python_version()} | {m.__name__: m.__version__ for m in modules}


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars, advice or warnings from the libraries: the report speaks for the run."""
    names = ("transformers", "trl", "peft", "accelerate", "datasets")
    levels = {name: logging.getLogger(name).level for name in names}
    bars = transformers.utils.logging.is_progress_bar_enabled()
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        transformers.utils.logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _where_it_goes_on(checkpoint: Checkpoint | None) -> str:
    if checkpoint is None:
        return "no checkpoint yet: from the beginning"
    return f"after step {checkpoint.record.step} of {checkpoint.record.steps}"


@contextlib.contextmanager
def _abandoned_on_error(log: MetricsLog) -> Iterator[None]:
    try:
        yield
    except BaseException:
        log.abandon()
        raise


@contextlib.contextmanager
def _told_what_is_saved(out: Path) -> Iterator[None]:
    """A signal, a full disk and a step that is not finite say what is saved and how to go on."""
    try:
        yield
    except Interrupted as stop:
        command = f"halfbyte finetune --out {shlex.quote(str(out))} --resume"
        saved = saving.last_checkpoint(out)
        raise Interrupted(
            stop.number,
            f"stopped; {saved}" + (f"; go on with: {command}" if checkpoints.found(out) else ""),
        ) from None
    except NonFinite as error:
        raise FinetuneError(f"{error}; {saving.last_checkpoint(out)}") from None
    except Exception as error:
        if isinstance(error, FinetuneError) or not is_disk_full(error):
            raise
        raise FinetuneError(f"the disk is full: {error}; {saving.last_checkpoint(out)}") from None


def _answer(plan: Plan, model: PeftModel) -> str | None:
    """Process 0's greedy answer to the sample prompt; None if none is asked for."""
    if plan.config.sample_tokens == 0 or not plan.prompt or not processes.is_first():
        return None
    text, special = render_prompt(
        plan.prompt, plan.tokenizer, chat_template=plan.config.chat_template
    )
    inputs = plan.tokenizer(text, add_special_tokens=special, return_tensors="pt")
    was_training = model.training
    model.eval()
    with torch.no_grad():
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=plan.config.sample_tokens,
            do_sample=False,
            temperature=None, top_p=None, top_k=None,
            pad_token_id=plan.tokenizer.pad_token_id,
        )  # fmt: skip
    model.train(was_training)
    return plan.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _dataset(samples: list[Sample]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {
            "input_ids": [sample.input_ids for sample in samples],
            "labels": [sample.labels for sample in samples],
        }
    )


def _bytes_of(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _counts(encoded: EncodedRows) -> dict[str, int]:
    return {
        "rows": len(encoded.samples),
        "tokens": encoded.tokens,
        "completion_tokens": encoded.learned,
        "truncated": encoded.truncated,
        "skipped": encoded.skipped,
    }
