"""What a launch did: instructions, coverage, bytes, sectors, bank conflicts, mma."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .state import WARP
from .syntax import Entry, Module

SECTOR = 32  # bytes: the unit of a global memory request
BANKS = 32


@dataclass
class Traffic:
    """Global memory, summed over warp requests."""

    requests: int = 0
    bytes: int = 0
    sectors: int = 0


@dataclass
class Counters:
    """Counts of one launch. Memory counts stay zero unless the launch was asked to `measure`.

    `instructions`: warp-instructions by opcode with modifiers (a warp that executes one for any of
    its threads counts 1). `mma`: warp-level matrix products. `global_read`, `global_written`:
    `Traffic`. `shared_requests` and `shared_wavefronts`: a request without bank conflicts takes one
    wavefront for each 128 bytes it moves at least, so `shared_conflicts` is what exceeds that;
    `conflicts_by_line` has it by PTX line.
    """

    measure: bool = True
    instructions: Counter = field(default_factory=Counter)
    mma: int = 0
    global_read: Traffic = field(default_factory=Traffic)
    global_written: Traffic = field(default_factory=Traffic)
    shared_requests: int = 0
    shared_wavefronts: int = 0
    shared_ideal: int = 0
    conflicts_by_line: Counter = field(default_factory=Counter)

    @property
    def shared_conflicts(self) -> int:
        return self.shared_wavefronts - self.shared_ideal

    def global_access(self, state, threads, addresses: np.ndarray, size: int, kind: str) -> None:
        traffic = self.global_read if kind.endswith("read") else self.global_written
        warp = _warps(state, threads)
        sector = addresses // SECTOR  # accesses are aligned and at most one sector wide
        traffic.requests += len(np.unique(warp))
        traffic.sectors += len(np.unique((warp << 44) ^ sector))
        traffic.bytes += len(addresses) * size

    def shared_access(self, state, threads, addresses: np.ndarray, size: int) -> None:
        """Wavefronts: 32, 16 or 8 lanes go together for accesses of up to 4, 8, 16 bytes; lanes on
        one word share it; a bank serves one word per wavefront."""
        if len(addresses) == 0:
            return
        together = WARP * 4 // max(size, 4)
        who = np.arange(state.count) if threads is None else threads
        phase = who // together
        words = (addresses[:, None] // 4) + np.arange(max(size // 4, 1))
        keys = np.unique((phase[:, None] << 20) + words)  # distinct words of a phase
        load = np.bincount((keys >> 20) * BANKS + keys % BANKS)
        rows = np.pad(load, (0, -len(load) % BANKS)).reshape(-1, BANKS)
        wavefronts = int(rows.max(axis=1).sum())
        ideal = len(np.unique(phase))
        self.shared_requests += len(np.unique(who // WARP))
        self.shared_wavefronts += wavefronts
        self.shared_ideal += ideal
        if wavefronts > ideal:
            self.conflicts_by_line[state.line] += wavefronts - ideal


def _warps(state, threads) -> np.ndarray:
    who = np.arange(state.count) if threads is None else threads
    return who // WARP


class Coverage:
    """Which instructions ran, with the predicate true for at least one thread."""

    def __init__(self, entry: Entry, syntax: Module, counts: list[int]):
        """`counts`: warp-instructions of each instruction of the kernel."""
        self._entry, self._syntax, self._counts = entry, syntax, counts

    @cached_property
    def executed(self) -> dict[int, int]:
        """PTX line -> warp-instructions."""
        executed: dict[int, int] = {}
        for instruction, count in zip(self._entry.instructions, self._counts, strict=True):
            executed[instruction.line] = executed.get(instruction.line, 0) + count
        return executed

    @cached_property
    def missed(self) -> list[tuple[int, str, str]]:
        """(PTX line, text, source place) of the instructions that never ran."""
        return [
            (instruction.line, instruction.text, self._syntax.place(instruction.source))
            for instruction, count in zip(self._entry.instructions, self._counts, strict=True)
            if count == 0
        ]

    @cached_property
    def source_lines(self) -> dict[tuple[str, int], bool]:
        """(file, line) -> whether any of its instructions ran."""
        lines: dict[tuple[str, int], bool] = {}
        for instruction, count in zip(self._entry.instructions, self._counts, strict=True):
            if instruction.source is not None:
                file = self._syntax.files.get(instruction.source.file, "?")
                key = (file, instruction.source.line)
                lines[key] = lines.get(key, False) or count > 0
        return lines

    @property
    def lines_run(self) -> set[int]:
        """PTX lines that were executed."""
        return {line for line, count in self.executed.items() if count}

    @property
    def ratio(self) -> float:
        """Executed instructions of all instructions."""
        if not self._counts:
            return 1.0
        return sum(count > 0 for count in self._counts) / len(self._counts)

    def merged(self, other: "Coverage") -> "Coverage":
        """Coverage by either launch (of the same kernel)."""
        counts = [a + b for a, b in zip(self._counts, other._counts, strict=True)]
        return Coverage(self._entry, self._syntax, counts)
