"""`halfbyte finetune`: flags from FinetuneConfig's fields, then one run.

The flags are generated: a field `block_size: int` is `--block-size INTEGER`, a boolean has a
`--no-...` twin, and a flag left out says nothing, so that the YAML file or the default holds.
"""

import dataclasses
import inspect
import logging
import os
import signal
import types
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from halfbyte.cli.errors import plain_errors
from halfbyte.finetune import checkpoints, processes
from halfbyte.finetune.config import FinetuneConfig
from halfbyte.finetune.errors import FinetuneError, Interrupted

DOC = """Fine-tune a language model on a 4-bit base with LoRA.

Needs --base, --data and --out; everything else has a default. Flags override --config.

    halfbyte finetune --base SmolLM2-135M-Instruct.gguf --data chat.jsonl --out run

Checkpoints are saved on the way. Ctrl-C and SIGTERM save one more after the step in progress;
a second signal stops at once. Go on from the newest, with the bits of a run never interrupted:

    halfbyte finetune --out run --resume
"""


def command(
    config: Path | None = None, truncate: bool = False, skip_long: bool = False, **settings: Any
) -> None:
    """Fine-tune; the signature typer sees is `_signature()`, the help text `DOC`."""
    stop_on_sigterm()
    with plain_errors(), processes.one_voice():
        if truncate or skip_long:
            if truncate and skip_long:
                raise FinetuneError("--truncate and --skip-long exclude each other")
            settings["long_samples"] = "truncate" if truncate else "skip"
        if settings.get("resume") and config is None and settings.get("out") is not None:
            config = checkpoints.newest_settings(settings["out"])
        start(FinetuneConfig.load(config, **settings))


def start(config: FinetuneConfig) -> None:
    """Run a checked configuration with a console report. A signal that ended its training is one
    line on stderr and exit code 128 + its number."""
    # The base is local by definition: nothing below may look for a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it where installed
    from halfbyte.finetune.report import ConsoleReport, Report

    report = ConsoleReport() if processes.is_first() else Report()
    report.stage("importing transformers, PEFT and TRL")
    from halfbyte.finetune.run import finetune

    try:
        finetune(config, report)
    except Interrupted as stop:
        typer.echo(stop, err=True)
        raise typer.Exit(128 + stop.number) from None


def stop_on_sigterm() -> None:
    """In one of several processes: say why, when the launcher stops those that are left over."""
    if processes.count() == 1:
        return

    def stop(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        typer.echo(f"error: process {processes.rank()}: {processes.LOST}", err=True)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)


def _signature() -> inspect.Signature:
    """One keyword parameter a setting, and the three flags that are not settings."""
    parameters = [
        _parameter("config", Path | None, None, typer.Option("--config", help="Settings as YAML."))
    ]
    hints = get_type_hints(FinetuneConfig)
    for field in dataclasses.fields(FinetuneConfig):
        parameters.append(_setting_parameter(field, hints[field.name]))
        if field.name == "long_samples":
            for flag, text in (
                ("truncate", "Same as --long-samples truncate."),
                ("skip_long", "Same as --long-samples skip."),
            ):
                option = typer.Option(
                    "--" + flag.replace("_", "-"),
                    help=text,
                    rich_help_panel=field.metadata["panel"],
                )
                parameters.append(_parameter(flag, bool, False, option))
    return inspect.Signature(parameters)


def _setting_parameter(field: dataclasses.Field, hint: Any) -> inspect.Parameter:
    if isinstance(hint, types.UnionType):
        hint = get_args(hint)[0]
    kind = str if get_origin(hint) is tuple else hint
    flag = "--" + field.name.replace("_", "-")
    text = field.metadata["help"]
    if field.metadata["choices"]:
        text += f" One of {', '.join(field.metadata['choices'])}."
    if kind is bool:
        text += " (default yes)" if field.default else ""
    elif field.default not in (None, ()):
        text += f" (default {field.default})"
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}"
        if kind is bool and field.name not in ("overwrite", "resume")
        else flag,
        help=text,
        rich_help_panel=field.metadata["panel"],
        show_default=False,
    )
    return _parameter(field.name, kind | None, None, option)


def _parameter(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, option],
    )


command.__signature__ = _signature()
command.__annotations__ = {
    parameter.name: parameter.annotation for parameter in command.__signature__.parameters.values()
}
command.__doc__ = DOC
