"""cp.async: copies from global to shared memory that finish at a wait.

The bytes move at once, but the shadow memory (checks.py) treats the destination as in flight until
the issuing thread has waited for the group, and for other threads until a barrier after that.
"""

import numpy as np

from ..decode import Decoder, Step, threads_of
from ..memory import gather, scatter
from ..syntax import Register
from . import instruction
from .load_store import active

PREFETCH = ("L2::64B", "L2::128B", "L2::256B")


@instruction("cp")
def copy_async(decoder: Decoder) -> Step:
    decoder.one_of("async")
    if decoder.has("commit_group"):
        decoder.finish(0)
        return lambda state, mask: state.shadow and state.shadow.commit(mask)
    if decoder.has("wait_all"):
        decoder.finish(0)
        return _wait(None)
    if decoder.has("wait_group"):
        decoder.finish(1)
        return _wait(int(decoder.read(0, "u32")(None)))
    return _copy(decoder)


def _wait(pending: int | None) -> Step:
    return lambda state, mask: state.shadow and state.shadow.wait(mask, pending)


def _copy(decoder: Decoder) -> Step:
    """cp.async.ca.shared.global [to], [from], size{, source size | predicate: ignore source};"""
    whole_only = decoder.one_of("ca", "cg") == "cg"
    decoder.one_of("shared", "shared::cta")
    decoder.one_of("global")
    policy = decoder.has("L2::cache_hint")
    for hint in PREFETCH:
        decoder.has(hint)
    count = len(decoder.operands) - policy
    decoder.finish((3 + policy, 4 + policy))
    size = int(decoder.read(2, "u32")(None))
    if size not in ((16,) if whole_only else (4, 8, 16)):
        raise decoder.unsupported(f"copy of {size} bytes")
    to, source = decoder.address(0), decoder.address(1)
    source_size = _source_size(decoder, size) if count == 4 else None

    def step(state, mask):
        threads = threads_of(mask)
        targets, places = to(state, threads), source(state, threads)
        shared = state.spaces.get("shared").segments(state, threads, targets, size, "copy")
        memory = state.spaces.get("global")
        words = max(size // 8, 1)
        element = size // words
        if source_size is None:
            values = gather(
                memory.segments(state, threads, places, size, "read"), len(places), element, words
            )
        else:
            sizes = np.minimum(active(source_size(state), state, threads), size)
            values = _partial(state, memory, threads, places, sizes, size)
            values = values.view(f"u{element}").reshape(-1, words)
            values = values[:, 0] if words == 1 else values
        scatter(shared, values, element, words)

    return step


def _source_size(decoder: Decoder, size: int):
    operand = decoder.operands[3]
    if isinstance(operand, Register) and operand.bits == 1:
        ignore = decoder.read(3, "pred")
        return lambda state: np.where(ignore(state), 0, size).astype(np.int64)
    read = decoder.read(3, "u32")
    return lambda state: read(state).astype(np.int64)


def _partial(state, memory, threads, places, sizes: np.ndarray, size: int) -> np.ndarray:
    """The first `sizes` bytes of each source, then zeros; absent bytes are not touched at all."""
    values = np.zeros((len(places), size), np.uint8)
    for wanted in np.unique(sizes[sizes > 0]):
        chosen = np.flatnonzero(sizes == wanted)
        some = chosen if threads is None else threads[chosen]
        part = size if wanted == size else 1  # a whole copy is one access, a partial one bytes
        for first in range(0, int(wanted), part):
            segments = memory.segments(state, some, places[chosen] + first, part, "read")
            count = max(part // 8, 1)
            read = gather(segments, len(chosen), part // count, count)
            values[chosen, first : first + part] = read.reshape(len(chosen), -1).view(np.uint8)
    return values
