"""Arenas and the paged AdamW step: results, order of what is enqueued, fallbacks, leaks, sentences.

Without a GPU: PTX executed by an interpreter; not run on a GPU. The fake runtime executes in the
order of the calls, so that the order a GPU must keep is read from the log: an operation comes
before another when streams and events say so (`Order`). Page migration itself cannot be tested
here.
"""

import pytest
import torch

import cuda_api as api
from paged_cases import CAN_BE_PAGED, KIND_NAMES, PagedStep, create, one_step
from test_cuda_adamw8 import SYNCHRONISING


@pytest.mark.parametrize("kind", CAN_BE_PAGED, ids=KIND_NAMES.get)
@pytest.mark.parametrize("encoding", ["ratio", "float32"])
@pytest.mark.parametrize("gap", [0, 40])
def test_paged_steps_have_the_cpus_bits(gpu, kind, encoding, gap):
    """Three steps, pages of two tensors, at the arena's start and at any alignment."""
    paged = PagedStep(gpu, [300, 257, 1, 512, 90], kind, 2, encoding, gap=gap)
    try:
        for step in range(3):
            paged.run(look_ahead=step, evict=step == 2, seed=10 * step)
    finally:
        paged.destroy()


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("look_ahead", [0, 1, 3, 9])
@pytest.mark.parametrize("evict", [False, True])
def test_managed_pages_come_before_their_update(fake, look_ahead, evict):
    gpu = fake()
    paged = PagedStep(gpu, [100] * 6)
    for seed in (0, 100):  # the second step finds streams and events made
        order = one_step(gpu, paged, look_ahead=look_ahead, evict=evict, seed=seed)
        updates = order.kernels("update")
        assert len(updates) == 6
        (check,) = order.kernels("check_gradients")
        (count,) = order.kernels("count_step")
        evictions = []
        for i, (address, size) in enumerate(paged.addresses()):
            (fetch,) = order.find(
                "cudaMemPrefetchAsync", pointer=address, bytes=size, location=("device", 0)
            )
            assert order.before(fetch, updates[i])
            assert order.before(check, updates[i]) and order.before(updates[i], count)
            assert order.stream[fetch] != order.stream[updates[i]]
            ahead = [u for u in range(6) if fetch < updates[u]]
            assert min(ahead) == max(0, i - look_ahead), "look-ahead"
            evictions.append(
                order.find("cudaMemPrefetchAsync", pointer=address, location=("host", 0))
            )
            assert len(evictions[i]) == evict
            if evict:
                assert order.before(updates[i], evictions[i][0])
                assert order.stream[evictions[i][0]] not in (order.stream[fetch], 0x4560)
                held = i - min(look_ahead + 1, 6)
                if held >= 0:  # no more pages at once on the device than asked for
                    assert order.before(evictions[held][0], fetch)
        assert not SYNCHRONISING & {call.name for call in order.log}
    paged.destroy()


def test_pinned_pages_are_copied_through_two_buffers(fake):
    gpu = fake()
    paged = PagedStep(gpu, [300, 100, 257, 700, 64], api.PINNED, gap=24)
    for seed in (0, 100):
        order = one_step(gpu, paged, look_ahead=1, seed=seed)
        updates = order.kernels("update")
        (count,) = order.kernels("count_step")
        copies_in, copies_out, buffers = [], [], []
        for i, (address, size) in enumerate(paged.addresses()):
            (arrival,) = order.find("cudaMemcpyAsync", source=address, bytes=size)
            (leaving,) = order.find("cudaMemcpyAsync", to=address, bytes=size)
            assert order.log[arrival].kind == "host_to_device"
            assert order.log[leaving].kind == "device_to_host"
            assert order.before(arrival, updates[i]) and order.before(updates[i], leaving)
            assert order.before(leaving, count), "the caller's stream waits for the last copy"
            assert len({order.stream[x] for x in (arrival, leaving, updates[i])}) == 3
            assert order.log[arrival].to == order.log[leaving].source
            assert (order.log[arrival].to - address) % 16 == 0, "alignment stays"
            copies_in.append(arrival)
            copies_out.append(leaving)
            buffers.append(order.log[arrival].to // 4096)
            if i >= 2:
                assert order.before(copies_out[i - 2], arrival), "the buffer is free"
            if i >= 1:
                assert copies_in[i] < updates[i - 1], "the next page travels meanwhile"
        assert len(set(buffers)) == 2 and buffers[0] != buffers[1]
        waits = SYNCHRONISING - {"cudaMemcpyAsync"}
        if seed:
            assert not waits & {call.name for call in order.log}
    assert not order.find("cudaMemPrefetchAsync")
    paged.destroy()


def test_pinned_pages_that_share_bytes_take_turns(fake):
    """A page that spans another's state: what it brought must not go back over the other's."""
    gpu = fake()
    paged = PagedStep(gpu, [300, 100, 257], api.PINNED)
    low, inner, high = paged.pages
    outer = api.PageRange(paged.arena, low.begin, high.end, 1, 2)
    paged.cases = [paged.cases[i] for i in (1, 0, 2)]
    paged.pages = [inner, outer]
    inner.first_tensor = 0
    for seed in (0, 100):
        order = one_step(gpu, paged, seed=seed)
        (leaving,) = order.find("cudaMemcpyAsync", to=paged.addresses()[0][0])
        (arrival,) = order.find("cudaMemcpyAsync", source=paged.addresses()[1][0])
        assert order.before(leaving, arrival)
    paged.destroy()


def test_what_is_written_on_the_callers_stream_reaches_pinned_copies(fake):
    """The first copy of a step comes after earlier work of the caller's stream."""
    gpu = fake()
    paged = PagedStep(gpu, [100, 100], api.PINNED)
    order = one_step(gpu, paged)
    (check,) = order.kernels("check_gradients")
    first = order.find("cudaMemcpyAsync")[0]
    starts = [at for at in order.find("cudaEventRecord", stream=0x4560) if at < check]
    assert any(order.before(start, first) for start in starts)
    paged.destroy()


@pytest.mark.parametrize("kind", CAN_BE_PAGED, ids=KIND_NAMES.get)
def test_a_bad_gradient_changes_nothing(fake, kind):
    gpu = fake()
    paged = PagedStep(gpu, [300, 300, 300], kind)
    paged.run()
    before = [{n: v.clone() for n, v in case.device.items()} for case in paged.cases]
    paged.cases[1].device["grad"][77] = float("nan")
    before[1]["grad"][77] = float("nan")
    launch = paged.launch(evict=True)
    gpu.call("adamw8_paged_step", launch)
    assert paged.bad.item() == 1 << 40 | 77
    for old, case in zip(before, paged.cases, strict=True):
        for name, value in old.items():
            assert torch.equal(case.device[name].view(torch.uint8), value.view(torch.uint8)), name
    paged.destroy()


def test_pages_without_an_arena_and_with_two(fake):
    """Small tensors outside any arena, and two arenas of different kinds, in one step."""
    gpu = fake()
    parts = [PagedStep(gpu, [300, 40], kind) for kind in (api.MANAGED, api.PINNED, api.MANAGED)]
    for page in parts[2].pages:
        page.arena, page.begin, page.end = None, 0, 0
    whole = parts[0]
    arenas = [part.arena for part in parts]
    whole.cases = [case for part in parts for case in part.cases]
    whole.pages = [page for part in parts for page in part.pages]
    for i, page in enumerate(whole.pages):
        page.first_tensor = i
    whole.run(look_ahead=2)
    whole.run(look_ahead=2, seed=50)
    for arena in arenas:
        gpu.api.arena_destroy(arena)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"first_tensor": 2}, "page 1: expected to start at tensor 1, got 2 with 1 tensors"),
        ({"tensor_count": 2}, "pages: expected 2 tensors in all, got 3"),
        ({"end": 1 << 20}, r"range: expected 0 <= begin <= end <= \d+, got \[\d+, 1048576\)"),
        ({"begin": -16}, "range: expected 0 <= begin"),
    ],
)
def test_wrong_pages_are_refused(fake, change, sentence):
    gpu = fake()
    paged = PagedStep(gpu, [100, 100])
    for name, value in change.items():
        setattr(paged.pages[1], name, value)
    gpu.runtime.log.clear()
    with pytest.raises(RuntimeError, match=sentence):
        gpu.call("adamw8_paged_step", paged.launch())
    assert not gpu.runtime.calls("cudaLaunchKernel")
    paged.destroy()


# --- arenas ---------------------------------------------------------------------------------------


def test_managed_arena_is_advised_once_and_freed(fake):
    gpu = fake()
    arena = create(gpu, 1 << 20)
    assert gpu.api.arena_kind(arena) == api.MANAGED
    assert gpu.runtime.live_managed_bytes == 1 << 20
    advice = [(call.advice, call.location) for call in gpu.runtime.calls("cudaMemAdvise")]
    assert advice == [("SetPreferredLocation", ("device", 0)), ("SetAccessedBy", ("device", 0))]
    gpu.api.arena_destroy(arena)
    names = [call.name for call in gpu.runtime.log]
    assert names.index("cudaDeviceSynchronize") < names.index("cudaFree")
    assert gpu.runtime.live_managed_bytes == 0 and gpu.runtime.live_allocations == 0
    gpu.runtime.check()


def test_prefetch(fake):
    gpu = fake()
    arena = create(gpu, 1000)
    base = gpu.api.arena_address(arena)
    for to_device, location in ((True, ("device", 0)), (False, ("host", 0))):
        assert gpu.api.arena_prefetch(arena, 100, 400, to_device, api.Where(0, None)) == b""
        (call,) = gpu.runtime.calls("cudaMemPrefetchAsync")
        assert (call.pointer, call.bytes, call.location) == (base + 100, 300, location)
        gpu.runtime.log.clear()
    assert gpu.api.arena_prefetch(arena, 100, 100, True, api.Where(0, None)) == b""
    assert not gpu.runtime.log
    for begin, end in ((-1, 5), (5, 4), (0, 1001)):
        sentence = gpu.api.arena_prefetch(arena, begin, end, True, api.Where(0, None)).decode()
        assert sentence == f"range: expected 0 <= begin <= end <= 1000, got [{begin}, {end})"
    gpu.runtime.fail_next("cudaMemPrefetchAsync", 101)
    sentence = gpu.api.arena_prefetch(arena, 0, 10, True, api.Where(0, None)).decode()
    assert sentence.startswith("cudaMemPrefetchAsync: invalid device ordinal")
    gpu.api.arena_destroy(arena)


def test_pinned_where_the_device_cannot_fault(fake):
    """Windows, WSL, Jetson: no concurrent access."""
    gpu = fake()
    gpu.runtime.attributes["concurrentManagedAccess"] = 0
    arena = create(gpu, 4096)
    assert gpu.api.arena_kind(arena) == api.PINNED
    assert gpu.runtime.peak_managed_bytes == 0
    assert gpu.api.arena_prefetch(arena, 0, 4096, True, api.Where(0, None)) == b""
    gpu.api.arena_destroy(arena)
    assert gpu.runtime.live_allocations == 0
    with pytest.raises(RuntimeError, match="device 0 does not let host and device use managed"):
        create(gpu, 4096, api.MANAGED)


@pytest.mark.parametrize("function", ["cudaMallocManaged", "cudaMemAdvise"])
def test_pinned_where_managed_memory_is_refused(fake, function):
    """Containers; advice that fails gives the managed memory back."""
    gpu = fake()
    gpu.runtime.fail_next(function, 801)
    arena = create(gpu, 4096)
    assert gpu.api.arena_kind(arena) == api.PINNED
    assert gpu.runtime.live_managed_bytes == 0
    gpu.api.arena_destroy(arena)
    gpu.runtime.fail_next(function, 801)
    with pytest.raises(RuntimeError, match="^arena of managed memory: 4096 bytes .* 0: operation"):
        create(gpu, 4096, api.MANAGED)
    assert gpu.runtime.live_allocations == 0


def test_out_of_memory_is_a_sentence(fake):
    """Names the bytes asked for and the bytes that are free; the next call works."""
    gpu = fake()
    sentence = r"^arena of {} memory: 8192 bytes on device 0: out of memory; \d+ of its \d+ bytes"
    gpu.runtime.fail_next("cudaMallocManaged", 2)
    with pytest.raises(RuntimeError, match=sentence.format("managed")):
        create(gpu, 8192, api.MANAGED)
    gpu.runtime.fail_next("cudaMallocManaged", 2)
    gpu.runtime.fail_next("cudaHostAlloc", 2)
    with pytest.raises(RuntimeError, match=sentence.format("pinned host")):
        create(gpu, 8192)
    with pytest.raises(RuntimeError, match="arena: expected bytes > 0, got 0"):
        create(gpu, 0)
    assert gpu.runtime.live_allocations == 0
    gpu.api.arena_destroy(create(gpu, 8192))


def test_no_room_for_staging_is_a_sentence(fake):
    gpu = fake()
    paged = PagedStep(gpu, [300, 300], api.PINNED)
    for first in ([2], [0, 2]):
        for code in first:
            if code:
                gpu.runtime.fail_next("cudaMalloc", code)
        with pytest.raises(RuntimeError, match=r"^staging buffer .*: \d+ bytes .* 0: out of"):
            gpu.call("adamw8_paged_step", paged.launch())
    paged.run()
    paged.destroy()
    assert gpu.runtime.live_allocations == 0


def test_staging_grows_with_the_pages(fake):
    gpu = fake()
    paged = PagedStep(gpu, [64, 64, 2000], api.PINNED)
    pages = paged.pages
    paged.cases, paged.pages, later = paged.cases[:2], pages[:2], paged.cases
    paged.run()
    paged.cases, paged.pages = later, pages
    paged.run(seed=9)
    grown = [call.bytes for call in gpu.runtime.calls("cudaMalloc")]
    assert len(grown) == 4 and grown[0] == grown[1] < grown[2] == grown[3]
    paged.destroy()
    assert gpu.runtime.live_allocations == 0


@pytest.mark.parametrize("kind", CAN_BE_PAGED, ids=KIND_NAMES.get)
def test_no_leak_in_1000_cycles(fake, kind):
    """Create, step, delete; launches are counted, not executed."""
    gpu = fake()
    gpu.runtime.cudaLaunchKernel = lambda *_: None
    paged = PagedStep(gpu, [64, 32], kind)
    launch = paged.launch(evict=True)
    handles = dict(gpu.runtime.handles)
    size = 4096
    for _ in range(1000):
        arena = create(gpu, size, kind)
        for page in launch.pages[0 : launch.page_count]:
            page.arena = arena
        gpu.call("adamw8_paged_step", launch)
        gpu.api.arena_destroy(arena)
        gpu.runtime.log.clear()
    paged.destroy()
    assert gpu.runtime.handles == handles, "streams and events"
    assert gpu.runtime.live_allocations == 0
    assert gpu.runtime.peak_managed_bytes <= 2 * size
    gpu.runtime.check()


# --- several devices ------------------------------------------------------------------------------


def test_several_devices(fake):
    gpu = fake()
    gpu.runtime.device_count = 2
    paged = [PagedStep(gpu, [300, 100], kind, device=1) for kind in CAN_BE_PAGED]
    for each in paged:
        each.run(evict=True)
        assert gpu.runtime.device == 0, "the caller's device is current again"
    advised = {call.location for call in gpu.runtime.calls("cudaMemAdvise")}
    fetched = {call.location for call in gpu.runtime.calls("cudaMemPrefetchAsync")}
    assert advised == {("device", 1)} and fetched == {("device", 1), ("host", 0)}
    assert {call.device for call in gpu.runtime.calls("cudaSetDevice")} == {0, 1}
    with pytest.raises(RuntimeError, match="arena: lies on device 1, used on device 0"):
        gpu.call("adamw8_paged_step", paged[0].launch(), device=0)
    with pytest.raises(RuntimeError, match=r"device: expected 0 \.\. 1, got 2"):
        create(gpu, 64, device=2)
    for each in paged:
        gpu.runtime.log.clear()
        each.destroy()
        names = [call.name for call in gpu.runtime.log]
        assert names[0] == names[-1] == "cudaSetDevice", "freed on its own device"
        assert (gpu.runtime.log[0].device, gpu.runtime.log[-1].device) == (1, 0)
    assert gpu.runtime.device == 0 and gpu.runtime.live_allocations == 0
