"""Tests of the Python layer on a CUDA device; `test_cuda_python.py` runs them."""

import gc
import os
import re
import weakref
from pathlib import Path

import pytest
import torch

import cuda_api
import fake_torch_cuda as fake
import halfbyte
from formats import same_bits
from halfbyte._native import _C
from halfbyte.ops import lora_linear as lora
from halfbyte.optim import (
    AdamW8bit,
    AdamW32bit,
    NonFiniteGradient,
    PagedAdamW8bit,
    PagedAdamW32bit,
)
from optim_cases import assert_same_state, parameters, set_gradients

CARD = torch.cuda.is_available()
KINDS = [AdamW8bit, AdamW32bit, PagedAdamW8bit, PagedAdamW32bit]
SHAPES = (5000, (20, 30), 0, 700)


@pytest.fixture(scope="session")
def library(request):
    """The interpreter behind the library that `_C` opens."""
    if CARD:
        return None
    built = request.getfixturevalue("built")
    made = cuda_api.Interpreted(built, "compute_80", Path(os.environ["HALFBYTE_CUDA_LIBRARY"]))
    made.runtime.register(fake.POOL)
    made.runtime.device_count = 2
    return made


class Card:
    """A real device."""

    def put(self, tensor, index=0):
        return tensor.to(f"cuda:{index}")


class Fake:
    """The fake runtime and what it logged."""

    def __init__(self, library, notes):
        self.runtime, self.notes = library.runtime, notes
        self.runtime.log.clear()

    def put(self, tensor, index=0):
        return fake.Pool.copy(tensor, index)


@pytest.fixture
def cuda(library, monkeypatch):
    """The device: `put` tensors there."""
    if CARD:
        yield Card()
        return
    fake.Pool.reset()
    attributes = dict(library.runtime.attributes)
    library.runtime.handles[0x7770] = "stream"
    with monkeypatch.context() as patch:
        yield Fake(library, fake.install(patch, 0x7770))
    library.runtime.attributes = attributes
    library.runtime.check()


def host(tensor):
    return tensor.cpu() if CARD else tensor.as_subclass(torch.Tensor)


# --- operators ------------------------------------------------------------------------------------


def packed(cuda, weight, double_quant=True):
    """A weight's operator arguments on the CPU and on the device."""
    args = halfbyte.quantize_nf4(weight, double_quant=double_quant).op_args()
    return args, [cuda.put(a) if isinstance(a, torch.Tensor) else a for a in args]


CUDA_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def dispatched(name, *args):
    """The operator by torch's dispatcher: the kernel registered for CUDA, by its schema. A tensor
    of the fake device has the CPU's key, which is why the key is given."""
    operator = getattr(torch.ops.halfbyte, name).default
    if CARD or not any(isinstance(each, fake.OnCuda) for each in args):
        return operator(*args)
    return operator.redispatch(CUDA_KEY, *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantize_and_dequantize(cuda, dtype):
    weight = torch.randn(30, 100).to(dtype)
    expected = dispatched("quantize_4bit", weight, "nf4", 64)
    got = dispatched("quantize_4bit", cuda.put(weight), "nf4", 64)
    assert all(g.device.type == "cuda" for g in got)
    for a, b in zip(expected, got, strict=True):
        assert same_bits(host(b), a)
    offset = expected[1].mean().reshape(1)
    codes = dispatched("double_quantize", expected[1], offset)
    got = dispatched("double_quantize", got[1], cuda.put(offset))
    for a, b in zip(codes, got, strict=True):
        assert same_bits(host(b), a)
    here, there = packed(cuda, weight)
    dense = dispatched("dequantize_4bit", *there, [30, 100], dtype)
    assert dense.device.type == "cuda"
    expected = dispatched("dequantize_4bit", *here, [30, 100], dtype)
    assert same_bits(host(dense), expected)
    out = cuda.put(torch.zeros(30, 100, dtype=dtype))
    dispatched("dequantize_4bit_into", *there, out)
    assert same_bits(host(out), expected)


def both(cuda, M, N, K, R, dtype, dropout, panels):
    """Forward and backward on the CPU and on the device: pairs of results."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    here, there = packed(cuda, draw(N, K), double_quant=not panels)
    x, dy, bias = draw(M, K).to(dtype), draw(M, N).to(dtype), draw(N)
    lora_a, lora_b, seed = draw(R, K) / K**0.5, draw(N, R), torch.tensor([11])
    tail = (0.5, dropout, seed if dropout else None)
    results = []
    for put, weight in ((lambda t: t, here), (cuda.put, there)):
        moved = [put(t) if isinstance(t, torch.Tensor) else t for t in tail]
        a, b, x_, dy_ = put(lora_a), put(lora_b), put(x), put(dy)
        y, t = dispatched("lora_linear", x_, *weight, N, put(bias), a, b, *moved)
        grads = dispatched(
            "lora_linear_backward", dy_, x_, *weight, K, torch.float32, a, b, t, *moved, [True] * 4
        )
        results.append([host(each) for each in (y, t, *grads)])
    return zip(*results, strict=True)


@pytest.mark.parametrize("panels", [False, True], ids=["fused", "panels"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_linear(cuda, panels, dropout, dtype, monkeypatch):
    """As on the CPU, up to the roundings of y and dx to their dtype and of factors to 8 bits; the
    same dropout mask, or results would differ by far more."""
    if panels:
        monkeypatch.setattr(lora, "PANEL_ROWS", 16)
        monkeypatch.setattr(lora, "PANEL_BYTES", 16 << 10)
    for want, got in both(cuda, 20, 96, 64, 4, dtype, dropout, panels):
        assert got.dtype == want.dtype and got.shape == want.shape
        unit = 2.0**-7 if dtype is torch.bfloat16 else 2.0**-18
        assert (got.float() - want.float()).abs().max() <= 4 * unit * want.float().abs().max()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("N", "K"), [(300, 128), (37, 100), (70, 33), (1, 7), (513, 64)])
def test_panels_are_rows_of_the_weight(double_quant, N, K, monkeypatch):
    """Whatever the row length: a panel starts where codes and scales can be cut. On the CPU."""
    monkeypatch.setattr(lora, "PANEL_BYTES", 1 << 12)
    weight = halfbyte.quantize_nf4(torch.randn(N, K), double_quant=double_quant)
    parts, at = [], 0
    for rows, panel in lora._panels(weight.op_args(), N, K, torch.float32):
        assert rows.start == at
        at = rows.stop
        parts.append(panel.clone())
    assert at == N and same_bits(torch.cat(parts), weight.dequantize())
    assert len(parts) > 1 or N * K < 1 << 14


def test_panels_are_taken_from_the_row_count_of_the_kernels_table(cuda, monkeypatch):
    source = (cuda_api.CUDA / "lora_linear/lora_linear.cu").read_text()
    assert int(re.search(r"kPanelRows = (\d+);", source).group(1)) == lora.PANEL_ROWS
    below, above = torch.empty(lora.PANEL_ROWS - 1, 1), torch.empty(lora.PANEL_ROWS, 1)
    assert not lora._wants_panels(below) and lora._wants_panels(above)
    monkeypatch.setenv("HALFBYTE_FORCE_VARIANT", "lora_linear:cuda_mma")
    assert not lora._wants_panels(above)
    monkeypatch.setenv("HALFBYTE_FORCE_VARIANT", "lora_linear:cuda_panels")
    assert lora._wants_panels(below)
    monkeypatch.setenv("HALFBYTE_FORCE_VARIANT", "avx2")
    assert lora._wants_panels(above)


def test_info_lists_devices_and_variants(cuda):
    assert len(halfbyte.cuda_devices()) >= 1
    assert "compute capability" in halfbyte.cuda_devices()[0]
    assert halfbyte.cuda_status() == "CUDA kernels available"
    rows = halfbyte.variants()
    for op in ("quantize_4bit", "dequantize_4bit", "lora_linear", "adamw8"):
        assert sum(row["chosen"] for row in rows[f"{op} (cuda)"]) == 1


# --- optimizers -----------------------------------------------------------------------------------


def pair(cuda, kind, shapes=SHAPES, dtype=torch.float32, index=0, **options):
    """Optimizers over the same parameters on the CPU (unpaged) and on the device."""
    plain = parameters(*shapes, dtype=dtype)
    moved = [cuda.put(p.detach(), index).requires_grad_() for p in plain]
    base = AdamW8bit if issubclass(kind, AdamW8bit) else AdamW32bit
    return (base(plain, lr=1e-2), plain), (kind(moved, lr=1e-2, **options), moved)


def advance(cuda, optimizers, steps, first=0, bad=None):
    (ours, plain), (theirs, moved) = optimizers
    for t in range(first, first + steps):
        set_gradients(plain, t)
        if bad is not None:
            row, element, value = bad
            plain[row].grad.view(-1)[element] = value
        for a, b in zip(plain, moved, strict=True):
            b.grad = cuda.put(a.grad, b.get_device())
        if bad is None:
            ours.step()
        theirs.step()


def assert_same_everything(optimizers):
    (ours, plain), (theirs, moved) = optimizers
    saved = theirs.state_dict()["state"]  # waits where the state is paged
    for a, b in zip(plain, moved, strict=True):
        assert same_bits(host(b.detach()), a.detach())
    saved = {key: {n: host(v) for n, v in state.items()} for key, state in saved.items()}
    assert_same_state(saved, ours.state_dict()["state"])


@pytest.mark.parametrize("kind", KINDS)
def test_steps_have_the_bits_of_the_cpu(cuda, kind):
    options = {"page_bytes": 3000, "evict": True} if "Paged" in kind.__name__ else {}
    optimizers = pair(cuda, kind, **options)
    advance(cuda, optimizers, 3)
    assert_same_everything(optimizers)
    optimizer, params = optimizers[1]
    for param in params:
        state = optimizer.state[param]
        assert state["step"].device == param.device
        if param.numel():
            assert state["exp_avg"].is_cpu == optimizer.paged


def test_a_step_waits_only_for_the_one_before(cuda):
    if CARD:
        pytest.skip("read from the fake runtime's log")
    optimizers = pair(cuda, AdamW8bit)
    advance(cuda, optimizers, 1)
    assert cuda.notes.waits == []
    advance(cuda, optimizers, 2, first=1)
    assert cuda.notes.waits == ["event"] * 2
    names = {call.name for call in cuda.runtime.log}
    assert not {n for n in names if "Synchronize" in n or "Malloc" in n}
    kernels = [call for call in cuda.runtime.log if call.name == "cudaLaunchKernel"]
    assert {call.stream for call in kernels} == {cuda.notes.stream}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_awkward_tensors(cuda, dtype):
    """Strided parameters and gradients, fp32 gradients of half parameters."""
    (ours, plain), (theirs, moved) = pair(cuda, AdamW8bit, ((40, 60), 300), dtype)
    strided = cuda.put(plain[0].detach().t().contiguous()).t().requires_grad_()
    theirs = AdamW8bit([strided, moved[1]], lr=1e-2)
    for t in range(2):
        set_gradients(plain, t)
        moved[1].grad_dtype = torch.float32
        moved[1].grad = cuda.put(plain[1].grad.float())
        strided.grad = cuda.put(plain[0].grad)
        ours.step()
        theirs.step()
    assert same_bits(host(strided.detach()).contiguous(), plain[0].detach())
    assert same_bits(host(moved[1].detach()), plain[1].detach())


@pytest.mark.parametrize("kind", [AdamW8bit, PagedAdamW8bit])
@pytest.mark.parametrize("ask", ["step", "state_dict"])
def test_a_bad_gradient_is_reported_late_and_changes_nothing(cuda, kind, ask):
    optimizers = pair(cuda, kind)
    advance(cuda, optimizers, 2)
    advance(cuda, optimizers, 1, first=2, bad=(1, 37, float("nan")))
    optimizer = optimizers[1][0]
    message = r"parameter 1 of group 0: gradient of the last step was not finite at \[1, 7\] "
    with pytest.raises(NonFiniteGradient, match=message + r"\(flat index 37\); the step was skip"):
        getattr(optimizer, ask)()
    assert_same_everything(optimizers)
    advance(cuda, optimizers, 1, first=3)
    assert_same_everything(optimizers)


def test_a_bad_gradient_can_be_counted(cuda):
    optimizers = pair(cuda, AdamW8bit, on_nonfinite="skip")
    advance(cuda, optimizers, 1, bad=(3, 0, float("inf")))
    advance(cuda, optimizers, 1, bad=(0, 0, -float("inf")))
    advance(cuda, optimizers, 2)
    assert optimizers[1][0].skipped_steps == 2
    assert_same_everything(optimizers)


def test_a_captured_step_does_not_wait(cuda):
    if CARD:
        pytest.skip("a graph of a real device: test_a_graph_replays_steps")
    optimizers = pair(cuda, AdamW8bit, on_nonfinite="skip")
    advance(cuda, optimizers, 1)
    cuda.notes.capturing = True
    advance(cuda, optimizers, 1, first=1)
    assert cuda.notes.waits == []
    cuda.notes.capturing = False
    assert_same_everything(optimizers)
    assert cuda.notes.waits == ["cuda:0"]
    optimizer = optimizers[1][0]
    optimizer._parts[0][0].verdict._host.fill_(5)  # as a replay would leave it
    optimizer.state_dict()
    optimizer.state_dict()
    assert optimizer.skipped_steps == 1


def test_cpu_and_two_devices_in_one_optimizer(cuda):
    """Non-finite gradients are found before any device steps."""
    if CARD and torch.cuda.device_count() < 2:
        pytest.skip("one card")
    plain = parameters(900, 800, 700, 600, 500)
    places = [None, 0, 1, 0, None]
    mixed = parameters(900, 800, 700, 600, 500)
    mixed = [
        p if place is None else cuda.put(p.detach(), place).requires_grad_()
        for p, place in zip(mixed, places, strict=True)
    ]
    optimizers = [AdamW8bit(params, lr=1e-2, min_8bit_size=1) for params in (plain, mixed)]

    def gradients(seed):
        set_gradients(plain, seed)
        for a, b, place in zip(plain, mixed, places, strict=True):
            b.grad = a.grad.clone() if place is None else cuda.put(a.grad, place)

    for seed in range(2):
        gradients(seed)
        for optimizer in optimizers:
            optimizer.step()
    before = [host(p.detach()).clone() for p in mixed]
    gradients(3)
    mixed[2].grad[5] = float("nan")
    with pytest.raises(NonFiniteGradient, match=r"parameter 2 of group 0.*nan at \[5\]"):
        optimizers[1].step()
    for a, b, c in zip(plain, mixed, before, strict=True):
        assert torch.equal(host(b.detach()), c) and torch.equal(a.detach(), c)
    mixed[2].grad = None
    plain[2].grad = None
    for optimizer in optimizers:
        optimizer.step()
    for a, b in zip(plain, mixed, strict=True):
        assert torch.equal(host(b.detach()), a.detach())


# --- paged state ----------------------------------------------------------------------------------


def arenas(optimizer):
    return list(optimizer._memory.arenas)


@pytest.mark.parametrize("pinned", [False, True], ids=["managed", "pinned"])
def test_paged_state_is_saved_and_restored_into_paged_memory(cuda, pinned):
    if pinned and CARD:
        pytest.skip("the card chooses")
    if pinned:
        cuda.runtime.attributes["concurrentManagedAccess"] = 0
    optimizers = pair(cuda, PagedAdamW8bit, page_bytes=3000)
    advance(cuda, optimizers, 2)
    first = optimizers[1][0]
    saved = first.state_dict()
    (arena,) = arenas(first)
    assert arena.kind == ("pinned" if pinned else "managed") or CARD
    assert arena.device == 0 and arena.bytes == len(memoryview(arena))
    second = PagedAdamW8bit(optimizers[1][1], lr=9)
    second.load_state_dict(saved)
    assert len(arenas(second)) == 1 and arenas(second)[0] is not arena
    for state in second.state.values():
        assert second._memory.holds(state, optimizers[1][1][0].device)
    resumed = (optimizers[0], (second, optimizers[1][1]))
    advance(cuda, resumed, 2, first=2)
    assert_same_everything(resumed)
    plain = AdamW8bit(optimizers[1][1])
    plain.load_state_dict(second.state_dict())
    assert all(v.device.type == "cuda" for s in plain.state.values() for v in s.values())


def test_pages_travel_before_their_update(cuda):
    if CARD:
        pytest.skip("read from the fake runtime's log")
    optimizers = pair(cuda, PagedAdamW8bit, [5000] * 4, page_bytes=1, look_ahead=1, evict=True)
    advance(cuda, optimizers, 1)
    (arena,) = arenas(optimizers[1][0])
    log = cuda.runtime.log
    spans = {"device": [], "host": []}
    for call in log:
        if call.name == "cudaMemPrefetchAsync":
            begin = call.pointer - arena.address
            spans[call.location[0]].append((begin, begin + call.bytes))
    assert len(spans["device"]) == 4 and spans["device"] == spans["host"]
    names = [call.name for call in log]
    updates = [
        at for at, call in enumerate(log)
        if call.name == "cudaLaunchKernel" and "update" in call.kernel
    ]  # fmt: skip
    assert len(updates) == 4
    assert names[: updates[0]].count("cudaMemPrefetchAsync") == 2


@pytest.mark.parametrize("kind", ["managed", "pinned"])
def test_no_leak_in_1000_cycles(cuda, kind, monkeypatch):
    """Create, step, delete; launches are counted, not executed."""
    if CARD:
        pytest.skip("counted by the fake runtime")
    cuda.runtime.attributes["concurrentManagedAccess"] = int(kind == "managed")
    monkeypatch.setattr(cuda.runtime, "cudaLaunchKernel", lambda *_: None)
    param = cuda.put(torch.zeros(300)).requires_grad_()
    param.grad = cuda.put(torch.zeros(300))
    live = cuda.runtime.live_allocations, dict(cuda.runtime.handles)
    for _ in range(1000):
        fake.Pool.used = 1 << 20
        PagedAdamW8bit([param], page_bytes=1).step()
        cuda.runtime.log.clear()
    assert (cuda.runtime.live_allocations, cuda.runtime.handles) == live
    assert cuda.runtime.peak_managed_bytes < 1 << 20


def test_deleting_the_optimizer_frees_the_arena_unless_its_state_is_kept(cuda):
    optimizers = pair(cuda, PagedAdamW8bit)
    advance(cuda, optimizers, 1)
    optimizer, params = optimizers[1]
    memory = weakref.ref(arenas(optimizer)[0])
    saved = optimizer.state_dict()["state"]
    del optimizer, optimizers
    gc.collect()
    assert memory() is not None
    assert saved[0]["exp_avg"].numel() == 5000
    saved.clear()
    gc.collect()
    assert memory() is None
    if not CARD:
        assert cuda.runtime.live_managed_bytes == 0


def test_out_of_memory_is_an_exception(cuda):
    if CARD:
        pytest.skip("made to fail by the fake runtime")
    params = [cuda.put(torch.zeros(5000)).requires_grad_()]
    params[0].grad = cuda.put(torch.ones(5000))
    optimizer = PagedAdamW8bit(params)
    for name in ("cudaMallocManaged", "cudaHostAlloc"):
        cuda.runtime.fail_next(name, 2)
    with pytest.raises(_C.Error, match=r"paged memory: arena of pinned host memory: 10\d* bytes"):
        optimizer.step()
    assert not optimizer.state[params[0]] and not host(params[0].detach()).any()
    optimizer.step()
    assert host(params[0].detach()).any()


if CARD:

    def test_a_graph_replays_steps(cuda):
        optimizers = pair(cuda, AdamW8bit)
        advance(cuda, optimizers, 1)
        set_gradients(optimizers[0][1], 1)
        for a, b in zip(optimizers[0][1], optimizers[1][1], strict=True):
            b.grad.copy_(a.grad)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizers[1][0].step()
        for _ in range(3):
            graph.replay()
            optimizers[0][0].step()
        assert_same_everything(optimizers)

    def test_modules_move_and_train(cuda):
        torch.manual_seed(0)
        layer = halfbyte.nn.LoraLinear.from_linear(torch.nn.Linear(256, 128), 8).cuda()
        x = torch.randn(2, 5, 256, device="cuda", requires_grad=True)
        layer(x).sum().backward()
        assert layer.lora_b.grad.is_cuda and x.grad.is_cuda
