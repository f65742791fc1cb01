"""The command `halfbyte`: one file a subcommand. Only this package turns errors into exits."""

import sys

INSTALL = "run: pip install 'halfbyte[finetune]'"


def command_line() -> None:
    """Run the command line; without the packages it needs, one line says how to get them."""
    try:
        from halfbyte.cli.main import app
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed; {INSTALL}")
    app()
