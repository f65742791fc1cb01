"""mma, ldmatrix, stmatrix and movmatrix against the fragment formulas of the PTX ISA, written out
element by element. Small integers make every product and sum exact."""

import numpy as np
import pytest

from . import Divergence, SharedRace, UninitialisedRead, Unsupported
from .exact import bf16_bits, round_fraction
from .snippets import run

RANDOM = np.random.default_rng(50)


def bits_of(values: np.ndarray, name: str) -> np.ndarray:
    """Elements of a matrix as raw bits."""
    if name == "bf16":
        return bf16_bits(values)
    if name == "f16":
        return values.astype(np.float16).view(np.uint16)
    if name == "tf32":
        return values.astype(np.float32).view(np.uint32)
    return values.astype(name.replace("s", "i").replace("8", "1")).view(np.uint8)


def place_a(lane: int, i: int, k: int, bits: int) -> tuple[int, int]:
    """(row, column) of element i of the A fragment of an m16n8k{k}."""
    group, tig = lane // 4, lane % 4
    if bits == 16:  # m16n8k8: i < 4; m16n8k16: i < 8
        row = group if i % 4 < 2 else group + 8
        return row, tig * 2 + (i & 1) + (8 if i >= 4 else 0)
    if bits == 8:  # m16n8k16: i < 8; m16n8k32: i < 16
        row = group if i % 8 < 4 else group + 8
        return row, tig * 4 + (i & 3) + (16 if i >= 8 else 0)
    row = group if i % 2 == 0 else group + 8  # tf32: m16n8k4: i < 2; m16n8k8: i < 4
    return row, tig + (4 if i >= 2 else 0)


def place_b(lane: int, i: int, k: int, bits: int) -> tuple[int, int]:
    group, tig = lane // 4, lane % 4
    if bits == 16:
        return tig * 2 + (i & 1) + (8 if i >= 2 else 0), group
    if bits == 8:
        return tig * 4 + (i & 3) + (16 if i >= 4 else 0), group
    return tig + (4 if i else 0), group


def place_c(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)


def fragments(matrix: np.ndarray, place, elements: int) -> np.ndarray:
    """(32 lanes, elements) from the matrix, packed into 32-bit registers."""
    out = np.array(
        [[matrix[place(lane, i)] for i in range(elements)] for lane in range(32)], matrix.dtype
    )
    return np.ascontiguousarray(out).view(np.uint32)


def names(prefix: int, count: int) -> str:
    return "{" + ", ".join(f"%r{prefix + i}" for i in range(count)) + "}"


def multiply(shape: str, types: str, a, b, c, warps: int = 1) -> np.ndarray:
    """D registers (lanes, registers) of one mma.sync; a, b, c are registers of the lanes."""
    counts = [each.shape[1] for each in (a, b, c)]
    code = "mov.u32 %r0, %tid.x;"
    for source, (first, count) in enumerate(zip((10, 20, 30), counts, strict=True)):
        code += f"mul.wide.u32 %d8, %r0, {4 * count}; add.u64 %d8, %d{source}, %d8;"
        code += "".join(f"ld.global.u32 %r{first + i}, [%d8+{4 * i}];" for i in range(count))
    code += (
        f"mma.sync.aligned.{shape}.row.col.{types} {names(40, counts[2])}, {names(10, counts[0])}, "
    )
    code += f"{names(20, counts[1])}, {names(30, counts[2])};"
    code += f"mul.wide.u32 %d8, %r0, {4 * counts[2]}; add.u64 %d8, %d3, %d8;"
    code += "".join(f"st.global.u32 [%d8+{4 * i}], %r{40 + i};" for i in range(counts[2]))
    out = np.zeros((32 * warps, counts[2]), np.uint32)
    report = run(code, *[np.tile(each, (warps, 1)) for each in (a, b, c)], out, block=32 * warps)
    assert report.counters.mma == warps
    return out


CASES = [
    ("m16n8k16", "bf16", 16),
    ("m16n8k16", "f16", 16),
    ("m16n8k8", "bf16", 16),
    ("m16n8k8", "f16", 16),
    ("m16n8k8", "tf32", 32),
    ("m16n8k4", "tf32", 32),
    ("m16n8k32", "s8", 8),
    ("m16n8k32", "u8", 8),
    ("m16n8k16", "s8", 8),
]


@pytest.mark.parametrize("shape, name, bits", CASES)
def test_mma_fragments(shape, name, bits):
    k = int(shape.split("k")[1])
    low = 0 if name[0] == "u" else -8
    a, b = RANDOM.integers(low, 9, (16, k)), RANDOM.integers(low, 9, (k, 8))
    c = RANDOM.integers(-1000, 1000, (16, 8))
    integers = name in ("s8", "u8")
    accumulator = np.int32 if integers else np.float32
    registers_a = fragments(
        bits_of(a, name), lambda lane, i: place_a(lane, i, k, bits), 16 * k // 32
    )
    registers_b = fragments(
        bits_of(b, name), lambda lane, i: place_b(lane, i, k, bits), 8 * k // 32
    )
    registers_c = fragments(c.astype(accumulator), place_c, 4)
    types = f"s32.{name}.{name}.s32" if integers else f"f32.{name}.{name}.f32"
    got = multiply(shape, types, registers_a, registers_b, registers_c, warps=2)
    wanted = fragments((a @ b + c).astype(accumulator), place_c, 4)
    assert np.array_equal(got, np.tile(wanted, (2, 1)))


def test_mma_with_f16_accumulators():
    a, b = RANDOM.integers(-8, 9, (16, 16)), RANDOM.integers(-8, 9, (16, 8))
    c = RANDOM.integers(-100, 100, (16, 8))
    got = multiply(
        "m16n8k16", "f16.f16.f16.f16",
        fragments(bits_of(a, "f16"), lambda lane, i: place_a(lane, i, 16, 16), 8),
        fragments(bits_of(b, "f16"), lambda lane, i: place_b(lane, i, 16, 16), 4),
        fragments(bits_of(c, "f16"), place_c, 4),
    )  # fmt: skip
    assert np.array_equal(got, fragments(bits_of(a @ b + c, "f16"), place_c, 4))


def test_mma_rounds_the_float64_sum_once():
    """The documented order: exact products, their float64 sum, plus C, one rounding."""
    from fractions import Fraction

    a = RANDOM.standard_normal((16, 16)).astype(np.float16).astype(np.float64)
    b = RANDOM.standard_normal((16, 8)).astype(np.float16).astype(np.float64)
    c = RANDOM.standard_normal((16, 8)).astype(np.float32)
    got = multiply(
        "m16n8k16", "f32.f16.f16.f32",
        fragments(bits_of(a, "f16"), lambda lane, i: place_a(lane, i, 16, 16), 8),
        fragments(bits_of(b, "f16"), lambda lane, i: place_b(lane, i, 16, 16), 4),
        fragments(c, place_c, 4),
    ).view(np.float32)  # fmt: skip
    for lane in range(32):
        for i in range(4):
            row, column = place_c(lane, i)
            exact = Fraction(float(c[row, column]))
            exact += sum(Fraction(a[row, k]) * Fraction(b[k, column]) for k in range(16))
            assert got[lane, i] == round_fraction(exact, "f32")


@pytest.mark.parametrize(
    "code",
    [
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r0}, {%r4}, {%r5}, {%r0};",
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%r0}, {%r4}, {%r5}, {%r0};",
        "wgmma.fence.sync.aligned;",
        "cp.async.bulk.commit_group;",
        "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r0, %r1}, [%r2];",
    ],
)
def test_what_is_not_supported(code):
    with pytest.raises(Unsupported, match="PTX line"):
        run(code)


SHARED = ".shared .align 16 .b8 tile[512];\n"
FILL = """mov.u32 %r0, %tid.x; mov.u32 %r1, tile; shl.b32 %r2, %r0, 4; add.u32 %r3, %r1, %r2;
mul.wide.u32 %d2, %r0, 16; add.u64 %d2, %d0, %d2; ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%d2];
st.shared.v4.u32 [%r3], {%r4, %r5, %r6, %r7}; bar.sync 0;"""


def loaded(count: int, transposed: bool, order=None) -> tuple[np.ndarray, np.ndarray]:
    """(registers (32, count), matrices (4, 8, 8)); lane l gives the address of row `order[l]`."""
    matrices = RANDOM.integers(0, 1 << 16, (4, 8, 8), dtype=np.uint16)
    order = np.arange(32, dtype=np.uint32) if order is None else order
    out = np.zeros((32, count), np.uint32)
    trans = ".trans" if transposed else ""
    code = (
        FILL
        + f"""mul.wide.u32 %d3, %r0, 4; add.u64 %d3, %d2, 0; mul.wide.u32 %d4, %r0, 4;
    add.u64 %d4, %d1, %d4; ld.global.u32 %r8, [%d4]; shl.b32 %r8, %r8, 4; add.u32 %r8, %r1, %r8;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {names(20, count)}, [%r8];
    ld.param.u64 %d5, [p2]; mul.wide.u32 %d6, %r0, {4 * count}; add.u64 %d5, %d5, %d6;"""
    )
    code += "".join(f"st.global.u32 [%d5+{4 * i}], %r{20 + i};" for i in range(count))
    run(code, matrices, order, out, variables=SHARED)
    return out, matrices


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(count, transposed):
    """Lane l, register i: row l/4, columns 2 (l%4) and 2 (l%4) + 1 of matrix i; transposed: the
    elements at rows 2 (l%4), 2 (l%4) + 1, column l/4."""
    order = RANDOM.permutation(32).astype(np.uint32)
    out, matrices = loaded(count, transposed, order)
    rows = matrices.reshape(32, 8)[order]
    for lane in range(32):
        for i in range(count):
            matrix = rows[8 * i : 8 * i + 8]
            row, pair = lane // 4, lane % 4 * 2
            low, high = (
                (matrix[pair, row], matrix[pair + 1, row])
                if transposed
                else (matrix[row, pair], matrix[row, pair + 1])
            )
            assert out[lane, i] == int(low) | int(high) << 16


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix_is_the_inverse_of_ldmatrix(trans):
    variables = SHARED + ".shared .align 16 .b8 copy[512];\n"
    matrices, out = (
        RANDOM.integers(0, 1 << 16, (4, 8, 8), dtype=np.uint16),
        np.zeros((4, 8, 8), np.uint16),
    )
    code = (
        FILL
        + f"""ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {names(20, 4)}, [%r3];
    mov.u32 %r9, copy; add.u32 %r9, %r9, %r2;
    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r9], {names(20, 4)}; bar.sync 0;
    ld.shared.v4.u32 {names(30, 4)}, [%r9]; mul.wide.u32 %d3, %r0, 16; add.u64 %d3, %d1, %d3;
    st.global.v4.u32 [%d3], {names(30, 4)};"""
    )
    run(code, matrices, out, variables=variables)
    assert np.array_equal(matrices, out)


def test_movmatrix_transposes():
    matrix, out = RANDOM.integers(0, 1 << 16, (8, 8), dtype=np.uint16), np.zeros((8, 8), np.uint16)
    code = """mov.u32 %r0, %tid.x; mul.wide.u32 %d2, %r0, 4; add.u64 %d3, %d0, %d2;
    add.u64 %d4, %d1, %d2; ld.global.u32 %r1, [%d3];
    movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1; st.global.u32 [%d4], %r2;"""
    run(code, matrix, out)
    assert np.array_equal(out, matrix.T)


def test_ldmatrix_needs_the_whole_warp_and_data_that_is_there():
    load = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r3];"
    zeros = np.zeros(256, np.uint16)
    with pytest.raises(Divergence, match="ldmatrix"):
        run(FILL + "setp.lt.u32 %p0, %r0, 8; @%p0 " + load, zeros, variables=SHARED)
    with pytest.raises(UninitialisedRead):
        run("mov.u32 %r3, tile;" + load, variables=SHARED)
    with pytest.raises(SharedRace):  # rows that lanes wrote themselves go to other lanes too
        run(FILL.replace("bar.sync 0;", "") + load, zeros, variables=SHARED)
