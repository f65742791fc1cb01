"""float32 and float64 arithmetic. Roundings rn, rz, rm, rp are exact; `.approx` instructions return
the correctly rounded result of the double-precision function, which a GPU does not promise."""

import numpy as np

from .. import rounding
from ..decode import Decoder, Step, elementwise
from . import instruction
from .halves import half_approximate, half_fma

MODES = ("rn", "rz", "rm", "rp")


def float_step(decoder: Decoder, type_name: str, function, sources: int) -> Step:
    """d = function(...) with .ftz on the way in and out, .sat, and PTX's NaN. Takes both
    modifiers."""
    flush = decoder.has("ftz")
    saturate = decoder.has("sat")
    if type_name == "f64" and (flush or saturate):
        raise decoder.unsupported("modifier .ftz or .sat")
    decoder.finish(sources + 1)
    if not flush and not saturate:
        if type_name == "f64":
            return elementwise(decoder, function, "f64", ("f64",) * sources)
        canonical = rounding.canonical_f32

        def plain(*values):
            return canonical(function(*values))

        return elementwise(decoder, plain, "f32", ("f32",) * sources)

    def adjusted(*values):
        if flush:
            values = [rounding.flush_f32(value) for value in values]
        result = rounding.canonical_f32(np.asarray(function(*values)))
        if flush:
            result = rounding.flush_f32(result)
        if saturate:
            result = saturated(result)
        return result

    return elementwise(decoder, adjusted, "f32", ("f32",) * sources)


def saturated(value: np.ndarray) -> np.ndarray:
    """Clamped to [0, 1]; NaN becomes +0, and so does -0."""
    one = value.dtype.type(1)
    return np.where(value > 0, np.minimum(value, one), value.dtype.type(0))


def float_add(decoder: Decoder, type_name: str) -> Step:
    mode = decoder.one_of(*MODES, default="rn")
    subtract = decoder.instruction.opcode == "sub"
    if mode == "rn":
        return float_step(decoder, type_name, np.subtract if subtract else np.add, 2)
    if type_name == "f64":
        raise decoder.unsupported(f"rounding .{mode} of f64")

    def rounded(a, b):
        return rounding.add_f32(a, -b if subtract else b, mode)

    return float_step(decoder, type_name, rounded, 2)


def float_mul(decoder: Decoder, type_name: str) -> Step:
    mode = decoder.one_of(*MODES, default="rn")
    if mode == "rn":
        return float_step(decoder, type_name, np.multiply, 2)
    if type_name == "f64":
        raise decoder.unsupported(f"rounding .{mode} of f64")
    return float_step(decoder, type_name, lambda a, b: rounding.multiply_f32(a, b, mode), 2)


@instruction("fma")
def fma(decoder: Decoder) -> Step:
    type_name = decoder.take_type()
    if type_name not in ("f32", "f64"):
        return half_fma(decoder, type_name)
    mode = decoder.one_of(*MODES)
    if type_name == "f64":
        if mode != "rn":
            raise decoder.unsupported(f"rounding .{mode} of f64")
        return float_step(decoder, type_name, rounding.fma_f64, 3)
    return float_step(decoder, type_name, lambda a, b, c: rounding.fma_f32(a, b, c, mode), 3)


def float_div(decoder: Decoder, type_name: str) -> Step:
    mode = decoder.one_of("rn", "approx", "full")
    if type_name == "f64" and mode != "rn":
        raise decoder.unsupported(f"modifier .{mode} of f64")
    return float_step(decoder, type_name, np.divide, 2)


def float_minmax(decoder: Decoder, type_name: str, maximum: bool) -> Step:
    """NaN loses against a number (wins with .NaN); -0 is less than +0."""
    keep_nan = decoder.has("NaN")
    xor_sign = decoder.has("xorsign") and decoder.has("abs")

    def chosen(a, b):
        sign = np.signbit(a) ^ np.signbit(b)
        if xor_sign:
            a, b = np.abs(a), np.abs(b)
        greater = (a > b) | ((a == b) & ~np.signbit(a) & np.signbit(b))
        first = greater if maximum else ~greater
        result = np.where(first, a, b)
        if keep_nan:
            result = np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), result)
        else:
            result = np.where(np.isnan(a), b, np.where(np.isnan(b), a, result))
        return np.copysign(result, np.where(sign, -1, 1)).astype(a.dtype) if xor_sign else result

    return float_step(decoder, type_name, chosen, 2)


def float_sign(decoder: Decoder, type_name: str) -> Step:
    """abs and neg only touch the sign bit, of NaN too."""
    flush = decoder.has("ftz")
    decoder.finish(2)
    function = np.absolute if decoder.instruction.opcode == "abs" else np.negative
    if not flush:
        return elementwise(decoder, function, type_name, (type_name,))
    return elementwise(decoder, lambda a: rounding.flush_f32(function(a)), type_name, (type_name,))


@instruction("copysign")
def copysign(decoder: Decoder) -> Step:
    """d = |b| with the sign of a."""
    type_name = decoder.take_type()
    decoder.finish(3)
    return elementwise(decoder, lambda a, b: np.copysign(b, a), type_name, (type_name,) * 2)


def _in_double(function):
    return lambda a: function(a.astype(np.float64)).astype(np.float32)


APPROXIMATIONS = {
    "ex2": _in_double(np.exp2),
    "lg2": _in_double(np.log2),
    "sin": _in_double(np.sin),
    "cos": _in_double(np.cos),
    "tanh": _in_double(np.tanh),
    "rsqrt": _in_double(lambda a: 1 / np.sqrt(a)),
    "rcp": lambda a: a.dtype.type(1) / a,
    "sqrt": np.sqrt,
}


@instruction("ex2", "lg2", "sin", "cos", "tanh", "rsqrt")
def approximate(decoder: Decoder) -> Step:
    type_name = decoder.take_type()
    decoder.one_of("approx")
    function = APPROXIMATIONS[decoder.instruction.opcode]
    if type_name in ("f16", "f16x2", "bf16", "bf16x2"):
        return half_approximate(decoder, type_name, function)
    if type_name != "f32":
        raise decoder.unsupported(f"type .{type_name}")
    return float_step(decoder, type_name, function, 1)


@instruction("rcp", "sqrt")
def reciprocal_or_root(decoder: Decoder) -> Step:
    type_name = decoder.take_type()
    mode = decoder.one_of("rn", "approx")
    if type_name == "f64" and mode != "rn":
        raise decoder.unsupported("modifier .approx of f64")
    return float_step(decoder, type_name, APPROXIMATIONS[decoder.instruction.opcode], 1)


@instruction("testp")
def test_property(decoder: Decoder) -> Step:
    what = decoder.one_of("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    type_name = decoder.take_type()
    decoder.finish(2)
    tiny = np.finfo(np.float64 if type_name == "f64" else np.float32).tiny
    tests = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & ((np.abs(a) >= tiny) | (a == 0)),  # as PTX has it
        "subnormal": lambda a: (a != 0) & (np.abs(a) < tiny),
    }
    return elementwise(decoder, tests[what], "pred", (type_name,))
