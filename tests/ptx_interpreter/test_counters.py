"""Counts with known values: sectors, bytes, bank conflicts, instructions, coverage."""

import numpy as np
import pytest

from .snippets import run

TID = "mov.u32 %r0, %tid.x;"
SHARED = ".shared .align 16 .b8 cells[16384];\n"


@pytest.mark.parametrize(
    "stride, size, sectors",
    [(4, 4, 4), (8, 4, 8), (32, 4, 32), (0, 4, 1), (16, 16, 16), (64, 16, 32), (1, 1, 1)],
)
def test_global_sectors(stride, size, sectors):
    """One warp reads `size` bytes at multiples of `stride`."""
    space = np.zeros(4096 + 32, np.uint8)
    data = space[-space.ctypes.data % 32 :][:4096]
    load = {1: "u8 %h0", 4: "u32 %r1", 16: "v4.u32 {%r1, %r2, %r3, %r4}"}[size]
    code = TID + f"mul.wide.u32 %d1, %r0, {stride}; add.u64 %d1, %d0, %d1; ld.global.{load}, [%d1];"
    traffic = run(code, data).counters.global_read
    assert (traffic.requests, traffic.sectors, traffic.bytes) == (1, sectors, 32 * size)


@pytest.mark.parametrize(
    "stride, size, wavefronts, ideal",
    [
        (4, 4, 1, 1),
        (8, 4, 2, 1),
        (128, 4, 32, 1),
        (132, 4, 1, 1),
        (0, 4, 1, 1),  # a broadcast
        (1, 1, 1, 1),
        (8, 8, 2, 2),
        (16, 16, 4, 4),
        (128, 16, 32, 4),
        (80, 16, 4, 4),
        (144, 16, 4, 4),
    ],
)
def test_bank_conflicts(stride, size, wavefronts, ideal):
    store = {1: "u8 [%r2], %r0", 4: "u32 [%r2], %r0", 8: "v2.u32 [%r2], {%r0, %r0}"}
    store[16] = "v4.u32 [%r2], {%r0, %r0, %r0, %r0}"
    code = TID + f"mov.u32 %r1, cells; mad.lo.u32 %r2, %r0, {stride}, %r1; st.shared.{store[size]};"
    counters = run(code, variables=SHARED, checks=False).counters
    assert (counters.shared_wavefronts, counters.shared_ideal) == (wavefronts, ideal)
    assert counters.shared_conflicts == wavefronts - ideal
    lines = list(counters.conflicts_by_line.values())
    assert lines == ([wavefronts - ideal] if wavefronts > ideal else [])


def test_instructions_are_counted_by_warp():
    code = TID + "setp.lt.u32 %p0, %r0, 40; @!%p0 bra over; add.u32 %r1, %r0, 1; over: ret;"
    report = run(code, block=128, grid=3)
    assert report.counters.instructions["add.u32"] == 6  # 40 threads: two warps of each block
    assert report.counters.instructions["mov.u32"] == 12


def test_coverage():
    code = (
        TID + "setp.lt.u32 %p0, %r0, 99;\n@%p0 bra over;\nadd.u32 %r1, %r0, 1;\nover:\n@!%p0 trap;"
    )
    coverage = run(code).coverage
    assert [text for _, text, _ in coverage.missed] == ["add.u32 %r1, %r0, 1", "@!%p0 trap"]
    assert 0.5 < coverage.ratio < 1
    other = run(code.replace("99", "0").replace("@!%p0 trap;", "")).coverage
    assert len(other.missed) == 1
    assert len(coverage.merged(coverage).missed) == 2


def test_nothing_is_measured_unless_asked_for():
    data = np.zeros(4, np.uint32)
    counters = run("ld.global.u32 %r0, [%d0];", data, measure=False).counters
    assert counters.global_read.bytes == 0 and counters.instructions["ld.global.u32"] == 1
