"""The planted faults themselves: what is made, and that a test which looks notices them."""

import numpy as np
import pytest

from . import SharedRace, launch, load_module
from .mutate import KINDS, hunt, mutations
from .snippets import kernel

BODY = """ld.param.u64 %d0, [p0]; ld.param.u32 %r9, [n];
mov.u32 %r0, %tid.x; setp.ge.u32 %p0, %r0, %r9; @%p0 bra over;
shl.b32 %r1, %r0, 2; mov.u32 %r2, cells; add.u32 %r3, %r2, %r1;
sub.u32 %r4, 63, %r0; shl.b32 %r5, %r4, 2; add.u32 %r6, %r2, %r5;
st.shared.u32 [%r3], %r0;
over: bar.sync 0; @%p0 bra end;
ld.shared.u32 %r7, [%r6]; mul.wide.u32 %d1, %r0, 4; add.u64 %d1, %d0, %d1; st.global.u32 [%d1], %r7;
end:"""
TEXT = kernel(BODY, ".param .u64 p0, .param .u32 n", ".shared .align 4 .b8 cells[256];")


def reverse(module) -> None:
    out = np.zeros(64, np.uint32)
    report = launch(module, "test", 1, 64, [out, 64], measure=False, step_limit=1000)
    assert out.tolist() == list(range(63, -1, -1))
    assert report.counters.instructions


def test_every_kind_is_made_and_the_module_stays_as_it_was():
    module = load_module(TEXT)
    reverse(module)
    found = list(mutations(module, "test"))
    assert {m.kind for m in found} == set(KINDS)
    assert all(m.module is not module and str(m.line) in m.description for m in found)
    assert len({m.description for m in found}) == len(found)
    reverse(module)


def test_kinds_can_be_chosen():
    module = load_module(TEXT)
    (dropped,) = mutations(module, "test", {"drop"})
    assert "dropped `bar.sync 0`" in dropped.description
    with pytest.raises(SharedRace):
        reverse(dropped.module)


def test_hunt_sorts_the_mutations():
    module = load_module(TEXT)
    outcome = hunt(module, "test", reverse)
    survivors = [m.description for m in outcome.survived]
    # The bound n equals the block: `ge` may be `gt` without a difference.
    assert len(survivors) == 1 and "ge -> gt" in survivors[0], survivors
    assert 0.9 < outcome.score < 1 and not outcome.stillborn
    some = hunt(module, "test", reverse, most=5, seed=1)
    assert len(some.killed) + len(some.survived) == 5
    nothing = hunt(module, "test", reverse, lines=set())
    assert nothing.score == 1.0 and not nothing.killed


def test_a_test_that_does_not_look_notices_little():
    module = load_module(TEXT)
    values = np.zeros(64, np.uint32)
    blind = hunt(module, "test", lambda m: launch(m, "test", 1, 64, [values, 64], checks=False))
    assert blind.score < hunt(module, "test", reverse).score
