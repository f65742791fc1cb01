"""Rounding by rational arithmetic: the tests' independent definition of every float operation."""

from fractions import Fraction
from math import copysign, inf, isinf, isnan, nan

import numpy as np

# precision in bits (with the hidden one), least and largest exponent of normal numbers
FORMATS = {
    "f16": (11, -14, 15),
    "bf16": (8, -126, 127),
    "f32": (24, -126, 127),
    "f64": (53, -1022, 1023),
}


def round_fraction(value: Fraction, format_name: str, mode: str = "rn") -> float:
    """The nearest (rn, ties to even) or directed (rz, rm, rp) number of the format, as a float."""
    precision, least, most = FORMATS[format_name]
    if value == 0:
        return 0.0
    sign = -1 if value < 0 else 1
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    exponent = max(exponent, least)
    unit = Fraction(2) ** (exponent - precision + 1)
    units = magnitude / unit
    whole, rest = units.numerator // units.denominator, units - units.numerator // units.denominator
    if mode == "rn":
        up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1)
    elif mode == "rz":
        up = False
    else:
        up = rest > 0 and (sign > 0) == (mode == "rp")
    result = (whole + up) * unit
    largest = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** most
    if result > largest:
        away = mode == "rn" or (mode == "rp") == (sign > 0) and mode != "rz"
        return sign * (inf if away else float(largest))
    return sign * float(result)


def fused(a: float, b: float, c: float, format_name: str, mode: str = "rn") -> float:
    """a * b + c rounded once, with IEEE 754's special cases."""
    if isnan(a) or isnan(b) or isnan(c) or (isinf(a) and b == 0) or (isinf(b) and a == 0):
        return nan
    if isinf(a) or isinf(b):
        product = copysign(inf, copysign(1, a) * copysign(1, b))
        return nan if isinf(c) and c != product else product
    if isinf(c):
        return c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        signs = copysign(1, a) * copysign(1, b), copysign(1, c)
        if a * b == 0 and c == 0 and signs[0] == signs[1]:
            return copysign(0.0, signs[0])
        if (a == 0 or b == 0) and c == 0 or exact == 0:
            return -0.0 if mode == "rm" else 0.0
    rounded = round_fraction(exact, format_name, mode)
    return copysign(rounded, exact.numerator) if rounded == 0 else rounded


def bf16_bits(value: np.ndarray) -> np.ndarray:
    """Bits of float values that are bf16 numbers already."""
    return (np.asarray(value, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def bf16_value(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def interesting_f32(seed: int, count: int) -> np.ndarray:
    """Random bit patterns, and zeros, ones, subnormals, the largest, infinities, NaN."""
    random = np.random.default_rng(seed)
    values = random.integers(0, 1 << 32, count, dtype=np.uint32).view(np.float32)
    special = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.1754942e-38, 1.1754944e-38, 3.4028235e38]
    special += [inf, -inf, nan, 0.5, 1.5, 2.5, 16777216.0, 16777217.0]
    values[: len(special)] = special
    random.shuffle(values)
    return values
