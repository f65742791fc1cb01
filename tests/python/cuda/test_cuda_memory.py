"""Arenas and the paged AdamW step: results, order of what is enqueued, fallbacks, leaks, sentences.

Without a GPU: PTX executed by an interpreter; not run on a GPU. The fake runtime executes in the
order of the calls, so that the order a GPU must keep is read from the log: an operation comes
before another when streams and events say so (`Order`). Page migration itself cannot be tested
here.
"""

import ctypes as C
import re
import subprocess
import sys

import pytest
import torch

import cuda_api as api
from adamw8_cases import (
    NAMES,
    assert_same,
    cpu_step,
    make_launch,
    new_case,
    random_gradient,
    set_gradient,
)
from test_cuda_adamw8 import SYNCHRONISING

CAN_BE_PAGED = [api.MANAGED, api.PINNED]
KIND_NAMES = {api.AUTO: "auto", api.MANAGED: "managed", api.PINNED: "pinned"}


# --- arenas with state in them --------------------------------------------------------------------


def create(gpu, size, kind=api.AUTO, device=0):
    arena = C.c_void_p()
    sentence = gpu.api.arena_create(size, device, kind, C.byref(arena)).decode()
    if sentence:
        assert not arena.value
        raise RuntimeError(sentence)
    return arena.value


def view(gpu, arena, offset, like):
    """A tensor over arena memory, with the values of `like`."""
    size = like.numel() * like.element_size()
    memory = (C.c_uint8 * size).from_address(gpu.api.arena_address(arena) + offset)
    tensor = torch.frombuffer(memory, dtype=like.dtype)
    tensor.copy_(like.flatten())
    return tensor


class PagedStep:
    """Cases whose moments lie in an arena, `per_page` tensors a page, and the launch over them."""

    def __init__(self, gpu, sizes, kind=api.MANAGED, per_page=1, encoding="ratio", device=0,
                 dtype=torch.float32, gap=0):  # fmt: skip
        self.gpu, self.device = gpu, device
        self.cases = [new_case(n, encoding, dtype, seed=i) for i, n in enumerate(sizes)]
        room = sum(64 + v.numel() * v.element_size() for c in self.cases for v in c.state.values())
        self.arena = create(gpu, room + gap * len(sizes) + 64, kind, device)
        self.pages, at = [], gap
        for first in range(0, len(sizes), per_page):
            group = self.cases[first : first + per_page]
            begin = at
            for case in group:
                case.grad = torch.zeros_like(case.param)
                case.device = {
                    "param": gpu.put(case.param.clone()),
                    "grad": gpu.put(case.grad.clone()),
                    "step": gpu.put(case.state["step"].clone()),
                }
                for name in NAMES:
                    if name in case.state:
                        value = case.state[name]
                        case.device[name] = view(gpu, self.arena, at, value)
                        at += -(-value.numel() * value.element_size() // 16) * 16
            self.pages.append(api.PageRange(self.arena, begin, at, first, len(group)))
            at += gap

    def launch(self, look_ahead=1, evict=False):
        self.step, self.bad = make_launch(self.gpu, self.cases)
        return api.PagedAdamW8Launch(
            self.step, (api.PageRange * len(self.pages))(*self.pages), len(self.pages), look_ahead,
            evict,
        )  # fmt: skip

    def run(self, look_ahead=1, evict=False, seed=0, stream=None):
        for i, case in enumerate(self.cases):
            set_gradient(self.gpu, case, random_gradient(case.param.numel(), seed + i,
                                                         dtype=case.param.dtype))  # fmt: skip
        launch = self.launch(look_ahead, evict)
        self.gpu.call("adamw8_paged_step", launch, self.device, stream)
        self.gpu.wait()
        assert self.bad.item() == -1
        cpu_step(self.cases)
        for case in self.cases:
            assert_same(case)

    def addresses(self):
        base = self.gpu.api.arena_address(self.arena)
        return [(base + page.begin, page.end - page.begin) for page in self.pages]

    def destroy(self):
        self.gpu.api.arena_destroy(self.arena)


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


class Order:
    """What streams and events order, from a log: `before(i, j)` for positions in it."""

    def __init__(self, log):
        self.log = log
        self.stream: list[int | None] = []
        self._past: list[set[int]] = []
        last: dict[int, int] = {}
        recorded: dict[int, int] = {}
        for at, call in enumerate(log):
            stream = call.arguments.get("stream")
            self.stream.append(stream)
            past: set[int] = set()
            sources = [last[stream]] if stream in last else []
            if call.name == "cudaStreamWaitEvent" and call.event in recorded:
                sources.append(recorded[call.event])
            for source in sources:
                past |= self._past[source] | {source}
            self._past.append(past)
            if stream is not None:
                last[stream] = at
            if call.name == "cudaEventRecord":
                recorded[call.event] = at

    def before(self, first: int, second: int) -> bool:
        return first in self._past[second]

    def find(self, name, **arguments) -> list[int]:
        """Positions of these calls."""
        return [
            at
            for at, call in enumerate(self.log)
            if call.name == name
            and all(call.arguments.get(key) == value for key, value in arguments.items())
        ]

    def kernels(self, part) -> list[int]:
        return [at for at in self.find("cudaLaunchKernel") if part in self.log[at].kernel]


def one_step(gpu, paged, **options) -> Order:
    stream = 0x4560
    gpu.runtime.handles[stream] = "stream"
    gpu.runtime.log.clear()
    paged.run(stream=stream, **options)
    return Order(gpu.runtime.log)


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


# --- several devices, and none --------------------------------------------------------------------


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


def every_call(library) -> dict[str, str]:
    """The sentence of each call that returns one, for empty launches."""
    where, arena = api.Where(0, None), C.c_void_p()
    table = library.api if hasattr(library, "api") else library
    bad = C.c_int64()
    launches = {
        "quantize_4bit": api.QuantizeLaunch(bad_index=C.pointer(bad)),
        "double_quantize": api.DoubleQuantizeLaunch(),
        "dequantize_4bit": api.DequantizeLaunch(),
        "lora_linear_forward": api.ForwardLaunch(),
        "lora_linear_backward": api.BackwardLaunch(),
        "adamw8_step": api.AdamW8Launch(),
        "adamw8_paged_step": api.PagedAdamW8Launch(),
    }
    said = {name: getattr(table, name)(C.byref(one), where) for name, one in launches.items()}
    said["arena_create"] = table.arena_create(64, 0, api.AUTO, C.byref(arena))
    said["why_not"] = table.why_not()
    said["device_description"] = table.device_description(0)
    assert table.device_count() == 0 and not arena.value
    assert table.lora_linear_forward_workspace(C.byref(launches["lora_linear_forward"]), where) == 0
    table.arena_destroy(None)
    return {name: sentence.decode() for name, sentence in said.items()}


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"driver_missing": True}, "no NVIDIA driver was found (CUDA error 35: "),
        ({"device_count": 0}, "no NVIDIA device was found (CUDA error 100: "),
    ],
)
def test_without_a_device_every_call_says_why(fake, setting, sentence):
    gpu = fake()
    for name, value in setting.items():
        setattr(gpu.runtime, name, value)
    said = every_call(gpu)
    assert len(set(said.values())) == 1 and said["why_not"].startswith(sentence)
    row = api.VariantRow()
    for op in ("quantize_4bit", "dequantize_4bit", "lora_linear", "adamw8"):
        assert gpu.api.variant(op.encode(), 0, 0, C.byref(row))
        assert row.why_not.decode() == said["why_not"] and not row.chosen


def test_an_old_device_is_refused(fake):
    gpu = fake()
    gpu.runtime.attributes.update(computeCapabilityMajor=7, computeCapabilityMinor=5)
    said = set(every_call(gpu).values())
    assert said == {"compute capability 8.0 or later is needed, device 0 has 7.5"}


def test_device_description(fake):
    gpu = fake()
    assert gpu.api.device_count() == 1
    assert gpu.api.device_description(0) == b"fake device, compute capability 8.0, 16.0 GiB"


REAL = """
import ctypes, sys
sys.path[:0] = {paths!r}
import cuda_api, test_cuda_memory
print(test_cuda_memory.every_call(cuda_api.load_api(ctypes.CDLL({library!r}))))
"""


def test_the_real_library_loads_without_a_driver(built, tmp_path):
    """Static cudart, one exported symbol, no CUDA library needed; every call has its sentence."""
    if torch.cuda.is_available():
        pytest.skip("a driver is there")
    library = tmp_path / "libhalfbyte_cuda.so"
    objects = [str(each.object) for each in built]
    subprocess.run(
        ["nvcc", "-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL", *objects, "-o",
         str(library)],
        check=True,
    )  # fmt: skip
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
    assert not re.search(r"NEEDED.*cud", needed)
    dynamic = subprocess.run(["nm", "-D", "-C", "--defined-only", library],
                             capture_output=True, text=True).stdout  # fmt: skip
    assert [line.split()[-1] for line in dynamic.splitlines()] == ["halfbyte_cuda_api"]
    code = REAL.format(paths=sys.path, library=str(library))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = eval(done.stdout)
    assert len(set(said.values())) == 1
    assert said["why_not"].startswith("no NVIDIA driver was found (CUDA error 35")
