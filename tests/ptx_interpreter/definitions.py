"""Which registers might be read before they are written.

A forward data-flow analysis over the control-flow graph finds the reads that are preceded by a
write on every path: those need no check at run time. The registers of all other reads (usually
none, or those written under a predicate) are tracked thread by thread while the kernel runs.
"""

from .syntax import Address, Entry, Instruction, Negated, Pair, Register, Vector

# Opcodes whose first operand is not a destination.
NO_DESTINATION = {
    "st", "red", "bra", "brx", "cp", "prefetch", "prefetchu", "applypriority", "stmatrix", "ret",
    "exit", "trap", "brkpt", "membar", "fence", "nanosleep", "griddepcontrol", "pmevent",
    "nop",
}  # fmt: skip
ENDS = {"ret", "exit", "trap"}


def registers_in(operand) -> list[Register]:
    """Every register an operand mentions."""
    if isinstance(operand, Register):
        return [operand]
    if isinstance(operand, Negated):
        return [operand.register]
    if isinstance(operand, Pair):
        return registers_in(operand.first) + registers_in(operand.second)
    if isinstance(operand, Vector):
        return [register for item in operand.items for register in registers_in(item)]
    if isinstance(operand, Address) and isinstance(operand.base, Register):
        return [operand.base]
    return []


def has_destination(instruction: Instruction) -> bool:
    if instruction.opcode in ("bar", "barrier"):
        return "red" in instruction.modifiers
    return instruction.opcode not in NO_DESTINATION


def written(instruction: Instruction) -> list[Register]:
    if not has_destination(instruction) or not instruction.operands:
        return []
    return registers_in(instruction.operands[0])


def read(instruction: Instruction) -> list[Register]:
    first = 1 if has_destination(instruction) else 0
    found = [r for operand in instruction.operands[first:] for r in registers_in(operand)]
    if instruction.guard is not None:
        found.append(instruction.guard[0])
    return found


def successors(entry: Entry, pc: int) -> list[int]:
    instruction = entry.instructions[pc]
    following = [pc + 1] if pc + 1 < len(entry.instructions) else []
    if instruction.opcode == "bra":
        target = [entry.labels[instruction.operands[0].name]]
    elif instruction.opcode == "brx":
        names = entry.branch_targets[instruction.operands[1].name]
        target = [entry.labels[name] for name in names]
    elif instruction.opcode in ENDS:
        target = []
    else:
        return following
    target = [pc for pc in target if pc < len(entry.instructions)]
    return target + (following if instruction.guard is not None else [])


def doubtful_registers(entry: Entry) -> set[Register]:
    """Registers with a read that some path reaches without a write."""
    numbers: dict[Register, int] = {}

    def bits(registers) -> int:
        result = 0
        for register in registers:
            result |= 1 << numbers.setdefault(register, len(numbers))
        return result

    reads = [bits(read(i)) for i in entry.instructions]
    always = [bits(written(i)) if i.guard is None else 0 for i in entry.instructions]
    everything = -1
    before = [everything] * len(reads)
    if not reads:
        return set()
    before[0] = 0
    queue = [0]
    while queue:
        pc = queue.pop()
        after = before[pc] | always[pc]
        for following in successors(entry, pc):
            merged = before[following] & after
            if merged != before[following]:
                before[following] = merged
                queue.append(following)
    doubtful = 0
    for reading, defined in zip(reads, before, strict=True):
        doubtful |= reading & ~defined
    return {register for register, number in numbers.items() if doubtful >> number & 1}
