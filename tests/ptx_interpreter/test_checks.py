"""The shadow of shared memory: what is a race, what is in flight, and what is fine."""

import numpy as np
import pytest

from . import InFlightAccess, OutOfBounds, SharedRace, UninitialisedRead, Unsupported
from .snippets import run

SHARED = ".shared .align 16 .b8 cells[1024];\n"
START = "mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 2; mov.u32 %r2, cells; add.u32 %r3, %r2, %r1;"
WRITE_MINE, READ_MINE = "st.shared.u32 [%r3], %r0;", "ld.shared.u32 %r5, [%r3];"
NEIGHBOUR = "xor.b32 %r4, %r1, {}; add.u32 %r4, %r2, %r4;"
BARRIER, WARP = "bar.sync 0;", "bar.warp.sync -1;"


def shared(code: str, block: int = 64, *args, **options):
    return run(START + code, *args, block=block, variables=SHARED, **options)


def neighbour(distance: int) -> str:
    """%r4: the cell of thread `tid ^ distance`"""
    return NEIGHBOUR.format(4 * distance)


READ_OTHER, WRITE_OTHER = "ld.shared.u32 %r6, [%r4];", "st.shared.u32 [%r4], %r0;"

RACES = {
    "write then read by another warp": neighbour(32) + WRITE_MINE + READ_OTHER,
    "write then read by another lane": neighbour(1) + WRITE_MINE + READ_OTHER,
    "read then write": WRITE_MINE + BARRIER + neighbour(32) + READ_MINE + WRITE_OTHER,
    "write then write": neighbour(32) + WRITE_MINE + WRITE_OTHER,
    "one cell by all": "st.shared.u32 [cells], %r0;",
    "bar.warp.sync does not order warps": neighbour(32) + WRITE_MINE + WARP + READ_OTHER,
    "atomic then plain read": WRITE_MINE + BARRIER + neighbour(32)
    + "atom.shared.add.u32 %r7, [%r3], 1;" + READ_OTHER,
    "plain write then atomic": neighbour(32) + WRITE_MINE + "red.shared.add.u32 [%r4], 1;",
    "read by two, written by one of them": WRITE_MINE + BARRIER
    + "setp.gt.u32 %p0, %r0, 1; @%p0 bra over; ld.shared.u32 %r5, [cells];"
    + "setp.ne.u32 %p1, %r0, 0; @%p1 bra over; st.shared.u32 [cells], 1; over:",
    "a wide write over a neighbour's byte": "mov.u32 %r8, cells; add.u32 %r8, %r8, %r0;"
    + "st.shared.u8 [%r8+4], %r0; setp.ne.u32 %p0, %r0, 0; @%p0 bra over;"
    + "st.shared.u32 [cells+4], 0; over:",
}  # fmt: skip

FINE = {
    "barrier between": neighbour(32) + WRITE_MINE + BARRIER + READ_OTHER,
    "own cell": WRITE_MINE + READ_MINE + WRITE_MINE + READ_MINE,
    "many readers": WRITE_MINE + BARRIER + READ_MINE + "ld.shared.u32 %r5, [cells];",
    "read, barrier, write": WRITE_MINE + BARRIER + neighbour(32) + READ_OTHER + BARRIER
    + WRITE_MINE,
    "bar.warp.sync inside a warp": neighbour(1) + WRITE_MINE + WARP + READ_OTHER + WARP + WRITE_MINE
    + WARP + READ_OTHER + WARP + WRITE_OTHER,
    "atomics do not race with atomics": WRITE_MINE + BARRIER + "red.shared.add.u32 [cells], 1;"
    + "atom.shared.add.u32 %r7, [cells], 1;" + BARRIER + "ld.shared.u32 %r5, [cells];",
    "neighbouring bytes": "mov.u32 %r8, cells; add.u32 %r8, %r8, %r0; st.shared.u8 [%r8], %r0;",
    "one writer of a cell that all read": "setp.ne.u32 %p0, %r0, 7; @%p0 bra over;"
    + "st.shared.u32 [cells], 1; over:" + BARRIER + "ld.shared.u32 %r5, [cells];",
}  # fmt: skip


@pytest.mark.parametrize("name", RACES)
def test_races(name):
    with pytest.raises(SharedRace, match="no barrier in between"):
        shared(RACES[name])
    shared(RACES[name], checks=False)


@pytest.mark.parametrize("name", FINE)
def test_no_race(name):
    for block in (64, 96, 50):
        if block != 64 and ("neighbour" in name or "barrier" in name or "warp" in name):
            continue
        shared(FINE[name], block, grid=3)


def test_the_message_names_both_threads():
    with pytest.raises(SharedRace) as caught:
        shared(RACES["write then read by another warp"])
    text = str(caught.value)
    assert "reads shared memory at offset 128, written by thread 32 of the block" in text
    assert "block (0, 0, 0) thread (0, 0, 0)" in text


COPY = """mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 4; mov.u32 %r2, cells; add.u32 %r3, %r2, %r1;
xor.b32 %r4, %r1, 512; add.u32 %r4, %r2, %r4; mul.wide.u32 %d2, %r0, 16; add.u64 %d2, %d0, %d2;
cp.async.cg.shared.global [%r3], [%d2], 16;"""
COMMIT, WAIT = "cp.async.commit_group;", "cp.async.wait_group 0;"
MINE, OTHER = "ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r3];", "ld.shared.u32 %r5, [%r4];"
MINE_SMALL = "ld.shared.u32 %r5, [%r3];"


def copied(code: str) -> None:
    run(COPY + code, np.arange(256, dtype=np.uint32), block=64, variables=SHARED)


@pytest.mark.parametrize(
    "code",
    [
        COMMIT + WAIT + MINE,
        "cp.async.wait_all;" + MINE,
        COMMIT + WAIT + BARRIER + OTHER,
        COMMIT + WAIT + BARRIER + MINE_SMALL + BARRIER + "st.shared.u32 [%r4], 1;",
        COMMIT + COMMIT + "cp.async.wait_group 1;" + MINE,
    ],
)
def test_copies_that_are_waited_for(code):
    copied(code)


@pytest.mark.parametrize(
    "code, message",
    [
        (MINE, "has not been waited for"),
        (COMMIT + MINE, "has not been waited for"),
        (WAIT + MINE, "has not been waited for"),  # nothing was committed
        (COMMIT + "cp.async.wait_group 1;" + MINE, "has not been waited for"),
        (COMMIT + BARRIER + WAIT + OTHER, "no barrier came since"),
        (COMMIT + WAIT + OTHER, "no barrier came since"),
        (COMMIT + WAIT + WARP + OTHER, "no barrier came since"),
        ("st.shared.u32 [%r3], 1;", "write of shared memory"),
        ("cp.async.cg.shared.global [%r3], [%d2], 16;", "copy of shared memory"),
    ],
)
def test_copies_in_flight(code, message):
    with pytest.raises(InFlightAccess, match=message):
        copied(code)


def test_a_copy_over_cells_that_others_still_read():
    before = "st.shared.u32 [%r3], 0; bar.sync 0; ld.shared.u32 %r9, [%r4];"
    code = COPY.replace("cp.async.cg", before + "cp.async.cg")
    with pytest.raises(SharedRace, match="copies to shared memory .* read by thread"):
        run(code, np.arange(256, dtype=np.uint32), block=64, variables=SHARED)


@pytest.mark.parametrize("mode, size", [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
def test_copy_sizes_and_zero_fill(mode, size):
    source = np.arange(1, 33 * 16, dtype=np.uint8)[: 32 * 16] | 1
    out = np.zeros((32, size), np.uint8)
    for kept in range(size + 1):
        code = f"""mov.u32 %r0, %tid.x; mul.lo.u32 %r1, %r0, {size}; mov.u32 %r2, cells;
        add.u32 %r3, %r2, %r1; mul.wide.u32 %d2, %r0, {size}; add.u64 %d3, %d0, %d2;
        add.u64 %d4, %d1, %d2; mov.u32 %r4, {kept};
        cp.async.{mode}.shared.global.L2::128B [%r3], [%d3], {size}, %r4; cp.async.wait_all;"""
        for first in range(0, size, 4):
            code += f"ld.shared.u32 %r5, [%r3+{first}]; st.global.u32 [%d4+{first}], %r5;"
        run(code, source[: 32 * size], out, variables=SHARED)
        wanted = source[: 32 * size].reshape(32, size).copy()
        wanted[:, kept:] = 0
        assert np.array_equal(out, wanted), kept


def test_a_copy_of_nothing_reads_nothing():
    """Rows beyond the end are copied with source size 0 from any address."""
    code = """mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 4; mov.u32 %r2, cells; add.u32 %r3, %r2, %r1;
    mul.wide.u32 %d2, %r0, 16; add.u64 %d2, %d0, %d2; setp.lt.u32 %p0, %r0, 8;
    selp.u32 %r4, {}, 0, %p0;
    cp.async.cg.shared.global [%r3], [%d2], 16, %r4;"""
    eight = np.zeros(8 * 16, np.uint8)
    run(code.format(16), eight, variables=SHARED)
    ignoring = code.replace("selp.u32 %r4, {}, 0, %p0", "not.pred %p1, %p0")
    run(ignoring.replace("16, %r4;", "16, %p1;"), eight, variables=SHARED)
    run(code.format(15), eight[:-1], variables=SHARED)
    with pytest.raises(OutOfBounds):
        run(code.format(16), eight[:-1], variables=SHARED)


@pytest.mark.parametrize(
    "code",
    [
        "cp.async.cg.shared.global [%r0], [%d0], 8;",
        "cp.async.ca.shared.global [%r0], [%d0], 2;",
        "cp.async.mbarrier.arrive.b64 [%r0];",
    ],
)
def test_refused_copies(code):
    with pytest.raises(Unsupported):
        run("mov.u32 %r0, cells;" + code, np.zeros(4, np.uint32), variables=SHARED)


def test_dynamic_shared_memory():
    variables = ".shared .align 4 .b8 fixed[20];\n.extern .shared .align 16 .b8 dynamic[];\n"
    out = np.zeros(2, np.uint32)
    code = """mov.u32 %r0, fixed; mov.u32 %r1, dynamic; st.global.u32 [%d0], %r1;
    mov.u32 %r2, %dynamic_smem_size;
    st.global.u32 [%d0+4], %r2; st.shared.u32 [%r1+60], 1;"""
    run(code, out, variables=variables, shared_bytes=64, block=1)
    assert out.tolist() == [32, 64]
    with pytest.raises(OutOfBounds, match="shared"):
        run(code, out, variables=variables, shared_bytes=60, block=1)


def test_a_fault_in_one_of_many_blocks_is_found():
    code = (
        START
        + """mov.u32 %r8, %ctaid.x; setp.ne.u32 %p0, %r8, 777; @%p0 ret;
    ld.shared.u32 %r5, [%r3];"""
    )
    with pytest.raises(UninitialisedRead) as caught:
        run(code, block=64, grid=1000, variables=SHARED)
    assert "block (777, 0, 0)" in str(caught.value)
