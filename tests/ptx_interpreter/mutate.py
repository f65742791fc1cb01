"""Small faults planted into a kernel's PTX, to measure how much a test notices.

    for mutation in mutations(module, "gemm", kinds={"drop"}):
        ...  # mutation.module is a LoadedModule with one instruction changed
    outcome = hunt(module, "gemm", check, lines=report.coverage.lines_run)

`check(module)` must raise if the kernel computes wrongly. Dropped barriers, waits and commits must
all die. Every other survivor has to be looked at: many are equivalent (the bound of a loop that is
unrolled anyway, a sign that never is one); mutations of lines that never ran always survive, which
is what `lines` is for.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from .definitions import has_destination
from .errors import PtxError, Unsupported
from .instructions.load_store import access_size
from .program import LoadedModule
from .syntax import Address, Immediate, Instruction, Vector

KINDS = ("drop", "immediate", "offset", "comparison", "swap", "guard", "store")
FLIPPED = {
    "lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq",
    "lo": "ls", "ls": "lo", "hi": "hs", "hs": "hi",
    "ltu": "leu", "leu": "ltu", "gtu": "geu", "geu": "gtu", "equ": "neu", "neu": "equ",
}  # fmt: skip
# Opcodes with two sources whose order matters, as operand positions.
SWAPPED = {
    "sub": (1, 2), "shl": (1, 2), "shr": (1, 2), "div": (1, 2), "rem": (1, 2), "selp": (1, 2),
    "mad": (1, 3), "fma": (1, 3), "prmt": (1, 2), "bfi": (1, 2), "shf": (1, 2),
}  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    kind: str
    description: str  # "PTX line 40 (gemm.cu:12): dropped `bar.sync 0`"
    line: int
    module: LoadedModule


@dataclass
class Outcome:
    """`killed` with the message that did it; `survived`; `stillborn`: not executable PTX."""

    killed: list[tuple[Mutation, str]] = field(default_factory=list)
    survived: list[Mutation] = field(default_factory=list)
    stillborn: list[Mutation] = field(default_factory=list)

    @property
    def score(self) -> float:
        total = len(self.killed) + len(self.survived)
        return len(self.killed) / total if total else 1.0


def mutations(module: LoadedModule, kernel: str, kinds=KINDS) -> Iterator[Mutation]:
    """All mutations of these kinds, in program order, made one at a time."""
    entry = module.syntax.entry(kernel)
    for pc, instruction in enumerate(entry.instructions):
        for kind, what, changed in _changes(instruction):
            if kind not in kinds:
                continue
            place = module.syntax.place(instruction.source)
            description = f"PTX line {instruction.line} ({place}): {what}"
            yield Mutation(
                kind, description, instruction.line, _with_instruction(module, entry, pc, changed)
            )


def hunt(
    module: LoadedModule,
    kernel: str,
    check: Callable[[LoadedModule], None],
    kinds=KINDS,
    lines: set[int] | None = None,
    most: int | None = None,
    seed: int = 0,
) -> Outcome:
    """Runs `check` on the mutations of these PTX lines, of which `most` are drawn with `seed`."""
    outcome = Outcome()
    found = [m for m in mutations(module, kernel, kinds) if lines is None or m.line in lines]
    if most is not None and len(found) > most:
        found = random.Random(seed).sample(found, most)
    for mutation in found:
        try:
            check(mutation.module)
        except Unsupported:
            outcome.stillborn.append(mutation)
        except (AssertionError, PtxError) as error:
            outcome.killed.append((mutation, f"{type(error).__name__}: {error}"))
        else:
            outcome.survived.append(mutation)
    return outcome


def _with_instruction(module: LoadedModule, entry, pc: int, instruction) -> LoadedModule:
    instructions = list(entry.instructions)
    instructions[pc] = instruction
    entries = module.syntax.entries.replaced(replace(entry, instructions=instructions))
    return LoadedModule(replace(module.syntax, entries=entries), module.storage, dict(module.cache))


def _changes(i: Instruction) -> Iterator[tuple[str, str, Instruction]]:
    """(kind, what was done, changed instruction)"""
    if _synchronises(i):
        yield "drop", f"dropped `{i.text}`", _dropped(i)
    if i.opcode in ("st", "red"):
        yield "store", f"dropped `{i.text}`", _dropped(i)
    if i.guard is not None:
        register, negated = i.guard
        yield "guard", f"negated the guard of `{i.text}`", replace(i, guard=(register, not negated))
    for position, operand in enumerate(i.operands):
        is_integer = isinstance(operand, Immediate) and not operand.float_bits
        if is_integer and i.opcode not in ("bar", "barrier"):  # any free barrier number will do
            more = Immediate(operand.value + 1)
            yield (
                "immediate",
                f"{operand.value} + 1 in `{i.text}`",
                _with_operand(i, position, more),
            )
        if isinstance(operand, Address) and i.opcode in ("ld", "st", "atom", "red"):
            further = replace(operand, offset=operand.offset + access_size(i))
            yield "offset", f"next element in `{i.text}`", _with_operand(i, position, further)
    if i.opcode in ("setp", "set"):
        for position, modifier in enumerate(i.modifiers):
            if modifier in FLIPPED:
                flipped = list(i.modifiers)
                flipped[position] = FLIPPED[modifier]
                what = f"{modifier} -> {FLIPPED[modifier]} in `{i.text}`"
                yield "comparison", what, replace(i, modifiers=tuple(flipped))
    swapped = _swapped(i)
    if swapped is not None:
        yield "swap", f"swapped operands of `{i.text}`", swapped


def _synchronises(i: Instruction) -> bool:
    if i.opcode in ("bar", "barrier"):
        return not has_destination(i)
    return i.opcode == "cp" and bool({"commit_group", "wait_group", "wait_all"} & set(i.modifiers))


def _dropped(i: Instruction) -> Instruction:
    """`nop` keeps the place, so that labels and the other instructions stay as they are."""
    return replace(i, opcode="nop", modifiers=(), operands=(), text=f"(dropped) {i.text}")


def _with_operand(i: Instruction, position: int, operand) -> Instruction:
    operands = list(i.operands)
    operands[position] = operand
    return replace(i, operands=tuple(operands), text=f"(changed) {i.text}")


def _swapped(i: Instruction) -> Instruction | None:
    operands = list(i.operands)
    if i.opcode == "st" and isinstance(operands[1], Vector):
        first, second, *others = operands[1].items
        operands[1] = Vector((second, first, *others))
    elif i.opcode in SWAPPED:
        a, b = SWAPPED[i.opcode]
        if operands[a] == operands[b] or "wide" in i.modifiers:
            return None
        operands[a], operands[b] = operands[b], operands[a]
    elif i.opcode == "cvt" and len(operands) == 3:
        operands[1], operands[2] = operands[2], operands[1]
    else:
        return None
    if tuple(operands) == i.operands:
        return None
    return replace(i, operands=tuple(operands), text=f"(swapped) {i.text}")
