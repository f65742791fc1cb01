"""What instruction builders are made of: modifiers taken one by one, operands as closures.

A builder gets a `Decoder` for one instruction and returns `step(state, mask)`. `mask` is None when
all threads of the chunk execute, else a bool array. `read` and `write` return closures, so that
everything about an operand that can be known before the launch is settled once.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

from .errors import Unsupported
from .ptx_types import DTYPES, FLOATS, SIZES, bits_of, view_of
from .state import State
from .syntax import (
    Address,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Register,
    Special,
    Symbol,
    Vector,
)

Read = Callable[[State], np.ndarray]
Step = Callable[[State, "np.ndarray | None"], None]
Write = Callable[[State, "np.ndarray | None", np.ndarray], None]
WriteAt = Callable[[State, "np.ndarray | None", np.ndarray], None]


class Decoder:
    """One instruction under construction. `addresses` gives every variable's address."""

    def __init__(self, instruction: Instruction, addresses: dict[str, int]):
        self.instruction = instruction
        self.operands = instruction.operands
        self.addresses = addresses
        self._left = list(instruction.modifiers)

    # Modifiers

    def unsupported(self, what: str) -> Unsupported:
        return Unsupported(f"PTX line {self.instruction.line}: {what} in `{self.instruction.text}`")

    def has(self, modifier: str) -> bool:
        """Takes the modifier if it is there."""
        if modifier in self._left:
            self._left.remove(modifier)
            return True
        return False

    def one_of(self, *modifiers: str, default: str | None = None) -> str:
        """Takes the one of these modifiers that is there."""
        for modifier in modifiers:
            if self.has(modifier):
                return modifier
        if default is None:
            raise self.unsupported(f"none of the modifiers {', '.join(modifiers)}")
        return default

    def take_type(self) -> str:
        """The next type modifier."""
        for modifier in self._left:
            if modifier in SIZES:
                self._left.remove(modifier)
                return modifier
        raise self.unsupported("no known type")

    def finish(self, operands: int | tuple[int, ...]) -> None:
        """Every modifier must have been taken: none is ever ignored."""
        if self._left:
            raise self.unsupported(f"modifier .{self._left[0]}")
        counts = (operands,) if isinstance(operands, int) else operands
        if len(self.operands) not in counts:
            raise self.unsupported(f"{len(self.operands)} operands")

    # Operands

    def read(self, operand: Operand | int, type_name: str) -> Read:
        """Values of the operand as the numpy type of `type_name`; wider registers are truncated."""
        if isinstance(operand, int):
            operand = self.operands[operand]
        dtype = DTYPES[type_name]
        if isinstance(operand, Register):
            return self._read_register(operand, type_name)
        if isinstance(operand, Negated) and type_name == "pred":
            index = operand.register.index
            return lambda state: ~state.pred[index]
        if isinstance(operand, Immediate):
            constant = self._constant(operand, type_name)
            return lambda state: constant
        if isinstance(operand, Special):
            name = operand.name
            return lambda state: state.special(name).astype(dtype)
        if isinstance(operand, Symbol) and operand.name in self.addresses:
            address = dtype.type(self.addresses[operand.name] + operand.offset)
            return lambda state: address
        raise self.unsupported(f"operand {operand}")

    def _read_register(self, register: Register, type_name: str) -> Read:
        index, bits = register.index, bits_of(type_name)
        view = view_of(type_name)
        if register.bits == bits:
            return _row_reader(view, index)
        if register.bits < bits or type_name in FLOATS or 1 in (bits, register.bits):
            raise self.unsupported(
                f"register {register.name} of {register.bits} bits as .{type_name}"
            )
        wide, dtype = f"u{register.bits}", DTYPES[type_name]
        return lambda state: getattr(state, wide)[index].astype(dtype)

    def _constant(self, operand: Immediate, type_name: str) -> np.generic:
        dtype = DTYPES[type_name]
        if type_name == "pred":
            return np.bool_(operand.value)
        if operand.float_bits:
            if type_name in FLOATS and operand.float_bits != 8 * dtype.itemsize:
                value = np.uint64(operand.value).view(np.float64)
                if operand.float_bits == 32:
                    value = np.uint32(operand.value).view(np.float32)
                return dtype.type(value)
            if operand.float_bits != 8 * dtype.itemsize:
                raise self.unsupported(f"float constant as .{type_name}")
        elif type_name in FLOATS:
            raise self.unsupported(f"integer constant {operand.value} as .{type_name}")
        bits = operand.value % (1 << 8 * dtype.itemsize)
        return np.frombuffer(bits.to_bytes(dtype.itemsize, "little"), dtype)[0]

    def write(self, operand: Operand | int, type_name: str) -> Write:
        """Stores values of `type_name`; in a wider register they are sign- or zero-extended."""
        if isinstance(operand, int):
            operand = self.operands[operand]
        if isinstance(operand, Symbol) and operand.name == "_":
            return lambda state, mask, value: None
        if not isinstance(operand, Register):
            raise self.unsupported(f"destination {operand}")
        view = self._destination_view(operand, type_name)
        index, source = operand.index, DTYPES[type_name]
        dtype = DTYPES[view]

        def write(state, mask, value):
            row = getattr(state, view)[index]
            if value.dtype != dtype:
                value = value.astype(source, copy=False).astype(dtype)
            if mask is None:
                row[...] = value
            else:
                np.copyto(row, value, where=mask)

        return write

    def write_at(self, operand: Operand, type_name: str) -> WriteAt:
        """Like `write` with values of the threads `threads` only (None: of all)."""
        if isinstance(operand, Symbol) and operand.name == "_":
            return lambda state, threads, value: None
        if not isinstance(operand, Register):
            raise self.unsupported(f"destination {operand}")
        view = self._destination_view(operand, type_name)
        index, dtype = operand.index, DTYPES[view]

        def write_at(state, threads, value):
            row = getattr(state, view)[index]
            if threads is None:
                row[...] = value.astype(dtype, copy=False)
            else:
                row[threads] = value.astype(dtype, copy=False)

        return write_at

    def _destination_view(self, register: Register, type_name: str) -> str:
        bits = bits_of(type_name)
        if register.bits == bits:
            return view_of(type_name)
        if register.bits < bits or type_name in FLOATS or 1 in (bits, register.bits):
            raise self.unsupported(f".{type_name} into {register.name} of {register.bits} bits")
        return ("s" if type_name[0] == "s" else "u") + str(register.bits)

    def address(self, operand: Operand | int) -> Callable[[State, "np.ndarray | None"], np.ndarray]:
        """Addresses (int64) of the given threads (None: of all)."""
        if isinstance(operand, int):
            operand = self.operands[operand]
        if not isinstance(operand, Address):
            raise self.unsupported(f"operand {operand} where an address belongs")
        base, offset = operand.base, operand.offset
        if isinstance(base, Register):
            index = base.index
            if base.bits == 64:
                offset = np.int64(offset)

                def address(state, threads):
                    row = state.s64[index]
                    return (row if threads is None else row[threads]) + offset
            else:
                offset = np.uint32(offset % (1 << 32))

                def address(state, threads):
                    row = state.u32[index]
                    return ((row if threads is None else row[threads]) + offset).astype(np.int64)

            return address
        constant = self.fixed_address(operand)

        def fixed_address(state, threads):
            return np.full(state.count if threads is None else len(threads), constant, np.int64)

        return fixed_address

    def fixed_address(self, operand: Operand | int) -> int:
        """The address `[name+offset]`, the same for all threads."""
        if isinstance(operand, int):
            operand = self.operands[operand]
        if operand.base is None:
            return operand.offset
        if operand.base.name not in self.addresses:
            raise self.unsupported(f"unknown name {operand.base.name}")
        return self.addresses[operand.base.name] + operand.offset

    def items(self, operand: Operand | int, count: int | None = None) -> tuple:
        """The elements of a vector operand; a plain one counts as a vector of one."""
        if isinstance(operand, int):
            operand = self.operands[operand]
        items = operand.items if isinstance(operand, Vector) else (operand,)
        if count is not None and len(items) != count:
            raise self.unsupported(f"{len(items)} registers where {count} belong")
        return items


@cache
def _row_reader(view: str, index: int) -> Read:
    """`state.u32[7]`, compiled: the fastest closure that Python has."""
    return eval(f"lambda state: state.{view}[{index}]")


def threads_of(mask: np.ndarray | None) -> np.ndarray | None:
    """Indices of the active threads; None stays None: all."""
    return None if mask is None else np.flatnonzero(mask)


def elementwise(
    decoder: Decoder, function: Callable, destination: str, sources: tuple[str, ...]
) -> Step:
    """d = function(a, b, ...): operand 0 of type `destination`, the rest of types `sources`."""
    write = decoder.write(0, destination)
    reads = [decoder.read(i + 1, type_name) for i, type_name in enumerate(sources)]
    if len(reads) == 1:
        (a,) = reads
        return lambda state, mask: write(state, mask, function(a(state)))
    if len(reads) == 2:
        a, b = reads
        return lambda state, mask: write(state, mask, function(a(state), b(state)))
    if len(reads) == 3:
        a, b, c = reads
        return lambda state, mask: write(state, mask, function(a(state), b(state), c(state)))
    return lambda state, mask: write(state, mask, function(*[read(state) for read in reads]))
