"""Where results come from and where they go: machine, commit, Markdown tables, CSV."""

from __future__ import annotations

import csv
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def machine() -> str:
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The commit measured, "+ changes" when sources differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    sources = git("status", "--porcelain", "--", "cpp", "cuda", "python")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" + changes" if sources else "")


def write_csv(path: Path, rows: list[dict]) -> None:
    """One row a case, with machine and commit; replaces older results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], "machine", "commit"])
        writer.writeheader()
        for row in rows:
            writer.writerow({**row, "machine": machine(), "commit": commit()})


def print_table(title: str, rows: list[dict]) -> None:
    """A pasteable Markdown table."""
    print(f"\n### {title}\n")
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        cells = (f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values())
        print("| " + " | ".join(cells) + " |")
