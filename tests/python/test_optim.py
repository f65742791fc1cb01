"""AdamW8bit against torch: the contract bit for bit, distance to fp32 AdamW, torch semantics."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from halfbyte._native import _C
from halfbyte.optim import AdamW8bit

VARIANTS = [name for name, why_not, _ in _C.adamw8_variants() if not why_not]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
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


def parameters(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def set_gradients(params, seed, sigma=2.0, dtype=None):
    """Normal gradients with a log-normal scale a coordinate, the same for the same seed."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for param in params:
        scale = torch.exp(sigma * torch.randn(param.shape, generator=generator))
        gradient = (scale * torch.randn(param.shape, generator=generator)).to(dtype or param.dtype)
        param.grad = gradient.clamp(-6e4, 6e4)


def train(optimizer, params, steps, first=0):
    for t in range(first, first + steps):
        set_gradients(params, t)
        optimizer.step()


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].keys() == b[key].keys()
        for name, value in a[key].items():
            assert value.dtype == b[key][name].dtype, name
            assert torch.equal(value, b[key][name]), name


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


def non_contiguous(param):
    return param.detach().t().contiguous().t().requires_grad_()


@pytest.mark.parametrize("which", ["param", "grad", "both"])
def test_non_contiguous_tensors(which):
    (plain,), (other,) = parameters((90, 70)), parameters((90, 70))
    if which != "grad":
        other = non_contiguous(other)
        assert not other.is_contiguous()
    optimizers = AdamW8bit([plain]), AdamW8bit([other])
    for t in range(3):
        set_gradients([plain], t)
        other.grad = plain.grad.clone()
        if which != "param":
            other.grad = plain.grad.t().contiguous().t()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(plain, other)
    assert_same_state(*(optimizer.state_dict()["state"] for optimizer in optimizers))


def test_strided_slice_of_a_larger_tensor():
    room = torch.full((64, 128), 7.0)
    param = room[:, ::2].requires_grad_()
    (plain,) = parameters((64, 64))
    with torch.no_grad():
        param.copy_(plain)
    for parameter in (plain, param):
        set_gradients([parameter], 0)
        AdamW8bit([parameter]).step()
    assert torch.equal(param, plain)
    assert (room[:, 1::2] == 7).all()


def test_fp32_gradients_of_half_parameters():
    ours = parameters(5000, dtype=torch.bfloat16)
    same = parameters(5000, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(5000, generator=generator).bfloat16()
    ours[0].grad_dtype = torch.float32
    ours[0].grad, same[0].grad = gradient.float(), gradient
    for params in (ours, same):
        AdamW8bit(params).step()
    assert torch.equal(ours[0], same[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradient_raises_before_anything_changes(dtype, bad):
    params = parameters(5000, (60, 80), dtype=dtype)
    optimizer = AdamW8bit([("first", params[0]), ("second", params[1])])
    train(optimizer, params, 2)
    before = copy.deepcopy([param.detach() for param in params])
    state = copy.deepcopy(optimizer.state_dict())
    set_gradients(params, 9)
    params[1].grad[3, 7] = bad
    params[1].grad[5, 1] = bad
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0 \('second'\).*\[3, 7\].*247"):
        optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param, old)
    assert_same_state(optimizer.state_dict()["state"], state["state"])


def test_non_finite_gradient_can_skip_the_step():
    params = parameters(5000, 30)
    optimizer = AdamW8bit(params, on_nonfinite="skip")
    before = copy.deepcopy([param.detach() for param in params])
    set_gradients(params, 0)
    params[1].grad[4] = float("nan")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param, old)
    set_gradients(params, 0)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.state[params[0]]["step"] == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("encoding", ["ratio", "moments"])
def test_resumed_equals_uninterrupted(dtype, encoding):
    straight = parameters(9000, (70, 90), 100, dtype=dtype)
    optimizer = AdamW8bit(straight, lr=1e-2, state=encoding)
    train(optimizer, straight, 10)

    params = parameters(9000, (70, 90), 100, dtype=dtype)
    first = AdamW8bit(params, lr=1e-2, state=encoding)
    train(first, params, 4)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    second = AdamW8bit(params, lr=7, state=encoding)
    second.load_state_dict(loaded)
    assert second.param_groups[0]["lr"] == 1e-2
    assert_same_state(second.state_dict()["state"], first.state_dict()["state"])
    train(second, params, 6, first=4)
    for a, b in zip(straight, params, strict=True):
        assert torch.equal(a, b)
    assert_same_state(optimizer.state_dict()["state"], second.state_dict()["state"])
    # Loading copied: the dictionary it came from is not written to.
    assert loaded["state"][0]["step"] == 4


def damaged(change):
    params = parameters(9000, 100)
    optimizer = AdamW8bit(params)
    train(optimizer, params, 2)
    state_dict = copy.deepcopy(optimizer.state_dict())
    change(state_dict)
    return params, optimizer, state_dict


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["state"][0].update(exp_avg=torch.zeros(8999, dtype=torch.uint8)), "exp_avg"),
        (lambda s: s["state"][0].update(exp_avg=torch.zeros(9000)), "uint8"),
        (lambda s: s["state"][0].update(exp_avg_absmax=torch.zeros(35)), "exp_avg_absmax"),
        (lambda s: s["state"][0].pop("exp_avg_sq_absmax"), "exp_avg_sq_absmax"),
        (lambda s: s["state"][1].update(exp_avg_absmax=torch.zeros(1)), "parameter 1"),
        (lambda s: s["param_groups"][0].update(state="moments"), "ratio"),
        (lambda s: s["param_groups"][0].update(block_size=128), "block_size"),
        (lambda s: s["param_groups"][0].update(params=[0]), "parameters"),
        (lambda s: s["param_groups"].append(s["param_groups"][0]), "groups"),
        (lambda s: s["param_groups"][0].update(betas=(1.0, 0.9)), "beta"),
    ],
)
def test_state_dict_that_does_not_fit_raises_and_changes_nothing(change, message):
    params, optimizer, state_dict = damaged(change)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert_same_state(optimizer.state_dict()["state"], before["state"])
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


def test_state_dict_of_another_optimizer_is_refused():
    params = parameters(9000)
    other = torch.optim.AdamW(params)
    train(other, params, 1)
    with pytest.raises(ValueError, match="not a state dict of AdamW8bit"):
        AdamW8bit(params).load_state_dict(other.state_dict())


def test_load_hooks_run_in_torch_order():
    params = parameters(9000)
    optimizer = AdamW8bit(params)
    train(optimizer, params, 1)
    seen = []

    def before(_, state_dict):
        seen.append(type(state_dict["state"][0]["exp_avg"]))

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(
        lambda self: seen.append(self.state[params[0]]["exp_avg"].dtype)
    )
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [torch.Tensor, torch.uint8]
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_alike(copier):
    params = parameters(9000, 50)
    optimizer = AdamW8bit(params, on_nonfinite="skip")
    train(optimizer, params, 2)
    params[0].grad[0] = float("nan")
    optimizer.step()
    twin = copier(optimizer)
    twins = twin.param_groups[0]["params"]
    assert twin.on_nonfinite == "skip" and twin.skipped_steps == 1
    for a, b in ((optimizer, params), (twin, twins)):
        train(a, b, 3, first=2)
    for a, b in zip(params, twins, strict=True):
        assert a is not b and torch.equal(a, b)


def test_groups_schedulers_closure_and_hooks():
    params = parameters(9000, (64, 65), 10)
    exact = parameters(9000, (64, 65), 10)

    def build(kind, tensors, **options):
        optimizer = kind([{"params": tensors[:1], "lr": 1e-2}], weight_decay=0.1, **options)
        optimizer.add_param_group({"params": tensors[1:], "weight_decay": 0.0})
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-2, 1e-3], 20)

    ours, schedule = build(AdamW8bit, params, min_8bit_size=1 << 30)
    theirs, their_schedule = build(torch.optim.AdamW, exact)
    calls = []
    ours.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        assert torch.is_grad_enabled()
        calls.append("closure")
        return 3.5

    for t in range(20):
        set_gradients(params, t)
        set_gradients(exact, t)
        assert ours.step(closure) == 3.5
        theirs.step()
        schedule.step()
        their_schedule.step()
    assert calls == ["closure", "after"] * 20
    for a, b in zip(params, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_parameters_may_join_rest_and_move():
    """No gradient: no step and no state; new storage of a parameter or its state is followed."""
    params = parameters(9000, 5000)
    optimizer = AdamW8bit(params)
    params[0].grad = torch.ones(9000)
    optimizer.step()
    assert params[1] not in optimizer.state
    set_gradients(params, 1)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [2, 1]
    twin = copy.deepcopy(optimizer)
    twins = twin.param_groups[0]["params"]
    for param in params:
        param.data = param.data.clone()
        optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"].clone()
    train(optimizer, params, 2, first=2)
    train(twin, twins, 2, first=2)
    for a, b in zip(params, twins, strict=True):
        assert torch.equal(a, b)


def test_zero_size_parameters():
    params = parameters(0, (3, 0), 5000)
    optimizer = AdamW8bit(params, min_8bit_size=0)
    train(optimizer, params, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, params, 2, first=2)
    AdamW8bit(parameters(0)).step()


def test_step_bumps_the_version_autograd_checks():
    (weight,) = parameters((80, 80))
    loss = (weight * weight).sum() * weight.sum()
    weight.grad = torch.ones_like(weight)
    AdamW8bit([weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_that_cannot_be_used_are_refused():
    (param,) = parameters((64, 64))
    optimizer = AdamW8bit([param])
    param.grad = torch.ones(64, 64).to_sparse()
    with pytest.raises(ValueError, match="dense"):
        optimizer.step()
    embedding = nn.Embedding(100, 64, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="parameter 0 of group 0 .'table'"):
        AdamW8bit([("table", embedding.weight)]).step()
    expanded = torch.ones(1).expand(5000).requires_grad_()
    expanded.grad = torch.ones(5000)
    with pytest.raises(ValueError, match="share memory"):
        AdamW8bit([expanded]).step()
    param.grad = None
    param.grad_dtype = None
    param.grad = torch.ones(64, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="gradient of torch.float32"):
        optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1},
        {"lr": float("nan")},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"eps": -1e-8},
        {"weight_decay": -1},
        {"state": "float32"},
        {"on_nonfinite": "ignore"},
        {"min_8bit_size": -1},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AdamW8bit(parameters(10), **options)


def test_unsupported_parameters_are_refused():
    with pytest.raises(TypeError, match="float64"):
        AdamW8bit(parameters(10, dtype=torch.float64))


def test_trains_a_model_like_torch():
    def losses(kind):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
        optimizer = kind(model.parameters(), lr=1e-2)
        x, history = torch.randn(256, 64), []
        for _ in range(60):
            loss = (model(x) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        return history

    ours, exact = losses(AdamW8bit), losses(torch.optim.AdamW)
    assert ours[-1] < 0.3 * ours[0]
    assert ours[-1] == pytest.approx(exact[-1], rel=0.1)
