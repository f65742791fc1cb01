"""`halfbyte verify FOLDER`: every stored tensor of a packed folder against its checksum."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

DAMAGED = 1


def command(
    folder: Annotated[Path, typer.Argument(help="A folder that halfbyte quantize wrote.")],
    threads: Annotated[int, typer.Option(help="Tensors read at a time.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a packed folder: exit code 0 if every tensor is whole, 1 if one is not, 2 if there is
    nothing to check.

    Example: halfbyte verify ./my-model-nf4
    """
    from halfbyte.cli.errors import plain_errors
    from halfbyte.finetune.errors import FinetuneError

    with plain_errors():
        if threads < 1:
            raise FinetuneError(f"threads: expected at least 1, got {threads}")
        if not folder.is_dir():
            raise FinetuneError(f"{folder}: expected a folder")
        from rich.console import Console

        from halfbyte.cli.quantize import progress_bar
        from halfbyte.integrations.folder_check import verify_folder
        from halfbyte.integrations.safetensors_files import ModelFileError

        try:
            with progress_bar(Console(stderr=True, highlight=False), "checking") as report:
                found = verify_folder(folder, threads=threads, progress=report)
        except ModelFileError as error:
            raise FinetuneError(str(error)) from None
    if as_json:
        facts = {"folder": str(folder), "ok": not found.damage} | dataclasses.asdict(found)
        typer.echo(json.dumps(facts, indent=2))
    else:
        for damage in found.damage:
            where = damage.file if damage.tensor is None else f"{damage.file}: {damage.tensor}"
            typer.echo(f"damaged: {where}: {damage.reason}", err=True)
        state = f"{len(found.damage)} damaged" if found.damage else "all whole"
        typer.echo(f"{folder}: {found.tensors} tensors, {found.nbytes / 1e9:.2f} GB: {state}")
    if found.damage:
        raise typer.Exit(DAMAGED)
