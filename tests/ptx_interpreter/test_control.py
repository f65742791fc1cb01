"""Branches, loops, divergence and barriers."""

import numpy as np
import pytest

from . import Divergence, LaunchError, StepLimit, Trap, Unsupported
from .snippets import evaluate, run


def test_loops_with_a_different_count_for_each_thread():
    a = np.random.default_rng(40).integers(1, 200, 300, dtype=np.uint32)
    code = """mov.u32 %out, 0; mov.u32 %x, %a;
    again: setp.eq.u32 %z, %x, 1; @%z bra done;
    and.b32 %y, %x, 1; setp.eq.u32 %z, %y, 0; @%z bra even;
    mad.lo.u32 %x, %x, 3, 1; bra.uni next;
    even: shr.u32 %x, %x, 1;
    next: add.u32 %out, %out, 1; bra again;
    done:"""
    got = evaluate(code, "<u4", a, types=".reg .pred %z; .reg .b32 %x, %y;")

    def collatz(x):
        steps = 0
        while x != 1:
            x = 3 * x + 1 if x % 2 else x // 2
            steps += 1
        return steps

    assert got.tolist() == [collatz(int(x)) for x in a]


def test_predication_and_negation():
    a = np.arange(40, dtype=np.uint32)
    code = (
        "mov.u32 %out, 7; setp.lt.u32 %z, %a, 10; @%z mov.u32 %out, 1; @!%z add.u32 %out, %out, %a;"
    )
    got = evaluate(code, "<u4", a, types=".reg .pred %z;")
    assert got.tolist() == [1 if i < 10 else 7 + i for i in range(40)]


def test_indexed_branch():
    a = np.arange(40, dtype=np.uint32) % 3
    code = """table: .branchtargets first, second, third;
    brx.idx %a, table;
    first: mov.u32 %out, 10; bra done;
    second: mov.u32 %out, 20; bra done;
    third: mov.u32 %out, 30;
    done:"""
    assert evaluate(code, "<u4", a).tolist() == [[10, 20, 30][i] for i in a]
    with pytest.raises(Trap, match="index 3"):
        evaluate(code, "<u4", a + 1)


def test_scoped_registers_are_different_registers():
    code = "{ .reg .b32 t; mov.u32 t, 1; { .reg .b32 t; mov.u32 t, 2; } add.u32 %out, t, %a; }"
    assert evaluate(code, "<u4", np.zeros(1, np.uint32))[0] == 1


SHARED = ".shared .align 4 .b8 cells[512];\n"
SWAP = """mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 2; mov.u32 %r2, cells; add.u32 %r3, %r2, %r1;
st.shared.u32 [%r3], %r0; {barrier}
xor.b32 %r4, %r1, 256; add.u32 %r4, %r2, %r4; ld.shared.u32 %r5, [%r4];
mul.wide.u32 %d1, %r0, 4; add.u64 %d1, %d0, %d1; st.global.u32 [%d1], %r5;"""


@pytest.mark.parametrize(
    "barrier",
    ["bar.sync 0;", "barrier.sync 0;", "barrier.cta.sync.aligned 3;", "bar.sync 1, 128;",
     "setp.lt.u32 %p0, %r0, 64; @%p0 bra a; bar.sync 0; bra b; a: bar.sync 0; b:"],
)  # fmt: skip
def test_barriers(barrier):
    """The last: warps wait at two bar.sync of the same number, which is one barrier."""
    out = np.zeros(128, np.uint32)
    run(SWAP.format(barrier=barrier), out, block=128, variables=SHARED)
    assert out.tolist() == [i ^ 64 for i in range(128)]


def test_barrier_reductions():
    out = np.zeros(3, np.uint32)
    code = """mov.u32 %r0, %tid.x; setp.lt.u32 %p0, %r0, 70; bar.red.popc.u32 %r1, 0, %p0;
    barrier.cta.red.and.aligned.pred %p1, 0, %p0;
    bar.red.or.pred %p2, 1, %p0; @%p1 trap; @!%p2 trap;
    setp.ne.u32 %p3, %r0, 0; @%p3 ret; st.global.u32 [%d0], %r1;"""
    run(code, out, block=96)
    assert out[0] == 70


@pytest.mark.parametrize(
    "code, message",
    [
        ("setp.gt.u32 %p0, %r0, 9; @%p0 ret; bar.sync 0;", "only 10 of 64 threads came"),
        ("setp.gt.u32 %p0, %r0, 9; @%p0 bar.sync 0;", "thread 0 of the block has exited"),
        ("setp.gt.u32 %p0, %r0, 9; @%p0 bra a; bar.sync 0; bra b; a: bar.sync 0; b:",
         "one warp wait at different barriers"),
        ("setp.gt.u32 %p0, %r0, 31; @%p0 bra a; bar.sync 0; bra b; a: bar.sync 1; b:",
         "wait at barriers"),
        ("setp.gt.u32 %p0, %r0, 9; @%p0 ret; bar.warp.sync -1;", "lane 10 has exited"),
    ],
)  # fmt: skip
def test_divergent_barriers(code, message):
    with pytest.raises(Divergence, match=message):
        run("mov.u32 %r0, %tid.x; " + code, block=64)


def test_cold_code_behind_the_end_rejoins_before_a_barrier():
    """The group with the lowest pc reaches the barrier first and has to wait for the others."""
    code = """mov.u32 %r0, %tid.x; setp.eq.u32 %p0, %r0, 3; @%p0 bra cold;
    back: bar.sync 0; redux.sync.add.u32 %r1, %r0, -1; st.global.u32 [%d0], %r1; ret;
    cold: add.u32 %r0, %r0, 100; bra back;"""
    out = np.zeros(1, np.uint32)
    run(code, out)
    assert out[0] == sum(range(32)) + 100


def test_part_of_a_block_is_not_supported():
    with pytest.raises(Unsupported, match="part of the block"):
        run("bar.sync 1, 32;", block=64)


def test_traps_and_endless_loops():
    with pytest.raises(Trap, match="trap executed"):
        run("trap;")
    with pytest.raises(StepLimit):
        run("again: bra again;", step_limit=1000)


def test_launch_limits():
    for options in ({"block": 1025}, {"block": (1, 1, 65)}, {"grid": 0}, {"shared_bytes": 1 << 20}):
        with pytest.raises(LaunchError):
            run("", **options)


def test_blocks_of_partial_warps():
    out = np.zeros((3, 40), np.uint32)
    code = """mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mad.lo.u32 %r2, %r1, 40, %r0;
    mul.wide.u32 %d1, %r2, 4; add.u64 %d1, %d0, %d1; bar.sync 0; st.global.u32 [%d1], %r2;"""
    run(code, out, block=40, grid=3)
    assert out.reshape(-1).tolist() == list(range(120))
