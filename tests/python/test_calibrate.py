"""Calibrated weights: against GPTQ in float64, against absmax, in stock bitsandbytes."""

import bitsandbytes
import pytest
import torch

import halfbyte
from formats import FLOATS, levels_of, name_of, same_bits
from halfbyte import calibrate, checkpoint
from halfbyte._native import _C
from halfbyte.calibrate import InputMoments, quantize_calibrated

ops = torch.ops.halfbyte
SHAPES = [(6, 96, 32), (5, 64, 64), (7, 40, 64), (3, 71, 32), (1, 1, 32)]  # N, K, block
BY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(scope="module", autouse=True)
def eager():
    """bitsandbytes compiles its fallbacks; the plain ones are what is compared."""
    with torch.compiler.set_stance("force_eager"):
        yield


def case(n: int, k: int, seed: int = 0, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight [n, k], moments [k, k] of inputs that hang together and differ in size)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) / 10
    x = torch.randn(3 * k, k, generator=generator) @ torch.randn(k, k, generator=generator)
    x *= torch.exp(torch.randn(k, generator=generator))
    return weight.to(dtype), x.T @ x / len(x)


def damage(weight: torch.Tensor, quantized: torch.Tensor, moments: torch.Tensor) -> float:
    error = weight.double() - quantized.double()
    return float(((error @ moments.double()) * error).sum())


def damped(moments: torch.Tensor, damping: float = calibrate.DAMPING) -> torch.Tensor:
    moments = moments.double()
    return moments + damping * moments.diagonal().mean() * torch.eye(len(moments))


def code_values(weight: halfbyte.NF4Weight) -> torch.Tensor:
    """Codes [N, K]."""
    flat = weight.packed.flatten()
    codes = torch.stack((flat >> 4, flat & 15), 1).flatten()[: weight.shape.numel()]
    return codes.view(weight.shape)


# --- scale search ---------------------------------------------------------------------------------


def block_damage(block, h, scale, levels) -> torch.Tensor:
    """Of each candidate `scale` [S], in float64, codes by nearness."""
    products = scale[:, None, None] * levels[None, None, :]
    errors = (block[None, :, None] - products).abs().amin(-1)
    return (h * errors**2).sum(-1)


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4"])
@BY_SHAPE
def test_scales_are_the_best_of_a_float64_search(shape, codebook):
    n, k, size = shape
    weight, moments = case(n, k)
    h = moments.diagonal()
    scales = ops.search_scales(weight, h, codebook, size)
    levels = levels_of(codebook).double()
    grid = torch.arange(0.5, 1.14, 1 / 32, dtype=torch.float64)
    grid = torch.cat((grid, -grid, torch.ones(1)))
    flat, each_h = weight.flatten().double(), h.double().repeat(n)
    for b, scale in enumerate(scales.double()):
        part = slice(b * size, (b + 1) * size)
        absmax = flat[part].abs().max()
        found = block_damage(flat[part], each_h[part], scale[None], levels)
        best = block_damage(flat[part], each_h[part], absmax * grid, levels).min()
        assert found <= best * (1 + 1e-5) + 1e-12, b


def test_search_forces_its_variants(monkeypatch):
    weight, moments = case(9, 70)
    results = []
    for name, why_not, _ in _C.search_scales_variants():
        if not why_not:
            monkeypatch.setenv("HALFBYTE_FORCE_VARIANT", name)
            results.append(quantize_calibrated(weight, moments))
    assert len(results) > 1
    for other in results[1:]:
        assert same_bits(other.packed, results[0].packed)
        assert same_bits(other.absmax, results[0].absmax)


# --- error feedback -------------------------------------------------------------------------------


@BY_SHAPE
def test_codes_are_those_of_gptq_in_float64(shape):
    """Column by column through the Cholesky factor of the inverse, the way GPTQ is published; where
    the target lies between two levels within rounding, either code will do."""
    n, k, size = shape
    weight, moments = case(n, k, seed=1)
    ours = quantize_calibrated(weight, moments, block_size=size, double_quant=False, sweeps=0)
    codes, levels = code_values(ours), levels_of("nf4").double()
    scales = ours.absmax.double().repeat_interleave(size)[: n * k].view(n, k)
    hessian = damped(moments)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    inverse = torch.linalg.inv(hessian[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    left = weight.double()[:, order].clone()
    for j, column in enumerate(order):
        products = scales[:, column, None] * levels
        gap = (left[:, j, None] - products).abs()
        chosen = products.gather(1, codes[:, column, None].long())[:, 0]
        tolerance = 1e-4 * scales[:, column].abs()
        assert ((left[:, j] - chosen).abs() <= gap.amin(1) + tolerance).all(), j
        error = (left[:, j] - chosen) / upper[j, j]
        left[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]


@pytest.mark.parametrize("double_quant", [True, False])
@BY_SHAPE
def test_feedback_and_sweeps_lower_the_damage(shape, double_quant):
    n, k, size = shape
    weight, moments = case(n, k, seed=2)
    full = damped(moments, 0.05)  # little, so that correlations count

    def of(moments, **options) -> float:
        options = {"block_size": size, "double_quant": double_quant, "damping": 0.05} | options
        made = quantize_calibrated(weight, moments, **options)
        return damage(weight, made.dequantize(torch.float32), full)

    plain = halfbyte.quantize_nf4(weight, size, double_quant).dequantize(torch.float32)
    fed_back = of(moments, sweeps=0)
    swept = [of(moments, sweeps=s) for s in (1, 2, 4)]
    assert fed_back <= damage(weight, plain, full) * 1.001
    for before, after in zip([fed_back, *swept], swept, strict=False):
        assert after <= before * (1 + 1e-5)
    if k > 8:
        diagonal = of(moments.diagonal())
        assert fed_back < 0.9 * diagonal and diagonal < damage(weight, plain, full)
        assert swept[-1] < fed_back


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4"])
def test_without_feedback_the_levels_are_the_nearest(codebook):
    weight, moments = case(5, 80)
    made = quantize_calibrated(weight, moments.diagonal(), block_size=32, codebook=codebook)
    levels = levels_of(codebook)
    error = (made.dequantize(torch.float32) - weight).abs()
    per_block = (
        ops.dequantize_4bit(
            torch.full_like(made.packed, 16 * 15 + 15), *made.op_args()[1:], [5, 80], torch.float32
        )
        / levels[15]
    )
    nearest = (per_block[..., None] * levels - weight[..., None]).abs().amin(-1)
    assert (error <= nearest + 1e-6).all()


def test_threads_and_shared_moments_make_the_same_bytes():
    weight, moments = case(100, 96)
    shared = InputMoments.from_moments(moments)
    one = quantize_calibrated(weight, shared)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        other = quantize_calibrated(weight, shared)
    finally:
        torch.set_num_threads(threads)
    assert same_bits(one.packed, other.packed) and same_bits(one.absmax, other.absmax)


# --- the format -----------------------------------------------------------------------------------


BY_DTYPE = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
BY_SCALES = pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])


@BY_DTYPE
@BY_SCALES
@BY_SHAPE
def test_the_result_is_a_weight_like_any_other(shape, double_quant, dtype):
    n, k, size = shape
    weight, moments = case(n, k, dtype=dtype)
    made = quantize_calibrated(weight, moments, block_size=size, double_quant=double_quant)
    assert made.dtype == dtype and made.shape == weight.shape
    assert made.double_quant == double_quant and made.block_size == size
    plain = halfbyte.quantize_nf4(weight, size, double_quant)
    assert {name: (t.dtype, t.shape) for name, t in made.tensors().items()} == {
        name: (t.dtype, t.shape) for name, t in plain.tensors().items()
    }
    back = checkpoint.from_entries(checkpoint.to_entries(made, "layer.weight"), "layer.weight")
    assert same_bits(back.packed.flatten(), made.packed) and same_bits(back.absmax, made.absmax)
    assert same_bits(back.dequantize(), made.dequantize())


@BY_DTYPE
@BY_SCALES
@pytest.mark.parametrize("shape", [(24, 256, 64), (5, 64, 64), (4, 256, 128)], ids=str)
def test_stock_bitsandbytes_reads_it_alike(shape, double_quant, dtype):
    n, k, size = shape
    weight, moments = case(n, k, dtype=dtype)
    made = quantize_calibrated(weight, moments, block_size=size, double_quant=double_quant)
    entries = checkpoint.to_entries(made, "weight")
    packed = entries.pop("weight")
    statistics = {key.removeprefix("weight."): t.clone() for key, t in entries.items()}
    theirs = bitsandbytes.nn.Params4bit.from_prequantized(packed, statistics, device="cpu")
    dense = bitsandbytes.functional.dequantize_4bit(theirs.data, theirs.quant_state)
    assert torch.equal(dense, made.dequantize())
    assert (ops.search_scales(weight, moments.diagonal(), "nf4", size) < 0).any()


def test_an_odd_count_is_padded_with_the_code_of_zero():
    for codebook in ("nf4", "fp4", "int4"):
        weight, moments = case(3, 71)
        made = quantize_calibrated(weight, moments, codebook=codebook)
        plain = halfbyte.quantize_4bit(weight, codebook)
        assert made.packed[-1] & 15 == plain.packed[-1] & 15


def test_inputs_that_never_came_leave_plain_nearness():
    weight, _ = case(4, 64)
    made = quantize_calibrated(weight, torch.zeros(64, 64), double_quant=False)
    plain = halfbyte.quantize_nf4(weight, double_quant=False)
    identity = torch.eye(64)
    assert damage(weight, made.dequantize(), identity) < damage(
        weight, plain.dequantize(), identity
    )


def test_a_block_of_zeros_stays_zero():
    weight, moments = case(2, 64)
    weight[1] = 0
    for double_quant in (True, False):
        made = quantize_calibrated(weight, moments, double_quant=double_quant)
        assert (made.dequantize()[1] == 0).all()


# --- what is refused ------------------------------------------------------------------------------


def test_bad_input_is_named():
    weight, moments = case(4, 64)

    def message(weight=weight, moments=moments, **options) -> str:
        with pytest.raises(ValueError) as caught:
            quantize_calibrated(weight, moments, **options)
        return str(caught.value)

    def with_value(tensor, index, value):
        changed = tensor.clone()
        changed.view(-1)[index] = value
        return changed

    nan, inf = float("nan"), float("inf")
    assert message(with_value(weight, 70, nan)) == (
        "weight: expected finite values, got nan at index 70"
    )
    assert "got -inf at index 3" in message(with_value(weight, 3, -inf))
    assert message(moments=with_value(moments, 65, nan)) == (
        "moments: expected finite values, got nan at index 65"
    )
    assert "got inf at index 64" in message(moments=with_value(moments, 64, inf))
    assert "diagonal of at least 0" in message(moments=-torch.eye(64))
    indefinite = torch.eye(64)
    indefinite[0, 1] = indefinite[1, 0] = 3
    assert "positive semidefinite" in message(moments=indefinite)
    assert "expected [K, K] or [K], got [64, 63]" in message(moments=moments[:, :63])
    assert "expected K = 64 as the weight has, got 63" in message(moments=moments[:63, :63])
    assert "weight: expected float32" in message(weight.double())
    assert "weight: expected float32" in message(weight[0])
    assert "block_size: expected a power of two" in message(block_size=48)
    assert "codebook: expected nf4" in message(codebook="nf3")
    assert "sweeps: expected 0 or more" in message(sweeps=-1)
    assert "damping: expected a positive number" in message(damping=0.0)


def test_the_weight_and_the_moments_are_left_as_they_are():
    weight, moments = case(4, 64)
    before = weight.clone(), moments.clone()
    quantize_calibrated(weight, moments)
    assert same_bits(weight, before[0]) and same_bits(moments, before[1])
