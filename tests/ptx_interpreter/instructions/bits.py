"""Bit operations: and or xor not cnot shl shr shf lop3 prmt bfe bfi bfind brev clz popc bmsk
szext."""

import numpy as np

from ..decode import Decoder, Step, elementwise
from ..ptx_types import DTYPES, bits_of
from ..syntax import Immediate
from . import instruction

LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@instruction("and", "or", "xor")
def logic(decoder: Decoder) -> Step:
    type_name = decoder.take_type()
    decoder.finish(3)
    return elementwise(
        decoder, LOGIC[decoder.instruction.opcode], type_name, (type_name, type_name)
    )


@instruction("not")
def invert(decoder: Decoder) -> Step:
    type_name = decoder.take_type()
    decoder.finish(2)
    return elementwise(decoder, np.invert, type_name, (type_name,))


@instruction("cnot")
def logical_not(decoder: Decoder) -> Step:
    type_name = decoder.take_type()
    decoder.finish(2)
    return elementwise(decoder, lambda a: (a == 0).astype(a.dtype), type_name, (type_name,))


@instruction("shl", "shr")
def shift(decoder: Decoder) -> Step:
    """Amounts beyond the width shift everything out; shr of a signed type keeps the sign."""
    type_name = decoder.take_type()
    decoder.finish(3)
    bits = bits_of(type_name)
    dtype = DTYPES[type_name]
    ufunc = np.left_shift if decoder.instruction.opcode == "shl" else np.right_shift
    a, amount = decoder.read(1, type_name), decoder.read(2, "u32")
    write = decoder.write(0, type_name)
    if isinstance(decoder.operands[2], Immediate):
        constant = dtype.type(min(int(amount(None)), bits))
        return lambda state, mask: write(state, mask, ufunc(a(state), constant))
    limit = np.uint32(bits)

    def step(state, mask):
        count = np.minimum(amount(state), limit).astype(dtype)
        write(state, mask, ufunc(a(state), count))

    return step


@instruction("shf")
def funnel_shift(decoder: Decoder) -> Step:
    """The upper (l) or lower (r) half of the 64 bits b:a shifted by c."""
    left = decoder.one_of("l", "r") == "l"
    clamp = decoder.one_of("clamp", "wrap") == "clamp"
    decoder.one_of("b32")
    decoder.finish(4)
    word = np.uint64(32)

    def funnel(a, b, c):
        c = np.minimum(c, np.uint32(32)) if clamp else c & np.uint32(31)
        both = (b.astype(np.uint64) << word) | a
        if left:
            return ((both << c.astype(np.uint64)) >> word).astype(np.uint32)
        return (both >> c.astype(np.uint64)).astype(np.uint32)

    return elementwise(decoder, funnel, "b32", ("b32", "b32", "u32"))


# f(b, c) for a truth table of four bits, bit 2 b + c.
PAIRS = [
    lambda b, c: b & ~b,
    lambda b, c: ~(b | c),
    lambda b, c: ~b & c,
    lambda b, c: ~b,
    lambda b, c: b & ~c,
    lambda b, c: ~c,
    lambda b, c: b ^ c,
    lambda b, c: ~(b & c),
    lambda b, c: b & c,
    lambda b, c: ~(b ^ c),
    lambda b, c: c,
    lambda b, c: ~b | c,
    lambda b, c: b,
    lambda b, c: b | ~c,
    lambda b, c: b | c,
    lambda b, c: b | ~b,
]


@instruction("lop3")
def lop3(decoder: Decoder) -> Step:
    """Any function of three bits: bit 4 a + 2 b + c of the immediate."""
    decoder.one_of("b32")
    decoder.finish(5)
    if not isinstance(decoder.operands[4], Immediate):
        raise decoder.unsupported("truth table that is not a constant")
    table = decoder.operands[4].value & 0xFF
    with_a, without_a = PAIRS[table >> 4], PAIRS[table & 15]

    def combine(a, b, c, _):
        return (a & with_a(b, c)) | (~a & without_a(b, c))

    return elementwise(decoder, combine, "b32", ("b32", "b32", "b32", "b32"))


# prmt modes: the four selectors for c = 0, 1, 2, 3, lowest byte first.
PERMUTATIONS = {
    "f4e": (0x3210, 0x4321, 0x5432, 0x6543),
    "b4e": (0x5670, 0x6701, 0x7012, 0x0123),
    "rc8": (0x0000, 0x1111, 0x2222, 0x3333),
    "ecl": (0x3210, 0x3211, 0x3222, 0x3333),
    "ecr": (0x0000, 0x1110, 0x2210, 0x3210),
    "rc16": (0x1010, 0x3232, 0x1010, 0x3232),
}


@instruction("prmt")
def permute(decoder: Decoder) -> Step:
    """Each selector nibble picks a byte of b:a; its top bit spreads that byte's sign instead."""
    decoder.one_of("b32")
    mode = decoder.one_of(*PERMUTATIONS, default="")
    decoder.finish(4)

    def pick(a, b, c):
        if mode:
            c = np.asarray(PERMUTATIONS[mode], np.uint32)[c & np.uint32(3)]
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        result = np.uint32(0)
        for i in range(4):
            nibble = (c >> np.uint32(4 * i)) & np.uint32(15)
            byte = (both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(
                np.uint8
            )
            sign = np.where(byte & 0x80, np.uint8(0xFF), np.uint8(0))
            byte = np.where(nibble & np.uint32(8), sign, byte)
            result = result | (byte.astype(np.uint32) << np.uint32(8 * i))
        return result

    return elementwise(decoder, pick, "b32", ("b32", "b32", "b32"))


@instruction("bfe")
def extract(decoder: Decoder) -> Step:
    """`c` bits of a from bit `b`; signed types repeat the field's top bit."""
    type_name = decoder.take_type()
    decoder.finish(4)
    bits, dtype = bits_of(type_name), DTYPES[type_name]
    unsigned = np.dtype(f"u{bits // 8}")

    def field(a, b, c):
        b, c = (b & np.uint32(255)).astype(np.int64), (c & np.uint32(255)).astype(np.int64)
        raw = a.astype(unsigned)
        one = unsigned.type(1)
        low_bits = np.minimum(c, bits).astype(unsigned)
        mask = (one << low_bits) - one
        value = (raw >> np.minimum(b, bits).astype(unsigned)) & mask
        if dtype.kind == "u":
            return value
        top = np.minimum(b + c - 1, bits - 1)
        sign = ((raw >> np.maximum(top, 0).astype(unsigned)) & one).astype(np.bool_) & (c != 0)
        kept = np.minimum(c, np.maximum(bits - b, 0)).astype(unsigned)
        return np.where(sign, value | ~((one << kept) - one), value).astype(dtype)

    return elementwise(decoder, field, type_name, (type_name, "u32", "u32"))


@instruction("bfi")
def insert(decoder: Decoder) -> Step:
    """The low `d` bits of a put over b from bit `c`."""
    type_name = decoder.take_type()
    decoder.finish(5)
    dtype = DTYPES[type_name].type
    bits = bits_of(type_name)

    def put(a, b, position, length):
        position = np.minimum(position & np.uint32(255), np.uint32(bits)).astype(dtype)
        length = np.minimum(length & np.uint32(255), np.uint32(bits)).astype(dtype)
        mask = ((dtype(1) << length) - dtype(1)) << position
        return (b & ~mask) | ((a << position) & mask)

    return elementwise(decoder, put, type_name, (type_name, type_name, "u32", "u32"))


def _bit_length(value: np.ndarray) -> np.ndarray:
    """Bits up to the highest set one; 0 for 0."""
    value = value.copy()
    length = np.zeros(value.shape, np.uint32)
    for step in (32, 16, 8, 4, 2, 1):
        if step >= 8 * value.dtype.itemsize:
            continue
        amount = value.dtype.type(step)
        big = (value >> amount) != 0
        length += np.where(big, np.uint32(step), np.uint32(0))
        value = np.where(big, value >> amount, value)
    return length + (value != 0)


@instruction("clz", "popc", "brev", "bfind")
def count(decoder: Decoder) -> Step:
    opcode = decoder.instruction.opcode
    type_name = decoder.take_type()
    amount = decoder.has("shiftamt") if opcode == "bfind" else False
    decoder.finish(2)
    bits = bits_of(type_name)
    unsigned = f"u{bits}"
    if opcode == "popc":
        return elementwise(
            decoder, lambda a: np.bitwise_count(a).astype(np.uint32), "u32", (unsigned,)
        )
    if opcode == "clz":
        return elementwise(decoder, lambda a: np.uint32(bits) - _bit_length(a), "u32", (unsigned,))
    if opcode == "brev":
        return elementwise(decoder, lambda a: _reverse(a, bits), unsigned, (unsigned,))

    def highest(a):
        if a.dtype.kind == "i":
            a = np.where(a < 0, ~a, a)
        length = _bit_length(np.asarray(a).astype(f"u{bits // 8}"))
        found = np.uint32(bits) - length if amount else length - np.uint32(1)
        return np.where(length == 0, np.uint32(0xFFFFFFFF), found)

    return elementwise(decoder, highest, "u32", (type_name,))


def _reverse(value: np.ndarray, bits: int) -> np.ndarray:
    octets = np.ascontiguousarray(value).view(np.uint8).reshape(-1, bits // 8)
    flipped = np.packbits(np.unpackbits(octets, axis=1, bitorder="little"), axis=1)[:, ::1]
    return np.ascontiguousarray(flipped[:, ::-1]).view(value.dtype).reshape(np.shape(value) or 1)


@instruction("bmsk")
def bit_mask(decoder: Decoder) -> Step:
    clamp = decoder.one_of("clamp", "wrap") == "clamp"
    decoder.one_of("b32")
    decoder.finish(3)

    def mask(a, b):
        if clamp:
            a, b = np.minimum(a, np.uint32(32)), np.minimum(b, np.uint32(32))
        else:
            a, b = a & np.uint32(31), b & np.uint32(31)
        ones = (np.uint64(1) << b.astype(np.uint64)) - np.uint64(1)
        return (ones << a.astype(np.uint64)).astype(np.uint32)

    return elementwise(decoder, mask, "b32", ("u32", "u32"))
