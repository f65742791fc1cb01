"""Writes the tables of options in docs/guide/commands.md from the commands themselves.

    python docs/tools/commands.py

A table stands after a line `<!-- options: NAME -->` and ends at the next empty line.
"""

import re
from pathlib import Path

import typer.main

from halfbyte.cli.main import app

PAGE = Path(__file__).resolve().parents[1] / "guide/commands.md"
TABLE = re.compile(r"(<!-- options: (\w+) -->\n\n)(?:\|[^\n]*\n)*\n?")
DEFAULT = re.compile(r" \(default ([^()]*)\)")


def table(name: str) -> str:
    """One row an argument or option: its names, its default, what it is."""
    group = typer.main.get_command(app)
    rows = ["| | default | |", "|---|---|---|"]
    for parameter in group.commands[name].params:
        if "--help" in parameter.opts:
            continue
        if parameter.param_type_name == "argument":
            shown = f"`{parameter.name.upper()}`"
        else:
            names = [*parameter.opts, *parameter.secondary_opts]
            shown = " ".join(f"`{name}`" for name in names)
        default = parameter.default
        none = default is None or default is False or default == () or not parameter.show_default
        default = "" if none else f"`{'yes' if default is True else default}`"
        if parameter.required:
            default = "required"
        text = " ".join((parameter.help or "").split()).replace("|", "\\|")
        if stated := DEFAULT.search(text):
            default, text = f"`{stated[1]}`", DEFAULT.sub("", text)
        rows.append(f"| {shown} | {default} | {text} |")
    return "\n".join(rows) + "\n"


def filled(text: str) -> str:
    """The page with every table made anew."""
    return TABLE.sub(lambda match: match[1] + table(match[2]) + "\n", text).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
