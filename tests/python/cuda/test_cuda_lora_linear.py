"""The LoRA linear on CUDA: every kernel at awkward shapes within derived bounds, exactly where sums
are exact; what the main loops cost; what planted faults do.

Without a GPU: PTX executed by an interpreter; not run on a GPU.
"""

import ctypes as C
import random
import re
import shutil
from functools import partial

import pytest
import torch

import cuda_api as api
from lora_linear_cases import (
    BF16,
    CASES,
    FP16,
    FP32,
    RAGGED,
    Layer,
    assert_within,
    check_bounds,
    check_exact,
    forward,
    gradients,
    kernels,
)

SOURCES = sorted((api.CUDA / "lora_linear").glob("*.cu"))


@pytest.fixture(scope="module")
def interpreted(built, fake_library, tmp_path_factory):
    """The library in the interpreter, on a card too: for counts and planted faults."""
    copy = tmp_path_factory.mktemp("lora_linear") / "library.so"
    shutil.copy(fake_library, copy)
    gpu = api.Interpreted(built, "compute_80", copy)
    yield gpu
    gpu.runtime.close()


@pytest.mark.parametrize("case", CASES)
def test_within_derived_bounds(gpu, case):
    forward_kernel, backward_kernel, shape, options = CASES[case]
    kernels(gpu)
    ran = check_bounds(gpu, Layer(*shape, **options), forward_kernel == "few_rows")
    assert ran is None or {forward_kernel, backward_kernel} <= set(ran)
    assert ran is None or "split" not in case or "sum_partials" in ran


@pytest.mark.parametrize("case", CASES)
def test_exact_values_come_out_exactly(gpu, case):
    """One wrong nibble, scale, mask bit or place shows, whatever the size of the sum."""
    _, _, shape, options = CASES[case]
    options = {**options, "p": 0.5 if options.get("p") else 0.0}
    check_exact(gpu, Layer(*shape, **options, exact=True))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_dropout_mask_is_the_cpus(gpu, dtype, p):
    """Every single mask bit shows: in T through one-hot rows of A, in dX where W is 0, in dA
    through ones."""
    M, N, K, R = 33, 8, 64, 64
    layer = Layer(M, N, K, R, dtype, double=False, p=p, scaling=1.0, bias=False, seed=11)
    layer.absmax.zero_()
    layer.x, layer.a = torch.ones(M, K, dtype=dtype), torch.eye(R, K)
    layer.dy, layer.b = torch.ones(M, N, dtype=dtype), torch.ones(N, R) / N
    weight = (layer.packed, layer.absmax, None, None, "nf4", None, None, 64)
    _, mask = torch.ops.halfbyte.lora_linear(
        layer.x, *weight, N, None, torch.eye(K), torch.ones(N, K), 1.0, p, layer.seed
    )
    mask = mask.double()
    assert torch.equal(mask, layer.mask())
    assert p == 1.0 or 0.4 < (mask == 0).double().mean() < 0.6
    y, t = forward(gpu, layer)
    assert torch.equal(t.double(), mask[:, :R])
    got = gradients(gpu, layer, t)
    assert torch.equal(got["dx"].double(), mask)
    assert torch.equal(got["d_lora_a"].double(), mask.sum(0).expand(R, K))
    assert torch.equal(got["d_bias"], torch.full((N,), float(M)))


HASHED = [(BF16, 64), (BF16, 33), (FP32, 64)]


@pytest.mark.parametrize(("dtype", "K"), HASHED, ids=str)
def test_hashes_beside_the_threshold(gpu, dtype, K):
    """Thresholds that are an element's hash, which is kept, or one more, when it is dropped: one
    wrong bit of a hash shows half of the times. W is 0 and R is K: T is the mask."""
    layer = Layer(19, 8, K, K, dtype, double=False, p=0.5, scaling=1.0, bias=False, seed=5)
    layer.absmax.zero_()
    layer.x, layer.a = torch.ones(19, K, dtype=dtype), torch.eye(K)
    layer.dy, layer.b = torch.ones(19, 8, dtype=dtype), torch.ones(8, K) / 8
    hashes = layer.hashes()
    for row, column, more in (
        (0, 1, 0),
        (3, 2, 1),
        (12, 31, 0),
        (18, 7, 1),
        (9, 24, 0),
        (10, 5, 1),
    ):
        layer.p = (int(hashes[row, column]) + more) / 2**32
        mask = layer.mask()
        assert (mask[row, column] == 0) == bool(more)
        _, t = forward(gpu, layer)
        assert torch.equal(t.double(), mask)
        got = gradients(gpu, layer, t)
        assert torch.equal(got["dx"], mask.to(dtype))
        assert torch.equal(got["d_lora_a"] != 0, (mask != 0).any(0).expand(K, K))


@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_ragged_ends_exactly(gpu, case, monkeypatch):
    variant, shape, options = case
    if variant:
        monkeypatch.setenv("HALFBYTE_FORCE_VARIANT", f"lora_linear:{variant}")
    check_exact(gpu, Layer(*shape, **options, p=0.5, exact=True))


def test_a_dropped_value_may_be_anything(gpu):
    layer = Layer(17, 8, 64, 2, p=0.5, bias=False, scaling=1.0)
    layer.x[layer.mask() == 0] = torch.inf
    _, t = forward(gpu, layer)
    assert t.isfinite().all()


@pytest.mark.parametrize("case", ["mma, split forward", "mma, split backward", "16 rows, split"])
def test_same_bits_twice(gpu, case):
    _, _, shape, options = CASES[case]
    layer = Layer(*shape, **options)
    first, t = forward(gpu, layer)
    assert torch.equal(first, forward(gpu, layer)[0])
    once, again = gradients(gpu, layer, t), gradients(gpu, layer, t)
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_no_rows(gpu):
    """Nothing to do forward; gradients are sums over nothing."""
    layer = Layer(0, 8, 64, 2)
    forward(gpu, layer)
    got = gradients(gpu, layer, torch.empty(0, 2), dx=False)
    assert all((gradient == 0).all() for gradient in got.values())


# --- the host's side ------------------------------------------------------------------------------


def test_a_call_launches_and_nothing_else(interpreted):
    """No allocation, no wait, no copy, and the caller's stream: a CUDA graph can hold it."""
    runtime, stream = interpreted.runtime, 0x5EED
    runtime.handles[stream] = "stream"
    runtime.log.clear(), runtime.launches.clear()
    layer = Layer(20, 8, 640, 3, p=0.5)
    _, t = forward(interpreted, layer, stream)
    gradients(interpreted, layer, t, stream=stream)
    asked = {"cudaGetDeviceCount", "cudaDeviceGetAttribute", "cudaGetDevice", "cudaGetLastError"}
    assert {call.name for call in runtime.log} <= asked | {"cudaLaunchKernel"}
    assert {launch.stream for launch in runtime.launches} == {stream}


def test_variant_table(gpu):
    table, row = [], api.VariantRow()
    while gpu.api.variant(b"lora_linear", len(table), 0, C.byref(row)):
        table.append((row.name.decode(), row.why_not.decode(), row.chosen))
    assert table[-1][:2] == ("cuda_fma", "")
    assert [name for name, _, chosen in table if chosen] == ["cuda_mma"]
    assert all(why for _, why, _ in table[:3]), table


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", ["cuda_mma_any_shape", "cuda_fma", "cuda_few_rows_fma"])
def test_a_forced_variant_fits_where_it_says_so(gpu, name, dtype, monkeypatch):
    """W rounded to the type of the activations, whatever the kernel multiplies in."""
    monkeypatch.setenv("HALFBYTE_FORCE_VARIANT", f"lora_linear:{name}")
    layer = Layer(9, 16, 128, 3, dtype)
    if name != "cuda_few_rows_fma":
        check_bounds(gpu, layer, False)
        return
    y, t = forward(gpu, layer)
    assert_within("y", y, layer.expect_y(t, False))


# --- what the main loops cost ---------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["forward_sm80", "backward_sm80"])
def test_main_loops_meet_no_bank_conflicts(interpreted, kernel):
    """Stated bounds: 1 % of the wavefronts (the look-up of a scale's code in the dynamic map); two
    wavefronts an mma; codes and activations read once by a tile."""
    interpreted.runtime.measure = True
    interpreted.runtime.launches.clear()
    if kernel == "backward_sm80":
        gradients(interpreted, Layer(128, 512, 128))
    else:
        forward(interpreted, Layer(128, 128, 512))
    interpreted.runtime.measure = False
    (launch,) = (each for each in interpreted.runtime.launches if kernel in each.kernel)
    counters = launch.report.counters
    assert counters.mma == 128 * 128 * 512 // (16 * 8 * 16)
    assert counters.shared_conflicts <= 0.01 * counters.shared_wavefronts
    assert counters.shared_wavefronts <= 2.2 * counters.mma
    codes, activations = 128 * 512 // 2, 128 * 512 * 2
    assert counters.global_read.bytes <= 1.1 * (codes + activations)


# --- seeded faults ------------------------------------------------------------------------------

FAULTY = {  # M, N, K, R, dtype: most of a tile in use, and some of it not
    "forward_sm80": (63, 120, 320, 33, BF16),
    "backward_sm80": (63, 320, 128, 33, BF16),
    "few_rows": (7, 23, 3904, 3, BF16),
    "few_rows_fma": (3, 5, 265, 3, FP32),
    "any_shape": (61, 59, 65, 33, BF16),
    "fp32": (61, 59, 40, 33, FP32),
    "skinny": (61, 9, 72, 43, FP32),
    "skinny_mma": (61, 9, 168, 43, BF16),
    "column_sum": (61, 33, 72, 0, BF16),
}


def plant(gpu, kernel: str, kinds: set[str], most: int | None = None):
    """(how many planted faults were noticed, descriptions of those that were not)."""
    from ptx_interpreter import PtxError
    from ptx_interpreter.mutate import mutations

    layer = Layer(*FAULTY[kernel], p=0.5, exact=True)
    backwards = kernel in ("backward_sm80", "column_sum")
    check = partial(check_exact, gpu, layer, forwards=not backwards, backwards=backwards)
    runtime, modules = gpu.runtime, gpu.runtime.modules
    runtime.launches.clear()
    check()
    wanted = re.compile(rf"lora_linear_{kernel}(I|E)")
    launches = [each for each in runtime.launches if wanted.search(each.kernel)]
    name = launches[0].kernel
    index = next(i for i, module in enumerate(modules) if name in module.kernels)
    executed = {
        line
        for each in launches
        for line, count in each.report.coverage.executed.items()
        if count and each.kernel == name
    }
    original, caught, missed = modules[index], 0, []
    planted = [each for each in mutations(original, name, kinds) if each.line in executed]
    if most is not None and len(planted) > most:
        planted = random.Random(0).sample(planted, most)
    for mutation in planted:
        modules[index] = mutation.module
        try:
            check()
            missed.append(mutation.description)
        except (AssertionError, PtxError):
            caught += 1
            runtime.errors.clear()
        finally:
            modules[index] = original
    return caught, missed


@pytest.mark.parametrize("kernel", FAULTY)
def test_every_dropped_barrier_wait_and_commit_is_noticed(interpreted, kernel):
    caught, missed = plant(interpreted, kernel, {"drop"})
    assert caught > 0 and not missed, missed


@pytest.mark.parametrize("kernel", ["forward_sm80", "backward_sm80", "few_rows", "skinny_mma"])
def test_most_other_faults_are_noticed(interpreted, kernel):
    """A sample. What survives is mostly equivalent: the guard of a partial last store, a bound that
    a later check repeats, bits of the mixer below those that p = 0.5 looks at."""
    caught, missed = plant(interpreted, kernel, {"swap", "immediate", "offset"}, most=16)
    assert caught >= 10, missed
