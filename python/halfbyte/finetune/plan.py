"""A checked run: everything that can be wrong is found before a weight is read.

In order of cost: output folder, data rows, base files, targets, tokenizer, sequence lengths.
"""

from dataclasses import dataclass, fields

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.integrations import get_available_reporting_integrations

from halfbyte.finetune import base as bases
from halfbyte.finetune import checkpoints
from halfbyte.finetune.config import FinetuneConfig
from halfbyte.finetune.data import Row, read_rows, split_rows
from halfbyte.finetune.encode import EncodedRows, encode_rows, prepare_tokenizer
from halfbyte.finetune.errors import FinetuneError
from halfbyte.finetune.report import Report

RESULT_FILES = ("adapter", "metrics.jsonl", "loss.png", "report.html", "config.yaml", "run.json")
DEFAULT_MAX_LENGTH = 1024


@dataclass(frozen=True)
class Plan:
    """A checked run: everything that is known before weights are read."""

    config: FinetuneConfig
    base: bases.Base
    tokenizer: PreTrainedTokenizerBase
    train: EncodedRows
    held_out: EncodedRows | None
    parameters: int
    dtype: torch.dtype
    prompt: str


def check(config: FinetuneConfig, report: Report) -> Plan:
    """Find all that is wrong before any weight is read."""
    _check_out(config)
    _check_report_to(config)
    train_rows, held_out_rows = _read_data(config)
    report.stage("checking the base model, the data and the settings")
    base = bases.open_base(config.base)
    _check_packing(base, config)
    model_config = base.opened.config
    model = bases.without_weights(model_config)
    linear, head = bases.linear_names(model)
    bases.check_targets(config.target_modules, linear, head)
    tokenizer = bases.load_tokenizer(base)
    prepare_tokenizer(tokenizer)
    rules = {
        "max_length": _max_length(config, model_config),
        "long_samples": config.long_samples,
        "chat_template": config.chat_template,
    }
    train_set = encode_rows(train_rows, tokenizer, **rules)
    held_out = encode_rows(held_out_rows, tokenizer, **rules) if held_out_rows else None
    _check_vocabulary([train_set, held_out], model_config.get_text_config().vocab_size)
    report.fact("base", f"{base.name} ({base.origin})")
    report.fact("data", _describe(train_set, "training"))
    if held_out is not None:
        report.fact("", _describe(held_out, "held-out"))
    prompt = config.sample_prompt or _first_prompt(held_out_rows or train_rows)
    return Plan(
        config,
        base,
        tokenizer,
        train_set,
        held_out,
        model.num_parameters(),
        compute_dtype(config.dtype),
        prompt,
    )


def _check_packing(base: bases.Base, config: FinetuneConfig) -> None:
    """A packed base has its format, and no other can be asked for; only it can be streamed."""
    defaults = {field.name: field.default for field in fields(FinetuneConfig)}
    for name in ("block_size", "double_quant", "codebook", "calibrate"):
        if base.is_packed and getattr(config, name) != defaults[name]:
            raise FinetuneError(
                f"{name}: base {base.source} is packed already and keeps its format"
            )
    if config.stream_layers and not base.is_packed:
        raise FinetuneError(
            f"stream_layers: expected a packed base, got {base.source}; "
            "`halfbyte quantize` makes one of it"
        )


def _check_out(config: FinetuneConfig) -> None:
    out = config.out
    if out.exists() and not out.is_dir():
        raise FinetuneError(f"out {out}: expected a folder, got a file")
    unfinished = bool(checkpoints.found(out))
    if config.resume:
        if config.overwrite:
            raise FinetuneError("--resume and --overwrite exclude each other")
        if not unfinished and (out / "run.json").exists():
            checkpoints.remove_all(out)  # a run that was killed while it did so
            raise FinetuneError(f"out {out}: the run is finished; pass --overwrite for another one")
        return
    held = [name for name in RESULT_FILES if (out / name).exists()]
    if unfinished and not config.overwrite:
        raise FinetuneError(
            f"out {out}: holds a run that is not finished; pass --resume to go on, or --overwrite"
        )
    if held and not config.overwrite:
        raise FinetuneError(f"out {out}: already holds a run ({held[0]}); pass --overwrite")


def _check_report_to(config: FinetuneConfig) -> None:
    there = get_available_reporting_integrations() if config.report_to else []
    for name in config.report_to:
        if name not in there:
            raise FinetuneError(
                f"report_to: expected what is installed here ({', '.join(there) or 'nothing'}), "
                f"got {name!r}"
            )


def _read_data(config: FinetuneConfig) -> tuple[list[Row], list[Row]]:
    rows = read_rows(config.data)
    if config.eval_data is not None:
        return rows, read_rows(config.eval_data)
    return split_rows(rows, config.eval_fraction)


def _max_length(config: FinetuneConfig, model_config: PretrainedConfig) -> int:
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if config.max_length is None:
        return min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)
    if positions and config.max_length > positions:
        raise FinetuneError(
            f"max_length: expected at most the model's {positions} positions, "
            f"got {config.max_length}"
        )
    return config.max_length


def _check_vocabulary(sets: list[EncodedRows | None], vocabulary: int) -> None:
    for encoded in sets:
        for sample in encoded.samples if encoded is not None else ():
            if max(sample.input_ids) >= vocabulary:
                raise FinetuneError(
                    f"{sample.row.place}: expected token ids below the model's {vocabulary}, got "
                    f"{max(sample.input_ids)}; the tokenizer belongs to another model"
                )


def compute_dtype(name: str) -> torch.dtype:
    """What `--dtype` stands for; auto: bf16 where the processor multiplies it."""
    if name == "auto":
        name = "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    return bases.DTYPES[name]


def _first_prompt(rows: list[Row]) -> str:
    row = rows[0]
    if row.form == "prompt":
        return row.content["prompt"]
    if row.form == "messages":
        users = [m["content"] for m in row.content["messages"] if m["role"] == "user"]
        return users[0] if users else ""
    return " ".join(row.content["text"].split()[:8])


def _describe(encoded: EncodedRows, name: str) -> str:
    text = (
        f"{len(encoded.samples):,} {name} rows, {encoded.tokens:,} tokens, "
        f"{encoded.learned:,} of them in completions"
    )
    if encoded.truncated:
        text += f"; {encoded.truncated:,} truncated"
    if encoded.skipped:
        text += f"; {encoded.skipped:,} too long and left out"
    return text
