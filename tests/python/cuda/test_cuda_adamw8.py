"""8-bit AdamW on CUDA: parameters, codes and scales have the bits of the CPU's step.

Without a GPU: PTX executed by an interpreter; not run on a GPU.
"""

import math
import re

import pytest
import torch

from adamw8_cases import (
    DEFAULT_GROUPS,
    assert_same,
    cpu_step,
    make_launch,
    new_case,
    random_gradient,
    set_gradient,
    snapshot,
    upload,
)
from cuda_api import ARCHS, CUDA
from formats import FLOATS

ENCODINGS = ("ratio", "moments", "float32")
SYNCHRONISING = {
    "cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaStreamQuery",
    "cudaMalloc", "cudaFree", "cudaMallocAsync", "cudaMemcpy", "cudaMemcpyAsync", "cudaHostAlloc",
}  # fmt: skip


def step_and_compare(gpu, cases, groups=None, what=""):
    launch, bad = make_launch(gpu, cases, groups)
    gpu.call("adamw8_step", launch)
    gpu.wait()
    assert bad.item() == -1
    cpu_step(cases, groups)
    for case in cases:
        assert_same(case, what)


def run_steps(gpu, cases, steps, groups=None, shift=0, sigma=2.0, grad_dtype=None):
    for case in cases:
        case.grad = torch.zeros_like(case.param, dtype=grad_dtype or case.param.dtype)
        upload(gpu, case, shift)
    for t in range(steps):
        for i, case in enumerate(cases):
            dtype = grad_dtype or case.param.dtype
            set_gradient(gpu, case, random_gradient(case.param.numel(), 97 * t + i, sigma, dtype))
        step_and_compare(gpu, cases, groups, f"step {t + 1}:")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_several_steps(gpu, encoding, dtype):
    """Whole blocks, a short last one, tensors under one block."""
    cases = [new_case(n, encoding, dtype, seed=n) for n in (*range(1, 9), 255, 256, 257, 1000)]
    run_steps(gpu, cases, steps=4)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_gradients(gpu, encoding, dtype):
    run_steps(gpu, [new_case(700, encoding, dtype)], steps=2, grad_dtype=torch.float32)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [1, 3])
def test_unaligned(gpu, encoding, dtype, shift):
    run_steps(gpu, [new_case(600, encoding, dtype)], steps=2, shift=shift)


def test_mixed_tensors_and_groups(gpu):
    """Several types, states, groups and step counts in one launch; empty tensors among them."""
    groups = [
        (1e-2, 0.9, 0.999, 1e-8, 1e-2, False),
        (3e-3, 0.8, 0.95, 1e-6, 0.0, True),
        (1e-1, 0.0, 0.5, 0.0, 0.1, False),
    ]
    cases = []
    for i, encoding in enumerate(ENCODINGS * 3):
        dtype = FLOATS[i % 3]
        cases.append(new_case(100 + 211 * i, encoding, dtype, i, group=i % 3, step=(i * 7) % 5))
    cases.insert(2, new_case(0, "ratio"))
    run_steps(gpu, cases, steps=3, groups=groups)


@pytest.mark.parametrize("step", [0, 1, 9, 999, 65535, 2**24])
def test_step_counts(gpu, step):
    """The fp64 scalars of any step."""
    case = new_case(300, "ratio", step=step)
    run_steps(gpu, [case], steps=1, groups=[(1e-3, 0.9, 0.999, 1e-8, 1e-2, False)])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_extreme_gradients(gpu, encoding):
    """Zeros, subnormals, overflow of v to infinity and the steps after it."""
    largest = torch.finfo(torch.float32).max
    first = torch.cat(
        [
            torch.zeros(256),
            torch.full((256,), 1e-30) * torch.linspace(-1, 1, 256),
            torch.tensor([2.0**-149, -(2.0**-126), 1e-22, 1e-19] * 64),
            largest * torch.linspace(-1, 1, 256),
            torch.cat([torch.full((255,), 1e-12), torch.full((1,), 1e20)]),
        ]
    )
    case = new_case(first.numel(), encoding, seed=3)
    case.grad = torch.zeros_like(first)
    upload(gpu, case)
    for t, grad in enumerate([first, torch.zeros_like(first), first.flip(0), first * 1e-3]):
        set_gradient(gpu, case, grad)
        step_and_compare(gpu, [case], what=f"step {t + 1}:")


def test_zero_gradient_on_zero_state_changes_only_decay(gpu):
    groups = [(1e-2, 0.9, 0.999, 0.0, 0.0, False)]
    case = new_case(513, "ratio")
    before = case.param.clone()
    case.grad = torch.zeros(513)
    upload(gpu, case)
    step_and_compare(gpu, [case], groups)
    assert torch.equal(case.device["param"].cpu(), before)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_bad_gradient_changes_nothing(gpu, bad, dtype):
    """`bad` names the lowest tensor and in it the lowest element."""
    sizes = [300, 5000, 1, 2049, 4096]
    places = [
        [(1, 4999)],
        [(4, 0), (3, 2048), (3, 2047)],
        [(2, 0), (4, 4095)],
        [(1, 17), (1, 3000)],
    ]
    for where in places:
        cases = [new_case(n, "ratio", dtype, n) for n in sizes]
        for i, case in enumerate(cases):
            case.grad = random_gradient(case.param.numel(), i, dtype=dtype)
        for tensor, index in where:
            cases[tensor].grad[index] = bad
        for case in cases:
            upload(gpu, case)
        before = snapshot(cases)
        launch, word = make_launch(gpu, cases)
        gpu.call("adamw8_step", launch)
        gpu.wait()
        tensor, index = min(where)
        assert word.item() == tensor << 40 | index
        for old, case in zip(before, cases, strict=True):
            for name, value in old.items():
                assert torch.equal(
                    case.device[name].cpu().view(torch.uint8), value.view(torch.uint8)
                ), name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_bad_gradient_anywhere_in_a_piece(gpu, dtype):
    """Pieces of 2,048 elements in loads of 512 bytes a warp: the ends of each load."""
    case = new_case(3 * 2048 + 700, "float32", dtype)
    case.grad = torch.zeros_like(case.param)
    upload(gpu, case)
    launch, word = make_launch(gpu, [case])
    width = 512 // case.grad.element_size()
    for index in (2048 + load + end for load in range(0, 2048, width) for end in (0, width - 1)):
        set_gradient(gpu, case, torch.zeros_like(case.param))
        case.device["grad"][index] = (math.nan, -math.inf)[index % 2]
        gpu.call("adamw8_step", launch)
        gpu.wait()
        assert word.item() == index


def test_a_bad_gradient_at_unaligned_addresses(gpu):
    case = new_case(3000, "ratio", torch.bfloat16)
    case.grad = random_gradient(3000, 0, dtype=torch.bfloat16)
    case.grad[2500] = math.nan
    upload(gpu, case, shift=1)
    launch, word = make_launch(gpu, [case])
    gpu.call("adamw8_step", launch)
    gpu.wait()
    assert word.item() == 2500


@pytest.mark.parametrize("tensor", [1, 840])
def test_bad_names_the_tensor_of_the_whole_step(gpu, tensor):
    """Behind an empty tensor, and in the second batch."""
    cases = [new_case(0 if i == 0 else 2, "float32") for i in range(tensor + 2)]
    for case in cases:
        case.grad = torch.zeros_like(case.param)
    cases[tensor].grad[1] = math.nan
    for case in cases:
        upload(gpu, case)
    launch, word = make_launch(gpu, cases)
    gpu.call("adamw8_step", launch)
    gpu.wait()
    assert word.item() == tensor << 40 | 1


def test_the_largest_finite_gradients_are_good(gpu):
    """Exponents next to all ones, in every position of a word."""
    for dtype in FLOATS:
        case = new_case(4096, "float32", dtype)
        largest = torch.finfo(dtype).max
        case.grad = torch.tensor([largest, -largest] * 2048).to(dtype)
        upload(gpu, case)
        launch, word = make_launch(gpu, [case])
        gpu.call("adamw8_step", launch)
        gpu.wait()
        assert word.item() == -1


def test_no_operation_is_fused(built):
    """The contract rounds every operation; the flag that keeps it so is in the build as well."""
    (update,) = [each for each in built if each.source.name == "adamw8_update_sm80.cu"]
    for path in update.ptx.values():
        loose = r"\bfma\.|\bmad\.rn|\b(mul|add|sub)\.f(32|64)"  # without .rn ptxas may fuse
        assert not re.search(loose, path.read_text())
    cmake = re.sub(r"#[^\n]*", "", (CUDA / "CMakeLists.txt").read_text())
    assert re.search(r"adamw8_update_sm80\.cu[^)]*-fmad=false", cmake), "cuda/CMakeLists.txt"


# --- the host's part ------------------------------------------------------------------------------


@pytest.fixture(params=ARCHS)
def crowded(request, fake):
    """One multiprocessor and 61 tensors of 1,000 blocks in all: blocks of threads own parts of
    several tensors, and their warps take several turns."""
    gpu = fake(request.param)
    gpu.runtime.attributes["multiProcessorCount"] = 1
    sizes = [1 + 137 * i % 1500 for i in range(60)]
    cases = [new_case(n, ENCODINGS[i % 3], FLOATS[i % 3], seed=i) for i, n in enumerate(sizes)]
    cases.insert(31, new_case(200_000, "float32", torch.bfloat16, seed=99))
    for i, case in enumerate(cases):
        case.grad = random_gradient(case.param.numel(), i, dtype=case.param.dtype)
        upload(gpu, case)
    return gpu, cases


def test_more_blocks_than_warps(crowded):
    gpu, cases = crowded
    step_and_compare(gpu, cases)
    grids = {each.kernel: each.grid[0] for each in gpu.runtime.launches}
    assert sorted(grids.values()) == [1, 1, 2, 4]


def test_the_first_of_many_bad_gradients(crowded):
    """Whichever warp finds it: tensor first, then element."""
    gpu, cases = crowded
    launch, word = make_launch(gpu, cases)
    far = [(60, 3), (46, 100), (31, 199_999), (31, 150_000), (31, 77_777), (31, 4097), (7, 958)]
    for tensor, index in far:
        cases[tensor].device["grad"][index] = math.nan
        gpu.call("adamw8_step", launch)
        assert word.item() == tensor << 40 | index


def test_one_launch_a_phase_and_nothing_waits(fake):
    """300 tensors: four launches, on the caller's stream; no call that a CUDA graph refuses."""
    gpu = fake()
    stream = 0x1230
    gpu.runtime.handles[stream] = "stream"
    cases = [new_case(40, "ratio", seed=i) for i in range(300)]
    for i, case in enumerate(cases):
        case.grad = random_gradient(40, i)
        upload(gpu, case)
    launch, bad = make_launch(gpu, cases)
    gpu.call("adamw8_step", launch, stream=stream)
    cpu_step(cases)
    assert bad.item() == -1
    for case in cases:
        assert_same(case)
    assert not SYNCHRONISING & {call.name for call in gpu.runtime.log}
    kernels = [each.kernel for each in gpu.runtime.launches]
    assert len(kernels) == 4 and all(each.stream == stream for each in gpu.runtime.launches)
    phases = ("clear_bad", "check_gradients", "update", "count_step")
    assert all(name in kernel for name, kernel in zip(phases, kernels, strict=True))


def test_batches_by_tensors_and_by_groups(fake):
    """More tensors than a batch of any phase but the last holds, more groups than a batch holds."""
    gpu = fake(checks=False)
    groups = [(1e-3 * (1 + i), 0.9, 0.99, 1e-8, 0.0, False) for i in range(101)]
    cases = [new_case(3, "ratio", seed=i, group=i % 101) for i in range(850)]
    for i, case in enumerate(cases):
        case.grad = random_gradient(3, i)
        upload(gpu, case)
    launch, bad = make_launch(gpu, cases, groups)
    gpu.call("adamw8_step", launch)
    cpu_step(cases, groups)
    assert bad.item() == -1
    for case in cases:
        assert_same(case)
    count = {
        name: sum(name in each.kernel for each in gpu.runtime.launches)
        for name in ("check_gradients", "update", "count_step")
    }
    assert count == {"check_gradients": 2, "update": math.ceil(850 / 45), "count_step": 1}


def test_a_full_batch_of_tensors(fake):
    gpu = fake(checks=False)
    cases = [new_case(2, "float32", seed=i) for i in range(381)]
    for i, case in enumerate(cases):
        case.grad = random_gradient(2, i)
        upload(gpu, case)
    launch, _ = make_launch(gpu, cases)
    gpu.call("adamw8_step", launch)
    cpu_step(cases)
    for case in cases:
        assert_same(case)
    assert sum("update" in each.kernel for each in gpu.runtime.launches) == 2


def test_no_tensors(fake):
    gpu = fake()
    launch, bad = make_launch(gpu, [])
    gpu.call("adamw8_step", launch)
    assert bad.item() == -1


def test_a_refused_launch_is_a_sentence(fake):
    gpu = fake()
    case = new_case(10)
    case.grad = torch.zeros(10)
    upload(gpu, case)
    launch, _ = make_launch(gpu, [case], DEFAULT_GROUPS)
    gpu.runtime.fail_next("cudaLaunchKernel", 209)
    with pytest.raises(RuntimeError, match=r"^adamw8: clear_bad: .*no kernel image"):
        gpu.call("adamw8_step", launch)
    gpu.call("adamw8_step", launch)  # the error is not remembered
