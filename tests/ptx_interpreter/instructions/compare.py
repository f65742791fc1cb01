"""Comparison and selection: setp set selp slct."""

import numpy as np

from .. import rounding
from ..decode import Decoder, Step
from ..ptx_types import FLOATS, SIGNED, bits_of
from ..syntax import Pair
from . import instruction

ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
# Float comparisons are false if either side is NaN (numpy's != is not); the -u ones are then true.
FLOAT_COMPARISONS = {
    **{name: ORDERED[name] for name in ("eq", "lt", "le", "gt", "ge")},
    "ne": lambda a, b: (a < b) | (a > b),
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
BOOLEAN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(decoder: Decoder):
    """(function of two values, boolean operation or None, type); takes those modifiers."""
    name = decoder.one_of(*FLOAT_COMPARISONS, *ORDERED)
    boolean = decoder.one_of(*BOOLEAN, default="")
    flush = decoder.has("ftz")
    return name, BOOLEAN.get(boolean), flush


def _comparer(decoder: Decoder, name: str, type_name: str, flush: bool):
    """The comparison as a closure of the state, of operands 1 and 2."""
    is_float = type_name in FLOATS or type_name == "bf16"
    table = FLOAT_COMPARISONS if is_float else ORDERED
    if name not in table or (name in ("lo", "ls", "hi", "hs") and type_name in SIGNED):
        raise decoder.unsupported(f"comparison .{name} of .{type_name}")
    compare = table[name]
    a, b = decoder.read(1, type_name), decoder.read(2, type_name)
    if type_name == "bf16":
        convert = rounding.bf16_to_f32
    elif flush and type_name == "f32":
        convert = rounding.flush_f32
    elif flush:
        raise decoder.unsupported("modifier .ftz")
    else:
        return lambda state: compare(a(state), b(state))
    return lambda state: compare(convert(a(state)), convert(b(state)))


@instruction("setp")
def setp(decoder: Decoder) -> Step:
    """p = (a cmp b) [bool c]; the second destination gets (not (a cmp b)) [bool c]."""
    name, boolean, flush = _comparison(decoder)
    type_name = decoder.take_type()
    if type_name in ("f16x2", "bf16x2"):
        raise decoder.unsupported(f"type .{type_name}")
    decoder.finish(4 if boolean else 3)
    compare = _comparer(decoder, name, type_name, flush)
    destination = decoder.operands[0]
    pair = isinstance(destination, Pair)
    write = decoder.write(destination.first if pair else destination, "pred")
    write_not = decoder.write(destination.second, "pred") if pair else None
    third = decoder.read(3, "pred") if boolean else None

    def step(state, mask):
        result = compare(state)
        if boolean is None:
            first, second = result, ~result
        else:
            other = third(state)
            first, second = boolean(result, other), boolean(~result, other)
        write(state, mask, first)
        if write_not is not None:
            write_not(state, mask, second)

    return step


@instruction("set")
def set_(decoder: Decoder) -> Step:
    """d = all ones (integer) or 1.0 (float) where the comparison holds, else 0."""
    name, boolean, flush = _comparison(decoder)
    destination = decoder.take_type()
    type_name = decoder.take_type()
    decoder.finish(4 if boolean else 3)
    if destination not in ("u32", "s32", "f32"):
        raise decoder.unsupported(f"destination .{destination}")
    compare = _comparer(decoder, name, type_name, flush)
    third = decoder.read(3, "pred") if boolean else None
    write = decoder.write(0, "u32")
    true = np.uint32(0x3F800000 if destination == "f32" else 0xFFFFFFFF)

    def step(state, mask):
        result = compare(state)
        if boolean is not None:
            result = boolean(result, third(state))
        write(state, mask, np.where(result, true, np.uint32(0)))

    return step


@instruction("selp")
def selp(decoder: Decoder) -> Step:
    type_name = decoder.take_type()
    decoder.finish(4)
    a, b = decoder.read(1, type_name), decoder.read(2, type_name)
    chosen, write = decoder.read(3, "pred"), decoder.write(0, type_name)
    return lambda state, mask: write(state, mask, np.where(chosen(state), a(state), b(state)))


@instruction("slct")
def slct(decoder: Decoder) -> Step:
    """d = c >= 0 ? a : b"""
    flush = decoder.has("ftz")
    type_name, selector = decoder.take_type(), decoder.take_type()
    decoder.finish(4)
    if selector not in ("s32", "f32") or bits_of(selector) != 32:
        raise decoder.unsupported(f"selector .{selector}")
    a, b = decoder.read(1, type_name), decoder.read(2, type_name)
    c, write = decoder.read(3, selector), decoder.write(0, type_name)

    def step(state, mask):
        value = rounding.flush_f32(c(state)) if flush else c(state)
        write(state, mask, np.where(value >= 0, a(state), b(state)))

    return step
