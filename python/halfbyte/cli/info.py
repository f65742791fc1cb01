"""`halfbyte info`: what this machine offers, which kernels were chosen and why, and versions."""

import importlib.metadata
import json
import platform
from typing import Annotated, Any

import typer

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show processor features, the kernel chosen for each op and why, CUDA, and versions."""
    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _show(facts)


def collect() -> dict[str, Any]:
    """All facts as plain values: versions, processor, variants, cuda, cuda_devices."""
    import torch

    import halfbyte

    versions = {"halfbyte": halfbyte.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "processor": {
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "features": halfbyte.cpu_features(),
        },
        "variants": halfbyte.variants(),
        "cuda": halfbyte.cuda_status(),
        "cuda_devices": halfbyte.cuda_devices(),
    }


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    grid.add_row(
        "versions",
        ", ".join(f"{name} {version or '-'}" for name, version in facts["versions"].items()),
    )
    processor = facts["processor"]
    features = processor["features"]
    present = " ".join(name for name, has in features.items() if has)
    absent = " ".join(name for name, has in features.items() if not has)
    grid.add_row("processor", f"{processor['machine']}, {processor['threads']} threads")
    grid.add_row("", f"has {present or 'none of the known features'}")
    if absent:
        grid.add_row("", f"[dim]lacks {absent}[/dim]")
    grid.add_row("cuda", escape(facts["cuda"]))
    for index, device in enumerate(facts["cuda_devices"]):
        grid.add_row("", escape(f"device {index}: {device}"))
    console.print(grid)

    table = Table(title="kernels, best first", title_justify="left", title_style="bold")
    for column in ("op", "variant", "", "why not"):
        table.add_column(column, overflow="fold")
    for op, variants in facts["variants"].items():
        for index, variant in enumerate(variants):
            unused = "" if variant["chosen"] else "a better one is usable"
            table.add_row(
                op if index == 0 else "",
                variant["name"],
                "[green]chosen[/green]" if variant["chosen"] else "",
                escape(variant["why_not"]) or unused,
                end_section=index == len(variants) - 1,
            )
    console.print(table)
