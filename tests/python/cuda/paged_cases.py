"""Arenas with AdamW state in them, and the order of what a paged step enqueues."""

import ctypes as C

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
