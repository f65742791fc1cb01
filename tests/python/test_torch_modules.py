"""What torch users do to modules, weights and optimizers: copies, files, casts, moves, autocast,
parametrizations, functional calls. Packed bytes stay as they are; what cannot work says so."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import halfbyte
from halfbyte.nn import LoraLinear, NF4Linear
from halfbyte.optim import AdamW8bit, AdamW32bit, PagedAdamW8bit, PagedAdamW32bit

OUT, IN = 23, 50  # neither a multiple of a block
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
OPTIMIZERS = [AdamW8bit, AdamW32bit, PagedAdamW8bit, PagedAdamW32bit]


def build(dropout: float = 0.0, double_quant: bool = True) -> LoraLinear:
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT)
    layer = LoraLinear.from_linear(linear, r=4, dropout=dropout, double_quant=double_quant)
    nn.init.normal_(layer.lora_b)
    return layer


def model() -> nn.Sequential:
    return nn.Sequential(build(), nn.ReLU(), nn.Linear(OUT, OUT), build_square())


def build_square() -> NF4Linear:
    torch.manual_seed(1)
    return NF4Linear.from_linear(nn.Linear(OUT, OUT, bias=False), double_quant=False)


def packed(module: nn.Module) -> dict[str, torch.Tensor]:
    """The integer Parameters: codes and bit patterns of statistics."""
    return {n: p for n, p in module.named_parameters() if not p.is_floating_point()}


def assert_packed_alike(a: nn.Module, b: nn.Module) -> None:
    mine, other = packed(a), packed(b)
    assert mine.keys() == other.keys() and len(mine) >= 4
    for name, value in mine.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


def through_file(value, weights_only: bool = False):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


COPIES = [copy.deepcopy, through_pickle, through_file]


def inputs(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(3, IN, generator=torch.Generator().manual_seed(2)).to(dtype)


# --- copies and files ----------------------------------------------------------------------------


@pytest.mark.parametrize("copier", COPIES)
def test_a_copied_model_computes_and_trains_alike(copier):
    first = model()
    second = copier(first)
    assert_packed_alike(first, second)
    for name, value in packed(first).items():
        assert value.data_ptr() != second.get_parameter(name).data_ptr(), name
    assert [p.requires_grad for p in first.parameters()] == [
        p.requires_grad for p in second.parameters()
    ]
    for each in (first, second):
        each(inputs()).square().sum().backward()
    assert torch.equal(first(inputs()), second(inputs()))
    assert torch.equal(first[0].lora_a.grad, second[0].lora_a.grad)


@pytest.mark.parametrize("copier", COPIES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_copied_weight_is_bit_equal(copier, double_quant):
    weight = halfbyte.quantize_4bit(torch.randn(OUT, IN), "fp4", 32, double_quant)
    other = copier(weight)
    assert (other.shape, other.dtype, other.block_size, other.codebook) == (
        weight.shape,
        weight.dtype,
        32,
        "fp4",
    )
    assert other.tensors().keys() == weight.tensors().keys()
    for name, tensor in weight.tensors().items():
        assert torch.equal(tensor, other.tensors()[name])
        assert tensor.data_ptr() != other.tensors()[name].data_ptr()
    assert torch.equal(weight.dequantize(), other.dequantize())


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("copier", COPIES)
def test_a_model_copied_with_its_optimizer_trains_on_alike(kind, copier):
    net = model()
    optimizer = kind([p for p in net.parameters() if p.requires_grad], lr=1e-2)

    def train(net, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            net(inputs()).square().mean().backward()
            optimizer.step()

    train(net, optimizer, 2)
    other, its = copier((net, optimizer))
    assert its.paged == optimizer.paged
    for each in ((net, optimizer), (other, its)):
        train(*each, 2)
    assert torch.equal(net(inputs()), other(inputs()))
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert a is not b and torch.equal(a, b)


def test_state_dicts_load_with_weights_only():
    first, second = model(), model()
    optimizer = PagedAdamW8bit([p for p in first.parameters() if p.requires_grad], min_8bit_size=0)
    first(inputs()).sum().backward()
    optimizer.step()
    second.load_state_dict(through_file(first.state_dict(), weights_only=True))
    assert torch.equal(first(inputs()), second(inputs()))
    kept = through_file(optimizer.state_dict(), weights_only=True)["state"]
    assert kept[0]["exp_avg"].dtype == torch.uint8


@pytest.mark.parametrize("assign", [True, False])
def test_a_loaded_state_dict_brings_the_bytes(assign):
    first, second = model(), copy.deepcopy(model())
    with torch.no_grad():
        second[0].base.weight.zero_()
    second.load_state_dict(first.state_dict(), assign=assign)
    assert_packed_alike(first, second)
    shared = second[0].base.weight.data_ptr() == first[0].base.weight.data_ptr()
    assert shared is assign


@pytest.mark.parametrize("part", ["absmax", "nested_absmax", "quant_map", "nested_quant_map"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused(part, bad):
    double_quant = part != "absmax"
    layer = build(double_quant=double_quant).base
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    state[f"weight.{part}"][-1] = bad
    before = {n: p.clone() for n, p in packed(layer).items()}
    with pytest.raises(RuntimeError, match=rf"weight\.{part}: expected finite values"):
        layer.load_state_dict(state)
    assert all(torch.equal(p, before[n]) for n, p in packed(layer).items())


def test_an_offset_that_is_not_finite_is_refused():
    layer = build().base
    state = layer.state_dict()
    key = "weight.quant_state.bitsandbytes__nf4"
    text = bytes(state[key].tolist()).decode()
    start = text.index('"nested_offset": ') + len('"nested_offset": ')
    damaged = text[:start] + "NaN}"
    state[key] = torch.frombuffer(bytearray(damaged.encode()), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="cannot read nested_offset nan"):
        layer.load_state_dict(state)


# --- casts and moves -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.float(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16, non_blocking=True),
        lambda m: m.cpu(),
        lambda m: m.half().float().bfloat16(),
        lambda m: m.to(inputs(torch.bfloat16)),
    ],
)
def test_casts_leave_packed_bytes_alone(cast):
    before, net = model(), cast(model())
    assert_packed_alike(before, net)
    dtype = net[0].lora_a.dtype
    assert net(inputs(dtype)).dtype == dtype


def test_swapped_parameters_keep_their_bytes():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net = model().to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_packed_alike(model(), net)


def test_to_meta_and_to_empty():
    net = model()
    empty = copy.deepcopy(net).to("meta")
    assert all(p.is_meta for p in empty.parameters())
    out = empty(inputs().to("meta"))
    assert out.is_meta and out.shape == (3, OUT)
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(net.state_dict())
    assert_packed_alike(net, filled)
    assert torch.equal(filled(inputs()), net(inputs()))


def test_shared_memory_is_used_as_it_is():
    net = model()
    before = copy.deepcopy(net)
    net.share_memory()
    assert all(p.is_shared() for p in net.parameters())
    assert_packed_alike(before, net)
    assert torch.equal(before(inputs()), net(inputs()))


def test_casting_integers_by_force_is_noticed():
    """`Module.type` casts every Parameter, packed bytes too; nothing is computed from them."""
    layer = build().base.type(torch.float32)
    with pytest.raises((ValueError, halfbyte._C.Error), match="uint8"):
        layer(inputs())


def test_float64_is_refused_by_name():
    with pytest.raises(ValueError, match="x: expected float32, bfloat16 or float16, got torch.fl"):
        build()(inputs().double())


# --- autocast and checkpointing ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_as_a_cast_does(dtype):
    layer = build()
    x = inputs().requires_grad_()
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    expected = layer(x.to(dtype))
    assert torch.equal(y, expected)
    grads = torch.autograd.grad(y.float().sum(), [x, layer.lora_a, layer.lora_b])
    want = torch.autograd.grad(expected.float().sum(), [x, layer.lora_a, layer.lora_b])
    assert [g.dtype for g in grads] == [torch.float32] * 3
    assert all(map(torch.equal, grads, want))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_checkpointing_recomputes_dropout_and_autocast(use_reentrant, dtype):
    layer = build(dropout=0.4)

    def gradients(call):
        layer.zero_grad()
        torch.manual_seed(6)
        x = inputs().requires_grad_()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            y = call(x)
        y.float().square().sum().backward()
        return [y.detach(), x.grad, layer.lora_a.grad, layer.lora_b.grad]

    plain = gradients(layer)
    again = gradients(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant))
    assert all(map(torch.equal, plain, again))


# --- parametrizations, functional calls, transforms ----------------------------------------------


class Doubled(nn.Module):
    def forward(self, value):
        return 2 * value


def test_an_adapter_can_be_parametrized():
    layer, plain = build(), build()
    parametrize.register_parametrization(layer, "lora_b", Doubled())
    with torch.no_grad():
        plain.lora_b.mul_(2)
    assert torch.equal(layer(inputs()), plain(inputs()))
    layer(inputs()).sum().backward()
    plain(inputs()).sum().backward()
    got = layer.parametrizations.lora_b.original.grad
    assert torch.equal(got, 2 * plain.lora_b.grad)


def test_functional_call_uses_the_tensors_it_is_given():
    layer, other = build(), build()
    with torch.no_grad():
        other.lora_a.mul_(2)
    values = {n: p.detach() for n, p in other.named_parameters()}
    assert torch.equal(functional_call(layer, values, (inputs(),)), other(inputs()))
    swapped = {"base.weight": torch.zeros_like(layer.base.weight)}
    assert not torch.equal(functional_call(layer, swapped, (inputs(),)), layer(inputs()))
    assert_packed_alike(layer, other)


def test_vmap_without_gradients():
    layer = build().requires_grad_(False)
    x = torch.randn(4, 3, IN)
    assert torch.equal(torch.func.vmap(layer)(x), torch.stack([layer(each) for each in x]))


def test_torch_func_gradients_are_refused():
    layer = build()
    adapters = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}

    def loss(values):
        return functional_call(layer, values, (inputs(),)).sum()

    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(loss)(adapters)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.vmap(layer)(torch.randn(4, 3, IN))


def test_forward_mode_and_second_derivatives_are_refused():
    layer = build()
    x = inputs().requires_grad_()
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs(), inputs())
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            layer(dual)
