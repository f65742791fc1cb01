"""The fake runtime's memory: every allocation with exact bounds, fresh bytes poisoned.

Fresh memory is filled with 0xff: NaN as float32, bf16 and float16, so results that depend on it
show.
"""

import ctypes
from dataclasses import dataclass

import numpy as np

from .errors import PtxError
from .memory import Memory

PAGE = 4096


class RuntimeFault(PtxError):
    """Host code called the CUDA runtime wrongly: bad range, double free, unknown kernel or
    handle."""


@dataclass
class Block:
    """One live allocation; `kind` is device, managed or host."""

    start: int
    size: int
    kind: str
    storage: np.ndarray | None


class FakeMemory:
    """Allocations by start address, and what is counted of them."""

    def __init__(self):
        self.registry = Memory()  # what kernels may touch
        self.blocks: dict[int, Block] = {}
        self.freed: set[int] = set()
        self.live = {"device": 0, "managed": 0, "host": 0}
        self.peak = {"device": 0, "managed": 0, "host": 0}
        self.allocations = {"device": 0, "managed": 0, "host": 0}

    def allocate(self, size: int, kind: str) -> int:
        """Page-aligned poisoned memory; 0 for size 0."""
        if size == 0:
            return 0
        storage = np.full(size + PAGE, 0xFF, np.uint8)
        start = -(-storage.ctypes.data // PAGE) * PAGE
        self.blocks[start] = Block(start, size, kind, storage)
        self.freed.discard(start)
        self.registry.add(start, size, f"{kind} allocation of {size} bytes", keep_alive=storage)
        self.live[kind] += size
        self.peak[kind] = max(self.peak[kind], self.live[kind])
        self.allocations[kind] += 1
        return start

    def free(self, start: int, kinds: tuple[str, ...]) -> None:
        """Frees exactly one live allocation of one of these kinds; null is fine."""
        if start == 0:
            return
        block = self.blocks.get(start)
        if block is None:
            again = "a second time" if start in self.freed else "that was never allocated"
            raise RuntimeFault(f"free of {start:#x} {again}")
        if block.kind not in kinds:
            raise RuntimeFault(f"free of {block.kind} memory with the function for {kinds[0]}")
        del self.blocks[start]
        self.freed.add(start)
        self.registry.remove(start)
        self.live[block.kind] -= block.size
        ctypes.memset(start, 0xDD, block.size)

    def block_of(self, pointer: int, size: int = 1) -> Block | None:
        """The allocation that holds all of [pointer, pointer + size)."""
        for block in self.blocks.values():
            if block.start <= pointer and pointer + size <= block.start + block.size:
                return block
        return None

    def managed_range(self, pointer: int, size: int) -> Block:
        block = self.block_of(pointer, max(size, 1))
        if block is None or block.kind != "managed":
            raise RuntimeFault(
                f"{size} bytes at {pointer:#x} are not inside one managed allocation"
            )
        return block

    def require_known(self, pointer: int, size: int, what: str) -> None:
        """The bytes must be an allocation or a buffer that the test registered."""
        if size and not self.registry.covers(pointer, size):
            raise RuntimeFault(f"{what}: {size} bytes at {pointer:#x} are not device memory")
