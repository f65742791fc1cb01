"""Float instructions against rational arithmetic (exact.py): results must be equal bit for bit."""

from fractions import Fraction
from math import isnan, isqrt

import numpy as np
import pytest

from . import Unsupported
from .exact import bf16_value, fused, interesting_f32, round_fraction
from .snippets import evaluate

MODES = ("rn", "rz", "rm", "rp")
NAN = 0x7FFFFFFF


def bits_of(value: float) -> int:
    """float32 bits of an exactly representable value; PTX's NaN."""
    return NAN if isnan(value) else int(np.float32(value).view(np.uint32))


def check_f32(instruction: str, function, *inputs: np.ndarray) -> None:
    got = evaluate(instruction, "<u4", *[each.view(np.uint32) for each in inputs])
    rows = zip(*[each.astype(np.float64).tolist() for each in inputs], strict=True)
    wanted = [bits_of(function(*row)) for row in rows]
    wrong = [i for i, bits in enumerate(got.tolist()) if bits != wanted[i]]
    assert not wrong, (instruction, [each[wrong[0]] for each in inputs], hex(got[wrong[0]]))


def pairs(count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Unrelated values, and values near enough that their sum rounds."""
    a, b = interesting_f32(1, count), interesting_f32(2, count)
    near = np.random.default_rng(3).uniform(-2, 2, count).astype(np.float32)
    b[::2] = a[::2] * near[::2]
    return a, b


@pytest.fixture(autouse=True)
def quiet():
    with np.errstate(all="ignore"):
        yield


@pytest.mark.parametrize("mode", MODES)
def test_add_sub_mul_fma_round_once(mode):
    a, b = pairs()
    c = interesting_f32(4, len(a))
    c[::3] = -(a * b)[::3]  # cancellation: the rounding error of the product remains
    check_f32(
        f"fma.{mode}.f32 %out, %a, %b, %c;", lambda x, y, z: fused(x, y, z, "f32", mode), a, b, c
    )
    check_f32(f"add.{mode}.f32 %out, %a, %b;", lambda x, y: fused(x, 1.0, y, "f32", mode), a, b)
    check_f32(f"sub.{mode}.f32 %out, %a, %b;", lambda x, y: fused(y, -1.0, x, "f32", mode), a, b)
    product = lambda x, y: fused(x, y, np.copysign(0.0, x) * np.copysign(1, y), "f32", mode)  # noqa: E731
    check_f32(f"mul.{mode}.f32 %out, %a, %b;", product, a, b)


def test_fma_on_ties():
    """a b = 1 + 2^-24 (1 + tiny): fl64(a b + c) is a tie of float32 that c must break."""
    unit = 2.0**-24
    cases = []
    for sign in (1, -1):
        for power in (-30, -60, -100, -140, -149):
            tie = (1 + 2**-12, sign * (1 + 2**-12))  # exact product 1 + 2^-11 + 2^-24
            cases += [(*tie, 2.0**power), (*tie, -(2.0**power)), (*tie, 0.0)]
            cases += [(1.0, sign * (1 + 2 * unit), unit), (1.0, sign, unit + 2.0**-48)]
            cases += [(2.0**-75, sign * 2.0**-75, 2.0**power), (2.0**-75, sign * 2.0**-75, 0.0)]
            cases += [
                (1.5 * 2.0**-75, sign * 2.0**-75, 2.0**-149),
                (2.0**-100, 2.0**-60, 2.0**-130),
            ]
            cases += [(2.0**64, sign * 2.0**64, -(2.0**104)), (2.0**127, 1.9999999, 2.0**103)]
    a, b, c = (np.array(column, np.float32) for column in zip(*cases, strict=True))
    for mode in MODES:
        check_f32(
            f"fma.{mode}.f32 %out, %a, %b, %c;",
            lambda x, y, z, m=mode: fused(x, y, z, "f32", m),
            a,
            b,
            c,
        )


def test_fma_differs_from_two_roundings():
    a = np.float32(1 + 2**-12)
    got = evaluate("fma.rn.f32 %out, %a, %a, %b;", "<f4", a, np.float32(-1 - 2**-11))
    assert got[0] == 2.0**-24 and a * a - np.float32(1 + 2**-11) == 0


def test_div_sqrt_rcp_are_correctly_rounded():
    a, b = pairs()

    def quotient(x, y):
        if isnan(x) or isnan(y) or x in (np.inf, -np.inf) or y in (0, np.inf, -np.inf) or x == 0:
            return float(np.float64(x) / np.float64(y))
        result = round_fraction(Fraction(x) / Fraction(y), "f32")
        return result if result else np.copysign(0.0, x) * np.copysign(1, y)

    check_f32("div.rn.f32 %out, %a, %b;", quotient, a, b)
    check_f32("rcp.rn.f32 %out, %a;", lambda x: quotient(1.0, x), a)

    def root(x):
        """The one float32 r with (r - ulp/2)^2 < x < (r + ulp/2)^2, exactly."""
        if isnan(x) or x <= 0 or x == np.inf:
            return float(np.sqrt(np.float64(x)))
        scaled = Fraction(x) * 4**200
        floor = Fraction(isqrt(scaled.numerator // scaled.denominator), 2**200)
        return round_fraction(floor + Fraction(1, 2**210), "f32")

    check_f32("sqrt.rn.f32 %out, %a;", root, a)


def test_f64():
    random = np.random.default_rng(5)
    a, b = random.standard_normal((2, 100)) * 2.0 ** random.integers(-30, 30, (2, 100))
    c = -a * b
    c[::2] = random.standard_normal(50)
    got = evaluate("fma.rn.f64 %out, %a, %b, %c;", "<f8", a, b, c)
    assert got.tolist() == [fused(*row, "f64") for row in zip(a, b, c, strict=True)]
    assert (evaluate("div.rn.f64 %out, %a, %b;", "<f8", a, b) == a / b).all()
    assert (evaluate("sub.f64 %out, %a, %b;", "<f8", a, b) == a - b).all()
    assert (evaluate("sqrt.rn.f64 %out, %a;", "<f8", abs(a)) == np.sqrt(abs(a))).all()
    with pytest.raises(Unsupported, match="rounding .rz"):
        evaluate("add.rz.f64 %out, %a, %b;", "<f8", a, b)


def test_flush_to_zero():
    subnormal, tiny = np.float32(1e-40), np.float32(1.1754944e-38)
    assert evaluate("add.f32 %out, %a, %a;", "<f4", subnormal)[0] == subnormal + subnormal
    assert evaluate("add.ftz.f32 %out, %a, %a;", "<f4", subnormal)[0] == 0
    out = evaluate("mul.ftz.f32 %out, %a, %b;", "<f4", -tiny, np.float32(0.5))
    assert out[0] == 0 and np.signbit(out[0])
    # The input subnormal counts as zero in fma too: 0 * 2^100 + 1.
    got = evaluate("fma.rn.ftz.f32 %out, %a, %b, %c;", "<f4", subnormal, np.float32(2**100), tiny)
    assert got[0] == tiny
    assert evaluate("setp.gt.ftz.f32 %out, %a, 0f00000000;", "?", subnormal).tolist() == [False]
    assert evaluate("setp.gt.f32 %out, %a, 0f00000000;", "?", subnormal).tolist() == [True]


def test_saturate():
    a = np.array([-1, -0.0, 0.25, 1, 2, np.inf, np.nan], np.float32)
    got = evaluate("add.sat.f32 %out, %a, 0f00000000;", "<u4", a.view(np.uint32))
    assert got.view(np.float32).tolist() == [0, 0, 0.25, 1, 1, 1, 0]
    assert got[1] == 0  # +0


def test_min_max():
    values = [np.nan, -np.inf, -1.0, -0.0, 0.0, 1e-45, 2.0, np.inf]
    a, b = np.array(np.meshgrid(values, values), np.float32).reshape(2, -1)
    order = lambda v: (v, np.copysign(1, v))  # noqa: E731

    def least(x, y):
        return y if isnan(x) else x if isnan(y) else min(x, y, key=order)

    def most(x, y):
        return y if isnan(x) else x if isnan(y) else max(x, y, key=order)

    check_f32("min.f32 %out, %a, %b;", least, a, b)
    check_f32("max.f32 %out, %a, %b;", most, a, b)
    nan_wins = lambda f: lambda x, y: np.nan if isnan(x) or isnan(y) else f(x, y)  # noqa: E731
    check_f32("min.NaN.f32 %out, %a, %b;", nan_wins(least), a, b)
    check_f32("max.NaN.f32 %out, %a, %b;", nan_wins(most), a, b)


def test_sign_bit_operations():
    a = interesting_f32(6, 100)
    bits = a.view(np.uint32)
    assert evaluate("neg.f32 %out, %a;", "<u4", bits).tolist() == (bits ^ 0x80000000).tolist()
    assert evaluate("abs.f32 %out, %a;", "<u4", bits).tolist() == (bits & 0x7FFFFFFF).tolist()
    b = interesting_f32(7, 100)
    got = evaluate("copysign.f32 %out, %a, %b;", "<u4", bits, b.view(np.uint32))
    wanted = (bits & 0x80000000) | (b.view(np.uint32) & 0x7FFFFFFF)
    assert got.tolist() == wanted.tolist()


def test_comparisons_with_nan():
    values = [np.nan, -np.inf, -0.0, 0.0, 1.0, np.inf]
    a, b = np.array(np.meshgrid(values, values), np.float32).reshape(2, -1)
    either = np.isnan(a) | np.isnan(b)
    ordered = {"eq": a == b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    ordered["ne"] = (a != b) & ~either
    for name, wanted in ordered.items():
        assert (evaluate(f"setp.{name}.f32 %out, %a, %b;", "?", a, b) == wanted).all(), name
        got = evaluate(f"setp.{name}u.f32 %out, %a, %b;", "?", a, b)
        assert (got == wanted | either).all(), name
    assert (evaluate("setp.num.f32 %out, %a, %b;", "?", a, b) == ~either).all()
    assert (evaluate("setp.nan.f32 %out, %a, %b;", "?", a, b) == either).all()


def test_approximations_are_within_an_ulp():
    a = np.random.default_rng(8).uniform(-20, 20, 500).astype(np.float32)
    positive = np.abs(a) + np.float32(0.01)
    cases = {
        "ex2.approx.f32": (a, np.exp2),
        "ex2.approx.ftz.f32": (a, np.exp2),
        "lg2.approx.f32": (positive, np.log2),
        "sin.approx.f32": (a, np.sin),
        "cos.approx.f32": (a, np.cos),
        "tanh.approx.f32": (a, np.tanh),
        "rsqrt.approx.f32": (positive, lambda x: 1 / np.sqrt(x)),
        "rcp.approx.ftz.f32": (positive, lambda x: 1 / x),
        "sqrt.approx.f32": (positive, np.sqrt),
    }
    for name, (x, function) in cases.items():
        got = evaluate(f"{name} %out, %a;", "<f4", x)
        exact = function(x.astype(np.float64))
        assert (np.abs(got - exact) <= np.spacing(np.abs(exact).astype(np.float32))).all(), name
    for mode in ("approx", "full", "approx.ftz"):
        got = evaluate(f"div.{mode}.f32 %out, %a, %b;", "<f4", a, positive)
        assert np.allclose(got, a / positive, rtol=1e-6, atol=0)


def test_testp():
    a = np.array([0, 1e-45, 1, np.inf, np.nan], np.float32)
    tables = {
        "finite": [1, 1, 1, 0, 0],
        "infinite": [0, 0, 0, 1, 0],
        "notanumber": [0, 0, 0, 0, 1],
        "number": [1, 1, 1, 1, 0],
        "normal": [1, 0, 1, 0, 0],
        "subnormal": [0, 1, 0, 0, 0],
    }
    for name, wanted in tables.items():
        assert evaluate(f"testp.{name}.f32 %out, %a;", "?", a).tolist() == [bool(w) for w in wanted]


HALF = {
    "f16": (lambda bits: bits.view(np.float16).astype(np.float64), "f16"),
    "bf16": (lambda bits: bf16_value(bits).astype(np.float64), "bf16"),
}


def half_bits(value: float, name: str) -> int:
    if isnan(value):
        return 0x7FFF
    if name == "f16":
        return int(np.float16(value).view(np.uint16))
    return int(np.float32(value).view(np.uint32) >> 16)


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_half_arithmetic_rounds_once(name):
    random = np.random.default_rng(9)
    value, _ = HALF[name]
    a, b, c = random.integers(0, 1 << 16, (3, 2000), dtype=np.uint16)
    if name == "f16":  # cancellation: the rounding error of the product remains
        c[::3] = np.float16(-(value(a) * value(b)))[::3].view(np.uint16)
    rows = list(zip(*(value(each).tolist() for each in (a, b, c)), strict=True))
    wanted = [half_bits(fused(x, y, z, name), name) for x, y, z in rows]
    assert evaluate(f"fma.rn.{name} %out, %a, %b, %c;", "<u2", a, b, c).tolist() == wanted
    wanted = [half_bits(fused(x, 1.0, y, name), name) for x, y, _ in rows]
    assert evaluate(f"add.{name} %out, %a, %b;", "<u2", a, b).tolist() == wanted
    wanted = [half_bits(fused(y, -1.0, x, name), name) for x, y, _ in rows]
    assert evaluate(f"sub.{name} %out, %a, %b;", "<u2", a, b).tolist() == wanted
    zero = [np.copysign(0.0, x) * np.copysign(1, y) for x, y, _ in rows]
    wanted = [
        half_bits(fused(x, y, z, name), name) for (x, y, _), z in zip(rows, zero, strict=True)
    ]
    assert evaluate(f"mul.{name} %out, %a, %b;", "<u2", a, b).tolist() == wanted


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_packed_halves_are_two_scalars(name):
    random = np.random.default_rng(10)
    a, b, c = random.integers(0, 1 << 16, (3, 400), dtype=np.uint16)
    wide = [each.view(np.uint32) for each in (a, b, c)]
    for code, count in (
        ("fma.rn", 3),
        ("add", 2),
        ("mul", 2),
        ("min", 2),
        ("max", 2),
        ("neg", 1),
        ("abs", 1),
    ):
        sources = "".join(f", %{letter}" for letter in "abc"[:count])
        packed = evaluate(f"{code}.{name}x2 %out{sources};", "<u4", *wide[:count])
        scalar = evaluate(f"{code}.{name} %out{sources};", "<u2", *(a, b, c)[:count])
        assert packed.view(np.uint16).tolist() == scalar.tolist(), code


def test_half_relu_and_comparison():
    one, minus = 0x3F80, 0xBF80
    a = np.array([one, minus], np.uint16)
    got = evaluate("fma.rn.relu.bf16 %out, %a, %b, %b;", "<u2", a, np.zeros(2, np.uint16))
    assert got.tolist() == [0, 0]
    got = evaluate("setp.lt.bf16 %out, %a, %b;", "?", a, a[::-1].copy())
    assert got.tolist() == [False, True]
