"""Matrix fragments: mma.sync, ldmatrix, stmatrix, movmatrix.

Fragment layouts follow the PTX ISA: with group = lane / 4 and tig = lane % 4, a 16-bit A register r
holds row group + 8 (r % 2), columns 2 tig + {0, 1} + 8 (r / 2); and so on (README.md has them all).
Products are exact. Sums are taken in float64 over the whole k and added to C, then rounded once to
the accumulator's type; a tensor core rounds differently and in between, which no test may rely on.
"""

import numpy as np

from .. import rounding
from ..decode import Decoder, Step, threads_of
from ..memory import gather, scatter
from ..state import WARP
from . import collective, instruction
from .load_store import active

# (bits of an element, decoder of raw elements to float64 or int64)
FORMATS = {
    "bf16": (16, lambda raw: rounding.bf16_to_f32(raw).astype(np.float64)),
    "f16": (16, lambda raw: raw.view(np.float16).astype(np.float64)),
    "tf32": (32, lambda raw: (raw & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)),
    "s8": (8, lambda raw: raw.view(np.int8).astype(np.float64)),
    "u8": (8, lambda raw: raw.astype(np.float64)),
    "f64": (64, lambda raw: raw.view(np.float64)),
}
# A m x k in registers of two row halves, k in multiples of one register's width times 4 lanes.
SHAPES = {
    ("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "bf16"), ("m16n8k8", "f16"),
    ("m16n8k8", "tf32"), ("m16n8k4", "tf32"), ("m16n8k32", "s8"), ("m16n8k32", "u8"),
    ("m16n8k16", "s8"), ("m16n8k16", "u8"),
}  # fmt: skip


@collective("mma", "ldmatrix", "stmatrix", "movmatrix")
def whole_warp(decoder: Decoder):
    return lambda state: np.uint32(0xFFFFFFFF)


def warps_of(values: np.ndarray) -> np.ndarray:
    """(threads,) -> (warps, 8 groups, 4 threads in group)"""
    return values.reshape(-1, 8, 4)


@instruction("mma")
def multiply_add(decoder: Decoder) -> Step:
    """mma.sync.aligned.m16n8kK.row.col.dtype.atype.btype.ctype d, a, b, c: D = A B + C."""
    for word in ("sync", "aligned", "row", "col"):
        decoder.one_of(word)
    saturate = decoder.has("satfinite")
    shape = decoder.one_of(*{shape for shape, _ in SHAPES})
    d_type, a_type, b_type, c_type = (decoder.take_type() for _ in range(4))
    decoder.finish(4)
    integers = a_type in ("s8", "u8")
    results = ("s32",) if integers else ("f32", "f16") if a_type == "f16" else ("f32",)
    if (shape, a_type) not in SHAPES or (shape, b_type) not in SHAPES or d_type != c_type:
        raise decoder.unsupported("shape or types")
    if d_type not in results or (saturate and not integers) or (a_type != b_type and not integers):
        raise decoder.unsupported("types")
    k = int(shape.split("k")[1])
    bits, decode_a = FORMATS[a_type]
    decode_b = FORMATS[b_type][1]
    halves = k * bits // 128  # registers along k
    a = [decoder.read(item, "b32") for item in decoder.items(1, 2 * halves)]
    b = [decoder.read(item, "b32") for item in decoder.items(2, halves)]
    if d_type == "f16":
        return _half_accumulate(decoder, a, b, k, bits, decode_a, decode_b)
    c = [decoder.read(item, d_type) for item in decoder.items(3, 4)]
    writes = [decoder.write_at(item, d_type) for item in decoder.items(0, 4)]

    def step(state, mask):
        threads = threads_of(mask)
        product = _product(state, threads, a, b, k, bits, decode_a, decode_b)
        rows = np.stack([active(read(state), state, threads) for read in c])
        total = product + _accumulator(rows.astype(np.float64))
        parts = _accumulator_registers(_to_result(total, d_type, saturate))
        for write, part in zip(writes, parts, strict=True):
            write(state, threads, part)
        state.counters.mma += len(total)

    return step


def _to_result(total: np.ndarray, d_type: str, saturate: bool) -> np.ndarray:
    if d_type == "f32":
        return rounding.canonical_f32(total.astype(np.float32))
    if saturate:
        return np.clip(total, -(2**31), 2**31 - 1).astype(np.int32)
    return total.astype(np.int64).astype(np.int32)


def _half_accumulate(decoder, a, b, k, bits, decode_a, decode_b) -> Step:
    """f16 accumulators: two registers of two values."""
    c = [decoder.read(item, "b32") for item in decoder.items(3, 2)]
    writes = [decoder.write_at(item, "b32") for item in decoder.items(0, 2)]

    def step(state, mask):
        threads = threads_of(mask)
        product = _product(state, threads, a, b, k, bits, decode_a, decode_b)
        packed = np.stack([active(read(state), state, threads) for read in c])
        low, high = rounding.unpack(packed, "f16")
        values = np.stack([low[0], high[0], low[1], high[1]])
        total = rounding.sum_to_odd(product, _accumulator(values))
        parts = [rounding.f64_to_half(part, "f16") for part in _accumulator_registers(total)]
        writes[0](state, threads, rounding.pack(parts[0], parts[1]))
        writes[1](state, threads, rounding.pack(parts[2], parts[3]))
        state.counters.mma += len(total)

    return step


def _product(state, threads, a, b, k, bits, decode_a, decode_b) -> np.ndarray:
    """A B as float64 (warps, 16, 8), from the fragments in registers."""
    halves, per_register = k * bits // 128, 32 // bits
    raw = np.dtype(f"u{bits // 8}")
    left = np.stack([active(read(state), state, threads) for read in a])
    right = np.stack([active(read(state), state, threads) for read in b])
    # A register r: row half r % 2, k part r / 2. (k part, row half, warp, group, tig, element)
    left = left.view(raw).reshape(halves, 2, -1, 8, 4, per_register)
    left = left.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, k)
    # B register r: k part r; column = group. (k part, warp, group, tig, element)
    right = right.view(raw).reshape(halves, -1, 8, 4, per_register)
    right = right.transpose(1, 0, 3, 4, 2).reshape(-1, k, 8)
    return decode_a(left) @ decode_b(right)


def _accumulator(registers: np.ndarray) -> np.ndarray:
    """Register 2 h + e of (lane = 4 group + tig) is row group + 8 h, column 2 tig + e."""
    tiles = registers.reshape(2, 2, -1, 8, 4)  # row half, element, warp, group, tig
    return tiles.transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)


def _accumulator_registers(matrix: np.ndarray) -> np.ndarray:
    tiles = matrix.reshape(-1, 2, 8, 4, 2)  # warp, row half, group, tig, element
    return np.ascontiguousarray(tiles.transpose(1, 4, 0, 2, 3)).reshape(4, -1)


def _matrix_operands(decoder: Decoder) -> tuple[int, bool, str]:
    """(number of 8 x 8 matrices, transposed, space)"""
    for word in ("sync", "aligned", "m8n8"):
        decoder.one_of(word)
    count = int(decoder.one_of("x1", "x2", "x4")[1])
    transposed = decoder.has("trans")
    space = decoder.one_of("shared", "shared::cta", default="generic").removesuffix("::cta")
    decoder.one_of("b16")
    decoder.finish(2)
    return count, transposed, space


def _row_threads(state, mask, count: int) -> np.ndarray:
    """The threads whose addresses matter: lane 8 i + r gives row r of matrix i."""
    threads = np.arange(state.count) if mask is None else np.flatnonzero(mask)
    return threads.reshape(-1, WARP)[:, : 8 * count].reshape(-1)


@instruction("ldmatrix")
def load_matrix(decoder: Decoder) -> Step:
    """Register i of lane 4 r + c gets elements (r, 2 c) and (r, 2 c + 1) of matrix i (or its
    transpose)."""
    count, transposed, space = _matrix_operands(decoder)
    writes = [decoder.write_at(item, "b32") for item in decoder.items(0, count)]
    address = decoder.address(1)

    def step(state, mask):
        rows = _row_threads(state, mask, count)
        places = address(state, rows)
        segments = state.spaces.get(space).segments(state, rows, places, 16, "collective read")
        tiles = gather(segments, len(rows), 8, 2).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            tiles = np.ascontiguousarray(tiles.swapaxes(2, 3))
        registers = tiles.view(np.uint32).reshape(-1, count, WARP)
        threads = threads_of(mask)
        for i, write in enumerate(writes):
            write(state, threads, registers[:, i].reshape(-1))

    return step


@instruction("stmatrix")
def store_matrix(decoder: Decoder) -> Step:
    """The inverse of ldmatrix."""
    count, transposed, space = _matrix_operands(decoder)
    reads = [decoder.read(item, "b32") for item in decoder.items(1, count)]
    address = decoder.address(0)

    def step(state, mask):
        rows = _row_threads(state, mask, count)
        places = address(state, rows)
        segments = state.spaces.get(space).segments(state, rows, places, 16, "collective write")
        threads = threads_of(mask)
        registers = [active(read(state), state, threads).reshape(-1, WARP) for read in reads]
        tiles = np.stack(registers, axis=1).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            tiles = np.ascontiguousarray(tiles.swapaxes(2, 3))
        scatter(segments, tiles.view(np.uint64).reshape(-1, 2), 8, 2)

    return step


@instruction("movmatrix")
def transpose_matrix(decoder: Decoder) -> Step:
    for word in ("sync", "aligned", "m8n8", "trans", "b16"):
        decoder.one_of(word)
    decoder.finish(2)
    read, write = decoder.read(1, "b32"), decoder.write_at(decoder.operands[0], "b32")

    def step(state, mask):
        threads = threads_of(mask)
        tiles = active(read(state), state, threads).reshape(-1, WARP).view(np.uint16)
        tiles = np.ascontiguousarray(tiles.reshape(-1, 8, 8).swapaxes(1, 2))
        write(state, threads, tiles.view(np.uint32).reshape(-1))

    return step
