"""What every benchmark shares: samples, roofs, shapes, and where results come from and go to."""

from __future__ import annotations

import argparse
import csv
import functools
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
LONG_MS = 10.0  # a call this long is not repeated within its turn
MIN_TURNS = 3


def sample(
    calls: dict[str, Callable[[], object]], turns: int = 60, seconds: float = 1.0, burst: int = 1
) -> dict[str, list[float]]:
    """Milliseconds of each call, taken in turns: A B C A B C ...

    A turn runs its call `burst` times, so that all but the first find in the caches what the
    caches can hold, whatever the others read meanwhile. A call drops out after `turns` turns, or
    once it has been timed for `seconds` and at least three turns. One untimed call comes first.
    """
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    waiting = dict(calls)
    for turn in range(1, turns + 1):
        for name, call in list(waiting.items()):
            for _ in range(burst):
                start = time.perf_counter()
                call()
                elapsed = time.perf_counter() - start
                taken[name].append(1e3 * elapsed)
                spent[name] += elapsed
                if 1e3 * elapsed > LONG_MS:
                    break
            if spent[name] > seconds and turn >= MIN_TURNS:
                del waiting[name]
    return taken


def fastest(calls: dict[str, Callable[[], object]], **options) -> dict[str, float]:
    """The shortest of each call's samples, in ms."""
    return {name: min(taken) for name, taken in sample(calls, **options).items()}


def memory_roof(nbytes: int, kind: str = "read") -> float:
    """GB/s at which torch's threads "read", "write" or "copy" `nbytes` in all, over and over."""
    step = 4 << 20
    return _memory_roof(max(2 * step, -(-nbytes // step) * step), kind)


@functools.cache
def _memory_roof(nbytes: int, kind: str) -> float:
    memory = torch.ones(nbytes // 4)
    first, second = memory.chunk(2)
    calls = {
        "read": {"one stream": memory.sum, "two streams": lambda: torch.dot(first, second)},
        "write": {"fill": lambda: memory.fill_(1.0)},
        "copy": {"copy": lambda: first.copy_(second)},
    }[kind]
    best = fastest(calls, turns=10, seconds=0.2, burst=5)
    return nbytes / min(best.values()) / 1e6


def named_shapes() -> dict[str, tuple[int, int]]:
    """(N, K) by name, from shapes.csv."""
    with (ROOT / "benchmarks" / "shapes.csv").open() as file:
        return {row["name"]: (int(row["N"]), int(row["K"])) for row in csv.DictReader(file)}


@functools.cache
def machine() -> str:
    """The processor and the threads in use."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    return f"{name}, {torch.get_num_threads()} threads"


@functools.cache
def commit() -> str:
    """The commit measured, "+ changes" when sources differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    sources = git("status", "--porcelain", "--", "cpp", "cuda", "python")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" + changes" if sources else "")


def parser(documentation: str) -> argparse.ArgumentParser:
    """A command's parser: its module's documentation is the help; --output is where CSV goes."""
    made = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    return made


def numbers(text: str) -> list[int]:
    """An argument such as 1,16,512."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,16,512, got {text!r}")
    return found


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """What reads an argument such as one,two of `known` names."""
    known = list(known)

    def parse(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(
                f"expected some of {','.join(known)}, got {unknown[0]!r}"
            )
        return found

    return parse


dtypes = names(("bfloat16", "float32", "float16"))


def print_birthplace() -> None:
    print(f"machine: {machine()}; commit {commit()}; torch {torch.__version__}", flush=True)


def columns(rows: Iterable[dict]) -> list[str]:
    """Every key of any row, in order of appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def write_csv(path: Path, rows: list[dict]) -> None:
    """One row a case, with machine and commit; replaces older results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*columns(rows), "machine", "commit"])
        writer.writeheader()
        for row in rows:
            writer.writerow({**row, "machine": machine(), "commit": commit()})


def print_table(title: str, rows: list[dict]) -> None:
    """A pasteable Markdown table, without the columns that are empty in every row."""
    shown = [name for name in columns(rows) if any(row.get(name, "") != "" for row in rows)]
    print(f"\n### {title}\n")
    print("| " + " | ".join(shown) + " |")
    print("|" + "---|" * len(shown))
    for row in rows:
        print("| " + " | ".join(_cell(row.get(name, "")) for name in shown) + " |")
    print(flush=True)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.3g}"
