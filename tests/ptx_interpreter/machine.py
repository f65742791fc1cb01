"""Execution of one chunk of blocks.

Threads with the same pc form a group; the group with the lowest pc runs until its pc reaches
another group's, a branch splits it, or it has to wait, so threads that a branch separated meet
again as early as possible. While all threads are in one group nothing is masked, which is the usual
case.

A barrier holds threads until all of their block are there. A warp collective holds them until all
lanes that the membermask names are at the same instruction. If nobody can run and somebody waits,
the threads that never came are the error.
"""

import numpy as np

from .checks import Shadow
from .counters import Counters
from .definitions import registers_in
from .errors import Divergence, PtxError, StepLimit, Trap, Unsupported
from .memory import LocalMemory, Memory, ParamMemory, SharedMemory, Spaces
from .program import BARRIER, BRANCH, BRANCH_INDEX, COLLECTIVE, EXIT, STEP, Program
from .state import WARP, Shape

FULL = np.uint32(0xFFFFFFFF)
NEVER = 1 << 60


class Machine:
    """Runs the blocks of `shape` of one launch."""

    def __init__(
        self,
        program: Program,
        shape: Shape,
        memory: Memory,
        arguments: bytes,
        shared_bytes: int,
        checks: bool,
        counters: Counters,
        counts: list[int],
        ran: list[bool],
        steps_left: int,
    ):
        self.program = program
        self.counts = counts
        self.steps_left = steps_left
        state = self.state = program.new_state(shape)
        size = program.static_shared + shared_bytes
        shared = SharedMemory(shape.blocks, size, shared_bytes)
        local = LocalMemory(state.count, program.local_bytes, checks)
        state.spaces = Spaces(memory, shared, local, ParamMemory(arguments))
        state.counters = counters
        state.ran = ran
        state.instructions = program.entry.instructions
        if checks and size:
            state.shadow = Shadow(state, program, shape.blocks * shared.stride, shared.stride)
        self.pending: dict[int, np.ndarray | None] = {}
        self.parked: dict[int, np.ndarray] = {}
        self.waiting = np.zeros(state.count, np.bool_)
        self.wait_pc = np.zeros(state.count, np.int64)
        self.wait_id = np.zeros(state.count, np.int64)
        self.exited = ~state.alive

    def run(self) -> int:
        """Runs to the end; returns the steps that are left of the limit."""
        state = self.state
        self.pending[0] = None if state.alive.all() else state.alive.copy()
        with np.errstate(all="ignore"):
            while self.pending:
                pc = min(self.pending)
                mask = self.pending.pop(pc)
                try:
                    self._run_group(pc, mask, min(self.pending, default=NEVER))
                except PtxError as error:
                    raise error.locate(self._where(state.pc, error.thread)) from None
                except Exception as error:
                    error.add_note(f"  interpreter bug at {self._where(state.pc, None)}")
                    raise
        if self.parked or self.waiting.any():
            self._raise_stuck()
        return self.steps_left

    def _run_group(self, pc: int, mask, limit: int) -> None:
        """Runs the group until it splits, waits, ends or reaches pc `limit`, where others are."""
        state, operations, counts = self.state, self.program.operations, self.counts
        end = len(operations)
        size = state.count if mask is None else int(np.count_nonzero(mask))
        if size == state.count:
            mask = None
        warps = size // WARP
        if mask is not None:
            warps = int(np.count_nonzero(mask.reshape(-1, WARP).any(axis=1)))
        while pc < limit:
            if pc == end:
                self._exit(mask)
                return
            operation = operations[pc]
            state.pc = pc
            counts[pc] += warps
            self.steps_left -= 1
            kind = operation.kind
            if kind == STEP:
                operation.step(state, mask)
                pc += 1
                continue
            if self.steps_left <= 0:
                raise StepLimit("the launch executes more instructions than its step limit")
            if operation.check is not None:
                operation.check(state, mask)
            active = self._guarded(mask, operation.guard)
            chosen = size if active is mask else int(np.count_nonzero(active))
            if chosen == 0:
                pc += 1
                continue
            if chosen == size:
                active = mask
            state.ran[pc] = True
            if kind == BRANCH and chosen == size:
                pc = operation.targets[0]
                continue
            if kind == COLLECTIVE and chosen == size and self._everyone(operation, mask, pc):
                operation.step(state, mask)
                pc += 1
                continue
            if kind == BARRIER and active is None:
                self._check_count(operation)
                self._pass_barrier(operation, None)
                pc += 1
                continue
            if chosen != size:
                self._add(pc + 1, ~active if mask is None else mask & ~active)
            self._leave(pc, operation, active)
            return
        self._add(pc, mask)

    def _leave(self, pc: int, operation, active) -> None:
        """The group does something that not all of it survives together."""
        kind, state = operation.kind, self.state
        if kind == BRANCH:
            self._add(operation.targets[0], active)
        elif kind == BRANCH_INDEX:
            self._branch_index(operation, active)
        elif kind == EXIT:
            self._exit(active)
        elif kind == BARRIER:
            self._arrive_barrier(pc, operation, active)
        elif kind == COLLECTIVE:
            self._arrive_collective(pc, operation, active)
        else:
            thread = 0 if active is None else int(np.argmax(active))
            raise Trap(f"{operation.instruction.opcode} executed", thread)
        assert state.pc == pc

    def _guarded(self, mask, guard):
        if guard is None:
            return mask
        index, negated = guard
        flags = ~self.state.pred[index] if negated else self.state.pred[index]
        return flags.copy() if mask is None else flags & mask

    def _add(self, pc: int, mask) -> None:
        """Puts threads at pc, joining those that are there."""
        if pc in self.pending:
            mask = self.pending[pc] | mask
        self.pending[pc] = mask

    def _all(self, mask) -> np.ndarray:
        return self.state.alive.copy() if mask is None else mask

    def _exit(self, mask) -> None:
        self.exited |= self._all(mask)

    def _branch_index(self, operation, mask) -> None:
        index = np.broadcast_to(operation.step(self.state), self.state.count)
        active = self._all(mask)
        for value in np.unique(index[active]):
            chosen = active & (index == value)
            if value >= len(operation.targets):
                raise Trap(f"brx.idx with index {value}", int(np.argmax(chosen)))
            self._add(operation.targets[value], chosen)

    # Barriers

    def _check_count(self, operation) -> None:
        threads = operation.barrier[1]
        wanted = self.state.shape.threads
        if threads is not None and not np.all(threads(self.state) == wanted):
            raise Unsupported(f"a barrier for a part of the block (of {wanted} threads)")

    def _pass_barrier(self, operation, released) -> None:
        """`released` threads (None: all) go on; their blocks begin a new epoch."""
        if operation.step is not None:
            operation.step(self.state, released)
        if self.state.shadow is not None:
            where = slice(None) if released is None else np.flatnonzero(released)
            self.state.shadow.barrier(where)

    def _arrive_barrier(self, pc: int, operation, active) -> None:
        state = self.state
        active = self._all(active)
        self._check_count(operation)
        self.waiting |= active
        self.wait_pc[active] = pc
        self.wait_id[active] = np.broadcast_to(operation.barrier[0](state), state.count)[active]
        rows = self.waiting.reshape(state.shape.blocks, -1)
        complete = rows.sum(axis=1) == state.shape.threads
        released = (rows & complete[:, None]).reshape(-1)
        if not released.any():
            return
        self._check_same_barrier(released)
        self.waiting &= ~released
        for place in np.unique(self.wait_pc[released]):
            some = released & (self.wait_pc == place)
            self._pass_barrier(self.program.operations[place], some)
            self._add(int(place) + 1, some)

    def _check_same_barrier(self, released) -> None:
        """Inside a warp one bar.sync, inside a block one barrier number."""
        lanes = released.reshape(-1, WARP)
        places = self.wait_pc.reshape(-1, WARP)
        low = np.where(lanes, places, NEVER).min(axis=1)
        high = np.where(lanes, places, -1).max(axis=1)
        mixed = lanes.any(axis=1) & (low != high)
        if mixed.any():
            warp = int(np.argmax(mixed))
            lines = [self.program.operations[pc].instruction.line for pc in (low[warp], high[warp])]
            raise Divergence(
                f"threads of one warp wait at different barriers, PTX lines {lines}", warp * WARP
            )
        blocks = self.wait_id.reshape(self.state.shape.blocks, -1)
        inside = released.reshape(blocks.shape)
        low = np.where(inside, blocks, NEVER).min(axis=1)
        high = np.where(inside, blocks, -1).max(axis=1)
        mixed = inside.any(axis=1) & (low != high)
        if mixed.any():
            block = int(np.argmax(mixed))
            raise Divergence(
                f"threads of one block wait at barriers {low[block]} and {high[block]}",
                block * self.state.shape.block_threads,
            )

    # Collectives

    def _everyone(self, operation, mask, pc: int) -> bool:
        """Every lane is here and every membermask names the whole warp."""
        return (
            mask is None
            and pc not in self.parked
            and bool(np.all(operation.members(self.state) == FULL))
        )

    def _arrive_collective(self, pc: int, operation, active) -> None:
        """Lanes go on when all that their membermask names are here; the others are parked."""
        state = self.state
        here = self._all(active)
        if pc in self.parked:
            here = here | self.parked.pop(pc)
        present = np.packbits(here.reshape(-1, WARP), axis=1, bitorder="little").view(np.uint32)
        present = np.repeat(present[:, 0], WARP)
        members = np.broadcast_to(operation.members(state), state.count)
        unnamed = here & ((members >> state.lane) & np.uint32(1) == 0)
        if unnamed.any():
            thread = int(np.argmax(unnamed))
            raise Divergence(
                f"membermask {int(members[thread]):#010x} does not name lane "
                f"{state.lane[thread]}, which executes the instruction",
                thread,
            )
        ready = here & ((members & present) == members)
        if not np.array_equal(ready, here):
            self.parked[pc] = here & ~ready
        if ready.any():
            operation.step(state, ready)
            self._add(pc + 1, ready)

    # Errors

    def _raise_stuck(self) -> None:
        """Threads wait for threads that will not come."""
        state, operations = self.state, self.program.operations
        where = np.full(state.count, "has exited", object)
        for pc, mask in self.parked.items():
            where[mask] = f"waits at PTX line {operations[pc].instruction.line}"
        for thread in np.flatnonzero(self.waiting):
            line = operations[self.wait_pc[thread]].instruction.line
            where[thread] = f"waits at the barrier in PTX line {line}"
        where[~state.alive] = "does not exist"
        if self.parked:
            pc = min(self.parked)
            thread = int(np.argmax(self.parked[pc]))
            members = np.broadcast_to(operations[pc].members(state), state.count)[thread]
            first = thread // WARP * WARP
            lanes = [i for i in range(WARP) if members >> i & 1 and not self.parked[pc][first + i]]
            what = f"lanes {lanes} that membermask {int(members):#010x} names are not there"
            missing = f"lane {lanes[0]} {where[first + lanes[0]]}"
        else:
            thread = int(np.argmax(self.waiting))
            pc = int(self.wait_pc[thread])
            first = thread // state.shape.block_threads * state.shape.block_threads
            block = slice(first, first + state.shape.threads)
            absent = np.flatnonzero(~self.waiting[block])
            what = f"only {state.shape.threads - len(absent)} of {state.shape.threads} threads came"
            missing = f"thread {absent[0]} of the block {where[first + absent[0]]}"
        name = operations[pc].instruction.name
        error = Divergence(f"{name}: {what}; {missing}", thread)
        raise error.locate(self._where(pc, thread))

    def _where(self, pc: int, thread: int | None) -> str:
        """Kernel, PTX line and text, source line, block and thread, and the operands' values."""
        entry = self.program.entry
        if pc >= len(entry.instructions):
            return f"kernel {entry.name}"
        instruction = entry.instructions[pc]
        lines = [
            f"kernel {entry.name}, PTX line {instruction.line}: {instruction.text}",
            f"  source {self.program.module.syntax.place(instruction.source)}",
        ]
        if thread is not None:
            lines.append(
                f"  {self.state.shape.describe(thread)}: {self._values(instruction, thread)}"
            )
        return "\n  ".join(lines)

    def _values(self, instruction, thread: int) -> str:
        registers = [r for operand in instruction.operands for r in registers_in(operand)]
        if instruction.guard is not None:
            registers.append(instruction.guard[0])
        values = []
        for register in dict.fromkeys(registers):
            view = {1: "pred", 8: "u8", 16: "u16", 32: "u32", 64: "u64"}[register.bits]
            value = getattr(self.state, view)[register.index][thread]
            text = str(bool(value)) if register.bits == 1 else f"{int(value):#x}"
            values.append(f"{register.name} = {text}")
        return ", ".join(values)
