"""ld, ldu, st and the cache hints, in every memory space and by generic address."""

import numpy as np

from ..decode import Decoder, Step, threads_of
from ..errors import OutOfBounds
from ..memory import gather, scatter
from ..ptx_types import DTYPES, SIZES, raw_type
from ..syntax import Register
from . import instruction

# Modifiers that steer caches or order memory: without meaning where memory is one flat array.
HINTS = (
    "weak", "volatile", "relaxed", "acquire", "release", "mmio", "cta", "gpu", "sys", "cluster",
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc",
    "L1::no_allocate", "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first",
    "L1::evict_last", "L2::evict_last", "L2::evict_normal", "L2::evict_first",
    "L2::64B", "L2::128B", "L2::256B",
)  # fmt: skip
SPACES = ("global", "shared", "shared::cta", "local", "const", "param")


def take_space(decoder: Decoder, default: str = "generic") -> str:
    return decoder.one_of(*SPACES, default=default).removesuffix("::cta")


def take_access(decoder: Decoder) -> tuple[str, str, int]:
    """(space, type, vector length); takes the hints and the cache policy."""
    for hint in HINTS:
        decoder.has(hint)
    policy = decoder.has("L2::cache_hint")
    space = take_space(decoder)
    count = int(decoder.one_of("v2", "v4", "v8", default="v1")[1])
    type_name = decoder.take_type()
    if SIZES[type_name] * count > 32:
        raise decoder.unsupported("access wider than 32 bytes")
    decoder.finish(3 if policy else 2)
    return space, type_name, count


def access_size(instruction_) -> int:
    """Bytes of one access of an ld, st, atom, red; for the resolution of the shadow memory."""
    count = next((int(m[1]) for m in instruction_.modifiers if m in ("v2", "v4", "v8")), 1)
    return count * next((SIZES[m] for m in instruction_.modifiers if m in SIZES), 1)


@instruction("ld", "ldu")
def load(decoder: Decoder) -> Step:
    space, type_name, count = take_access(decoder)
    element, raw = SIZES[type_name], raw_type(type_name)
    items = decoder.items(0, count)
    if space == "param" and not isinstance(decoder.operands[1].base, Register):
        return _load_argument(decoder, items, raw)
    writes = [decoder.write_at(item, raw) for item in items]
    address, dtype = decoder.address(1), DTYPES[raw]

    def step(state, mask):
        threads = threads_of(mask)
        places = address(state, threads)
        memory = state.spaces.get(space)
        segments = memory.segments(state, threads, places, element * count, "read")
        values = gather(segments, len(places), element, count).view(dtype)
        if count == 1:
            writes[0](state, threads, values)
        else:
            for i, write in enumerate(writes):
                write(state, threads, values[:, i])

    return step


def _load_argument(decoder: Decoder, items: tuple, raw: str) -> Step:
    """ld.param from a fixed place: one value for all threads."""
    dtype = DTYPES[raw]
    offset = decoder.fixed_address(1)
    end = offset + dtype.itemsize * len(items)
    if offset % (end - offset):
        raise decoder.unsupported("misaligned parameter")
    writes = [decoder.write(item, raw) for item in items]

    def step(state, mask):
        param = state.spaces.get("param")
        if end > param.size:
            raise OutOfBounds(f"bytes {offset} to {end} of {param.size} bytes of parameters")
        values = param.view[offset:end].view(dtype)
        for write, value in zip(writes, values, strict=True):
            write(state, mask, value)

    return step


@instruction("st")
def store(decoder: Decoder) -> Step:
    space, type_name, count = take_access(decoder)
    if space in ("const", "param"):
        raise decoder.unsupported(f"store to .{space}")
    element, raw = SIZES[type_name], f"u{8 * SIZES[type_name]}"
    reads = [decoder.read(item, raw) for item in decoder.items(1, count)]
    address, dtype = decoder.address(0), DTYPES[raw]

    def step(state, mask):
        threads = threads_of(mask)
        places = address(state, threads)
        memory = state.spaces.get(space)
        segments = memory.segments(state, threads, places, element * count, "write")
        if count == 1:
            values = active(reads[0](state), state, threads)
        else:
            values = np.empty((len(places), count), dtype)
            for i, read in enumerate(reads):
                values[:, i] = active(read(state), state, threads)
        scatter(segments, values, element, count)

    return step


def active(value: np.ndarray, state, threads) -> np.ndarray:
    """The values of the given threads (None: of all); constants are spread out."""
    if np.ndim(value) == 0:
        return np.full(state.count if threads is None else len(threads), value)
    return value if threads is None else value[threads]


@instruction("prefetch", "prefetchu", "applypriority", "discard", "createpolicy")
def cache_hint(decoder: Decoder) -> Step:
    """Hints to the caches. createpolicy yields a policy of 0, which no instruction looks at."""
    opcode = decoder.instruction.opcode
    if opcode == "discard":  # it destroys data: not a hint
        raise decoder.unsupported("discard")
    for hint in (*HINTS, "L1", "L2", "fractional", "range", "b64", "global", "local"):
        decoder.has(hint)
    decoder.finish((1, 2, 3, 4, 5))
    if opcode != "createpolicy":
        return lambda state, mask: None
    write = decoder.write(0, "b64")
    return lambda state, mask: write(state, mask, np.uint64(0))
