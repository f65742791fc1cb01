"""AdamW8bit as a torch optimizer: state dicts, groups, hooks, awkward tensors, refusals."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn

from halfbyte.ops import adamw8
from halfbyte.optim import AdamW8bit, AdamW32bit, PagedAdamW8bit, PagedAdamW32bit
from optim_cases import DTYPES, assert_same_state, parameters, set_gradients, train


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
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    assert re.search(r"parameter 1 of group 0 \('second'\).*\[3, 7\].*247", str(error.value))
    assert "clipping" not in str(error.value)
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
        (lambda s: s["state"][0]["exp_avg_sq_absmax"].fill_(float("nan")), "finite scales"),
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


def test_state_that_does_not_fit_its_parameter_is_refused():
    params = parameters(9000)
    optimizer = AdamW8bit(params)
    train(optimizer, params, 1)
    state = optimizer.state[params[0]]
    state["exp_avg"] = state["exp_avg"][:100]
    with pytest.raises(ValueError, match="parameter 0 of group 0: its state: exp_avg"):
        optimizer.step()


def test_a_parameter_that_changes_groups_takes_its_new_options():
    params = parameters(9000, 5000)
    optimizer = AdamW8bit([{"params": params[:1], "lr": 0.0}, {"params": params[1:]}])
    train(optimizer, params, 1)
    before = params[0].detach().clone()
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
    train(optimizer, params, 1)
    assert not torch.equal(params[0], before)


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_32_bit_state_follows_torch(dtype):
    """Moments are fp32 whatever the parameter's dtype; the same arithmetic as torch on fp32."""
    ours, exact = parameters(9000, (64, 65), dtype=dtype), parameters(9000, (64, 65), dtype=dtype)
    optimizer, theirs = AdamW32bit(ours, lr=1e-2), torch.optim.AdamW(exact, lr=1e-2)
    for t in range(10):
        set_gradients(ours, t)
        set_gradients(exact, t)
        optimizer.step()
        theirs.step()
    state = optimizer.state[ours[0]]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    if dtype is not torch.float32:
        return
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    for name in ("exp_avg", "exp_avg_sq"):
        want = theirs.state[exact[0]][name]
        # Ten sums of terms of either sign: a few roundings of the largest.
        largest = 2**-22 * want.abs().max().item()
        torch.testing.assert_close(state[name], want, rtol=1e-5, atol=largest)


def test_32_bit_and_8_bit_states_are_told_apart():
    params = parameters(9000)
    wide, narrow = AdamW32bit(params), AdamW8bit(params)
    train(wide, params, 1)
    with pytest.raises(ValueError, match="state: expected 'ratio', got 'float32'"):
        narrow.load_state_dict(wide.state_dict())
    with pytest.raises(ValueError, match="state: expected 'float32', got 'ratio'"):
        AdamW32bit(params, state="ratio")


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "exp_avg_absmax", "step"])
def test_a_replaced_state_tensor_is_followed(name):
    params = parameters(9000, 5000)
    optimizer = AdamW8bit(params)
    train(optimizer, params, 1)
    twin = copy.deepcopy(optimizer)
    state = optimizer.state[params[1]]
    old = state[name]
    state[name] = old.clone()
    train(optimizer, params, 2, first=1)
    train(twin, twin.param_groups[0]["params"], 2, first=1)
    assert_same_state(optimizer.state_dict()["state"], twin.state_dict()["state"])
    assert state[name] is not old and not torch.equal(state[name], old)


def test_first_nonfinite_of_any_gradients():
    grads = [torch.ones(3), torch.zeros(0), torch.ones(4, 5).bfloat16().t(), torch.ones(2).half()]
    assert adamw8.first_nonfinite(grads) == adamw8.FINITE == (-1, -1)
    assert adamw8.first_nonfinite([torch.zeros(0)]) == adamw8.FINITE
    grads[2][1, 2] = float("nan")
    grads[2][3, 0] = float("inf")
    grads[3][0] = -float("inf")
    assert adamw8.first_nonfinite(grads) == (2, 6)
    largest = torch.finfo(torch.float32).max
    assert adamw8.first_nonfinite([torch.tensor([largest, -largest])]) == adamw8.FINITE


@pytest.mark.parametrize("kind", [AdamW8bit, AdamW32bit, PagedAdamW8bit, PagedAdamW32bit])
def test_loading_over_state_takes_no_second_room(kind, monkeypatch):
    params = parameters(9000, (60, 80), 50)
    other = kind(params)
    train(other, params, 2)
    saved = copy.deepcopy(other.state_dict())
    optimizer = kind(params)
    train(optimizer, params, 3)
    homes = {p: {n: t.data_ptr() for n, t in optimizer.state[p].items()} for p in params}
    rooms = []
    allocate = optimizer._allocate
    monkeypatch.setattr(
        optimizer,
        "_allocate",
        lambda layouts, device: rooms.append(layouts) or allocate(layouts, device),
    )
    optimizer.load_state_dict(saved)
    assert rooms == [[]]
    assert_same_state(optimizer.state_dict()["state"], saved["state"])
    assert homes == {p: {n: t.data_ptr() for n, t in optimizer.state[p].items()} for p in params}
    train(optimizer, params, 1)
    assert saved["state"][0]["step"] == 2


def test_loading_an_optimizers_own_state_in_another_order():
    """Sources that are destinations too: no row may be read after it was overwritten."""
    params = parameters(9000, 9000)
    optimizer = AdamW8bit(params)
    train(optimizer, params, 1)
    state_dict = optimizer.state_dict()
    swapped = {**state_dict, "state": {0: state_dict["state"][1], 1: state_dict["state"][0]}}
    expected = copy.deepcopy(swapped["state"])
    optimizer.load_state_dict(swapped)
    assert_same_state(optimizer.state_dict()["state"], expected)


@pytest.mark.parametrize("kind", [AdamW8bit, AdamW32bit])
def test_a_learning_rate_may_be_a_tensor(kind):
    params, same = parameters(9000, 40), parameters(9000, 40)
    optimizer, other = kind(params, lr=torch.tensor(1e-2)), kind(same, lr=1e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    its = torch.optim.lr_scheduler.ExponentialLR(other, 0.5)
    for t in range(3):
        for each, tensors, scheduler in ((optimizer, params, schedule), (other, same, its)):
            train(each, tensors, 1, first=t)
            scheduler.step()
    for a, b in zip(params, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # lr was rounded to float32
    again = kind(params, lr=1.0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.param_groups[0]["lr"] == pytest.approx(1.25e-3)


@pytest.mark.parametrize("option", ["foreach", "fused", "amsgrad", "capturable"])
def test_options_of_torch_that_choose_an_implementation_are_refused_by_name(option):
    with pytest.raises(TypeError, match=option):
        AdamW8bit(parameters(10), **{option: True})


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    params = parameters(9000)
    optimizer = AdamW8bit(params, weight_decay=0.0)
    set_gradients(params, 0)
    optimizer.zero_grad(set_to_none=set_to_none)
    before = params[0].detach().clone()
    optimizer.step()
    assert torch.equal(params[0], before)
    assert (params[0] in optimizer.state) is not set_to_none


def test_groups_added_later_are_resumed_with_their_options():
    def build(params):
        optimizer = AdamW8bit(params[:1], lr=1e-2)
        optimizer.add_param_group({"params": params[1:], "lr": 1e-3, "state": "moments"})
        return optimizer

    params = parameters(9000, 5000)
    optimizer = AdamW8bit(params[:1], lr=1e-2)
    train(optimizer, params[:1], 2)
    optimizer.add_param_group({"params": params[1:], "lr": 1e-3, "state": "moments"})
    train(optimizer, params, 2, first=2)
    assert [optimizer.state[p]["step"].item() for p in params] == [4, 2]
    twins = [p.detach().clone().requires_grad_() for p in params]
    twin = build(twins)
    twin.load_state_dict(optimizer.state_dict())
    for each, tensors in ((optimizer, params), (twin, twins)):
        train(each, tensors, 2, first=4)
    for a, b in zip(params, twins, strict=True):
        assert torch.equal(a, b)
