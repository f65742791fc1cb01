"""`halfbyte export`: a base with its adapter, or the adapter alone, as a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.finetune.errors import FinetuneError

if TYPE_CHECKING:
    from halfbyte.integrations.gguf_export import Exported

TYPES = ("f16", "q8_0", "q4_0")


def command(
    base: Annotated[Path, typer.Option(help="Folder of a Llama-family base, 16 or 4 bits.")],
    out: Annotated[Path, typer.Option("--out", "--output", help="The .gguf file to write.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a LoRA adapter to merge in.")
    ] = None,
    file_format: Annotated[str, typer.Option("--format", help="gguf.")] = "gguf",
    kind: Annotated[str, typer.Option("--type", help="f16, q8_0 or q4_0.")] = "f16",
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Write the adapter alone (llama.cpp's --lora).")
    ] = False,
    modelfile: Annotated[
        bool, typer.Option("--modelfile", help="Write Ollama's Modelfile beside it.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model for llama.cpp and Ollama: weights, tokenizer and chat template in one file.

    Example: halfbyte export --base my-model --adapter run/adapter --type q8_0 --out my.gguf
    """
    from halfbyte.cli.models import check_adapter, check_target, quiet, user_errors

    with user_errors():
        if file_format != "gguf":
            raise FinetuneError(f"--format: expected gguf, got {file_format!r}")
        if kind not in TYPES:
            raise FinetuneError(f"--type: expected one of {', '.join(TYPES)}, got {kind!r}")
        if out.suffix != ".gguf" or out.is_dir():
            raise FinetuneError(f"out {out}: expected the name of a .gguf file")
        if adapter_only and (adapter is None or modelfile):
            raise FinetuneError("--adapter-only: expected --adapter, and no --modelfile")
        if not base.is_dir():
            raise FinetuneError(f"base {base}: no such folder")
        if adapter is not None:
            check_adapter(adapter)
        check_target(out, overwrite)
        with quiet():
            exported = _export(base, adapter, out, kind, adapter_only, modelfile)
    facts = {
        "out": str(out),
        "type": "f32" if adapter_only else kind,
        "tensors": exported.tensors,
        "bytes": exported.nbytes,
        "left_f16": exported.left_f16,
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    note = f"; {exported.left_f16} of them f16 for their shape" if exported.left_f16 else ""
    typer.echo(
        f"{out}: {exported.tensors} tensors{note}, {exported.nbytes / 1e6:,.1f} MB, {facts['type']}"
    )


def _export(
    base: Path, adapter: Path | None, out: Path, kind: str, adapter_only: bool, modelfile: bool
) -> Exported:
    from halfbyte.finetune import base as bases
    from halfbyte.finetune.files import replace_file, write_text
    from halfbyte.integrations import gguf_export
    from halfbyte.integrations.merging import MergedWeights

    merged = MergedWeights(base, [] if adapter is None else [(adapter, 1.0)])
    gguf_export.load_config(base)
    with replace_file(out) as file:
        if adapter_only:
            return gguf_export.write_adapter(merged, file, out.stem)
        tokenizer = bases.load_tokenizer(bases.open_base(base))
        exported = gguf_export.write_model(merged, tokenizer, file, kind, out.stem)
    if modelfile:
        write_text(out.parent / "Modelfile", gguf_export.modelfile(out.name, tokenizer))
    return exported
