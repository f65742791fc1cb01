"""Loads, stores, atomics and address spaces; bounds, alignment, uninitialised bytes."""

import ctypes

import numpy as np
import pytest

from . import LaunchError, Memory, Misaligned, OutOfBounds, UninitialisedRead, launch, load_module
from .snippets import evaluate, kernel, run

TID = "mov.u32 %r0, %tid.x; "


def test_every_width_and_vector():
    source = np.arange(4 * 32 * 4, dtype=np.uint8)
    for count in (1, 2, 4):
        vector = "" if count == 1 else f".v{count}"
        for bits in (8, 16, 32, 64):
            size = bits // 8 * count
            if size > 16 or len(source) < 32 * size:
                continue
            register = {8: "%h", 16: "%h", 32: "%r", 64: "%d"}[bits]
            names = ", ".join(f"{register}{10 + i}" for i in range(count))
            items = names if count == 1 else f"{{{names}}}"
            out = np.zeros(32 * size, np.uint8)
            run(
                f"""{TID} mul.wide.u32 %d2, %r0, {size}; add.u64 %d3, %d0, %d2;
                add.u64 %d4, %d1, %d2; ld.global{vector}.u{bits} {items}, [%d3];
                st.global{vector}.b{bits} [%d4], {items};""",
                source, out,
            )  # fmt: skip
            assert np.array_equal(out, source[: 32 * size]), (count, bits)


def test_small_loads_are_extended_to_the_register():
    values = np.array([0x80, 0x7F, 0xFF] + [0] * 29, np.uint8)
    out = np.zeros(32, np.int32)
    code = TID + "cvt.u64.u32 %d2, %r0; add.u64 %d2, %d0, %d2; mul.wide.u32 %d3, %r0, 4;"
    code += "add.u64 %d3, %d1, %d3; "
    run(code + "ld.global.s8 %r1, [%d2]; st.global.u32 [%d3], %r1;", values, out)
    assert out[:3].tolist() == [-128, 127, -1]
    run(code + "ld.global.nc.u8 %r1, [%d2]; st.global.u32 [%d3], %r1;", values, out)
    assert out[:3].tolist() == [128, 127, 255]


@pytest.mark.parametrize(
    "load",
    [
        "ld.global.nc.L1::no_allocate.L2::128B.u32",
        "ld.volatile.global.u32",
        "ld.relaxed.gpu.global.u32",
        "ld.global.cg.u32",
        "ld.u32",
        "ldu.global.u32",
    ],
)
def test_hints_do_not_change_a_load(load):
    out = np.zeros(1, np.uint32)
    run(f"{load} %r0, [%d0]; st.global.wb.u32 [%d1], %r0;", np.array([7], np.uint32), out)
    assert out[0] == 7


def test_cache_policies():
    out = np.zeros(1, np.uint32)
    policy = "createpolicy.fractional.L2::evict_last.b64 %d5, 0f3F800000;"
    run(
        policy + "ld.global.L2::cache_hint.u32 %r0, [%d0], %d5; st.global.u32 [%d1], %r0;",
        np.array([9], np.uint32), out,
    )  # fmt: skip
    assert out[0] == 9


def test_bounds_are_exact():
    big = np.zeros(64, np.float32)
    inner = big[16:32]
    code = "ld.global.f32 %f0, [%d0+{}]; st.global.f32 [%d0], %f0;"
    for offset in (0, 60):
        run(code.format(offset), inner)
    for offset in (-4, 64):
        with pytest.raises(OutOfBounds, match="outside registered memory"):
            run(code.format(offset), inner)
    odd = np.zeros(7, np.uint8)
    run("ld.global.u8 %r0, [%d0+6];", odd)
    for offset, kind in ((7, "u8"), (4, "u32")):
        with pytest.raises(OutOfBounds):
            run(f"ld.global.{kind} %r0, [%d0+{offset}];", odd)
    with pytest.raises(OutOfBounds, match="0x0"):
        run("ld.global.u32 %r0, [%d0];", None)


def test_the_error_names_kernel_line_block_thread_and_values():
    out = np.zeros(33, np.uint32)
    code = """mov.u32 %r0, %ctaid.x; mov.u32 %r1, %tid.x; mad.lo.u32 %r2, %r0, 32, %r1;
    mul.wide.u32 %d1, %r2, 4; add.u64 %d1, %d0, %d1; st.global.u32 [%d1], %r2;"""
    with pytest.raises(OutOfBounds) as caught:
        run(code, out, grid=2)
    text = str(caught.value)
    assert "4 bytes beyond the end of argument 0 uint32[33]" in text
    assert "kernel test, PTX line 14: st.global.u32 [%d1], %r2" in text
    assert "block (1, 0, 0) thread (1, 0, 0)" in text and "%r2 = 0x21" in text


def test_alignment():
    data = np.zeros(64, np.uint8)
    skew = -data.ctypes.data % 16
    for load, offset in (("u16", 1), ("u32", 2), ("u64", 4), ("v2.u32", 4), ("v4.u32", 8)):
        items = {"v2.u32": "{%r0, %r1}", "v4.u32": "{%r0, %r1, %r2, %r3}", "u64": "%d5"}
        with pytest.raises(Misaligned):
            run(f"ld.global.{load} {items.get(load, '%r0')}, [%d0+{skew + offset}];", data)


def test_read_only_memory():
    memory = Memory()
    table = np.zeros(4, np.uint32)
    memory.register(table, writable=False)
    run("ld.global.u32 %r0, [%d0];", table, memory=memory)
    with pytest.raises(OutOfBounds, match="read-only"):
        run("st.global.u32 [%d0], 1;", table, memory=memory)


def test_registered_memory_behind_a_pointer():
    target = np.array([5], np.uint32)
    pointers = np.array([target.ctypes.data], np.uint64)
    out = np.zeros(1, np.uint32)
    code = "ld.global.u64 %d5, [%d0]; ld.global.u32 %r0, [%d5]; st.global.u32 [%d1], %r0;"
    with pytest.raises(OutOfBounds):
        run(code, pointers, out)
    memory = Memory()
    memory.register(target)
    run(code, pointers, out, memory=memory)
    assert out[0] == 5


def test_registrations():
    memory = Memory()
    data = np.zeros(16, np.uint32)
    assert memory.register(data) == memory.register(data) == data.ctypes.data
    memory.register(data[4:])
    with pytest.raises(LaunchError, match="overlaps"):
        memory.add(data.ctypes.data + 60, 8, "tail")
    memory.remove(data.ctypes.data)
    with pytest.raises(LaunchError, match="begins"):
        memory.remove(data.ctypes.data)


def test_one_instruction_over_several_allocations():
    a, b = np.arange(16, dtype=np.uint32), np.arange(16, 32, dtype=np.uint32)
    out = np.zeros(32, np.uint32)
    code = """mov.u32 %r0, %tid.x; and.b32 %r1, %r0, 15; mul.wide.u32 %d3, %r1, 4;
    setp.lt.u32 %p0, %r0, 16; selp.b64 %d4, %d0, %d1, %p0; add.u64 %d4, %d4, %d3;
    ld.global.u32 %r2, [%d4]; add.u32 %r3, %r2, 100; st.global.u32 [%d4], %r3;
    mul.wide.u32 %d3, %r0, 4; add.u64 %d3, %d2, %d3; st.global.u32 [%d3], %r2;"""
    run(code, a, b, out)
    assert out.tolist() == list(range(32))
    assert a.tolist() + b.tolist() == list(range(100, 132))


SHARED = ".shared .align 16 .b8 tile[128];\n"


def test_generic_addresses_find_their_space():
    out = np.zeros(96, np.uint32)
    code = f""".local .align 4 .b8 depot[8]; {TID}
    mul.wide.u32 %d1, %r0, 4; add.u64 %d2, %d0, %d1;
    mov.u32 %r1, tile; cvt.u64.u32 %d3, %r1; cvta.shared.u64 %d3, %d3; add.u64 %d3, %d3, %d1;
    st.u32 [%d3], %r0; ld.u32 %r2, [%d3]; st.u32 [%d2], %r2;
    mov.u64 %d4, depot; cvta.local.u64 %d4, %d4; add.u32 %r3, %r0, 1000; st.u32 [%d4+4], %r3;
    ld.local.u32 %r4, [depot+4]; st.u32 [%d2+128], %r4;
    rem.u32 %r5, %r0, 3; setp.eq.u32 %p0, %r5, 0; setp.eq.u32 %p1, %r5, 1;
    add.u64 %d5, %d4, 4; selp.b64 %d6, %d3, %d2, %p0; selp.b64 %d6, %d5, %d6, %p1;
    ld.u32 %r6, [%d6]; st.u32 [%d2+256], %r6;
    cvta.to.shared.u64 %d7, %d3; cvt.u32.u64 %r7, %d7; ld.shared.u32 %r8, [%r7];
    isspacep.shared %p2, %d3; isspacep.global %p3, %d2; isspacep.local %p4, %d3;
    @!%p2 trap; @!%p3 trap; @%p4 trap;"""
    run(code, out, variables=SHARED)
    mixed = [i + 1000 if i % 3 == 1 else i for i in range(32)]
    assert out.tolist() == [*range(32), *range(1000, 1032), *mixed]
    with pytest.raises(OutOfBounds, match="another space"):
        run("cvta.to.shared.u64 %d1, %d0;", out)


def test_bounds_of_shared_and_local_memory():
    for address in ("tile+128", "tile+126", "-4"):
        with pytest.raises((OutOfBounds, Misaligned)):
            run(f"ld.shared.u32 %r0, [{address}];", variables=SHARED) if address != "-4" else run(
                "mov.u32 %r1, tile; ld.shared.u32 %r0, [%r1+-4];", variables=SHARED
            )
    with pytest.raises(OutOfBounds, match="local"):
        run(".local .align 4 .b8 depot[8]; st.local.u32 [depot+8], 1;")


def test_uninitialised_shared_and_local_bytes():
    with pytest.raises(UninitialisedRead, match="shared memory at offset 4"):
        run(
            "st.shared.u32 [tile], 0; ld.shared.v2.u32 {%r0, %r1}, [tile];",
            variables=SHARED,
            block=1,
        )
    with pytest.raises(UninitialisedRead, match="local"):
        run(".local .align 4 .b8 depot[8]; st.local.u32 [depot], 1; ld.local.u32 %r0, [depot+4];")


def test_uninitialised_registers():
    with pytest.raises(UninitialisedRead, match="%r1"):
        run("add.u32 %r0, %r1, 1;")
    code = f"{TID} setp.lt.u32 %p0, %r0, 7; @%p0 mov.u32 %r1, 5; "
    run(code + "@%p0 add.u32 %r2, %r1, 1;")
    with pytest.raises(UninitialisedRead, match="%r1") as caught:
        run(code + "add.u32 %r2, %r1, 1;")
    assert "thread (7, 0, 0)" in str(caught.value)
    with pytest.raises(UninitialisedRead, match="%p9"):
        run("@%p9 mov.u32 %r0, 1;")


def test_constant_table_and_global_variable():
    variables = """.const .align 4 .b8 table[16] =
  {1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 255, 255, 255, 255};
.global .align 4 .u32 counter = 41;
.const .f32 half = 0f3F000000;
"""
    out = np.zeros(33, np.uint32)
    code = f"""{TID} and.b32 %r1, %r0, 3; mul.wide.u32 %d1, %r1, 4; mov.u64 %d2, table;
    add.u64 %d2, %d2, %d1; ld.const.u32 %r2, [%d2]; mul.wide.u32 %d3, %r0, 4; add.u64 %d3, %d0, %d3;
    st.global.u32 [%d3], %r2; setp.ne.u32 %p0, %r0, 0; @%p0 ret;
    atom.global.add.u32 %r3, [counter], 1; st.global.u32 [%d0+128], %r3;"""
    text = kernel(f"ld.param.u64 %d0, [p0];\n{code}", ".param .u64 p0", variables)
    module = load_module(text)
    for expected in (41, 42):  # the module keeps its global variables between launches
        launch(module, "test", 1, 32, [out])
        assert out[:5].tolist() == [1, 2, 3, 0xFFFFFFFF, 1] and out[32] == expected


def test_struct_parameters():
    class Parameters(ctypes.Structure):
        _fields_ = [
            ("pointer", ctypes.c_uint64),
            ("scale", ctypes.c_float),
            ("n", ctypes.c_int * 3),
        ]

    out = np.zeros(4, np.uint32)
    memory = Memory()
    value = Parameters(memory.register(out), 1.5, (ctypes.c_int * 3)(10, 20, 30))
    code = """ld.param.u64 %d0, [p+0]; ld.param.f32 %f0, [p+8]; ld.param.u32 %r0, [p+16];
    mov.b64 %d1, p; ld.param.u32 %r1, [%d1+12]; st.global.f32 [%d0], %f0;
    ld.param.v2.u32 {%r4, %r5}, [p+16];
    st.global.v2.u32 [%d0+8], {%r0, %r1}; st.global.u32 [%d0+4], %r5;"""
    text = kernel(code, ".param .align 8 .b8 p[24]")
    launch(load_module(text), "test", 1, 1, [bytes(value)], memory=memory)
    assert out.tolist() == [0x3FC00000, 30, 20, 10]
    with pytest.raises(OutOfBounds):
        launch(load_module(kernel("ld.param.u32 %r0, [p+24];", ".param .align 8 .b8 p[24]")),
               "test", 1, 1, [bytes(value)])  # fmt: skip


def test_arguments_are_checked():
    module = load_module(kernel("", ".param .u64 a, .param .u32 n, .param .f32 x, .param .u8 b"))
    array = np.zeros(4, np.float32)
    launch(module, "test", 1, 1, [array, 3, 1.5, 255])
    launch(module, "test", 1, 1, [array, np.int32(-1), ctypes.c_float(2), np.uint8(1)])
    for bad in (
        [array, 3, 1.5],
        [array, 2**32, 1.5, 0],
        [array, 1.5, 1.5, 0],
        [np.int32(3), 3, 1.5, 0],
    ):
        with pytest.raises(LaunchError):
            launch(module, "test", 1, 1, bad)
    with pytest.raises(LaunchError, match="fits 0 kernels"):
        launch(module, "other", 1, 1, [])


def test_atomics_return_the_old_value_in_thread_order():
    counter = np.array([10], np.uint32)
    code = TID + "atom.global.add.u32 %r1, [%d0], %r0; mul.wide.u32 %d2, %r0, 4;"
    out = np.zeros(64, np.uint32)
    run(code + "add.u64 %d2, %d1, %d2; st.global.u32 [%d2], %r1;", counter, out, block=64)
    assert counter[0] == 10 + sum(range(64))
    assert out.tolist() == [10 + sum(range(i)) for i in range(64)]


@pytest.mark.parametrize(
    "operation, function",
    [
        ("min.s32", min),
        ("max.s32", max),
        ("and.b32", lambda old, b: old & b),
        ("or.b32", lambda old, b: old | b),
        ("xor.b32", lambda old, b: old ^ b),
        ("exch.b32", lambda old, b: b),
        ("inc.u32", lambda old, b: 0 if old >= b else old + 1),
        ("dec.u32", lambda old, b: b if old == 0 or old > b else old - 1),
        ("add.s32", lambda old, b: old + b),
    ],
)
def test_atomic_operations(operation, function):
    random = np.random.default_rng(20)
    values = random.integers(0, 100, 32, dtype=np.int32)
    places = random.integers(0, 4, 32, dtype=np.int32)
    cells = np.array([50, 3, 70, 20], np.int32)
    old = np.zeros(32, np.int32)
    name, _, kind = operation.partition(".")
    code = f"""{TID} mul.wide.u32 %d4, %r0, 4; add.u64 %d5, %d0, %d4; ld.global.u32 %r1, [%d5];
    add.u64 %d5, %d1, %d4; ld.global.u32 %r2, [%d5];
    mul.wide.u32 %d6, %r2, 4; add.u64 %d6, %d2, %d6;
    atom.global.{operation} %r3, [%d6], %r1; add.u64 %d5, %d3, %d4; st.global.u32 [%d5], %r3;"""
    expected, before = cells.copy(), []
    for value, place in zip(values, places, strict=True):
        before.append(int(expected[place]))
        expected[place] = function(int(expected[place]), int(value))
    again = cells.copy()
    run(code, values, places, cells, old)
    assert cells.tolist() == expected.tolist() and old.tolist() == before
    if name not in ("exch",):
        red = code.replace("atom.global", "red.relaxed.gpu.global").replace("%r3, [%d6]", "[%d6]")
        run(red.split("add.u64 %d5, %d3")[0], values, places, again, old)
        assert again.tolist() == expected.tolist()


def test_compare_and_swap_serves_one_thread():
    lock, out = np.zeros(1, np.uint32), np.zeros(32, np.uint32)
    code = (
        TID
        + """add.u32 %r1, %r0, 1; atom.cas.b32 %r2, [%d0], 0, %r1;
    mul.wide.u32 %d2, %r0, 4; add.u64 %d2, %d1, %d2; st.global.u32 [%d2], %r2;"""
    )
    run(code, lock, out)
    assert lock[0] == 1 and out.tolist() == [0] + [1] * 31


def test_float_atomics_add_in_thread_order():
    random = np.random.default_rng(21)
    values = random.standard_normal(32).astype(np.float32)
    total = np.zeros(1, np.float32)
    code = (
        TID
        + """mul.wide.u32 %d2, %r0, 4; add.u64 %d2, %d0, %d2; ld.global.f32 %f0, [%d2];
    red.global.add.f32 [%d1], %f0;"""
    )
    run(code, values, total)
    expected = np.float32(0)
    for value in values:
        expected += value
    assert total[0] == expected
    halves = np.zeros(2, np.uint16)
    run("mov.b32 %r0, 0x3F803F80; red.global.add.noftz.bf16x2 [%d0], %r0;", halves)
    assert halves.tolist() == [0x4200, 0x4200]  # 32 times 1.0


def test_special_registers():
    out = np.zeros((12, 24), np.uint32)
    names = ["tid.x", "tid.y", "tid.z", "ntid.x", "ntid.y", "ntid.z", "ctaid.x", "ctaid.y"]
    names += ["nctaid.x", "laneid", "warpid", "lanemask_lt"]
    code = """mov.u32 %r1, %tid.x; mov.u32 %r2, %tid.y; mad.lo.u32 %r1, %r2, 2, %r1;
    mov.u32 %r2, %tid.z; mad.lo.u32 %r1, %r2, 6, %r1;
    mul.wide.u32 %d1, %r1, 4; add.u64 %d1, %d0, %d1; mov.u32 %r3, %ctaid.x;
    mov.u32 %r4, %ctaid.y; setp.ne.u32 %p0, %r3, 1; setp.ne.u32 %p1, %r4, 2;
    @%p0 ret; @%p1 ret;"""
    code += "".join(
        f"mov.u32 %r5, %{name}; st.global.u32 [%d1+{96 * i}], %r5;" for i, name in enumerate(names)
    )
    run(code, out, block=(2, 3, 4), grid=(2, 3))
    t = np.arange(24)
    wanted = [t % 2, t // 2 % 3, t // 6, 2, 3, 4, 1, 2, 2, t, 0, (1 << t) - 1]
    for row, expected in zip(out, wanted, strict=True):
        assert (row == expected).all()


def test_evaluate_over_many_blocks():
    a = np.arange(70000, dtype=np.uint32)
    assert np.array_equal(evaluate("add.u32 %out, %a, 1;", "<u4", a), a + 1)


def test_uninitialised_guards_of_branches():
    with pytest.raises(UninitialisedRead, match="%p9"):
        run("@%p9 bra over; over:")
    with pytest.raises(UninitialisedRead, match="%p9"):
        run("@%p9 bar.sync 0;")
    with pytest.raises(UninitialisedRead, match="%r9"):
        run("shfl.sync.idx.b32 %r0, %r9, 0, 31, -1;")
