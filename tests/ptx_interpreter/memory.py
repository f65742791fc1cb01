"""Memory: global allocations at their host addresses, and shared, local and param space per launch.

A device address of global or const memory *is* the host address of the numpy or torch buffer that a
test registered, so pointers inside structs need no translation. Bounds are exact to the byte.
Shared, local and param addresses are offsets; `cvta` moves them into windows far above any host
address, by which a generic access finds its space again.
"""

import bisect
import ctypes
from dataclasses import dataclass

import numpy as np

from .errors import LaunchError, Misaligned, OutOfBounds, UninitialisedRead

WINDOW_SHIFT = 56
WINDOWS = {"shared": 1 << WINDOW_SHIFT, "local": 2 << WINDOW_SHIFT, "param": 3 << WINDOW_SHIFT}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
LINE = 32  # buffers are viewed from and to multiples of this: the widest access


@dataclass
class Allocation:
    """Bytes [start, end). `view` covers them rounded outward to whole lines, `base` is its
    address."""

    start: int
    end: int
    name: str
    writable: bool
    keep_alive: object
    base: int = 0
    view: np.ndarray | None = None

    def __post_init__(self):
        # The rounding stays inside the pages of the buffer; bytes outside [start, end) are never
        # used.
        self.base = self.start // LINE * LINE
        size = -(-(self.end - self.base) // LINE) * LINE
        self.view = np.frombuffer((ctypes.c_uint8 * size).from_address(self.base), np.uint8)


def buffer_range(array) -> tuple[int, int]:
    """Address and size in bytes of a numpy array, a torch tensor or a ctypes array."""
    if hasattr(array, "data_ptr"):
        if array.numel() == 0:
            return array.data_ptr(), 0
        span = 1 + sum((n - 1) * s for n, s in zip(array.shape, array.stride(), strict=True))
        return array.data_ptr(), span * array.element_size()
    if isinstance(array, np.ndarray):
        low, high = np.lib.array_utils.byte_bounds(array)
        return low, high - low if array.size else 0
    return ctypes.addressof(array), ctypes.sizeof(array)


class Memory:
    """The registered global memory. Overlapping registrations are refused, repeated ones are
    fine."""

    def __init__(self):
        self._allocations: list[Allocation] = []  # sorted by start
        self._starts: list[int] = []

    def register(self, array, name: str = "", writable: bool = True) -> int:
        """Makes the buffer known to kernels; returns its address."""
        start, size = buffer_range(array)
        known = self._containing(start, size)
        if known is None:
            shape = "x".join(str(n) for n in getattr(array, "shape", (size,)))
            label = name or f"{getattr(array, 'dtype', 'bytes')}[{shape}]"
            self.add(start, size, label, writable, array)
        return start

    def add(self, start: int, size: int, name: str, writable: bool = True, keep_alive=None) -> None:
        """Registers raw host bytes."""
        if size == 0:
            return
        at = bisect.bisect_right(self._starts, start)
        for neighbour in self._allocations[max(at - 1, 0) : at + 1]:
            if neighbour.start < start + size and start < neighbour.end:
                raise LaunchError(f"{name} overlaps registered memory {neighbour.name}")
        self._allocations.insert(at, Allocation(start, start + size, name, writable, keep_alive))
        self._starts.insert(at, start)

    def remove(self, start: int) -> None:
        """Forgets the allocation that begins there."""
        at = bisect.bisect_left(self._starts, start)
        if at == len(self._starts) or self._starts[at] != start:
            raise LaunchError(f"no registered memory begins at {start:#x}")
        del self._allocations[at], self._starts[at]

    def covers(self, start: int, size: int) -> bool:
        """Whether all these bytes lie in one allocation."""
        return self._containing(start, size) is not None

    def copy(self) -> "Memory":
        other = Memory()
        other._allocations, other._starts = list(self._allocations), list(self._starts)
        return other

    def _containing(self, start: int, size: int) -> Allocation | None:
        at = bisect.bisect_right(self._starts, start) - 1
        if at >= 0 and start + size <= self._allocations[at].end:
            return self._allocations[at]
        return None

    def _explain(self, address: int, size: int) -> str:
        at = bisect.bisect_right(self._starts, address) - 1
        text = f"{size} bytes at {address:#x}"
        if at >= 0:
            before = self._allocations[at]
            text += f", {address + size - before.end} bytes beyond the end of {before.name}"
        if at + 1 < len(self._allocations):
            after = self._allocations[at + 1]
            text += f", {after.start - address} bytes before {after.name}"
        return text

    def segments(self, state, threads, addresses, size: int, kind: str) -> list:
        """[(selector or None, buffer, byte offsets)]: one segment for each allocation touched."""
        if len(addresses) == 0:
            return []
        check_alignment(threads, addresses, size)
        if state.counters.measure:
            state.counters.global_access(state, threads, addresses, size, kind)
        low, high = int(addresses.min()), int(addresses.max())
        allocation = self._containing(low, high - low + size)
        if allocation is not None:
            self._check_writable(allocation, threads, kind)
            return [(None, allocation.view, addresses - allocation.base)]
        at = np.searchsorted(np.asarray(self._starts, np.int64), addresses, side="right") - 1
        ends = np.asarray([a.end for a in self._allocations] + [0], np.int64)
        bad = (at < 0) | (addresses + size > ends[at])
        if bad.any():
            i = int(np.argmax(bad))
            raise OutOfBounds(
                f"{kind} outside registered memory: {self._explain(int(addresses[i]), size)}",
                thread_at(threads, i),
            )
        segments = []
        for index in np.unique(at):
            allocation = self._allocations[index]
            selector = at == index
            self._check_writable(allocation, threads, kind)
            segments.append((selector, allocation.view, addresses[selector] - allocation.base))
        return segments

    @staticmethod
    def _check_writable(allocation: Allocation, threads, kind: str) -> None:
        if not kind.endswith("read") and not allocation.writable:
            raise OutOfBounds(f"{kind} to read-only {allocation.name}", thread_at(threads, 0))


def thread_at(threads: np.ndarray | None, i: int) -> int:
    return int(i if threads is None else threads[i])


def check_alignment(threads, addresses: np.ndarray, size: int) -> None:
    wrong = addresses & np.int64(size - 1)
    if wrong.any():
        i = int(np.argmax(wrong != 0))
        raise Misaligned(
            f"address {int(addresses[i]):#x} is not a multiple of {size}", thread_at(threads, i)
        )


def check_inside(threads, addresses: np.ndarray, size: int, limit: int, space: str) -> None:
    bad = (addresses < 0) | (addresses + size > limit)
    if bad.any():
        i = int(np.argmax(bad))
        raise OutOfBounds(
            f"{size} bytes at offset {int(addresses[i])} of {space} memory, which has {limit}",
            thread_at(threads, i),
        )


class SharedMemory:
    """`size` bytes for each block, of which the last `dynamic` were asked for by the launch."""

    def __init__(self, blocks: int, size: int, dynamic: int):
        self.size, self.dynamic = size, dynamic
        self.stride = -(-size // LINE) * LINE
        self.view = np.zeros(blocks * self.stride, np.uint8)

    def segments(self, state, threads, addresses, size: int, kind: str) -> list:
        check_alignment(threads, addresses, size)
        check_inside(threads, addresses, size, self.size, "shared")
        if state.counters.measure:
            state.counters.shared_access(state, threads, addresses, size)
        block = state.block_index if threads is None else state.block_index[threads]
        offsets = addresses + block * self.stride
        if state.shadow is not None:
            state.shadow.access(state, threads, offsets, size, kind)
        return [(None, self.view, offsets)]


class LocalMemory:
    """`size` bytes for each thread, with a record of which were ever written."""

    def __init__(self, threads: int, size: int, checks: bool):
        self.size = size
        self.stride = -(-size // LINE) * LINE
        self.view = np.zeros(threads * self.stride, np.uint8)
        self.written = np.zeros_like(self.view) if checks else None

    def segments(self, state, threads, addresses, size: int, kind: str) -> list:
        check_alignment(threads, addresses, size)
        check_inside(threads, addresses, size, self.size, "local")
        thread = np.arange(state.count) if threads is None else threads
        offsets = addresses + thread * self.stride
        if self.written is not None:
            rows = self.written.reshape(-1, size)
            if kind.endswith("read"):
                unset = ~rows[offsets // size].all(axis=1)
                if unset.any():
                    i = int(np.argmax(unset))
                    raise UninitialisedRead(
                        f"local memory at offset {int(addresses[i])} was never written",
                        thread_at(threads, i),
                    )
            else:
                rows[offsets // size] = 1
        return [(None, self.view, offsets)]


class ParamMemory:
    """The arguments of the launch, the same for all threads, read-only."""

    def __init__(self, content: bytes):
        self.size = len(content)
        self.view = np.zeros(-(-self.size // LINE) * LINE, np.uint8)
        self.view[: self.size] = np.frombuffer(content, np.uint8)

    def segments(self, state, threads, addresses, size: int, kind: str) -> list:
        check_alignment(threads, addresses, size)
        check_inside(threads, addresses, size, self.size, "param")
        if kind != "read":
            raise OutOfBounds(f"{kind} to kernel parameters", thread_at(threads, 0))
        return [(None, self.view, addresses)]


class Spaces:
    """The memory of one chunk of blocks, by the name of the space; `generic` finds it by window."""

    def __init__(
        self, memory: Memory, shared: SharedMemory, local: LocalMemory, param: ParamMemory
    ):
        self.shared = shared
        self._by_name = {
            "global": memory,
            "const": memory,
            "shared": shared,
            "local": local,
            "param": param,
            "generic": self,
        }
        self._by_window = {0: memory, 1: shared, 2: local, 3: param}

    def get(self, name: str):
        return self._by_name[name]

    def segments(self, state, threads, addresses, size: int, kind: str) -> list:
        windows = addresses >> np.int64(WINDOW_SHIFT)
        found = np.unique(windows)
        segments = []
        for window in found:
            space = self._by_window.get(int(window))
            chosen = windows == window
            if space is None:
                i = int(np.argmax(chosen))
                raise OutOfBounds(
                    f"address {int(addresses[i]) % 2**64:#x} is in no memory space",
                    thread_at(threads, i),
                )
            base = np.int64(int(window) << WINDOW_SHIFT)
            if len(found) == 1:
                return space.segments(state, threads, addresses - base, size, kind)
            some = np.flatnonzero(chosen) if threads is None else threads[chosen]
            for inner, view, offsets in space.segments(
                state, some, addresses[chosen] - base, size, kind
            ):
                selector = np.flatnonzero(chosen)
                segments.append((selector if inner is None else selector[inner], view, offsets))
        return segments


def gather(segments: list, lanes: int, element: int, count: int) -> np.ndarray:
    """Values at the segments' offsets: shape (lanes,) or, for vectors, (lanes, count)."""
    dtype, size = UNSIGNED[element], element * count
    shape = lanes if count == 1 else (lanes, count)
    result = None
    for selector, view, offsets in segments:
        words = view.view(dtype)
        if count > 1:
            words = words.reshape(-1, count)
        values = words[offsets // size]
        if selector is None:
            return values
        if result is None:
            result = np.zeros(shape, dtype)
        result[selector] = values
    return np.zeros(shape, dtype) if result is None else result


def scatter(segments: list, values: np.ndarray, element: int, count: int) -> None:
    """The inverse of `gather`; of two lanes at one address the later one wins."""
    dtype, size = UNSIGNED[element], element * count
    for selector, view, offsets in segments:
        words = view.view(dtype)
        if count > 1:
            words = words.reshape(-1, count)
        words[offsets // size] = values if selector is None else values[selector]
