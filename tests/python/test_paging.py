"""Paged optimizers on the CPU: the same bits as unpaged ones, state in a mapped file from the first
step to a resumed one, room taken at once and given back."""

import copy
import errno
import gc
import io
import os
import pickle
import resource
import weakref

import pytest
import torch

from halfbyte import paging
from halfbyte.optim import (
    AdamW8bit,
    AdamW32bit,
    NonFiniteGradient,
    PagedAdamW8bit,
    PagedAdamW32bit,
)
from optim_cases import DTYPES, assert_same_state, parameters, set_gradients, train

SHAPES = (9000, (70, 90), 100, 0, 5000)
PAIRS = [(AdamW8bit, PagedAdamW8bit), (AdamW32bit, PagedAdamW32bit)]


def arenas(optimizer) -> list[paging.FileArena]:
    return list(optimizer._memory.arenas)


def assert_paged(optimizer):
    """Every state tensor but the counters lies in an arena of the optimizer."""
    spans = [(arena.address, arena.address + arena.bytes) for arena in arenas(optimizer)]
    assert optimizer.state
    for state in optimizer.state.values():
        for name, value in state.items():
            if name != "step" and value.numel():
                at = value.data_ptr()
                assert any(begin <= at and at + value.nbytes <= end for begin, end in spans), name
                assert at % 256 == 0


def mappings() -> int:
    """Mapped files without a name, of which every arena is one."""
    with open("/proc/self/maps") as file:
        return sum("(deleted)" in line for line in file)


@pytest.mark.parametrize("kinds", PAIRS, ids=lambda kinds: kinds[0].__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_bytes", [1, 20_000, 64 << 20])
@pytest.mark.parametrize("evict", [False, True])
def test_paged_steps_have_the_bits_of_unpaged_ones(kinds, dtype, page_bytes, evict, tmp_path):
    plain, paged = parameters(*SHAPES, dtype=dtype), parameters(*SHAPES, dtype=dtype)
    first = kinds[0](plain, lr=1e-2)
    second = kinds[1](
        paged, lr=1e-2, page_bytes=page_bytes, look_ahead=1, evict=evict, page_dir=tmp_path
    )
    assert not first.paged and second.paged
    train(first, plain, 4)
    train(second, paged, 4)
    for a, b in zip(plain, paged, strict=True):
        assert torch.equal(a, b)
    assert_same_state(first.state_dict()["state"], second.state_dict()["state"])
    assert_paged(second)
    assert len(arenas(second)) == 1, "one arena for all that was made together"
    assert not os.listdir(tmp_path), "the file has no name"


@pytest.mark.parametrize("look_ahead", [0, 1, 9])
def test_pages_are_fetched_ahead_and_evicted_in_order(look_ahead, monkeypatch):
    log = []
    monkeypatch.setattr(paging.FileArena, "fetch", lambda self, b, e: log.append(("fetch", b, e)))
    monkeypatch.setattr(paging.FileArena, "evict", lambda self, b, e: log.append(("evict", b, e)))
    params = parameters(*[5000] * 6)
    optimizer = PagedAdamW8bit(params, page_bytes=1, look_ahead=look_ahead, evict=True)
    train(optimizer, params, 1)
    fetched = [entry[1:] for entry in log if entry[0] == "fetch"]
    evicted = [entry[1:] for entry in log if entry[0] == "evict"]
    assert len(fetched) == 6 and fetched == evicted == sorted(fetched)
    for page, span in enumerate(fetched):
        done_before = sum(entry[0] == "evict" for entry in log[: log.index(("fetch", *span))])
        assert done_before == max(0, page - look_ahead)


def test_pages_hold_at_most_page_bytes():
    params = parameters(*[5000] * 7, 60_000)
    optimizer = PagedAdamW8bit(params, page_bytes=25_000)
    train(optimizer, params, 1)
    states = [optimizer.state[param] for param in params]
    pages = optimizer._memory.pages(states)
    assert [page.count for page in pages] == [2, 2, 2, 1, 1]
    assert [page.first for page in pages] == [0, 2, 4, 6, 7]
    assert all(page.end - page.begin <= 25_000 for page in pages[:-1])
    assert all(a.end <= b.begin for a, b in zip(pages, pages[1:], strict=False))
    assert pages[-1].end <= arenas(optimizer)[0].bytes


@pytest.mark.parametrize("page_bytes", [1, 64 << 20])
def test_a_bad_gradient_changes_nothing(page_bytes):
    params = parameters(5000, (60, 80), 9000)
    optimizer = PagedAdamW8bit(params, page_bytes=page_bytes)
    train(optimizer, params, 2)
    before = copy.deepcopy([param.detach() for param in params])
    state = copy.deepcopy(optimizer.state_dict()["state"])
    set_gradients(params, 9)
    params[2].grad[7] = float("inf")
    params[1].grad[3, 7] = float("nan")
    with pytest.raises(NonFiniteGradient, match=r"parameter 1 of group 0.*nan at \[3, 7\]"):
        optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param, old)
    assert_same_state(optimizer.state_dict()["state"], state)


@pytest.mark.parametrize("kinds", PAIRS, ids=lambda kinds: kinds[0].__name__)
@pytest.mark.parametrize("directions", [(0, 1), (1, 0), (1, 1)], ids=str)
def test_resumed_equals_uninterrupted(kinds, directions):
    """Between paged and unpaged, either way; what is loaded is paged at once."""
    straight = parameters(*SHAPES)
    optimizer = kinds[0](straight, lr=1e-2)
    train(optimizer, straight, 7)

    params = parameters(*SHAPES)
    first = kinds[directions[0]](params, lr=1e-2)
    train(first, params, 3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    size = file.tell()
    file.seek(0)
    second = kinds[directions[1]](params, lr=7)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.paged == bool(directions[1])
    if second.paged:
        assert_paged(second)
        assert len(arenas(second)) == 1
    train(second, params, 4, first=3)
    for a, b in zip(straight, params, strict=True):
        assert torch.equal(a, b)
    assert_same_state(optimizer.state_dict()["state"], second.state_dict()["state"])
    assert size < 12 * sum(p.numel() for p in params) + 20_000, "a tensor is saved, not its arena"


def test_a_state_dict_outlives_its_optimizer():
    params = parameters(9000)
    optimizer = PagedAdamW8bit(params)
    train(optimizer, params, 2)
    kept = optimizer.state_dict()
    expected = copy.deepcopy(kept["state"])
    memory = weakref.ref(arenas(optimizer)[0])
    del optimizer
    gc.collect()
    assert memory() is not None
    assert_same_state(kept["state"], expected)
    del kept
    gc.collect()
    assert memory() is None


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_are_paged_and_go_on_alike(copier):
    params = parameters(9000, 50)
    optimizer = PagedAdamW8bit(params, page_bytes=12345, look_ahead=3, evict=True)
    train(optimizer, params, 2)
    twin = copier(optimizer)
    assert_paged(twin)
    assert not set(map(id, arenas(twin))) & set(map(id, arenas(optimizer)))
    memory = twin._memory
    assert (memory.page_bytes, memory.look_ahead, memory.evict) == (12345, 3, True)
    twins = twin.param_groups[0]["params"]
    for a, b in ((optimizer, params), (twin, twins)):
        train(a, b, 3, first=2)
    for a, b in zip(params, twins, strict=True):
        assert a is not b and torch.equal(a, b)
    assert_same_state(optimizer.state_dict()["state"], twin.state_dict()["state"])


def test_parameters_may_join_and_rest():
    """A later group has an arena of its own; a step over some of the parameters is paged too."""
    params = parameters(9000, 5000, 7000)
    plain = parameters(9000, 5000, 7000)
    pair = PagedAdamW8bit(params[:2], page_bytes=1), AdamW8bit(plain[:2])
    for optimizer, tensors in zip(pair, (params, plain), strict=True):
        train(optimizer, tensors[:2], 1)
        optimizer.add_param_group({"params": tensors[2:], "lr": 0.1})
        train(optimizer, tensors, 2, first=1)
        tensors[1].grad = None
        optimizer.step()
    assert len(arenas(pair[0])) == 2
    assert_paged(pair[0])
    for a, b in zip(params, plain, strict=True):
        assert torch.equal(a, b)


def test_state_that_was_replaced_is_paged_again():
    params = parameters(9000)
    optimizer = PagedAdamW8bit(params)
    train(optimizer, params, 1)
    for name in ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax", "step"):
        optimizer.state[params[0]][name] = optimizer.state[params[0]][name].clone()
        train(optimizer, params, 1)
        assert_paged(optimizer)


# --- memory ---------------------------------------------------------------------------------------


def test_the_file_is_freed_with_the_optimizer():
    before = mappings()
    params = parameters(9000)
    optimizer = PagedAdamW8bit(params)
    train(optimizer, params, 1)
    memory = weakref.ref(arenas(optimizer)[0])
    assert mappings() == before + 1
    del optimizer
    assert memory() is None, "freed without the garbage collector"
    assert mappings() == before


def test_no_leak_in_1000_cycles():
    params = parameters(5000, 100)
    set_gradients(params, 0)

    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    PagedAdamW8bit(params, page_bytes=1).step()
    before = mappings(), descriptors()
    for _ in range(1000):
        PagedAdamW8bit(params, page_bytes=1).step()
    assert (mappings(), descriptors()) == before


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("cause", ["full disk", "limit", "no folder"])
def test_no_room_is_said_when_the_state_is_made(cause, monkeypatch, tmp_path):
    """A disk that is full, a limit on the size of files: bytes and folder are named, nothing has
    changed, and the next step works."""
    folder = tmp_path / "missing" if cause == "no folder" else tmp_path
    params = parameters(90_000)
    set_gradients(params, 0)
    before = params[0].detach().clone()
    optimizer = PagedAdamW8bit(params, page_dir=folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        if cause == "full disk":
            patch.setattr(os, "posix_fallocate", full)
        if cause == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        expected = r"paged optimizer state: 18\d{4} bytes in .*: "
        reason = {"full disk": "No space left", "limit": "File too large"}.get(cause, "No such")
        try:
            with pytest.raises(OSError, match=expected + reason):
                optimizer.step()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(params[0], before)
    assert not optimizer.state[params[0]]
    folder.mkdir(exist_ok=True)
    optimizer.step()
    assert_paged(optimizer)


def test_no_room_on_loading_changes_nothing(monkeypatch):
    params = parameters(9000, 5000)
    optimizer = PagedAdamW8bit(params)
    train(optimizer, params[:1], 2)  # the other needs room
    other = AdamW8bit(params)
    train(other, params, 1)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="paged optimizer state"):
            optimizer.load_state_dict(other.state_dict())
    assert_same_state(optimizer.state_dict()["state"], before)


def test_room_is_taken_where_posix_fallocate_is_missing(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "posix_fallocate")
    arena = paging.FileArena((3 << 20) + 17, tmp_path)
    assert len(arena) == arena.bytes == (3 << 20) + 17
    assert arena[-1] == 0


def test_advice_may_name_any_bytes():
    arena = paging.FileArena(100_000)
    arena[50_000] = 7
    for begin, end in ((0, 100_000), (5, 6), (4096, 8192), (99_999, 100_000)):
        arena.fetch(begin, end)
        arena.evict(begin, end)
    assert arena[50_000] == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_bytes": 0}, "page_bytes: expected a whole number >= 1, got 0"),
        ({"page_bytes": 1.5}, "page_bytes"),
        ({"look_ahead": -1}, "look_ahead: expected a whole number >= 0, got -1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PagedAdamW8bit(parameters(10), **options)


def test_paged_can_be_chosen_either_way():
    assert AdamW8bit(parameters(10), paged=True).paged
    assert AdamW32bit(parameters(10), paged=True).paged
    assert not PagedAdamW8bit(parameters(10), paged=False).paged
