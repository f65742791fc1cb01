"""Number formats and exact rounding, vectorised.

The tool behind everything here is *rounding to odd*: a float64 that carries, in its last bit,
whether it is exact. With s = fl(a + b) and e the error of that sum (Knuth's TwoSum, exact), the
result is s if e = 0 and else the neighbour of a + b whose last bit is one. A number rounded to odd
with 53 bits and then rounded once more to at most 51 bits is rounded as if once. The product of two
float32 is exact in float64, so fma, and any directed rounding, of float32 and narrower formats is
exact this way.
"""

import ctypes

import numpy as np

_U64 = np.uint64
_libm = ctypes.CDLL("libm.so.6")
_libm.fma.restype = ctypes.c_double
_libm.fma.argtypes = [ctypes.c_double] * 3
_fma_f64 = np.frompyfunc(_libm.fma, 3, 1)
NAN_F32 = np.uint32(0x7FFFFFFF).view(np.float32)  # what PTX arithmetic returns for NaN
NAN_16 = np.uint16(0x7FFF)


def sum_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64, rounded to odd."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    return _odd(np.asarray(total), np.asarray(error))


def _odd(value: np.ndarray, error: np.ndarray) -> np.ndarray:
    """`value` is the nearest float64 to value + error."""
    bits = value.view(_U64)
    inexact = (error != 0) & np.isfinite(value) & np.isfinite(error) & ((bits & _U64(1)) == 0)
    if not inexact.any():
        return value
    outward = (error > 0) == (value > 0)
    moved = np.where(outward, bits + _U64(1), bits - _U64(1))
    return np.where(inexact, moved, bits).view(np.float64)


def canonical_f32(value: np.ndarray) -> np.ndarray:
    """float32 with every NaN replaced by PTX's 0x7fffffff."""
    if value.size and np.isnan(value.min()):
        value = np.where(np.isnan(value), NAN_F32, value)
    return value


def flush_f32(value: np.ndarray) -> np.ndarray:
    """.ftz: subnormals become zeros of the same sign."""
    bits = np.asarray(value).view(np.uint32)
    return np.where((bits & 0x7F800000) == 0, bits & np.uint32(0x80000000), bits).view(np.float32)


def round_f32(value: np.ndarray, mode: str = "rn") -> np.ndarray:
    """float64 (exact or rounded to odd) -> float32; mode rn, rz, rm or rp."""
    near = value.astype(np.float32)
    if mode == "rn":
        return near
    if mode == "rz":
        over = np.abs(near.astype(np.float64)) > np.abs(value)
        return np.where(over, np.nextafter(near, np.float32(0)), near)
    if mode == "rm":
        return np.where(near > value, np.nextafter(near, np.float32(-np.inf)), near)
    return np.where(near < value, np.nextafter(near, np.float32(np.inf)), near)


def fma_f32(a: np.ndarray, b: np.ndarray, c: np.ndarray, mode: str = "rn") -> np.ndarray:
    """float32 a * b + c, rounded once."""
    product = np.multiply(a, b, dtype=np.float64)
    total = np.asarray(product + c)
    if mode != "rn":
        return _rounded_sum(product, np.asarray(c, np.float64), mode)
    result = total.astype(np.float32)
    # Rounding twice goes wrong only where the float64 sum is a tie, or the result is subnormal.
    doubtful = (total.view(_U64) & _U64(0x1FFFFFFF)) == _U64(0x10000000)
    doubtful |= (np.abs(result) < np.float32(2.4e-38)) & (total != 0)
    if doubtful.any():
        c = np.broadcast_to(np.asarray(c, np.float64), total.shape)
        exact = sum_to_odd(product[doubtful], c[doubtful])
        result[doubtful] = exact.astype(np.float32)
    return result


def fma_f64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float64 a * b + c, rounded once (the C library's fma, one element at a time)."""
    return np.asarray(_fma_f64(a, b, c)).astype(np.float64)


def add_f32(a: np.ndarray, b: np.ndarray, mode: str) -> np.ndarray:
    return _rounded_sum(a.astype(np.float64), np.asarray(b, np.float64), mode)


def _rounded_sum(a: np.ndarray, b: np.ndarray, mode: str) -> np.ndarray:
    """a + b of float64 as float32. Rounding down makes an exact zero -0, except for 0 + 0."""
    total = sum_to_odd(a, b)
    result = round_f32(total, mode)
    if mode == "rm":
        negative = (total == 0) & (np.signbit(a) | np.signbit(b))
        result = np.where(negative, np.float32(-0.0), result)
    return result


def multiply_f32(a: np.ndarray, b: np.ndarray, mode: str) -> np.ndarray:
    return round_f32(np.multiply(a, b, dtype=np.float64), mode)


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(value: np.ndarray, mode: str = "rn") -> np.ndarray:
    """float32 -> bf16 bits; NaN becomes 0x7fff."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    if mode == "rn":
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    else:  # rz
        rounded = bits
    return np.where(np.isnan(value), NAN_16, (rounded >> np.uint32(16)).astype(np.uint16))


def f64_to_bf16(value: np.ndarray) -> np.ndarray:
    """float64 (exact or rounded to odd) -> bf16 bits, rounded once."""
    near = np.asarray(value.astype(np.float32))
    odd = near.view(np.uint32)
    error = value - near
    inexact = (error != 0) & np.isfinite(error) & ((odd & np.uint32(1)) == 0)
    outward = (error > 0) == (near > 0)
    moved = np.where(outward, odd + np.uint32(1), odd - np.uint32(1))
    # Below the least float32 the sum of signs is lost: the result is the least subnormal, then
    # zero.
    moved = np.where(near == 0, np.where(value < 0, 0x80000001, 1).astype(np.uint32), moved)
    return f32_to_bf16(np.where(inexact, moved, odd).view(np.float32))


def f64_to_f16(value: np.ndarray) -> np.ndarray:
    """float64 (exact or rounded to odd) -> float16 with NaN 0x7fff."""
    return canonical_f16(value.astype(np.float16))


def canonical_f16(value: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(value), NAN_16.view(np.float16), value)


def f32_to_f16(value: np.ndarray, mode: str = "rn") -> np.ndarray:
    """float32 -> float16."""
    near = value.astype(np.float16)
    if mode == "rz":
        over = np.abs(near.astype(np.float32)) > np.abs(value)
        near = np.where(over, np.nextafter(near, np.float16(0)), near)
    return canonical_f16(near)


def unpack(bits: np.ndarray, half: str) -> tuple[np.ndarray, np.ndarray]:
    """The low and the high value of packed f16x2 or bf16x2 bits, as float64."""
    low, high = bits.astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)
    return half_to_f64(low, half), half_to_f64(high, half)


def half_to_f64(bits: np.ndarray, half: str) -> np.ndarray:
    if half == "bf16":
        return bf16_to_f32(bits).astype(np.float64)
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float64)


def f64_to_half(value: np.ndarray, half: str) -> np.ndarray:
    """float64 (exact or rounded to odd) -> 16 bits of `half` (f16 or bf16)."""
    if half == "bf16":
        return f64_to_bf16(value)
    return f64_to_f16(value).view(np.uint16)


def pack(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two 16-bit values -> 32 bits."""
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def f32_to_tf32(value: np.ndarray) -> np.ndarray:
    """cvt.rna.tf32: 10 bits of mantissa, ties away from zero, as float32 bits."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(value), rounded, bits)
