"""How the command line ends when something is wrong: one line, an exit code, no traceback."""

import contextlib
from collections.abc import Iterator

import typer

from halfbyte.cli import INSTALL
from halfbyte.finetune.errors import FinetuneError

USAGE_ERROR = 2
INTERRUPTED = 130


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """A FinetuneError becomes one line on stderr and exit code 2; Ctrl-C exit code 130.

    A library that is not installed is named with the command that installs it.
    """
    try:
        yield
    except FinetuneError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(USAGE_ERROR) from None
    except ModuleNotFoundError as error:
        typer.echo(f"error: {error.name} is not installed; {INSTALL}", err=True)
        raise typer.Exit(USAGE_ERROR) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; no results were written", err=True)
        raise typer.Exit(INTERRUPTED) from None
