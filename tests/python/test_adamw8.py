"""The native AdamW step: the contract bit for bit, every variant, distance to fp32 AdamW."""

import math

import pytest
import torch

from halfbyte._native import _C
from halfbyte.optim import AdamW8bit
from optim_cases import DTYPES, parameters, set_gradients, train

VARIANTS = [name for name, why_not, _ in _C.adamw8_variants() if not why_not]
SIZES = [1, 255, 256, 257, 4095, 4096, 4097, 70000]
BLOCK = 256


def dynamic_map(signed: bool) -> torch.Tensor:
    """The 256 values by their definition, in fp32 (format: the 8-bit dynamic map)."""
    values = [torch.zeros(1), torch.ones(1)]
    for i in range(7):
        points = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        part = (points[:-1] + points[1:]) / 2.0 * 10.0 ** (i - 6)
        values += [part, -part] if signed else [part]
    return torch.cat(values).sort().values


MAPS = {signed: dynamic_map(signed) for signed in (False, True)}
MIDDLES = {signed: (m[:-1].double() + m[1:].double()) / 2 for signed, m in MAPS.items()}


def encode(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, absmax) of flat fp32 `values`: the nearest code, non-zero unsigned never code 0."""
    blocks = -(-values.numel() // BLOCK)
    padded = torch.zeros(blocks * BLOCK)
    padded[: values.numel()] = values
    absmax = padded.view(blocks, BLOCK).abs().amax(1)
    inverse = torch.where(absmax > 0, 1 / absmax, torch.zeros(()))
    x = values * inverse.repeat_interleave(BLOCK)[: values.numel()]
    codes = torch.bucketize(x.double(), MIDDLES[signed])  # a tie goes down
    if not signed:
        codes = torch.where(values > 0, codes.clamp(min=1), torch.zeros(()).long())
    return codes.to(torch.uint8), absmax


def decode(codes: torch.Tensor, absmax: torch.Tensor, signed: bool) -> torch.Tensor:
    scale = absmax.repeat_interleave(BLOCK)[: codes.numel()]
    return MAPS[signed][codes.flatten().long()] * scale


def contract_step(p, g, state, encoding, t, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, wd=1e-2):
    """One step in plain torch fp32, operation for operation. Returns the new parameter."""

    def scalar(value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float64).float()

    beta1, beta2 = betas
    shape, dtype = p.shape, p.dtype
    p, g = p.detach().flatten().float(), g.flatten().float()
    if encoding == "float32":
        m, v = state["exp_avg"].flatten(), state["exp_avg_sq"].flatten()
    else:
        m = decode(state["exp_avg"], state["exp_avg_absmax"], signed=True)
        v = decode(state["exp_avg_sq"], state["exp_avg_sq_absmax"], signed=False)
        if encoding == "ratio":
            m, v = m * v, v * v
    m = scalar(beta1) * m + scalar(1 - beta1) * g
    v = scalar(beta2) * v + scalar(1 - beta2) * g * g
    s = v.double().sqrt().float()  # correctly rounded, which torch.sqrt on fp32 is not
    d = s * scalar(1 / math.sqrt(1 - beta2**t)) + scalar(eps)
    p = p * scalar(1 - lr * wd) - scalar(lr / (1 - beta1**t)) * (m / d)
    if encoding == "float32":
        state["exp_avg"], state["exp_avg_sq"] = m.view(shape), v.view(shape)
    else:
        if encoding == "ratio":
            m, v = torch.where(s > 0, m / s, torch.zeros(())), s
        for name, value, signed in (("exp_avg", m, True), ("exp_avg_sq", v, False)):
            codes, state[f"{name}_absmax"] = encode(value, signed)
            state[name] = codes.view(shape)
    return p.view(shape).to(dtype)


@pytest.fixture(params=VARIANTS)
def variant(request, monkeypatch):
    monkeypatch.setenv("HALFBYTE_FORCE_VARIANT", f"adamw8:{request.param}")
    return request.param


@pytest.mark.parametrize("encoding", ["ratio", "moments", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_is_the_contract_bit_for_bit(variant, dtype, encoding):
    params = parameters(*SIZES, (33, 17), (), dtype=dtype)
    coded = encoding != "float32"
    optimizer = AdamW8bit(
        params, state=encoding if coded else "ratio", min_8bit_size=0 if coded else 1 << 30
    )
    expected = [param.detach().clone() for param in params]
    states = None
    for t in range(1, 5):
        set_gradients(params, t)
        optimizer.step()
        if states is None:  # all zero
            states = [
                {name: torch.zeros_like(value) for name, value in optimizer.state[p].items()}
                for p in params
            ]
            for state in states:
                if coded:
                    state["exp_avg"].fill_(127)
        for i, param in enumerate(params):
            expected[i] = contract_step(expected[i], param.grad, states[i], encoding, t)
            assert torch.equal(param, expected[i]), (i, t)
            for name, value in optimizer.state[param].items():
                wanted = torch.tensor(float(t)) if name == "step" else states[i][name]
                assert torch.equal(value, wanted), (i, t, name)


@pytest.mark.parametrize("encoding", ["ratio", "moments"])
def test_unaligned_parameters_and_gradients(variant, encoding):
    whole = parameters(9001, 5001)
    loose = []
    for param in whole:
        room = torch.full((param.numel() + 3,), float("nan"))
        room[1:-2] = param.detach()
        loose.append(room[1:-2].requires_grad_())
    ours = AdamW8bit(whole, state=encoding), AdamW8bit(loose, state=encoding)
    for t in range(3):
        set_gradients(whole, t)
        for param, other in zip(whole, loose, strict=True):
            room = torch.full((param.numel() + 5,), float("nan"))
            room[3:-2] = param.grad
            other.grad = room[3:-2]
        for optimizer in ours:
            optimizer.step()
    for param, other in zip(whole, loose, strict=True):
        assert torch.equal(param, other)


# Distance to fp32 AdamW after 200 steps, as a share of the distance travelled from the start.
# Coordinate i draws a scale exp(sigma z_i) once and a gradient scale_i * N(0, 1) a step; no decay.
DISTANCES = {
    "ratio": (0.023, 0.051, 0.101, 0.205),
    "moments": (0.023, 0.089, 0.349, 0.682),
}


@pytest.mark.parametrize("sigma", range(4))
@pytest.mark.parametrize("encoding", DISTANCES)
def test_distance_to_fp32_adamw(encoding, sigma):
    generator = torch.Generator().manual_seed(sigma)
    scale = torch.exp(sigma * torch.randn(1 << 17, generator=generator))
    ours, exact = (torch.zeros(1 << 17).requires_grad_() for _ in range(2))
    optimizers = (
        AdamW8bit([ours], weight_decay=0, state=encoding),
        torch.optim.AdamW([exact], weight_decay=0),
    )
    for _ in range(200):
        ours.grad = exact.grad = scale * torch.randn(scale.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    share = ((ours - exact).norm() / exact.norm()).item()
    assert share == pytest.approx(DISTANCES[encoding][sigma], rel=0.1)


def test_fp32_moments_follow_torch():
    ours, exact = parameters(1000, (30, 40)), parameters(1000, (30, 40))
    options = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "maximize": True}
    optimizers = AdamW8bit(ours, **options), torch.optim.AdamW(exact, **options)
    for t in range(100):
        set_gradients(ours, t)
        set_gradients(exact, t)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_first_step_follows_torch():
    """From zero state the step uses exact moments, whatever the encoding."""
    for encoding in DISTANCES:
        ours, exact = parameters(5000), parameters(5000)
        for params, kind in ((ours, AdamW8bit), (exact, torch.optim.AdamW)):
            set_gradients(params, 0)
            kind(params, **({"state": encoding} if kind is AdamW8bit else {})).step()
        torch.testing.assert_close(ours[0], exact[0], rtol=1e-6, atol=1e-7)


def test_state_is_two_bytes_a_parameter():
    (param,) = params = parameters((256, 128))
    optimizer = AdamW8bit(params)
    train(optimizer, params, 1)
    state = optimizer.state[param]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
    size = sum(value.nbytes for name, value in state.items() if name != "step")
    assert size / param.numel() == 2 + 8 / 256
    (small,) = params = parameters(4095)
    optimizer = AdamW8bit(params)
    train(optimizer, params, 1)
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("encoding", ["ratio", "moments"])
def test_zero_gradient_leaves_parameters_still(encoding):
    params = parameters(5000, 100)
    before = [param.detach().clone() for param in params]
    optimizer = AdamW8bit(params, weight_decay=0, state=encoding)
    for _ in range(5):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param, old)
    optimizer.param_groups[0].update(weight_decay=0.1, lr=0.5)
    optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param, old * 0.95)


def test_thread_count_changes_nothing():
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            params = parameters(70000, 300, (77, 99), 20000)
            train(AdamW8bit(params), params, 3)
            results.append([param.detach().clone() for param in params])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
