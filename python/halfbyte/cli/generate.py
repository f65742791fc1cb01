"""`halfbyte generate`: answers in the terminal from one frozen 4-bit base and its adapters."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.models import NO_ADAPTER
from halfbyte.finetune.errors import FinetuneError

if TYPE_CHECKING:
    from halfbyte.integrations.chat import Chat

COMMANDS = """/adapter NAME   answer with this adapter; /adapter none: with the base alone
/adapter        list the adapters
/reset          forget the conversation
/help           show this
/quit           end"""


def command(
    base: Annotated[Path, typer.Option(help="Folder of the base (16 or 4 bits), or a GGUF file.")],
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER of a LoRA adapter; may come again.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this and end.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: the most likely token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Draw from this part of the probability.")] = 0.9,
    seed: Annotated[int, typer.Option(help="Seed of the first answer.")] = 0,
    dtype: Annotated[str, typer.Option(help="Compute type: auto, bf16 or fp32.")] = "auto",
    block_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale (default 64).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object an answer.")] = False,
) -> None:
    """Chat with a 4-bit base, switching adapters without reloading it. Reads lines from a pipe too.

    Example: halfbyte generate --base my-model --adapter tuned=run/adapter --prompt "Hello"
    """
    from halfbyte.cli.models import load_model, named_adapters, quiet, user_errors

    with user_errors():
        adapters = named_adapters(adapter or [])
        check_dtype(dtype)
        if seed < 0:
            raise FinetuneError(f"--seed: expected 0 or more, got {seed}")
        with quiet():
            from halfbyte.finetune.base import load_tokenizer, open_base
            from halfbyte.integrations.chat import Chat, Sampling

            sampling = Sampling(max_new_tokens, temperature, top_p, seed)
            found = open_base(base)
            tokenizer = load_tokenizer(found)
            model = load_model(found, adapters, dtype, block_size)
            chat = Chat(model, tokenizer, sampling)
            if prompt is not None:
                _answer(chat, prompt, as_json)
            else:
                _converse(chat, as_json)


def check_dtype(dtype: str) -> None:
    """FinetuneError for a compute type that there is not."""
    if dtype not in ("auto", "bf16", "fp32"):
        raise FinetuneError(f"--dtype: expected one of auto, bf16, fp32, got {dtype!r}")


def _converse(chat: Chat, as_json: bool) -> None:
    """Answer line by line. A mistake ends it (exit code 2) unless a person is typing."""
    person = sys.stdin.isatty()
    if person:
        typer.echo(COMMANDS, err=True)
    for line in _lines(chat, person):
        try:
            if line.startswith("/"):
                if _obey(chat, line):
                    return
            else:
                _answer(chat, line, as_json)
        except ValueError as error:
            if not person:
                raise
            typer.echo(f"error: {error}", err=True)
        except KeyboardInterrupt:
            if not person:
                raise
            typer.echo("\nstopped", err=True)


def _lines(chat: Chat, person: bool) -> Iterator[str]:
    if not person:
        for line in sys.stdin:
            if line.strip():
                yield line.strip()
        return
    while True:
        try:
            line = input(f"{chat.active or NO_ADAPTER}> ").strip()
        except EOFError:
            return
        if line:
            yield line


def _obey(chat: Chat, line: str) -> bool:
    """Carry out a command; True if it ends the conversation."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name == "/quit":
        return True
    if name == "/reset":
        chat.reset()
    elif name == "/help":
        typer.echo(COMMANDS, err=True)
    elif name == "/adapter" and argument:
        chat.use(None if argument == NO_ADAPTER else argument)
    elif name == "/adapter":
        for known in [*chat.adapters, NO_ADAPTER]:
            mark = "*" if known == (chat.active or NO_ADAPTER) else " "
            typer.echo(f"{mark} {known}", err=True)
    else:
        raise FinetuneError(f"{name}: no such command; /help lists them")
    return False


def _answer(chat: Chat, text: str, as_json: bool) -> None:
    if as_json:
        answer = chat.answer(text)
        facts = {
            "adapter": answer.adapter,
            "prompt": text,
            "text": answer.text,
            "tokens": answer.tokens,
            "seconds": answer.seconds,
            "tokens_per_s": answer.tokens_per_s,
        }
        typer.echo(json.dumps(facts, ensure_ascii=False))
        return
    answer = chat.answer(text, _show)
    typer.echo()
    typer.echo(
        f"[{answer.adapter or NO_ADAPTER}: {answer.tokens} tokens, "
        f"{answer.tokens_per_s:.1f} tokens/s]",
        err=True,
    )


def _show(piece: str) -> None:
    typer.echo(piece, nl=False)
    sys.stdout.flush()
