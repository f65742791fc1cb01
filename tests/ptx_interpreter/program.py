"""A kernel ready to run: one closure for each instruction, and what the machine must know of it."""

import gc
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from . import definitions
from .decode import Decoder, Step
from .errors import PtxError, UninitialisedRead, Unsupported
from .instructions import BUILDERS, COLLECTIVES
from .instructions.load_store import access_size
from .instructions.warp import sync_warp
from .memory import Memory
from .parser import parse
from .state import State
from .syntax import Address, Entry, Instruction, Module, Symbol, Variable

# What the machine does with an instruction.
STEP, BRANCH, BRANCH_INDEX, EXIT, TRAP, BARRIER, COLLECTIVE = range(7)
KINDS = {"bra": BRANCH, "brx": BRANCH_INDEX, "ret": EXIT, "exit": EXIT, "trap": TRAP, "brkpt": TRAP}


@dataclass
class Operation:
    """One decoded instruction. `guard` is (predicate row, negated); STEPs apply it themselves."""

    kind: int
    step: Step | None
    guard: tuple[int, bool] | None
    instruction: Instruction
    targets: tuple[int, ...] = ()
    members: object = None  # COLLECTIVE: closure for the membermask
    barrier: tuple | None = None  # BARRIER: closures for the id and the thread count
    check: object = None  # not for STEPs: looks for registers that were never written


class Program:
    """Decodes lazily and only once; mutated modules share the operations they did not change."""

    def __init__(self, module: "LoadedModule", entry: Entry, cache: dict):
        self.module = module
        self.entry = entry
        self.addresses, self.static_shared, self.local_bytes = self._layout()
        self.param_bytes = max((p.offset + p.size for p in entry.parameters), default=0)
        instructions = entry.instructions
        self.names = [instruction.name for instruction in instructions]
        self.warp_epochs = any(i.opcode == "bar" and "warp" in i.modifiers for i in instructions)
        self.granule = _granule(instructions)
        operations = []
        for instruction in instructions:
            key = id(instruction)
            if key not in cache:
                cache[key] = (instruction, self._decode(instruction))
            operations.append(cache[key][1])
        self.doubtful = definitions.doubtful_registers(entry)
        self.operations = [self._tracked(o) for o in operations] if self.doubtful else operations

    def _layout(self) -> tuple[dict[str, int], int, int]:
        """Addresses of all names; bytes of static shared and of local memory."""
        addresses = {p.name: p.offset for p in self.entry.parameters}
        addresses.update(self.module.storage.addresses)
        used = _symbols(self.entry)
        variables = {**self.module.syntax.variables, **self.entry.variables}
        shared = local = 0
        dynamic_align = 1
        for variable in variables.values():
            if variable.name not in used or variable.size is None:
                continue
            if variable.space == "shared":
                shared = -(-shared // variable.align) * variable.align
                addresses[variable.name] = shared
                shared += variable.size
            elif variable.space == "local":
                local = -(-local // variable.align) * variable.align
                addresses[variable.name] = local
                local += variable.size
        dynamic = [v for v in variables.values() if v.space == "shared" and v.size is None]
        for variable in dynamic:
            dynamic_align = max(dynamic_align, variable.align)
        if dynamic:
            shared = -(-shared // dynamic_align) * dynamic_align
        addresses.update({variable.name: shared for variable in dynamic})
        return addresses, shared, local

    def _decode(self, instruction: Instruction) -> Operation:
        decoder = Decoder(instruction, self.addresses)
        opcode = instruction.opcode
        guard = None
        if instruction.guard is not None:
            guard = (instruction.guard[0].index, instruction.guard[1])
        if opcode in KINDS:
            return self._control(decoder, KINDS[opcode], guard)
        if opcode in ("bar", "barrier"):
            return self._barrier(decoder, guard)
        if opcode not in BUILDERS:
            raise Unsupported(
                f"PTX line {instruction.line}: opcode {instruction.name} in `{instruction.text}`"
            )
        step = BUILDERS[opcode](decoder)
        members = COLLECTIVES.get(opcode, lambda _: None)(decoder)
        if members is not None:
            return Operation(COLLECTIVE, step, guard, instruction, members=members)
        return Operation(STEP, _guarded(step, guard), guard, instruction)

    def _control(self, decoder: Decoder, kind: int, guard) -> Operation:
        decoder.has("uni")
        instruction, entry = decoder.instruction, self.entry
        names = []
        step = None
        if kind == BRANCH:
            names = [decoder.operands[0].name]
        elif kind == BRANCH_INDEX:
            decoder.one_of("idx")
            names = entry.branch_targets[decoder.operands[1].name]
            step = decoder.read(0, "u32")
        decoder.finish((0, 1, 2))
        for name in names:
            if name not in entry.labels:
                raise decoder.unsupported(f"unknown label {name}")
        targets = tuple(entry.labels[name] for name in names)
        return Operation(kind, step, guard, instruction, targets)

    def _barrier(self, decoder: Decoder, guard) -> Operation:
        """bar.sync id{, count}, bar.red.op d, id{, count}, p, bar.warp.sync mask."""
        instruction = decoder.instruction
        decoder.has("cta")
        if decoder.has("warp"):
            decoder.one_of("sync")
            members = decoder.read(0, "u32")
            return Operation(COLLECTIVE, sync_warp(decoder), guard, instruction, members=members)
        reduction = decoder.has("red")
        if not reduction:
            decoder.one_of("sync")
        decoder.has("aligned")
        step = _barrier_reduction(decoder) if reduction else None
        first, count = (1, 3) if reduction else (0, 1)
        with_count = len(decoder.operands) == count + 1
        decoder.finish((count, count + 1))
        number = decoder.read(first, "u32")
        threads = decoder.read(first + 1, "u32") if with_count else None
        return Operation(BARRIER, step, guard, instruction, barrier=(number, threads))

    def _tracked(self, operation: Operation) -> Operation:
        """Adds the run-time check of registers that may be read before they are written."""
        instruction, inner, guard = operation.instruction, operation.step, operation.guard
        reads = [r for r in definitions.read(instruction) if r in self.doubtful]
        writes = [r for r in definitions.written(instruction) if r in self.doubtful]
        if not (reads or writes):
            return operation

        def check(state, mask):
            if guard is not None and instruction.guard[0] in reads:
                _check_defined(state, mask, instruction.guard[0])
            active = _apply_guard(state, mask, guard)
            for register in reads:
                _check_defined(state, active, register)

        def step(state, mask):
            if operation.kind == STEP:
                check(state, mask)
            result = inner(state, mask)
            active = _apply_guard(state, mask, guard)
            for register in writes:
                row = state.defined[register.bits, register.index]
                np.copyto(row, True, where=True if active is None else active)
            return result

        return replace(
            operation, step=step if writes or operation.kind == STEP else inner, check=check
        )

    def new_state(self, shape) -> State:
        state = State(self.entry.register_counts, shape)
        for register in self.doubtful:
            state.defined[register.bits, register.index] = np.zeros(state.count, np.bool_)
        return state


def _apply_guard(state, mask, guard):
    if guard is None:
        return mask
    index, negated = guard
    flags = ~state.pred[index] if negated else state.pred[index]
    return flags if mask is None else flags & mask


def _check_defined(state, active, register) -> None:
    row = state.defined[register.bits, register.index]
    bad = ~row if active is None else active & ~row
    if bad.any():
        raise UninitialisedRead(
            f"register {register.name} is read before it is written", int(np.argmax(bad))
        )


def _guarded(step: Step, guard) -> Step:
    """A STEP that runs for the threads whose predicate holds, if any."""
    if guard is None:
        return step
    index, negated = guard

    def guarded(state, mask):
        flags = ~state.pred[index] if negated else state.pred[index]
        active = flags if mask is None else flags & mask
        count = np.count_nonzero(active)
        if count:
            state.ran[state.pc] = True
            step(state, None if count == state.count else active.copy())

    return guarded


def _barrier_reduction(decoder: Decoder) -> Step:
    """bar.red: each thread gets the count, conjunction or disjunction of its block's predicates."""
    name = decoder.one_of("popc", "and", "or")
    decoder.one_of("u32" if name == "popc" else "pred")
    flag = decoder.read(decoder.operands[-1], "pred")
    write = decoder.write(0, "u32" if name == "popc" else "pred")

    def step(state, mask):
        flags = np.broadcast_to(flag(state), state.count).reshape(state.shape.blocks, -1)
        flags = flags[:, : state.shape.threads]
        result = {"popc": np.sum, "and": np.all, "or": np.any}[name](flags, axis=1)
        result = np.repeat(result, state.shape.block_threads)
        write(state, mask, result.astype(np.uint32 if name == "popc" else np.bool_))

    return step


def _symbols(entry: Entry) -> set[str]:
    found = set()
    for instruction in entry.instructions:
        for operand in instruction.operands:
            base = operand.base if isinstance(operand, Address) else operand
            if isinstance(base, Symbol):
                found.add(base.name)
    return found


def _granule(instructions: list[Instruction]) -> int:
    """Bytes of the smallest access that may touch shared memory (at most 16)."""
    smallest = 16
    elsewhere = {"global", "local", "const", "param"}
    for i in instructions:
        if i.opcode in ("ld", "st", "atom", "red") and not elsewhere & set(i.modifiers):
            smallest = min(smallest, access_size(i))
        elif i.opcode == "cp" and len(i.operands) > 2:
            smallest = min(smallest, getattr(i.operands[2], "value", 4))
    return smallest


class Storage:
    """The module's .const and .global variables, as host memory."""

    def __init__(self, variables: dict[str, Variable]):
        self.addresses: dict[str, int] = {}
        self.variables: dict[str, Variable] = {}
        self._arrays = []
        for variable in variables.values():
            if variable.space not in ("const", "global"):
                continue
            size = variable.size or 1
            array = np.zeros(size + 256, np.uint8)
            skip = -array.ctypes.data % 256
            content = np.frombuffer(variable.content[:size], np.uint8)
            array[skip : skip + len(content)] = content
            self._arrays.append(array)
            self.addresses[variable.name] = array.ctypes.data + skip
            self.variables[variable.name] = variable

    def register(self, memory: Memory) -> None:
        for name, variable in self.variables.items():
            memory.add(
                self.addresses[name],
                variable.size or 1,
                f".{variable.space} {name}",
                writable=variable.space == "global",
            )


class LoadedModule:
    """A parsed module, its variables' storage, and the programs decoded so far."""

    def __init__(self, syntax: Module, storage: Storage | None = None, cache: dict | None = None):
        self.syntax = syntax
        self.storage = storage or Storage(syntax.variables)
        self.cache = {} if cache is None else cache
        self._programs: dict[str, Program] = {}

    @property
    def kernels(self) -> list[str]:
        return list(self.syntax.entries)

    def program(self, kernel: str) -> Program:
        """The kernel of that name (or the only one whose name contains it), decoded."""
        name = self.syntax.find(kernel)
        if name not in self._programs:
            try:
                with _no_collection():
                    entry = self.syntax.entries[name]
                    self._programs[name] = Program(self, entry, self.cache)
            except PtxError as error:
                raise error.locate(f"kernel {name}") from None
        return self._programs[name]


@lru_cache(maxsize=64)
def load_module(text: str) -> LoadedModule:
    """Parses PTX text; the same text is parsed once."""
    with _no_collection():
        return LoadedModule(parse(text))


@contextmanager
def _no_collection():
    """Making a hundred thousand small objects that all stay: the collector would only slow it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
