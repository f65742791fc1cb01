"""What to change where a step does not fit: each change tried alone, then together, then on more
devices, by the calculator itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from halfbyte.memory_plan.plan import Settings, plan
from halfbyte.memory_plan.scaling import rank_plan
from halfbyte.memory_plan.shapes import Shape

_MOST_RANKS = 64


@dataclasses.dataclass(frozen=True)
class Change:
    """`flags` of `halfbyte plan` that bring the peak of a process down to `peak` bytes."""

    flags: str
    peak: int


def changes_that_fit(
    shape: Shape,
    settings: Settings,
    capacity: int,
    device: str = "cuda",
    ranks: int = 1,
) -> list[Change]:
    """Changes after which a process fits in `capacity` bytes: each single one; if none does alone,
    those that leave the sequence whole, together, and then the fewest GPUs. Empty: none of it
    helps. `ranks`: processes now, under FSDP2."""

    def peak(settings: Settings, ranks: int) -> int:
        if ranks > 1:
            return rank_plan(shape, settings, ranks, "fsdp2", device).peak
        return plan(shape, settings, device).peak

    steps = list(_steps(settings))
    tried = [(flags, peak(dataclasses.replace(settings, **new), ranks)) for flags, new in steps]
    if device == "cuda" and settings.method == "qlora":
        tried.append((f"--gpus {2 * ranks}", peak(settings, 2 * ranks)))
    if single := [Change(flags, size) for flags, size in tried if size <= capacity]:
        return single
    flags: list[str] = []
    for flag, new in steps:
        if "sequence" in new:
            continue
        settings = dataclasses.replace(settings, **new)
        flags = [f for f in flags if f.split()[0] != flag.split()[0]] + [flag]
        if (size := peak(settings, ranks)) <= capacity:
            return [Change(" ".join(flags), size)]
    while device == "cuda" and settings.method == "qlora" and 2 * ranks <= _MOST_RANKS:
        ranks *= 2
        if (size := peak(settings, ranks)) <= capacity:
            return [Change(" ".join([*flags, f"--gpus {ranks}"]), size)]
    return []


def _steps(settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    """(flags, changed settings), those that cost nothing or only time first."""
    if settings.method != "qlora":
        yield "--method qlora", {"method": "qlora"}
    if not settings.optimizer.endswith("8bit"):
        name = "paged-adamw8bit" if settings.paged else "adamw8bit"
        yield f"--optimizer {name}", {"optimizer": name}
    if not settings.double_quant:
        yield "--double-quant", {"double_quant": True}
    if not settings.checkpointing:
        yield "--checkpointing", {"checkpointing": True}
    if settings.batch > 2:
        half = settings.batch // 2
        yield f"--batch {half}", {"batch": half}
    if settings.batch > 1:
        yield "--batch 1", {"batch": 1}
    if settings.sequence > 256:
        half = settings.sequence // 2
        yield f"--seq {half}", {"sequence": half}
