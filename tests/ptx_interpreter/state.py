"""The registers and special registers of the threads of several blocks, all executed together.

Thread t of the chunk is thread `t % block_threads` of block `t // block_threads`; `block_threads`
is the block size rounded up to whole warps of 32 (the threads beyond the block are never active).
Every register is one row: `state.u32[i]`, `state.s32[i]`, `state.f32[i]` are views of the same
32-bit row.
"""

from dataclasses import dataclass

import numpy as np

from .ptx_types import DTYPES, VIEWS

WARP = 32


@dataclass(frozen=True)
class Shape:
    """Grid and block of a launch, and which blocks are executed at once."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    first_block: int
    blocks: int

    @property
    def threads(self) -> int:
        """Threads of one block."""
        x, y, z = self.block
        return x * y * z

    @property
    def block_threads(self) -> int:
        """Threads of one block, whole warps."""
        return -(-self.threads // WARP) * WARP

    def describe(self, thread: int) -> str:
        """`block (1,0,0) thread (5,0,0)`"""
        block, index = divmod(int(thread), self.block_threads)
        return f"block {_unravel(self.first_block + block, self.grid)} thread " + str(
            _unravel(index, self.block)
        )


def _unravel(index: int, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    x, y, _ = shape
    return index % x, index // x % y, index // (x * y)


class State:
    """Rows of registers by view type, plus what the instructions need to know of the launch."""

    def __init__(self, register_counts: dict[int, int], shape: Shape):
        self.shape = shape
        self.count = shape.blocks * shape.block_threads
        for bits, views in VIEWS.items():
            rows = np.zeros((register_counts.get(bits, 0), self.count), DTYPES[views[0]])
            for view in views:
                setattr(self, view, list(rows.view(DTYPES[view])))
        self.defined: dict[tuple[int, int], np.ndarray] = {}
        self.carry = np.zeros(self.count, np.bool_)
        index = np.arange(self.count, dtype=np.uint32)
        self.block_index = (index // np.uint32(shape.block_threads)).astype(np.int64)
        self.thread_in_block = index % np.uint32(shape.block_threads)
        self.lane = index % np.uint32(WARP)
        self.alive = self.thread_in_block < shape.threads
        self.clock = 0
        self._special: dict[str, np.ndarray] = {}
        # Filled in by the machine: memory spaces, checks, counters, what executes now.
        self.spaces = None
        self.shadow = None
        self.counters = None
        self.ran: list[bool] = []
        self.instructions: list = []
        self.pc = 0

    @property
    def line(self) -> int:
        """The PTX line that executes now."""
        return self.instructions[self.pc].line

    def special(self, name: str) -> np.ndarray:
        """The value of special register %name: uint32, or uint64 for the 64-bit ones."""
        if name.startswith(("clock", "globaltimer")):
            self.clock += 1
            wide = name in ("clock64", "globaltimer")
            return (np.uint64 if wide else np.uint32)(self.clock)
        if name not in self._special:
            self._special[name] = self._make_special(name)
        return self._special[name]

    def _make_special(self, name: str) -> np.ndarray:
        base, _, axis = name.partition(".")
        shape = self.shape
        if axis:
            position = "xyz".index(axis)
            if base == "ntid":
                return np.uint32(shape.block[position])
            if base == "nctaid":
                return np.uint32(shape.grid[position])
            if base == "tid":
                return _unravel(self.thread_in_block, shape.block)[position].astype(np.uint32)
            blocks = self.block_index + shape.first_block
            return _unravel(blocks, shape.grid)[position].astype(np.uint32)
        one = np.uint32(1)
        simple = {
            "laneid": lambda: self.lane,
            "warpid": lambda: self.thread_in_block // np.uint32(WARP),
            "nwarpid": lambda: np.uint32(shape.block_threads // WARP),
            "smid": lambda: np.uint32(0),
            "nsmid": lambda: np.uint32(1),
            "gridid": lambda: np.uint32(0),
            "lanemask_eq": lambda: one << self.lane,
            "lanemask_lt": lambda: (one << self.lane) - one,
            "lanemask_le": lambda: ((one << self.lane) - one) | (one << self.lane),
            "lanemask_gt": lambda: ~(((one << self.lane) - one) | (one << self.lane)),
            "lanemask_ge": lambda: ~((one << self.lane) - one),
            "total_smem_size": lambda: np.uint32(self.spaces.shared.size),
            "dynamic_smem_size": lambda: np.uint32(self.spaces.shared.dynamic),
        }
        return simple[name]()
