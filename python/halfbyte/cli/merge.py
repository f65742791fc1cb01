"""`halfbyte merge`: adapters into the weights of a base, written dense or in 4 bits again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.finetune.errors import FinetuneError

if TYPE_CHECKING:
    from halfbyte.integrations.merging import Written

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def command(
    base: Annotated[Path, typer.Option(help="Folder of the base: 16-bit weights, or 4-bit ones.")],
    adapter: Annotated[list[Path], typer.Option(help="Folder of a LoRA adapter; may come again.")],
    out: Annotated[Path, typer.Option("--out", "--output", help="Folder to write.")],
    weight: Annotated[
        list[float] | None,
        typer.Option(help="Factor of an adapter, in their order; none: 1 for each."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32; default: the base's own.")
    ] = None,
    nf4: Annotated[bool, typer.Option("--nf4", help="Write 4 bits and report the error.")] = False,
    block_size: Annotated[
        int | None, typer.Option(help="With --nf4: weights that share a scale (default 64).")
    ] = None,
    double_quant: Annotated[
        bool | None, typer.Option(help="With --nf4: scales in 8 bits too (default yes).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Merge LoRA adapters into their base, tensor by tensor; sums are in fp32.

    Example: halfbyte merge --base my-model --adapter run/adapter --out merged --dtype bf16
    """
    from halfbyte.cli.models import check_adapter, check_target, quiet, user_errors

    with user_errors():
        weights = _weights(adapter, weight)
        if dtype is not None and dtype not in DTYPES:
            raise FinetuneError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        if nf4 and dtype is not None:
            raise FinetuneError("--dtype and --nf4 exclude each other")
        if not nf4 and (block_size is not None or double_quant is not None):
            raise FinetuneError("--block-size and --double-quant need --nf4")
        if not base.is_dir():
            raise FinetuneError(f"base {base}: no such folder")
        for path in adapter:
            check_adapter(path)
        check_target(out, overwrite, base, *adapter)
        with quiet():
            written = _merge(
                base, list(zip(adapter, weights, strict=True)), out, dtype, nf4, block_size,
                double_quant,
            )  # fmt: skip
    facts = _facts(out, adapter, weights, dtype, nf4, written)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _show(facts)


def _weights(adapters: list[Path], given: list[float] | None) -> list[float]:
    if not given:
        return [1.0] * len(adapters)
    if len(given) != len(adapters):
        raise FinetuneError(
            f"--weight: expected none, or one for each of {len(adapters)} adapters, "
            f"got {len(given)}"
        )
    return given


def _merge(
    base: Path,
    adapters: list[tuple[Path, float]],
    out: Path,
    dtype: str | None,
    nf4: bool,
    block_size: int | None,
    double_quant: bool | None,
) -> Written:
    import torch

    from halfbyte.finetune.files import replace_folder
    from halfbyte.integrations.merging import MergedWeights, write_dense, write_packed
    from halfbyte.integrations.transformers import NF4Config

    chosen = {"block_size": block_size, "double_quant": double_quant}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    settings = NF4Config(**chosen) if chosen else None
    merged = MergedWeights(base, adapters)
    with replace_folder(out) as folder:
        if nf4:
            return write_packed(merged, folder, settings)
        return write_dense(merged, folder, getattr(torch, DTYPES[dtype]) if dtype else None)


def _facts(
    out: Path,
    adapters: list[Path],
    weights: list[float],
    dtype: str | None,
    nf4: bool,
    written: Written,
) -> dict[str, Any]:
    error = None
    if written.error is not None and written.error.worst is not None:
        layer, value = written.error.worst
        error = {
            "overall": written.error.overall,
            "worst": {"layer": layer, "error": value},
            "layers": written.error.layers,
        }
    return {
        "out": str(out),
        "adapters": [
            {"path": str(path), "weight": weight}
            for path, weight in zip(adapters, weights, strict=True)
        ],
        "format": "nf4" if nf4 else dtype or "as the base",
        "merged_weights": written.adapted,
        "bytes": written.nbytes,
        "files": written.files,
        "added_error": error,
    }


def _show(facts: dict[str, Any]) -> None:
    typer.echo(
        f"merged {facts['merged_weights']} weights of {len(facts['adapters'])} adapter(s) into "
        f"{facts['out']}: {facts['bytes'] / 1e6:,.1f} MB in {facts['files']} file(s), "
        f"{facts['format']}"
    )
    if error := facts["added_error"]:
        worst = error["worst"]
        typer.echo(
            f"added by 4 bits: {error['overall']:.4f} of the weights' norm; at most "
            f"{worst['error']:.4f}, in {worst['layer']}"
        )
