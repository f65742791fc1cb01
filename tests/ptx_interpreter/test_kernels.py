"""Kernels compiled by nvcc, by both code generators, against numpy; and faults in them."""

import numpy as np
import pytest
import torch

from . import (
    InFlightAccess,
    OutOfBounds,
    SharedRace,
    UninitialisedRead,
    launch,
)
from .conftest import line_of
from .mutate import hunt, mutations

CODE = ((np.arange(16) - 7.5) / 7.5).astype(np.float32)


def gemm_case(m: int, n: int, k: int, seed: int = 0):
    torch.manual_seed(seed)
    a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    exact = a.double() @ b.double().T
    # One rounding of the accumulator for each of the k / 16 products.
    bound = k / 16 * 2.0**-24 * (a.double().abs() @ b.double().abs().T)
    return a, b, exact, bound


def run_gemm(module, case, **options):
    a, b, exact, bound = case
    c = torch.full(exact.shape, float("nan"))
    grid = (exact.shape[1] // 64, exact.shape[0] // 64)
    report = launch(
        module, "gemm_bf16", grid, 128, [a, b, c, exact.shape[1], a.shape[1]], **options
    )
    assert ((c - exact).abs() <= bound).all()
    return report


@pytest.mark.parametrize("m, n, k", [(64, 64, 32), (64, 64, 128), (128, 192, 96)])
def test_gemm(gemm, m, n, k):
    report = run_gemm(gemm, gemm_case(m, n, k))
    assert report.counters.mma == m // 64 * (n // 64) * 4 * 8 * k // 16
    copied = 2 * (m // 64) * (n // 64) * 64 * k * 2
    assert report.counters.global_read.bytes == copied
    assert report.counters.global_read.sectors * 32 == copied
    assert report.counters.global_written.bytes == m * n * 4
    ldmatrix = [i.line for i in gemm.program("gemm").entry.instructions if i.opcode == "ldmatrix"]
    assert not set(ldmatrix) & set(report.counters.conflicts_by_line)


def test_gemm_is_fast_enough(gemm):
    case = gemm_case(64, 64, 128)
    run_gemm(gemm, case)
    seconds = min(run_gemm(gemm, case).seconds for _ in range(3))
    assert seconds < 1.0  # 0.02 s on two idle cores


def dequantize_case(count: int):
    random = np.random.default_rng(1)
    packed = random.integers(0, 256, count // 2, dtype=np.uint8)
    absmax = random.uniform(0.1, 3, -(-count // 64)).astype(np.float32)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    exact = torch.from_numpy(CODE[codes] * np.repeat(absmax, 64)[:count]).bfloat16()
    return packed, absmax, exact


@pytest.mark.parametrize("count", [2, 64, 130, 4096])
def test_dequantize(elementwise, count):
    packed, absmax, exact = dequantize_case(count)
    values = torch.full((count,), float("nan"), dtype=torch.bfloat16)
    blocks = -(-count // 2 // 128)
    report = launch(elementwise, "dequantize", blocks, 128, [packed, absmax, values, count])
    assert torch.equal(values, exact)
    assert report.counters.global_written.bytes == 2 * count


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
def test_block_sum(elementwise, count):
    values = np.random.default_rng(2).integers(-100, 100, count).astype(np.float32)
    sums = np.full(-(-count // 256), np.nan, np.float32)
    launch(elementwise, "block_sum", len(sums), 256, [values, sums, count])
    padded = np.pad(values, (0, -count % 256)).reshape(-1, 256)
    assert np.array_equal(sums, padded.sum(axis=1))


def adamw_reference(w, m, v, g, lr, beta1, beta2, epsilon, decay):
    """The kernel's roundings; fma by float64, which rounds twice only on rare ties."""
    f = np.float32
    fma = lambda a, b, c: (a.astype(np.float64) * b + c).astype(f)  # noqa: E731
    m = fma(m, f(beta1), (f(1) - f(beta1)) * g)
    v = fma(v, f(beta2), (f(1) - f(beta2)) * g * g)
    decayed = w * fma(np.array(-f(lr)), f(decay), f(1))
    return fma(m / (np.sqrt(v) + f(epsilon)), -f(lr), decayed), m, v


def test_adamw_bit_for_bit(elementwise):
    count, options = 3000, (1e-3, 0.9, 0.999, 1e-8, 0.1)
    random = np.random.default_rng(3)
    w, m, g = (random.standard_normal(count).astype(np.float32) for _ in range(3))
    v = np.abs(random.standard_normal(count)).astype(np.float32)
    expected = adamw_reference(w, m, v, g, *options)
    launch(elementwise, "adamw", 4, 128, [w, m, v, g, *options, count])
    for got, wanted in zip((w, m, v), expected, strict=True):
        assert np.array_equal(got, wanted)


def test_dynamic_shared_memory(elementwise):
    values, out = np.arange(256, dtype=np.float32), np.zeros(256, np.float32)
    launch(elementwise, "reverse_block", 2, 128, [values, out], shared_bytes=512)
    assert np.array_equal(out, values.reshape(2, 128)[:, ::-1].reshape(-1))
    with pytest.raises(OutOfBounds, match="shared memory"):
        launch(elementwise, "reverse_block", 2, 128, [values, out], shared_bytes=508)


def test_histogram(elementwise):
    octets = np.random.default_rng(4).integers(0, 256, 5000, dtype=np.uint8)
    counts = np.zeros(256, np.uint32)
    report = launch(elementwise, "histogram", 3, 128, [octets, counts, len(octets)])
    assert np.array_equal(counts, np.bincount(octets, minlength=256))
    assert any("atom" in name for name in report.counters.instructions)


def test_off_by_one_bounds(elementwise):
    count = 1000
    values, sums = np.zeros(count, np.float32), np.zeros(4, np.float32)
    with pytest.raises(OutOfBounds, match=r"float32\[1000\]") as caught:
        launch(elementwise, "block_sum", 4, 256, [values, sums, count + 1])
    assert f"elementwise.cu:{line_of('elementwise.cu', '? values[i] :')}" in str(caught.value)
    packed, absmax, _ = dequantize_case(128)
    with pytest.raises(OutOfBounds, match="absmax|argument 1"):
        launch(
            elementwise, "dequantize", 1, 128,
            [packed, absmax[:1], torch.zeros(128, dtype=torch.bfloat16), 128],
        )  # fmt: skip


def test_every_dropped_barrier_wait_and_commit_dies(gemm):
    case = gemm_case(64, 64, 96)
    outcome = hunt(gemm, "gemm_bf16", lambda module: run_gemm(module, case), kinds={"drop"})
    assert not outcome.survived and len(outcome.killed) == 6  # 2 barriers, 2 commits, 2 waits
    kinds = {message.split(":")[0] for _, message in outcome.killed}
    assert kinds == {InFlightAccess.__name__, SharedRace.__name__}


def test_dropped_barriers_of_the_other_kernels(elementwise):
    values, out = np.arange(256, dtype=np.float32), np.zeros(256, np.float32)
    octets, counts = np.zeros(500, np.uint8), np.zeros(256, np.uint32)
    runs = {
        "block_sum": lambda m: launch(m, "block_sum", 1, 256, [values, out, 256]),
        "reverse_block": lambda m: launch(
            m, "reverse_block", 2, 128, [values, out], shared_bytes=512
        ),
        "histogram": lambda m: launch(m, "histogram", 2, 128, [octets, counts, 500]),
    }
    for kernel, run in runs.items():
        outcome = hunt(elementwise, kernel, run, kinds={"drop"})
        assert outcome.killed and not outcome.survived, kernel
        for _, message in outcome.killed:
            assert message.startswith((SharedRace.__name__, UninitialisedRead.__name__)), message


def test_most_small_faults_in_the_gemm_are_noticed(gemm):
    case = gemm_case(64, 64, 96)
    lines = run_gemm(gemm, case).coverage.lines_run
    outcome = hunt(
        gemm, "gemm_bf16",
        lambda module: run_gemm(module, case, measure=False, step_limit=20_000),
        lines=lines, most=120,
    )  # fmt: skip
    assert outcome.score > 0.6, [each.description for each in outcome.survived]
    swapped = [m for m in mutations(gemm, "gemm_bf16", {"swap"}) if "st.global" in m.description]
    for mutation in swapped:
        with pytest.raises(AssertionError):
            run_gemm(mutation.module, case)
