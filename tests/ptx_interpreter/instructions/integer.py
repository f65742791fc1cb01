"""Integer arithmetic: add sub mul mad div rem min max abs neg sad, with carry, dp4a dp2a."""

import numpy as np

from ..decode import Decoder, Step, elementwise
from ..errors import Trap
from ..ptx_types import DTYPES, SIGNED, bits_of
from . import instruction
from .floating import float_add, float_div, float_minmax, float_mul, float_sign
from .halves import half_add, half_minmax, half_sign

WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
HALVES = ("f16", "f16x2", "bf16", "bf16x2")


@instruction("add", "sub")
def add(decoder: Decoder) -> Step:
    opcode = decoder.instruction.opcode
    type_name = decoder.take_type()
    if type_name in ("f32", "f64"):
        return float_add(decoder, type_name)
    if type_name in HALVES:
        return half_add(decoder, type_name)
    if decoder.has("cc"):
        return _add_carry(decoder, type_name, subtract=opcode == "sub", carry_in=False)
    saturate = decoder.has("sat")
    decoder.finish(3)
    ufunc = np.add if opcode == "add" else np.subtract
    if not saturate:
        return elementwise(decoder, ufunc, type_name, (type_name, type_name))
    if type_name != "s32":
        raise decoder.unsupported("modifier .sat")

    def saturated(a, b):
        return np.clip(ufunc(a.astype(np.int64), b), -(2**31), 2**31 - 1).astype(np.int32)

    return elementwise(decoder, saturated, type_name, (type_name, type_name))


@instruction("addc", "subc")
def add_with_carry(decoder: Decoder) -> Step:
    decoder.has("cc")
    type_name = decoder.take_type()
    return _add_carry(decoder, type_name, decoder.instruction.opcode == "subc", carry_in=True)


def _add_carry(decoder: Decoder, type_name: str, subtract: bool, carry_in: bool) -> Step:
    """d = a +- b (+- carry); the carry flag is set where .cc asks for it."""
    carry_out = "cc" in decoder.instruction.modifiers
    unsigned = f"u{bits_of(type_name)}"
    decoder.finish(3)
    a, b, write = decoder.read(1, unsigned), decoder.read(2, unsigned), decoder.write(0, unsigned)
    dtype = DTYPES[unsigned].type

    def step(state, mask):
        x, y = a(state), b(state)
        carry = state.carry if carry_in else np.zeros(1, np.bool_)
        if subtract:
            value = x - y - carry.astype(dtype)
            out = (x < y) | ((x == y) & carry)
        else:
            value = x + y + carry.astype(dtype)
            out = (value < x) | ((value == x) & carry)
        if carry_out:
            np.copyto(state.carry, out, where=True if mask is None else mask)
        write(state, mask, value)

    return step


def multiply_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(a.dtype)
    low32, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    x0, x1, y0, y1 = x & low32, x >> shift, y & low32, y >> shift
    middle = x1 * y0 + ((x0 * y0) >> shift)
    other = x0 * y1 + (middle & low32)
    high = x1 * y1 + (middle >> shift) + (other >> shift)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, 0).astype(np.uint64)
        high = high - np.where(b < 0, x, 0).astype(np.uint64)
    return high.astype(a.dtype)


@instruction("mul", "mul24")
def mul(decoder: Decoder) -> Step:
    type_name = decoder.take_type()
    if decoder.instruction.opcode == "mul24":
        return _mul24(decoder, type_name)
    if type_name in ("f32", "f64"):
        return float_mul(decoder, type_name)
    if type_name in HALVES:
        return half_add(decoder, type_name)
    part = decoder.one_of("lo", "hi", "wide")
    decoder.finish(3)
    function, destination = _product(part, type_name)
    return elementwise(decoder, function, destination, (type_name, type_name))


def _product(part: str, type_name: str):
    if part == "lo":
        return np.multiply, type_name
    if part == "hi":
        return multiply_high, type_name
    dtype = DTYPES[WIDE[type_name]]
    return (lambda a, b: np.multiply(a, b, dtype=dtype)), WIDE[type_name]


def _mul24(decoder: Decoder, type_name: str) -> Step:
    decoder.one_of("lo")
    decoder.finish(3)
    eight = DTYPES[type_name].type(8)

    def low(a, b):
        return (((a << eight) >> eight) * ((b << eight) >> eight)).astype(a.dtype)

    return elementwise(decoder, low, type_name, (type_name, type_name))


@instruction("mad", "madc")
def mad(decoder: Decoder) -> Step:
    type_name = decoder.take_type()
    if type_name in ("f32", "f64"):
        raise decoder.unsupported("mad of floats")
    part = decoder.one_of("lo", "hi", "wide")
    carry_in = decoder.instruction.opcode == "madc"
    carry_out = decoder.has("cc")
    decoder.finish(4)
    product, destination = _product(part, type_name)
    if not carry_in and not carry_out:
        return elementwise(
            decoder,
            lambda a, b, c: product(a, b) + c,
            destination,
            (type_name, type_name, destination),
        )
    unsigned = f"u{bits_of(destination)}"
    a, b = decoder.read(1, type_name), decoder.read(2, type_name)
    c, write = decoder.read(3, unsigned), decoder.write(0, unsigned)
    dtype = DTYPES[unsigned].type

    def step(state, mask):
        x = product(a(state), b(state)).astype(dtype)
        carry = state.carry if carry_in else np.zeros(1, np.bool_)
        value = x + c(state) + carry.astype(dtype)
        if carry_out:
            out = (value < x) | ((value == x) & carry)
            np.copyto(state.carry, out, where=True if mask is None else mask)
        write(state, mask, value)

    return step


def _truncated_quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Division toward zero; where b is 0 the result means nothing."""
    b = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return a // b
    quotient = a // b
    return quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype)


@instruction("div", "rem")
def div(decoder: Decoder) -> Step:
    opcode = decoder.instruction.opcode
    type_name = decoder.take_type()
    if type_name in ("f32", "f64"):
        return float_div(decoder, type_name)
    decoder.finish(3)
    a, b = decoder.read(1, type_name), decoder.read(2, type_name)
    write = decoder.write(0, type_name)

    def step(state, mask):
        x, y = np.broadcast_arrays(a(state), b(state))
        zero = (y == 0) if mask is None else (y == 0) & mask
        if zero.any():
            thread = int(np.argmax(zero)) if zero.ndim else 0
            raise Trap(f"integer division by zero: {x[thread]} / 0", thread)
        quotient = _truncated_quotient(x, y)
        write(state, mask, quotient if opcode == "div" else x - quotient * y)

    return step


@instruction("min", "max")
def minmax(decoder: Decoder) -> Step:
    maximum = decoder.instruction.opcode == "max"
    type_name = decoder.take_type()
    if type_name in ("f32", "f64"):
        return float_minmax(decoder, type_name, maximum)
    if type_name in HALVES:
        return half_minmax(decoder, type_name, maximum)
    relu = decoder.has("relu")
    decoder.finish(3)
    ufunc = np.maximum if maximum else np.minimum
    if relu:
        return elementwise(
            decoder, lambda a, b: np.maximum(ufunc(a, b), 0), type_name, (type_name, type_name)
        )
    return elementwise(decoder, ufunc, type_name, (type_name, type_name))


@instruction("abs", "neg")
def sign(decoder: Decoder) -> Step:
    opcode = decoder.instruction.opcode
    type_name = decoder.take_type()
    if type_name in ("f32", "f64"):
        return float_sign(decoder, type_name)
    if type_name in HALVES:
        return half_sign(decoder, type_name)
    decoder.finish(2)
    if type_name not in SIGNED:
        raise decoder.unsupported(f"type .{type_name}")
    return elementwise(
        decoder, np.absolute if opcode == "abs" else np.negative, type_name, (type_name,)
    )


@instruction("sad")
def sad(decoder: Decoder) -> Step:
    type_name = decoder.take_type()
    decoder.finish(4)
    return elementwise(
        decoder, lambda a, b, c: np.where(a < b, b - a, a - b) + c, type_name, (type_name,) * 3
    )


@instruction("dp4a", "dp2a")
def dot_product(decoder: Decoder) -> Step:
    """d = c + sum of a[i] * b[i]: four bytes by four bytes, or two halves by two bytes of b."""
    a_type, b_type = decoder.take_type(), decoder.take_type()
    half = decoder.one_of("lo", "hi") if decoder.instruction.opcode == "dp2a" else ""
    decoder.finish(4)
    if a_type not in ("u32", "s32") or b_type not in ("u32", "s32"):
        raise decoder.unsupported("types")
    result = "s32" if "s32" in (a_type, b_type) else "u32"

    def parts(value, signed, bits, count, first=0):
        dtype = np.dtype(f"{'i' if signed else 'u'}{bits // 8}")
        return [
            (value >> np.uint32(bits * (first + i))).astype(dtype).astype(np.int64)
            for i in range(count)
        ]

    def dot(a, b, c):
        if half:
            x = parts(a, a_type == "s32", 16, 2)
            y = parts(b, b_type == "s32", 8, 2, 2 if half == "hi" else 0)
        else:
            x, y = parts(a, a_type == "s32", 8, 4), parts(b, b_type == "s32", 8, 4)
        total = sum(p * q for p, q in zip(x, y, strict=True))
        return (c.astype(np.int64) + total).astype(np.uint32)

    return elementwise(decoder, dot, "u32", ("u32", "u32", result))
