"""Memory for optimizer state that may leave the device, or the main memory, when room is short.

    parameters on   the state lies in                        who moves it
    CUDA            `_C.Arena`: managed memory, or pinned     the paged step: pages are fetched
                    where the device cannot fault pages in    ahead, and evicted on request
    the CPU         `FileArena`: a mapped temporary file      the operating system; the step asks
                                                              ahead, and evicts on request

An arena is one allocation for all tensors that are made together on one device: each starts at a
multiple of 256 bytes and keeps the arena alive. It is freed, and a file's room given back, when the
last of them is gone. Its tensors are CPU tensors for torch, whichever device their arena serves.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from halfbyte._native import _C

_ALIGNMENT = 256
_PAGEOUT = 21  # Linux's MADV_PAGEOUT, which the mmap module does not name
# A parameter's counter of steps: never paged, it is one number on the parameter's own device.
_RESIDENT = "step"


class FileArena(mmap.mmap):
    """Bytes in an unlinked temporary file in `folder`, mapped and shared with the file.

    All of its room is taken at once: a disk that is full says so here (OSError), not later by a
    signal.
    """

    kind = "file"
    address: int
    bytes: int

    def __new__(cls, size: int, folder: str | os.PathLike | None = None) -> FileArena:
        folder = tempfile.gettempdir() if folder is None else os.fspath(folder)
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                _take_room(file, size)
                arena = super().__new__(cls, file.fileno(), size)
        except OSError as error:
            raise OSError(
                error.errno,
                f"paged optimizer state: {size} bytes in {folder}: {os.strerror(error.errno or 0)}",
            ) from None
        arena.bytes = size
        arena.address = torch.frombuffer(arena, dtype=torch.uint8).data_ptr()
        return arena

    def fetch(self, begin: int, end: int) -> None:
        """Asks the operating system to read these bytes ahead."""
        self._advise(mmap.MADV_WILLNEED, begin, end)

    def evict(self, begin: int, end: int) -> None:
        """Writes these bytes to the file and asks for their memory back."""
        start = begin - begin % mmap.PAGESIZE
        self.flush(start, end - start)
        self._advise(_PAGEOUT, begin, end)

    def _advise(self, advice: int, begin: int, end: int) -> None:
        start = begin - begin % mmap.PAGESIZE
        with contextlib.suppress(OSError):  # a hint; older kernels do not know all of them
            self.madvise(advice, start, end - start)


def _take_room(file, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    chunk = bytes(1 << 20)
    for begin in range(0, size, len(chunk)):
        file.write(chunk[: size - begin])
    file.flush()


@dataclass
class Page:
    """Consecutive rows of a step whose state lies in [begin, end) of `arena`.

    `arena` is None for rows without paged state.
    """

    arena: FileArena | _C.Arena | None
    begin: int
    end: int
    first: int
    count: int


class PagedMemory:
    """The arenas of one optimizer, and how a step goes through them.

    Args:
        page_bytes: rows of a step are grouped into pages of at most this many bytes of state; a
            larger tensor is a page of its own.
        look_ahead: pages fetched before the one that is updated.
        evict: send each page back after its update.
        folder: of the files on the CPU; None: the system's for temporary files.
    """

    def __init__(
        self,
        page_bytes: int,
        look_ahead: int,
        evict: bool,
        folder: str | os.PathLike | None,
    ):
        for name, value, least in (("page_bytes", page_bytes, 1), ("look_ahead", look_ahead, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected a whole number >= {least}, got {value!r}")
        self.page_bytes = page_bytes
        self.look_ahead = look_ahead
        self.evict = bool(evict)
        self.folder = folder
        self.arenas: weakref.WeakSet = weakref.WeakSet()

    def __reduce__(self):
        """A copy has the settings; its arenas are its own."""
        return PagedMemory, (self.page_bytes, self.look_ahead, self.evict, self.folder)

    def allocate(
        self,
        layouts: Sequence[Mapping[str, tuple[torch.dtype, torch.Size]]],
        device: torch.device,
    ) -> list[dict[str, torch.Tensor]]:
        """Tensors of unknown content for each layout, in one new arena; `step` on `device`.

        Raises OSError where the file does not fit, `_C.Error` where CUDA has no memory.
        """
        starts, size = [], 0
        for layout in layouts:
            for name, (dtype, shape) in layout.items():
                if name != _RESIDENT:
                    starts.append(size)
                    span = shape.numel() * dtype.itemsize
                    size += math.ceil(span / _ALIGNMENT) * _ALIGNMENT
        arena = self._new_arena(size, device) if size else None
        start = iter(starts)
        return [
            {
                name: torch.empty(shape, dtype=dtype, device=device)
                if name == _RESIDENT
                else _tensor(arena, next(start), dtype, shape)
                for name, (dtype, shape) in layout.items()
            }
            for layout in layouts
        ]

    def _new_arena(self, size: int, device: torch.device):
        arena = (
            FileArena(size, self.folder) if device.type == "cpu" else _C.Arena(size, device.index)
        )
        self.arenas.add(arena)
        return arena

    def holds(self, state: Mapping[str, torch.Tensor], device: torch.device) -> bool:
        """Whether `state` lies where `allocate` would put it: in one arena, `step` on `device`."""
        resident = state[_RESIDENT]
        arenas = {id(arena): arena for arena in map(self._arena_of, _paged(state))}
        return (
            resident.device == device
            and all(value.is_contiguous() for value in (resident, *_paged(state)))
            and len(arenas) <= 1
            and all(arena is not None and _serves(arena, device) for arena in arenas.values())
        )

    def _arena_of(self, tensor: torch.Tensor):
        if not tensor.is_cpu:
            return None
        at = tensor.data_ptr()
        for arena in self.arenas:
            if arena.address <= at < arena.address + arena.bytes:
                return arena
        return None

    def pages(self, states: Sequence[Mapping[str, torch.Tensor]]) -> list[Page]:
        """The pages of a step over these states, in order; they cover every row."""
        pages: list[Page] = []
        for row, state in enumerate(states):
            arena, begin, end = self._span(state)
            last = pages[-1] if pages else None
            if last is not None and (arena is None or self._fits(last, arena, begin, end)):
                last.end = max(last.end, end)
                last.count += 1
            elif last is not None and last.arena is None:
                last.arena, last.begin, last.end = arena, begin, end
                last.count += 1
            else:
                pages.append(Page(arena, begin, end, row, 1))
        return pages

    def _span(self, state: Mapping[str, torch.Tensor]):
        """(arena, begin, end) of a parameter's paged tensors; (None, 0, 0) without any."""
        paged = _paged(state)
        if not paged:
            return None, 0, 0
        arena = self._arena_of(paged[0])
        begin = min(value.data_ptr() for value in paged)
        end = max(value.data_ptr() + value.nbytes for value in paged)
        return arena, begin - arena.address, end - arena.address

    def _fits(self, page: Page, arena, begin: int, end: int) -> bool:
        return page.arena is arena and page.end <= begin and end - page.begin <= self.page_bytes


def _paged(state: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    return [
        value
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name != _RESIDENT and value.numel()
    ]


def _serves(arena, device: torch.device) -> bool:
    if device.type == "cpu":
        return arena.kind == "file"
    return arena.kind != "file" and arena.device == device.index


def _tensor(arena, start: int, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    """A tensor of its own storage, so that saving or copying it takes its bytes only."""
    if not shape.numel():
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(arena, dtype=dtype, count=shape.numel(), offset=start)
    return flat.view(shape)
