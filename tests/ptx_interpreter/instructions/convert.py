"""cvt between integers and floats, with roundings, saturation, packed bf16x2/f16x2, tf32."""

import numpy as np

from .. import rounding
from ..decode import Decoder, Step, elementwise
from ..ptx_types import DTYPES, FLOATS
from . import instruction
from .floating import saturated

INTEGER_MODES = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
FLOAT_MODES = ("rn", "rz", "rm", "rp", "rna")
WIDE_FLOATS = FLOATS | {"bf16"}


@instruction("cvt")
def cvt(decoder: Decoder) -> Step:
    mode = decoder.one_of(*FLOAT_MODES, *INTEGER_MODES, default="")
    if decoder.has("pack"):
        return _pack_saturated(decoder)
    flush, saturate = decoder.has("ftz"), decoder.has("sat")
    relu, finite = decoder.has("relu"), decoder.has("satfinite")
    destination = decoder.take_type()
    if destination in ("f16x2", "bf16x2"):
        return _two_halves(decoder, destination, mode, relu, finite)
    source = decoder.take_type()
    decoder.finish(2)
    if destination == "tf32":
        if (mode, source, relu, finite) != ("rna", "f32", False, False):
            raise decoder.unsupported("cvt to tf32")
        return elementwise(decoder, rounding.f32_to_tf32, "b32", ("f32",))
    if source in WIDE_FLOATS and destination in WIDE_FLOATS:
        function = _float_to_float(decoder, destination, source, mode)
    elif source in WIDE_FLOATS:
        function = _float_to_int(decoder, destination, source, mode)
    elif destination in WIDE_FLOATS:
        function = _int_to_float(decoder, destination, source, mode)
    else:
        return _int_to_int(decoder, destination, source, saturate)
    return _adjusted(decoder, function, destination, source, flush, saturate, relu or finite)


def _adjusted(decoder, function, destination, source, flush, saturate, special) -> Step:
    """Adds .ftz (float32 on either side) and .sat (float results) around the conversion."""
    if special or (flush and "f32" not in (destination, source)):
        raise decoder.unsupported("modifier .relu, .satfinite or .ftz")
    before = source == "f32" and flush
    after = destination == "f32" and flush
    clamp = saturate and destination in FLOATS
    if saturate and destination == "bf16":
        raise decoder.unsupported("modifier .sat")

    def convert(value):
        value = np.asarray(value)
        if source == "bf16":
            value = rounding.bf16_to_f32(value)
        result = np.asarray(function(rounding.flush_f32(value) if before else value))
        result = rounding.flush_f32(result) if after else result
        return saturated(result) if clamp else result

    return elementwise(decoder, convert, destination, (source,))


def _int_to_int(decoder: Decoder, destination: str, source: str, saturate: bool) -> Step:
    dtype = DTYPES[destination]
    if not saturate:
        return elementwise(decoder, lambda a: a.astype(dtype), destination, (source,))
    limits = np.iinfo(dtype)

    def clamped(a):
        own = np.iinfo(a.dtype)
        low, high = max(limits.min, own.min), min(limits.max, own.max)
        return np.clip(a, a.dtype.type(low), a.dtype.type(high)).astype(dtype)

    return elementwise(decoder, clamped, destination, (source,))


def _float_to_int(decoder: Decoder, destination: str, source: str, mode: str):
    """Clamped to the range; NaN becomes 0, or the top bit alone from f64 and for 64-bit results."""
    if mode not in INTEGER_MODES:
        raise decoder.unsupported("float to integer without .rni, .rzi, .rmi or .rpi")
    round_it, dtype = INTEGER_MODES[mode], DTYPES[destination]
    limits = np.iinfo(dtype)
    top_bit = dtype.type(limits.min if dtype.kind == "i" else limits.max // 2 + 1)
    nan_value = top_bit if dtype.itemsize == 8 or source == "f64" else dtype.type(0)

    def convert(value):
        whole = round_it(value.astype(np.float64))
        low, high = whole <= limits.min, whole >= float(limits.max)
        nan = np.isnan(whole)
        result = np.where(low | high | nan, 0.0, whole).astype(dtype)
        result = np.where(low, dtype.type(limits.min), result)
        result = np.where(high, dtype.type(limits.max), result)
        return np.where(nan, nan_value, result)

    return convert


def _int_to_float(decoder: Decoder, destination: str, source: str, mode: str):
    if mode not in ("rn", "rz", "rm", "rp"):
        raise decoder.unsupported("integer to float without a rounding")
    if destination == "f64":
        if mode != "rn" and DTYPES[source].itemsize == 8:
            raise decoder.unsupported(f"rounding .{mode} of .{source} to .f64")
        return lambda a: a.astype(np.float64)
    if destination == "f32" and mode == "rn":
        return lambda a: a.astype(np.float32)
    if DTYPES[source].itemsize == 8:
        raise decoder.unsupported(f"rounding .{mode} of .{source} to .{destination}")
    return _from_f64(decoder, destination, mode)


def _from_f64(decoder: Decoder, destination: str, mode: str):
    """From numbers that float64 holds exactly, rounded once."""
    if destination == "f32":
        return lambda a: rounding.canonical_f32(rounding.round_f32(a.astype(np.float64), mode))
    if mode != "rn":
        raise decoder.unsupported(f"rounding .{mode} to .{destination}")
    if destination == "bf16":
        return lambda a: rounding.f64_to_bf16(a.astype(np.float64))
    return lambda a: rounding.f64_to_f16(a.astype(np.float64))


def _float_to_float(decoder: Decoder, destination: str, source: str, mode: str):
    if mode in INTEGER_MODES:
        if destination != source or source == "bf16":
            raise decoder.unsupported(f"rounding .{mode}")
        return INTEGER_MODES[mode]
    sizes = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8}
    if sizes[destination] > sizes[source]:
        dtype = DTYPES[destination]
        if destination == "f32":
            return lambda a: rounding.canonical_f32(a.astype(dtype))
        return lambda a: a.astype(dtype)
    if destination == source:
        return lambda a: a
    if not mode:
        raise decoder.unsupported("narrowing without a rounding")
    if source == "f32" and destination == "bf16" and mode in ("rn", "rz"):
        return lambda a: rounding.f32_to_bf16(a, mode)
    if source == "f32" and destination == "f16" and mode in ("rn", "rz"):
        return lambda a: rounding.f32_to_f16(a, mode)
    return _from_f64(decoder, destination, mode)


def _two_halves(decoder: Decoder, destination: str, mode: str, relu: bool, finite: bool) -> Step:
    """cvt.rn.bf16x2.f32 d, a, b: a becomes the upper half, b the lower one."""
    decoder.one_of("f32")
    decoder.finish(3)
    if mode not in ("rn", "rz") or finite:
        raise decoder.unsupported("modifiers")

    def half(value):
        value = np.asarray(value)
        if relu:
            value = np.where(np.isnan(value), value, np.maximum(value, np.float32(0)))
        if destination == "bf16x2":
            return rounding.f32_to_bf16(value, mode)
        return rounding.f32_to_f16(value, mode).view(np.uint16)

    return elementwise(decoder, lambda a, b: rounding.pack(half(b), half(a)), "b32", ("f32", "f32"))


def _pack_saturated(decoder: Decoder) -> Step:
    """cvt.pack.sat.s8.s32.b32 d, a, b, c: bytes b, a, then the low half of c (b lowest)."""
    decoder.one_of("sat")
    destination = decoder.one_of("s8", "u8", "s16", "u16")
    decoder.one_of("s32")
    with_c = decoder.has("b32")
    decoder.finish(4 if with_c else 3)
    dtype = DTYPES[destination]
    limits, bits = np.iinfo(dtype), 8 * dtype.itemsize
    unsigned = np.dtype(f"u{dtype.itemsize}")

    def clamp(value):
        return (
            np.clip(value, limits.min, limits.max).astype(dtype).astype(unsigned).astype(np.uint32)
        )

    def packed(a, b, *c):
        result = clamp(b) | (clamp(a) << np.uint32(bits))
        return result | (c[0] << np.uint32(2 * bits)) if c and bits == 8 else result

    sources = ("s32", "s32", "b32") if with_c else ("s32", "s32")
    return elementwise(decoder, packed, "b32", sources)
