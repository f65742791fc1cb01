"""cvt in all directions, exact against rational arithmetic."""

from fractions import Fraction
from math import floor, isinf, isnan

import numpy as np
import pytest

from . import Unsupported
from .exact import bf16_value, interesting_f32, round_fraction
from .snippets import evaluate

INTEGERS = {
    "u8": np.uint8, "s8": np.int8, "u16": np.uint16, "s16": np.int16, "u32": np.uint32,
    "s32": np.int32, "u64": np.uint64, "s64": np.int64,
}  # fmt: skip
ROUND = {
    "rni": lambda f: round(f),  # Python rounds ties to even
    "rzi": lambda f: int(f),
    "rmi": lambda f: floor(f),
    "rpi": lambda f: -floor(-f),
}


@pytest.fixture(autouse=True)
def quiet():
    with np.errstate(all="ignore"):
        yield


def result_type(t: str) -> str:
    """8-bit results live in 16-bit registers."""
    return np.dtype({"u8": np.uint16, "s8": np.int16}.get(t, INTEGERS.get(t))).str


def samples(t: str) -> np.ndarray:
    limits = np.iinfo(INTEGERS[t])
    random = np.random.default_rng(11)
    values = random.integers(limits.min, limits.max, 100, dtype=INTEGERS[t], endpoint=True)
    values[:5] = [limits.min, limits.max, 0, 1, limits.max // 2]
    return values


@pytest.mark.parametrize("source", INTEGERS)
def test_integer_to_integer(source):
    a = samples(source)
    for destination, dtype in INTEGERS.items():
        limits = np.iinfo(dtype)
        bits = 8 * np.dtype(dtype).itemsize
        got = evaluate(f"cvt.{destination}.{source} %out, %a;", result_type(destination), a)
        wanted = []
        for value in a.tolist():
            low = value % (1 << bits)
            wanted.append(low - (1 << bits) if low > limits.max else low)
        assert got.tolist() == wanted, destination
        got = evaluate(f"cvt.sat.{destination}.{source} %out, %a;", result_type(destination), a)
        assert got.tolist() == [min(max(v, limits.min), limits.max) for v in a.tolist()], (
            destination
        )


@pytest.mark.parametrize("mode", ROUND)
def test_float_to_integer(mode):
    a = interesting_f32(12, 300)
    random = np.random.default_rng(13)
    a[::2] = random.integers(-2000, 2000, 150).astype(np.float32) / 4  # halves and quarters
    for destination, dtype in INTEGERS.items():
        limits = np.iinfo(dtype)
        wide = limits.bits == 64
        got = evaluate(f"cvt.{mode}.{destination}.f32 %out, %a;", result_type(destination), a)
        for value, result in zip(a.tolist(), got.tolist(), strict=True):
            if isnan(value):
                wanted = (limits.min if limits.min else 1 << 63) if wide else 0
            elif isinf(value):
                wanted = limits.max if value > 0 else limits.min
            else:
                wanted = min(max(ROUND[mode](Fraction(value)), limits.min), limits.max)
            assert result == wanted, (destination, value)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_integer_to_float(mode):
    for source in ("u8", "s8", "u16", "s16", "u32", "s32"):
        a = samples(source)
        got = evaluate(f"cvt.{mode}.f32.{source} %out, %a;", "<f4", a)
        assert got.tolist() == [round_fraction(Fraction(v), "f32", mode) for v in a.tolist()]
    a = samples("s32")
    if mode == "rn":
        for source in ("u64", "s64"):
            a = samples(source)
            for destination, out in (("f32", "<f4"), ("f64", "<f8")):
                got = evaluate(f"cvt.rn.{destination}.{source} %out, %a;", out, a)
                wanted = [round_fraction(Fraction(v), destination) for v in a.tolist()]
                assert got.tolist() == wanted
        a = samples("s16")
        got = evaluate("cvt.rn.f16.s16 %out, %a;", "<f2", a)
        assert got.tolist() == [round_fraction(Fraction(v), "f16") for v in a.tolist()]
        got = evaluate("cvt.rn.bf16.s16 %out, %a;", "<u2", a)
        wanted = [round_fraction(Fraction(v), "bf16") for v in a.tolist()]
        assert bf16_value(got).tolist() == wanted


def half_ties(precision: int) -> np.ndarray:
    """float32 values on, just above and just below the midpoints of a narrower format."""
    random = np.random.default_rng(14)
    shift = 24 - precision
    bits = random.integers(0x38000000, 0x47000000, 300, dtype=np.uint32) >> shift << shift
    bits |= 1 << (shift - 1)
    bits[::3] += 1
    bits[1::3] -= 1
    values = bits.view(np.float32)
    values[::2] *= -1
    return values


def expected_half(value: float, name: str, mode: str) -> float:
    if isnan(value) or isinf(value) or value == 0:
        return value
    result = round_fraction(Fraction(value), name, mode)
    return result if result else np.copysign(0.0, value)


@pytest.mark.parametrize("name, precision", [("f16", 11), ("bf16", 8)])
@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_f32_to_half(name, precision, mode):
    a = np.concatenate([half_ties(precision), interesting_f32(15, 400)])
    got = evaluate(f"cvt.{mode}.{name}.f32 %out, %a;", "<u2", a)
    values = got.view(np.float16).astype(np.float32) if name == "f16" else bf16_value(got)
    wanted = np.array([expected_half(v, name, mode) for v in a.tolist()], np.float32)
    same = (values.view(np.uint32) == wanted.view(np.uint32)) | (
        np.isnan(values) & np.isnan(wanted)
    )
    assert same.all(), a[~same][:3]
    assert (got[np.isnan(a)] == 0x7FFF).all()


def test_two_halves_at_once_put_the_first_operand_high():
    a, b = half_ties(8), interesting_f32(16, 300)
    for name in ("f16", "bf16"):
        packed = evaluate(f"cvt.rn.{name}x2.f32 %out, %a, %b;", "<u4", a, b)
        high = evaluate(f"cvt.rn.{name}.f32 %out, %a;", "<u2", a)
        low = evaluate(f"cvt.rn.{name}.f32 %out, %a;", "<u2", b)
        assert (packed >> 16).tolist() == high.tolist()
        assert (packed & 0xFFFF).tolist() == low.tolist()
    got = evaluate("cvt.rn.relu.bf16x2.f32 %out, %a, %b;", "<u4", np.float32(-2), np.float32(3))
    assert got[0] == 0x00004040


def test_half_to_f32_and_f64():
    bits = np.arange(1 << 16, dtype=np.uint16)
    got = evaluate("cvt.f32.f16 %out, %a;", "<f4", bits)
    wanted = bits.view(np.float16).astype(np.float32)
    assert ((got == wanted) | np.isnan(wanted)).all() and (np.isnan(got) == np.isnan(wanted)).all()
    got = evaluate("cvt.f32.bf16 %out, %a;", "<f4", bits)
    wanted = bf16_value(bits)
    assert ((got == wanted) | np.isnan(wanted)).all()
    got = evaluate("cvt.f64.f16 %out, %a;", "<f8", bits)
    assert np.array_equal(got, bits.view(np.float16).astype(np.float64), equal_nan=True)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_f64_to_f32(mode):
    random = np.random.default_rng(17)
    a = random.standard_normal(300) * 2.0 ** random.integers(-155, 128, 300)
    a[:4] = [1e300, -1e300, 1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-52]
    got = evaluate(f"cvt.{mode}.f32.f64 %out, %a;", "<f4", a)
    wanted = [round_fraction(Fraction(v), "f32", mode) for v in a.tolist()]
    assert got.tolist() == wanted
    if mode == "rn":
        assert (evaluate("cvt.f64.f32 %out, %a;", "<f8", got) == got).all()


def test_round_to_integral_float_and_saturate():
    a = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 3.3, 1e20, np.inf], np.float32)
    assert np.array_equal(evaluate("cvt.rni.f32.f32 %out, %a;", "<f4", a), np.rint(a))
    assert np.array_equal(evaluate("cvt.rzi.f32.f32 %out, %a;", "<f4", a), np.trunc(a))
    got = evaluate("cvt.sat.f32.f32 %out, %a;", "<f4", a)
    assert got.tolist() == np.clip(a, 0, 1).tolist()
    assert evaluate("cvt.ftz.f32.f32 %out, %a;", "<f4", np.float32(1e-40))[0] == 0


def test_tf32_rounds_ties_away():
    a = np.array([1 + 2.0**-11, -(1 + 2.0**-11), 1 + 2.0**-12, 3.0], np.float32)
    got = evaluate("cvt.rna.tf32.f32 %out, %a;", "<u4", a).view(np.float32)
    assert got.tolist() == [1 + 2.0**-10, -(1 + 2.0**-10), 1.0, 3.0]


def test_pack_with_saturation():
    a, b = np.array([300, -300, 5], np.int32), np.array([1, 2, -200], np.int32)
    c = np.array([0xAABB, 0xCCDD, 0x1122], np.uint32)
    got = evaluate("cvt.pack.sat.s8.s32.b32 %out, %a, %b, %c;", "<u4", a, b, c)
    clamp = lambda v: max(-128, min(127, int(v))) & 255  # noqa: E731
    wanted = [clamp(y) | clamp(x) << 8 | int(z) << 16 for x, y, z in zip(a, b, c, strict=True)]
    assert got.tolist() == wanted


@pytest.mark.parametrize(
    "code",
    [
        "cvt.s32.f32",
        "cvt.f16.f32",
        "cvt.rn.satfinite.e4m3x2.f32",
        "cvt.rz.f32.s64",
        "cvt.rni.f16.f32",
    ],
)
def test_refused(code):
    with pytest.raises(Unsupported):
        evaluate(f"{code} %out, %a;", "<u4", np.zeros(1, np.uint64 if "s64" in code else np.uint32))


def test_not_a_number_to_integer():
    nan = np.array([np.nan])
    assert evaluate("cvt.rzi.s32.f64 %out, %a;", "<u4", nan)[0] == 0x80000000
    assert evaluate("cvt.rzi.u32.f32 %out, %a;", "<u4", nan.astype(np.float32))[0] == 0
    assert evaluate("cvt.rzi.u64.f32 %out, %a;", "<u8", nan.astype(np.float32))[0] == 1 << 63
