"""`launch`: checks the arguments, splits the grid into chunks of blocks, runs them, reports."""

import ctypes
import struct
import time
from dataclasses import dataclass

import numpy as np

from .counters import Counters, Coverage
from .errors import LaunchError
from .machine import Machine
from .memory import Memory
from .program import LoadedModule, Program
from .ptx_types import DTYPES
from .state import Shape
from .syntax import Parameter

THREADS_AT_ONCE = 1 << 15
SHARED_AT_ONCE = 1 << 23  # bytes; the shadow takes several times as much
STEP_LIMIT = 50_000_000
MAX_SHARED = 227 << 10  # of an H100 block; other cards have less, which is the host code's business


@dataclass
class Report:
    """What a launch did."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    counters: Counters
    coverage: Coverage
    seconds: float


def _triple(value) -> tuple[int, int, int]:
    values = (value,) if isinstance(value, int | np.integer) else tuple(value)
    return tuple(int(v) for v in values + (1,) * (3 - len(values)))


def launch(
    module: LoadedModule,
    kernel: str,
    grid,
    block,
    args,
    shared_bytes: int = 0,
    checks: bool = True,
    measure: bool = True,
    memory: Memory | None = None,
    step_limit: int = STEP_LIMIT,
) -> Report:
    """Executes a kernel and returns a `Report`; any fault raises a `PtxError`.

    `kernel` is the entry's name or a part of it that fits only one. Arguments are numpy arrays or
    torch tensors (passed as pointers; they become the registered memory together with `memory`),
    None (a null pointer), numpy or ctypes scalars of the parameter's size, Python ints and floats,
    or bytes (structs). `checks` turns the shared-memory shadow off; `measure` the memory counters.
    """
    started = time.perf_counter()
    program = module.program(kernel)
    grid, block = _triple(grid), _triple(block)
    known = Memory() if memory is None else memory.copy()
    module.storage.register(known)
    arguments = _pack_arguments(program, args, known)
    _check_launch(program, grid, block, shared_bytes)
    counters = Counters(measure)
    counts = [0] * len(program.operations)
    ran = [False] * len(program.operations)
    for shape in _chunks(grid, block, program.static_shared + shared_bytes):
        machine = Machine(
            program,
            shape,
            known,
            arguments,
            shared_bytes,
            checks,
            counters,
            counts,
            ran,
            step_limit,
        )
        step_limit = machine.run()
    _count_instructions(program, counts, counters)
    coverage = _coverage(program, counts, ran)
    seconds = time.perf_counter() - started
    return Report(program.entry.name, grid, block, shared_bytes, counters, coverage, seconds)


def _check_launch(program: Program, grid, block, shared_bytes: int) -> None:
    """The limits every CUDA device has."""
    threads = block[0] * block[1] * block[2]
    if min(grid) < 1 or grid[0] >= 2**31 or max(grid[1:]) >= 2**16:
        raise LaunchError(f"grid {grid}")
    if min(block) < 1 or threads > 1024 or max(block[:2]) > 1024 or block[2] > 64:
        raise LaunchError(f"block {block} of {threads} threads")
    if shared_bytes < 0 or program.static_shared + shared_bytes > MAX_SHARED:
        raise LaunchError(f"{program.static_shared} + {shared_bytes} bytes of shared memory")
    most = program.entry.tuning.get(".maxntid", "")
    if most:
        limit = int(np.prod([int(word) for word in most.replace(",", " ").split()]))
        if threads > limit:
            raise LaunchError(f"{threads} threads in a block; __launch_bounds__ says {limit}")


def _chunks(grid, block, shared: int):
    blocks = grid[0] * grid[1] * grid[2]
    one = Shape(grid, block, 0, 1)
    most = max(1, min(THREADS_AT_ONCE // one.block_threads, SHARED_AT_ONCE // max(shared, 1)))
    for first in range(0, blocks, most):
        yield Shape(grid, block, first, min(most, blocks - first))


def _pack_arguments(program: Program, args, memory: Memory) -> bytes:
    parameters = program.entry.parameters
    if isinstance(args, bytes):  # the whole parameter block, as the driver sees it
        if len(args) != program.param_bytes:
            raise LaunchError(f"{len(args)} bytes for {program.param_bytes} bytes of parameters")
        return args
    args = list(args)
    if len(args) != len(parameters):
        raise LaunchError(
            f"{program.entry.name} has {len(parameters)} parameters, got {len(args)} arguments"
        )
    block = bytearray(program.param_bytes)
    for i, (parameter, value) in enumerate(zip(parameters, args, strict=True)):
        content = _argument_bytes(i, parameter, value, memory)
        block[parameter.offset : parameter.offset + parameter.size] = content
    return bytes(block)


def _argument_bytes(i: int, parameter: Parameter, value, memory: Memory) -> bytes:
    what = f"argument {i} ({parameter.name}, .{parameter.type_name}, {parameter.size} bytes)"
    if value is None:
        value = np.uint64(0)
    elif hasattr(value, "data_ptr") or (isinstance(value, np.ndarray) and value.ndim > 0):
        value = np.uint64(memory.register(value, name=f"argument {i} {_describe(value)}"))
    if isinstance(value, bool | int | float):
        return _python_number(what, parameter, value)
    if isinstance(value, np.generic | np.ndarray):
        content = value.tobytes()
    elif isinstance(value, bytes | bytearray | ctypes.Structure | ctypes._SimpleCData):
        content = bytes(value)
    else:
        raise LaunchError(f"{what}: cannot pass a {type(value).__name__}")
    if len(content) != parameter.size:
        raise LaunchError(f"{what}: got {len(content)} bytes ({type(value).__name__})")
    return content


def _describe(array) -> str:
    shape = "x".join(str(n) for n in array.shape)
    return f"{array.dtype}[{shape}]"


def _python_number(what: str, parameter: Parameter, value) -> bytes:
    dtype = DTYPES[parameter.type_name]
    if parameter.size != dtype.itemsize:
        raise LaunchError(f"{what}: a number for a struct")
    if parameter.type_name in ("f32", "f64"):
        return np.array(value, dtype).tobytes()
    if isinstance(value, float):
        if parameter.size == 4 and parameter.type_name == "b32":
            return struct.pack("<f", value)
        raise LaunchError(f"{what}: a float for an integer")
    bits = 8 * parameter.size
    if not -(1 << (bits - 1)) <= value < 1 << bits:
        raise LaunchError(f"{what}: {value} does not fit")
    return (int(value) % (1 << bits)).to_bytes(parameter.size, "little")


def _count_instructions(program: Program, counts: list[int], counters: Counters) -> None:
    for name, count in zip(program.names, counts, strict=True):
        if count:
            counters.instructions[name] += count


def _coverage(program: Program, counts: list[int], ran: list[bool]) -> Coverage:
    """An instruction whose predicate was never true does not count as executed."""
    effective = [
        0 if operation.guard is not None and not reached else count
        for operation, count, reached in zip(program.operations, counts, ran, strict=True)
    ]
    return Coverage(program.entry, program.module.syntax, effective)
