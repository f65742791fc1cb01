"""Warp collectives against per-lane definitions."""

import numpy as np
import pytest

from . import Divergence
from .snippets import evaluate

RANDOM = np.random.default_rng(30)
LANES = range(32)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8])
def test_shuffle(mode, width):
    """The PTX ISA's pseudocode for every distance; width and clamp as CUDA's intrinsics do."""
    a = RANDOM.integers(0, 1 << 32, 32, dtype=np.uint32)
    segment = 32 - width
    control = segment << 8 | (0 if mode == "up" else 31)
    for b in range(32):
        code = f"shfl.sync.{mode}.b32 %out|%z, %a, {b}, {control}, -1;"
        got = evaluate(code, "<u4", a, types=".reg .pred %z;")
        inside = evaluate(code.replace("%out|%z", "%y|%out"), "?", a, types=".reg .b32 %y;")
        for lane in LANES:
            last = (lane & segment) | (control & 31 & ~segment)
            source = {
                "up": lane - b,
                "down": lane + b,
                "bfly": lane ^ b,
                "idx": (lane & segment) | (b & ~segment & 31),
            }[mode]
            valid = source >= last if mode == "up" else source <= last
            assert got[lane] == a[source if valid else lane]
            assert inside[lane] == valid


def test_shuffle_with_a_source_of_each_lane():
    a = RANDOM.integers(0, 1 << 32, 64, dtype=np.uint32)
    b = RANDOM.integers(0, 32, 64, dtype=np.uint32)
    got = evaluate("shfl.sync.idx.b32 %out, %a, %b, 31, -1;", "<u4", a, b)
    assert got.tolist() == [a[i // 32 * 32 + b[i]] for i in range(64)]


def test_votes():
    flags = RANDOM.integers(0, 2, 96).astype("?")
    flags[:32], flags[32:64] = True, False
    warps = flags.reshape(3, 32)
    ballots = [sum(int(f) << i for i, f in enumerate(row)) for row in warps]
    got = evaluate("vote.sync.ballot.b32 %out, %a, -1;", "<u4", flags)
    assert got.tolist() == np.repeat(ballots, 32).tolist()
    got = evaluate("vote.sync.ballot.b32 %out, !%a, -1;", "<u4", flags)
    assert got.tolist() == [b ^ 0xFFFFFFFF for b in np.repeat(ballots, 32).tolist()]
    for mode, wanted in (("all", [1, 0, 0]), ("any", [1, 0, 1]), ("uni", [1, 1, 0])):
        got = evaluate(f"vote.sync.{mode}.pred %out, %a, -1;", "?", flags)
        assert got.tolist() == np.repeat(np.array(wanted, "?"), 32).tolist(), mode


def test_match():
    a = RANDOM.integers(0, 4, 32, dtype=np.uint32)
    got = evaluate("match.any.sync.b32 %out, %a, -1;", "<u4", a)
    assert got.tolist() == [sum(1 << i for i in LANES if a[i] == a[lane]) for lane in LANES]
    code = "match.all.sync.b32 %out|%z, %a, -1;"
    assert not evaluate(code, "<u4", a, types=".reg .pred %z;").any()
    same = np.full(32, 9, np.uint32)
    assert (evaluate(code, "<u4", same, types=".reg .pred %z;") == 0xFFFFFFFF).all()


@pytest.mark.parametrize(
    "operation, ufunc",
    [("add.u32", np.add), ("min.s32", np.minimum), ("max.u32", np.maximum), ("min.u32", np.minimum),
     ("and.b32", np.bitwise_and), ("or.b32", np.bitwise_or), ("xor.b32", np.bitwise_xor)],
)  # fmt: skip
def test_redux(operation, ufunc):
    a = RANDOM.integers(0, 1 << 32, 64, dtype=np.uint32)
    values = a.view(np.int32) if "s32" in operation else a
    got = evaluate(f"redux.sync.{operation} %out, %a, -1;", "<u4", a)
    wanted = ufunc.reduce(values.reshape(2, 32), axis=1, dtype=values.dtype).view(np.uint32)
    assert got.tolist() == np.repeat(wanted, 32).tolist()


def test_collectives_of_half_a_warp():
    """Each half names only itself; the halves arrive at different times, after a branch."""
    a = RANDOM.integers(0, 1000, 32, dtype=np.uint32)
    code = """mov.u32 %i, %laneid; setp.lt.u32 %z, %i, 16; selp.b32 %m, 0xFFFF, 0xFFFF0000, %z;
    @%z bra low;
    redux.sync.add.u32 %out, %a, 0xFFFF0000; bra done;
    low: redux.sync.add.u32 %out, %a, 0xFFFF; shfl.sync.bfly.b32 %y, %a, 8, 31, 0xFFFF;
    vote.sync.any.pred %z, %z, 0xFFFF;
    done: mov.u32 %i, %tid.x;"""
    got = evaluate(code, "<u4", a, types=".reg .pred %z; .reg .b32 %m, %y;")
    assert got.tolist() == [a[:16].sum()] * 16 + [a[16:].sum()] * 16
    code = """mov.u32 %i, %laneid; setp.lt.u32 %z, %i, 16; selp.b32 %m, 0xFFFF, 0xFFFF0000, %z;
    redux.sync.add.u32 %out, %a, %m; mov.u32 %i, %tid.x;"""
    got = evaluate(code, "<u4", a, types=".reg .pred %z; .reg .b32 %m;")
    assert got.tolist() == [a[:16].sum()] * 16 + [a[16:].sum()] * 16


def test_activemask_and_elect():
    a = np.arange(32, dtype=np.uint32)
    code = """mov.u32 %out, 0; setp.lt.u32 %z, %a, 5; @!%z bra over; activemask.b32 %out; over:"""
    assert evaluate(code, "<u4", a, types=".reg .pred %z;").tolist() == [31] * 5 + [0] * 27
    got = evaluate("elect.sync %out|%z, 0xFFFFFFFF;", "<u4", a, types=".reg .pred %z;")
    assert not got.any()
    code = """setp.ge.u32 %z, %a, 4; mov.u32 %out, 99; @!%z bra over;
    elect.sync %y|%z, 0xFFFFFFF0; selp.u32 %out, 1, 0, %z; over:"""
    got = evaluate(code, "<u4", a, types=".reg .pred %z; .reg .b32 %y;")
    assert got.tolist() == [99] * 4 + [1] + [0] * 27


def test_masks_that_name_the_wrong_lanes():
    a = np.arange(32, dtype=np.uint32)
    types = ".reg .pred %z; .reg .b32 %y;"
    with pytest.raises(Divergence, match="does not name lane 16"):
        evaluate("redux.sync.add.u32 %out, %a, 0xFFFF;", "<u4", a)
    with pytest.raises(Divergence, match="lanes .* are not there; lane 5 has exited"):
        evaluate(
            "setp.eq.u32 %z, %a, 5; @%z ret; redux.sync.add.u32 %out, %a, -1;",
            "<u4",
            a,
            types=types,
        )
    with pytest.raises(Divergence, match="shfl.sync.idx.b32: lanes .* are not there"):
        evaluate(
            "setp.lt.u32 %z, %a, 5; mov.u32 %out, 0; @%z shfl.sync.idx.b32 %out, %a, 0, 31, -1;",
            "<u4", a, types=types,
        )  # fmt: skip
    with pytest.raises(Divergence, match="reads lane 9"):
        evaluate(
            """setp.lt.u32 %z, %a, 8; mov.u32 %out, 0; @!%z bra over;
            shfl.sync.idx.b32 %out, %a, 9, 31, 0xFF; over:""",
            "<u4", a, types=types,
        )  # fmt: skip
