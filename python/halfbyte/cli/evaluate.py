"""`halfbyte eval`: loss and perplexity on held-out text, and lm-evaluation-harness's tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.finetune.errors import FinetuneError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from halfbyte.integrations.evaluation import Sample

DEFAULT_MAX_LENGTH = 1024
LM_EVAL = "--tasks needs lm_eval, which is not installed; run: pip install lm_eval"


def command(
    base: Annotated[Path, typer.Option(help="Folder of the base (16 or 4 bits), or a GGUF file.")],
    adapter: Annotated[Path | None, typer.Option(help="Folder of a LoRA adapter.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="A .jsonl file of rows as for finetune, or any other file: one text."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm_eval, comma separated: hellaswag,arc_easy.")
    ] = None,
    task_path: Annotated[
        Path | None, typer.Option(help="With --tasks: a folder of task files of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="With --tasks: documents of each.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Longest sequence, in tokens; default: at most 1024.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between windows of a text; default: half of that.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences a forward pass.")] = 8,
    dense: Annotated[
        bool, typer.Option("--dense", help="Leave 16-bit weights as they are, not in 4 bits.")
    ] = False,
    block_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale (default 64).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Compute type: auto, bf16 or fp32.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure loss (nats a token) and perplexity on held-out data; logits are scored in fp32.

    Example: halfbyte eval --base my-model --adapter run/adapter --data held-out.jsonl
    """
    from halfbyte.cli.models import check_adapter, quiet, user_errors

    with user_errors():
        _check(adapter, data, tasks, task_path, limit, stride, dense, block_size)
        if adapter is not None:
            check_adapter(adapter)
        with quiet():
            facts = collect(
                base, adapter, data, tasks, task_path=task_path, limit=limit,
                max_length=max_length, stride=stride, batch=batch, dense=dense,
                block_size=block_size, dtype=dtype,
            )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(facts, indent=2, default=str))
    else:
        _show(facts)


def _check(
    adapter: Path | None,
    data: Path | None,
    tasks: str | None,
    task_path: Path | None,
    limit: int | None,
    stride: int | None,
    dense: bool,
    block_size: int | None,
) -> None:
    if data is None and tasks is None:
        raise FinetuneError("eval: expected --data, --tasks or both")
    if data is not None and not data.is_file():
        raise FinetuneError(f"{data}: no such file")
    if limit is not None and (tasks is None or limit < 1):
        raise FinetuneError("--limit: expected at least 1, with --tasks")
    if task_path is not None and (tasks is None or not task_path.is_dir()):
        raise FinetuneError(f"--task-path {task_path}: expected a folder, with --tasks")
    if stride is not None and (data is None or data.suffix == ".jsonl"):
        raise FinetuneError("--stride is for a text, not for rows")
    if dense and block_size is not None:
        raise FinetuneError("--dense and --block-size exclude each other")
    if tasks is not None:
        import importlib.util

        if importlib.util.find_spec("lm_eval") is None:
            raise FinetuneError(LM_EVAL)


def collect(
    base: Path,
    adapter: Path | None,
    data: Path | None,
    tasks: str | None,
    *,
    task_path: Path | None,
    limit: int | None,
    max_length: int | None,
    stride: int | None,
    batch: int,
    dense: bool,
    block_size: int | None,
    dtype: str,
) -> dict[str, Any]:
    """All results as plain values: loss, perplexity, tokens, sequences; tasks."""
    from halfbyte.cli.generate import check_dtype
    from halfbyte.cli.models import load_model
    from halfbyte.finetune.base import load_tokenizer, open_base
    from halfbyte.integrations.evaluation import harness, held_out_loss

    check_dtype(dtype)
    if batch < 1:
        raise FinetuneError(f"--batch: expected at least 1, got {batch}")
    found = open_base(base)
    config = found.opened.config
    tokenizer = load_tokenizer(found)
    length = _length(config, max_length)
    samples = [] if data is None else _samples(data, tokenizer, config, length, stride)
    adapters = {} if adapter is None else {"default": adapter}
    model = load_model(found, adapters, dtype, block_size, dense)
    facts: dict[str, Any] = {
        "base": str(base),
        "adapter": None if adapter is None else str(adapter),
        "max_length": length,
    }
    if data is not None:
        result = held_out_loss(model, samples, batch)
        facts |= {
            "data": str(data),
            "loss": result.loss,
            "perplexity": result.perplexity,
            "tokens": result.tokens,
            "sequences": len(samples),
        }
    if tasks is not None:
        names = [task.strip() for task in tasks.split(",") if task.strip()]
        facts["tasks"] = harness(model, tokenizer, names, batch, length, limit, task_path)
    return facts


def _length(config: PretrainedConfig, wanted: int | None) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if wanted is None:
        return min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)
    if wanted < 2 or (positions and wanted > positions):
        raise FinetuneError(
            f"--max-length: expected 2 to the model's {positions or 'any'} positions, got {wanted}"
        )
    return wanted


def _samples(
    data: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    length: int,
    stride: int | None,
) -> list[Sample]:
    """Rows with labels on their answers, or the windows of one text."""
    from halfbyte.finetune.data import read_rows
    from halfbyte.finetune.encode import encode_rows, prepare_tokenizer
    from halfbyte.integrations.evaluation import windows

    if data.suffix == ".jsonl":
        prepare_tokenizer(tokenizer)
        rows = encode_rows(read_rows(data), tokenizer, max_length=length)
        samples = [(sample.input_ids, sample.labels) for sample in rows.samples]
    else:
        try:
            text = data.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FinetuneError(f"{data}: expected UTF-8 text ({error.reason})") from None
        ids = tokenizer(text, verbose=False)["input_ids"]
        if len(ids) < 2:
            raise FinetuneError(f"{data}: expected at least two tokens, got {len(ids)}")
        samples = list(windows(ids, length, stride or max(1, length // 2)))
    vocabulary = config.get_text_config().vocab_size
    largest = max(max(ids) for ids, _ in samples)
    if largest >= vocabulary:
        raise FinetuneError(
            f"{data}: expected token ids below the model's {vocabulary}, got {largest}; the "
            "tokenizer belongs to another model"
        )
    return samples


def _show(facts: dict[str, Any]) -> None:
    if "loss" in facts:
        typer.echo(
            f"{facts['data']}: loss {facts['loss']:.4f} nats a token, perplexity "
            f"{facts['perplexity']:.3f}; {facts['tokens']:,} tokens in {facts['sequences']:,} "
            f"sequences of at most {facts['max_length']:,}"
        )
    for task, values in facts.get("tasks", {}).items():
        for name, value in values.items():
            if isinstance(value, float):
                typer.echo(f"{task}: {name} {value:.4f}")
