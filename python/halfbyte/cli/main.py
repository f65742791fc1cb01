"""Entry point of the command `halfbyte`.

Heavy imports (torch, transformers) happen inside the subcommands, so that help is instant.
"""

from typing import Annotated

import typer

from halfbyte.cli import (
    bench,
    demo,
    evaluate,
    export,
    finetune,
    generate,
    info,
    merge,
    plan,
    quantize,
    verify,
)

app = typer.Typer(
    help="4-bit QLoRA fine-tuning with native kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        import halfbyte

        typer.echo(f"halfbyte {halfbyte.__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """4-bit QLoRA fine-tuning with native kernels."""


app.command("finetune")(finetune.command)
app.command("info")(info.command)
app.command("demo")(demo.command)
app.command("bench")(bench.command)
app.command("plan")(plan.command)
app.command("merge")(merge.command)
app.command("quantize")(quantize.command)
app.command("verify")(verify.command)
app.command("generate")(generate.command)
app.command("eval")(evaluate.command)
app.command("export")(export.command)
