"""f16, bf16 and their packed pairs: add sub mul fma min max abs neg and approximations.

Values are taken to float64, where sums and products of 16-bit floats round to odd or are exact, and
rounded once to the format.
"""

import numpy as np

from .. import rounding
from ..decode import Decoder, Step, elementwise

BITS = {"f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32"}


def on_halves(type_name: str, function):
    """Lifts a function of 16-bit values to packed pairs; f16 and bf16 stay as raw bits."""
    if not type_name.endswith("x2"):
        return function

    def packed(*values):
        low = function(*[value.astype(np.uint16) for value in values])
        high = function(*[(value >> np.uint32(16)).astype(np.uint16) for value in values])
        return rounding.pack(low, high)

    return packed


def half_step(decoder: Decoder, type_name: str, function, sources: int) -> Step:
    """d = function of float64 values, rounded once; takes .ftz (f16 only), .sat, .relu."""
    half = type_name.removesuffix("x2")
    flush = half == "f16" and decoder.has("ftz")
    saturate = half == "f16" and decoder.has("sat")
    relu = decoder.has("relu")
    decoder.finish(sources + 1)

    def compute(*bits):
        values = [rounding.half_to_f64(np.asarray(b), half) for b in bits]
        if flush:
            values = [_flush(value) for value in values]
        result = function(*values)
        if flush:
            result = _flush(rounding.half_to_f64(rounding.f64_to_half(result, half), half))
        if saturate:
            result = np.where(result > 0, np.minimum(result, 1), 0)
        if relu:
            result = np.where(np.isnan(result), result, np.maximum(result, 0))
        return rounding.f64_to_half(result, half)

    bits = BITS[type_name]
    return elementwise(decoder, on_halves(type_name, compute), bits, (bits,) * sources)


def _flush(value: np.ndarray) -> np.ndarray:
    return np.where(np.abs(value) < 2.0**-14, np.copysign(0.0, value), value)


def half_add(decoder: Decoder, type_name: str) -> Step:
    """add, sub and mul."""
    decoder.has("rn")
    functions = {
        "add": rounding.sum_to_odd,
        "sub": lambda a, b: rounding.sum_to_odd(a, -b),
        "mul": np.multiply,
    }
    return half_step(decoder, type_name, functions[decoder.instruction.opcode], 2)


def half_fma(decoder: Decoder, type_name: str) -> Step:
    if type_name not in BITS:
        raise decoder.unsupported(f"type .{type_name}")
    decoder.one_of("rn")
    return half_step(decoder, type_name, lambda a, b, c: rounding.sum_to_odd(a * b, c), 3)


def half_minmax(decoder: Decoder, type_name: str, maximum: bool) -> Step:
    keep_nan = decoder.has("NaN")

    def chosen(a, b):
        greater = (a > b) | ((a == b) & ~np.signbit(a) & np.signbit(b))
        result = np.where(greater if maximum else ~greater, a, b)
        if keep_nan:
            return np.where(np.isnan(a) | np.isnan(b), np.nan, result)
        return np.where(np.isnan(a), b, np.where(np.isnan(b), a, result))

    return half_step(decoder, type_name, chosen, 2)


def half_sign(decoder: Decoder, type_name: str) -> Step:
    """abs and neg: the sign bits only."""
    decoder.finish(2)
    bits = BITS[type_name]
    sign = np.uint16(0x8000) if bits == "b16" else np.uint32(0x80008000)
    if decoder.instruction.opcode == "neg":
        return elementwise(decoder, lambda a: a ^ sign, bits, (bits,))
    return elementwise(decoder, lambda a: a & ~sign, bits, (bits,))


def half_approximate(decoder: Decoder, type_name: str, function) -> Step:
    """ex2 and tanh: the float32 function rounded to the format."""
    if type_name.startswith("bf16"):
        decoder.has("ftz")  # required by the syntax of ex2; subnormal bf16 need no flushing for ex2
    return half_step(
        decoder, type_name, lambda a: function(a.astype(np.float32)).astype(np.float64), 1
    )
