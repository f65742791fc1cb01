"""PTX scalar types: their size, and the numpy type that holds them.

16-bit and packed formats without a numpy type (bf16, f16x2, tf32 ...) are held as raw bits.
"""

import numpy as np

DTYPES = {
    "pred": np.dtype(np.bool_),
    "b8": np.dtype(np.uint8),
    "u8": np.dtype(np.uint8),
    "s8": np.dtype(np.int8),
    "b16": np.dtype(np.uint16),
    "u16": np.dtype(np.uint16),
    "s16": np.dtype(np.int16),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
    "b32": np.dtype(np.uint32),
    "u32": np.dtype(np.uint32),
    "s32": np.dtype(np.int32),
    "f32": np.dtype(np.float32),
    "tf32": np.dtype(np.uint32),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
    "b64": np.dtype(np.uint64),
    "u64": np.dtype(np.uint64),
    "s64": np.dtype(np.int64),
    "f64": np.dtype(np.float64),
}
SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
FLOATS = {"f16", "f32", "f64"}
SIGNED = {"s8", "s16", "s32", "s64"}
# The types whose rows a register of that many bits is viewed as (see state.py).
VIEWS = {
    1: ("pred",),
    8: ("u8", "s8"),
    16: ("u16", "s16", "f16"),
    32: ("u32", "s32", "f32"),
    64: ("u64", "s64", "f64"),
}


def bits_of(type_name: str) -> int:
    return 1 if type_name == "pred" else 8 * SIZES[type_name]


def view_of(type_name: str) -> str:
    """The canonical type of `VIEWS` that has the same numpy type: b32 -> u32, bf16 -> u16."""
    if type_name == "pred":
        return type_name
    kind = DTYPES[type_name].kind
    return f"{kind if kind != 'i' else 's'}{bits_of(type_name)}"


def raw_type(type_name: str) -> str:
    """The integer type with the same bits; signed types stay signed, for sign extension."""
    return type_name if type_name in SIGNED else f"u{bits_of(type_name)}"
