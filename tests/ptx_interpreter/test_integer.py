"""Integer and bit instructions against Python's integers."""

import numpy as np
import pytest

from . import Trap, Unsupported
from .snippets import evaluate

RANDOM = np.random.default_rng(1)
DTYPES = {
    "u16": np.uint16,
    "s16": np.int16,
    "u32": np.uint32,
    "s32": np.int32,
    "u64": np.uint64,
    "s64": np.int64,
}


def samples(type_name: str, count: int = 200) -> np.ndarray:
    """Random values of mixed magnitude, with the limits of the type."""
    dtype = np.dtype(DTYPES[type_name])
    bits = 8 * dtype.itemsize
    raw = RANDOM.integers(0, 1 << 63, count, dtype=np.uint64) << np.uint64(1)
    raw ^= RANDOM.integers(0, 2, count, dtype=np.uint64)
    values = (raw >> RANDOM.integers(64 - bits, 64, count).astype(np.uint64)).astype(dtype)
    values[:4] = [0, 1, np.iinfo(dtype).max, np.iinfo(dtype).min]
    RANDOM.shuffle(values)
    return values


def wrap(value: int, type_name: str) -> int:
    bits = 8 * np.dtype(DTYPES[type_name]).itemsize
    value %= 1 << bits
    return value - (1 << bits) if type_name[0] == "s" and value >> (bits - 1) else value


def truncated(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return -quotient if (a < 0) != (b < 0) else quotient


def expect(instruction: str, out_type: str, function, *inputs) -> None:
    got = evaluate(instruction, np.dtype(DTYPES[out_type]).str, *inputs)
    wanted = [wrap(function(*map(int, row)), out_type) for row in zip(*inputs, strict=True)]
    assert got.tolist() == wanted, instruction


ALL = list(DTYPES)


@pytest.mark.parametrize("t", ALL)
def test_add_sub_mul_wrap(t):
    a, b = samples(t), samples(t)
    expect(f"add.{t} %out, %a, %b;", t, lambda x, y: x + y, a, b)
    expect(f"sub.{t} %out, %a, %b;", t, lambda x, y: x - y, a, b)
    expect(f"mul.lo.{t} %out, %a, %b;", t, lambda x, y: x * y, a, b)
    bits = 8 * np.dtype(DTYPES[t]).itemsize
    expect(f"mul.hi.{t} %out, %a, %b;", t, lambda x, y: (x * y) >> bits, a, b)
    c = samples(t)
    expect(f"mad.lo.{t} %out, %a, %b, %c;", t, lambda x, y, z: x * y + z, a, b, c)
    expect(f"mad.hi.{t} %out, %a, %b, %c;", t, lambda x, y, z: ((x * y) >> bits) + z, a, b, c)
    expect(f"add.{t} %out, %a, -3;", t, lambda x: x - 3, a)


@pytest.mark.parametrize(
    "t, wide", [("u16", "u32"), ("s16", "s32"), ("u32", "u64"), ("s32", "s64")]
)
def test_wide(t, wide):
    a, b, c = samples(t), samples(t), samples(wide)
    expect(f"mul.wide.{t} %out, %a, %b;", wide, lambda x, y: x * y, a, b)
    expect(f"mad.wide.{t} %out, %a, %b, %c;", wide, lambda x, y, z: x * y + z, a, b, c)


@pytest.mark.parametrize("t", ALL)
def test_div_rem_truncate(t):
    a, b = samples(t), samples(t)
    b[b == 0] = 7
    expect(f"div.{t} %out, %a, %b;", t, truncated, a, b)
    expect(f"rem.{t} %out, %a, %b;", t, lambda x, y: x - truncated(x, y) * y, a, b)
    with pytest.raises(Trap, match="division by zero"):
        evaluate(f"div.{t} %out, %a, 0;", np.dtype(DTYPES[t]).str, a)


@pytest.mark.parametrize("t", ALL)
def test_min_max_abs_neg(t):
    a, b, c = samples(t), samples(t), samples(t)
    expect(f"min.{t} %out, %a, %b;", t, min, a, b)
    expect(f"max.{t} %out, %a, %b;", t, max, a, b)
    expect(f"sad.{t} %out, %a, %b, %c;", t, lambda x, y, z: abs(x - y) + z, a, b, c)
    if t[0] == "s":
        expect(f"abs.{t} %out, %a;", t, abs, a)
        expect(f"neg.{t} %out, %a;", t, lambda x: -x, a)


def test_saturating_add_and_mul24():
    a, b = samples("s32"), samples("s32")
    clamp = lambda v: max(-(2**31), min(2**31 - 1, v))  # noqa: E731
    expect("add.sat.s32 %out, %a, %b;", "s32", lambda x, y: clamp(x + y), a, b)
    expect("sub.sat.s32 %out, %a, %b;", "s32", lambda x, y: clamp(x - y), a, b)
    low = lambda x: wrap(x << 8, "s32") >> 8  # noqa: E731
    expect("mul24.lo.s32 %out, %a, %b;", "s32", lambda x, y: low(x) * low(y), a, b)


def test_carry_chain_is_128_bit_arithmetic():
    a, b = samples("u64"), samples("u64")
    c, d = samples("u64"), samples("u64")
    for sign, opcode in ((1, "add"), (-1, "sub")):
        chain = f"{opcode}.cc.u64 %x, %a, %c; {opcode}c.u64 %out, %b, %d;"
        high = evaluate(chain, "<u8", a, b, c, d, types=".reg .b64 %x;")
        for i in range(len(a)):
            x, y = int(a[i]) + (int(b[i]) << 64), int(c[i]) + (int(d[i]) << 64)
            assert int(high[i]) == ((x + sign * y) >> 64) % 2**64
    a, b, c = samples("u32"), samples("u32"), samples("u32")
    chain = "mad.lo.cc.u32 %x, %a, %b, %c; madc.hi.u32 %out, %a, %b, 0;"
    high = evaluate(chain, "<u4", a, b, c, types=".reg .b32 %x;")
    wanted = [(int(x) * int(y) + int(z)) >> 32 for x, y, z in zip(a, b, c, strict=True)]
    assert high.tolist() == wanted


@pytest.mark.parametrize("t", ALL)
def test_shifts_clamp_the_amount(t):
    bits = 8 * np.dtype(DTYPES[t]).itemsize
    a = samples(t)
    amount = RANDOM.integers(0, 2 * bits, len(a), dtype=np.uint32)
    amount[:3] = [bits, bits - 1, 2**32 - 1]
    expect(f"shr.{t} %out, %a, %b;", t, lambda x, n: x >> min(n, bits), a, amount)
    expect(f"shl.b{bits} %out, %a, %b;", t, lambda x, n: x << min(n, bits), a, amount)
    expect(f"shr.{t} %out, %a, 3;", t, lambda x: x >> 3, a)
    expect(f"shl.b{bits} %out, %a, {bits};", t, lambda x: 0, a)


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(mode):
    a, b = samples("u32"), samples("u32")
    c = RANDOM.integers(0, 70, len(a), dtype=np.uint32)
    limit = (lambda n: n & 31) if mode == "wrap" else (lambda n: min(n, 32))
    both = lambda x, y: (y << 32) | x  # noqa: E731
    left = lambda x, y, n: (both(x, y) << limit(n)) >> 32  # noqa: E731
    expect(f"shf.l.{mode}.b32 %out, %a, %b, %c;", "u32", left, a, b, c)
    right = lambda x, y, n: both(x, y) >> limit(n)  # noqa: E731
    expect(f"shf.r.{mode}.b32 %out, %a, %b, %c;", "u32", right, a, b, c)


def test_logic_and_every_lop3_table():
    a, b, c = samples("u32", 40), samples("u32", 40), samples("u32", 40)
    expect("and.b32 %out, %a, %b;", "u32", lambda x, y: x & y, a, b)
    expect("or.b32 %out, %a, %b;", "u32", lambda x, y: x | y, a, b)
    expect("xor.b32 %out, %a, %b;", "u32", lambda x, y: x ^ y, a, b)
    expect("not.b32 %out, %a;", "u32", lambda x: ~x, a)
    expect("cnot.b32 %out, %a;", "u32", lambda x: int(x == 0), a)
    for table in range(256):

        def lop(x, y, z, table=table):
            bit = lambda v, i: v >> i & 1  # noqa: E731
            return sum(
                (table >> (4 * bit(x, i) + 2 * bit(y, i) + bit(z, i)) & 1) << i for i in range(32)
            )

        expect(f"lop3.b32 %out, %a, %b, %c, {table:#x};", "u32", lop, a[:9], b[:9], c[:9])


def test_logic_on_predicates():
    a, b = np.array([0, 0, 1, 1], "?"), np.array([0, 1, 0, 1], "?")
    assert evaluate("and.pred %out, %a, %b;", "?", a, b).tolist() == (a & b).tolist()
    assert evaluate("xor.pred %out, %a, %b;", "?", a, b).tolist() == (a ^ b).tolist()
    assert evaluate("not.pred %out, %a;", "?", a).tolist() == (~a).tolist()


def test_prmt():
    a, b, c = samples("u32"), samples("u32"), samples("u32")

    def permute(x, y, selector):
        octets = [x >> 8 * i & 255 for i in range(4)] + [y >> 8 * i & 255 for i in range(4)]
        result = 0
        for i in range(4):
            nibble = selector >> 4 * i & 15
            octet = octets[nibble & 7]
            if nibble & 8:
                octet = 255 if octet & 128 else 0
            result |= octet << 8 * i
        return result

    expect("prmt.b32 %out, %a, %b, %c;", "u32", permute, a, b, c)
    expect("prmt.b32 %out, %a, %b, 0x5410;", "u32", lambda x, y: permute(x, y, 0x5410), a, b)
    modes = {
        "f4e": lambda n: [n, n + 1, n + 2, n + 3],
        "b4e": lambda n: [n, (n - 1) % 8, (n - 2) % 8, (n - 3) % 8],
        "rc8": lambda n: [n] * 4,
        "ecl": lambda n: [max(n, i) for i in range(4)],
        "ecr": lambda n: [min(n, i) for i in range(4)],
        "rc16": lambda n: [0, 1, 0, 1] if n in (0, 2) else [2, 3, 2, 3],
    }
    for mode, bytes_of in modes.items():

        def picked(x, y, n, bytes_of=bytes_of):
            octets = [x >> 8 * i & 255 for i in range(4)] + [y >> 8 * i & 255 for i in range(4)]
            return sum(octets[k] << 8 * i for i, k in enumerate(bytes_of(n & 3)))

        expect(f"prmt.b32.{mode} %out, %a, %b, %c;", "u32", picked, a, b, c)


@pytest.mark.parametrize("t", ["u32", "s32", "u64", "s64"])
def test_bit_fields(t):
    bits = 8 * np.dtype(DTYPES[t]).itemsize
    a, b = samples(t), samples(t)
    position = RANDOM.integers(0, bits + 9, len(a), dtype=np.uint32)
    length = RANDOM.integers(0, bits + 9, len(a), dtype=np.uint32)

    def extract(x, at, n):
        """Bit by bit, as the PTX ISA writes it."""
        x %= 1 << bits
        top = min(at + n - 1, bits - 1)
        sign = 0 if t[0] == "u" or n == 0 else x >> top & 1
        return sum(
            ((x >> (at + i) & 1) if i < n and at + i < bits else sign) << i for i in range(bits)
        )

    expect(f"bfe.{t} %out, %a, %b, %c;", t, extract, a, position, length)

    def insert(x, y, at, n):
        y %= 1 << bits
        for i in range(n):
            if at + i < bits:
                y = y & ~(1 << (at + i)) | (x >> i & 1) << (at + i)
        return y

    expect(f"bfi.b{bits} %out, %a, %b, %c, %d;", t, insert, a, b, position, length)


@pytest.mark.parametrize("bits", [32, 64])
def test_counting(bits):
    t = f"u{bits}"
    a = samples(t)
    expect(f"popc.b{bits} %out, %a;", "u32", lambda x: x.bit_count(), a)
    expect(f"clz.b{bits} %out, %a;", "u32", lambda x: bits - x.bit_length(), a)
    reverse = lambda x: int(f"{x:0{bits}b}"[::-1], 2)  # noqa: E731
    expect(f"brev.b{bits} %out, %a;", t, reverse, a)
    expect(f"bfind.u{bits} %out, %a;", "u32", lambda x: x.bit_length() - 1, a)
    shift = lambda x: bits - x.bit_length() if x else -1  # noqa: E731
    expect(f"bfind.shiftamt.u{bits} %out, %a;", "u32", shift, a)
    signed = samples(f"s{bits}")
    expect(
        f"bfind.s{bits} %out, %a;", "u32", lambda x: (~x if x < 0 else x).bit_length() - 1, signed
    )


def test_bmsk():
    a, b = np.arange(0, 40, dtype=np.uint32), np.arange(40, 0, -1, dtype=np.uint32)
    mask = lambda x, y: (1 << min(y, 32)) - 1 << min(x, 32)  # noqa: E731
    expect("bmsk.clamp.b32 %out, %a, %b;", "u32", mask, a, b)


def test_dot_products():
    a, b, c = samples("u32"), samples("u32"), samples("u32")
    signed = lambda v, n: v - (1 << n) if v >> (n - 1) else v  # noqa: E731
    for x_type in "us":
        for y_type in "us":

            def dp4a(x, y, z, x_type=x_type, y_type=y_type):
                for i in range(4):
                    p, q = x >> 8 * i & 255, y >> 8 * i & 255
                    p = signed(p, 8) if x_type == "s" else p
                    q = signed(q, 8) if y_type == "s" else q
                    z += p * q
                return z

            expect(f"dp4a.{x_type}32.{y_type}32 %out, %a, %b, %c;", "u32", dp4a, a, b, c)

    def dp2a(x, y, z, first):
        return z + sum(
            signed(x >> 16 * i & 0xFFFF, 16) * signed(y >> 8 * (i + first) & 255, 8)
            for i in range(2)
        )

    expect("dp2a.lo.s32.s32 %out, %a, %b, %c;", "u32", lambda x, y, z: dp2a(x, y, z, 0), a, b, c)
    expect("dp2a.hi.s32.s32 %out, %a, %b, %c;", "u32", lambda x, y, z: dp2a(x, y, z, 2), a, b, c)


@pytest.mark.parametrize("t", ALL)
def test_comparison_and_selection(t):
    a, b = samples(t), samples(t)
    b[::3] = a[::3]
    comparisons = {
        "eq": lambda x, y: x == y,
        "ne": lambda x, y: x != y,
        "lt": lambda x, y: x < y,
        "le": lambda x, y: x <= y,
        "gt": lambda x, y: x > y,
        "ge": lambda x, y: x >= y,
    }
    if t[0] == "u":
        comparisons |= {"lo": comparisons["lt"], "hs": comparisons["ge"]}
        comparisons |= {"ls": comparisons["le"], "hi": comparisons["gt"]}
    for name, compare in comparisons.items():
        got = evaluate(f"setp.{name}.{t} %out, %a, %b;", "?", a, b)
        wanted = [compare(int(x), int(y)) for x, y in zip(a, b, strict=True)]
        assert got.tolist() == wanted
    got = evaluate(f"set.lt.u32.{t} %out, %a, %b;", "<u4", a, b)
    assert got.tolist() == [0xFFFFFFFF if x < y else 0 for x, y in zip(a, b, strict=True)]
    chosen = RANDOM.integers(0, 2, len(a)).astype("?")
    got = evaluate(f"selp.{t} %out, %a, %b, %c;", np.dtype(DTYPES[t]).str, a, b, chosen)
    assert got.tolist() == np.where(chosen, a, b).tolist()


def test_setp_with_two_results_and_a_third_operand():
    a, b = samples("s32"), samples("s32")
    c = RANDOM.integers(0, 2, len(a)).astype("?")
    types = ".reg .pred %z;"
    for name, both in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        code = f"setp.lt.{name}.s32 %out|%z, %a, %b, %c;"
        assert evaluate(code, "?", a, b, c, types=types).tolist() == both(a < b, c).tolist()
        code = f"setp.lt.{name}.s32 %z|%out, %a, %b, !%c;"
        assert evaluate(code, "?", a, b, c, types=types).tolist() == both(a >= b, ~c).tolist()


def test_slct():
    a, b, c = samples("s32"), samples("s32"), samples("s32")
    expect("slct.s32.s32 %out, %a, %b, %c;", "s32", lambda x, y, z: x if z >= 0 else y, a, b, c)


def test_mov_packs_low_part_first():
    a, b = samples("u32"), samples("u32")
    expect("mov.b64 %out, {%a, %b};", "u64", lambda x, y: x | y << 32, a, b)
    wide = samples("u64")
    types = ".reg .b32 %x; .reg .b16 %h;"
    got = evaluate("mov.b64 {%x, %out}, %a;", "<u4", wide, types=types)
    assert got.tolist() == (wide >> np.uint64(32)).tolist()
    got = evaluate("mov.b32 {%h, %out}, %a; mov.b16 %h, %h;", "<u2", a, types=types)
    assert got.tolist() == (a >> 16).tolist()
    got = evaluate("mov.b64 {_, %out}, %a;", "<u4", wide)
    assert got.tolist() == (wide >> np.uint64(32)).tolist()


@pytest.mark.parametrize(
    "instruction, named",
    [
        ("add.u8x4 %out, %a, %a;", "no known type"),
        ("add.rz.s32 %out, %a, %a;", ".rz"),
        ("vadd.u32.u32.u32 %out, %a, %a;", "vadd"),
        ("shl.b32.wrap %out, %a, %a;", ".wrap"),
        ("mul.lo.cc.u32 %out, %a, %a;", ".cc"),
        ("add.u64 %out, %a, %a;", "32 bits"),
    ],
)
def test_what_is_not_supported_is_named(instruction, named):
    with pytest.raises(Unsupported, match="PTX line") as caught:
        evaluate(instruction, "<u4", samples("u32"))
    assert named in str(caught.value)
