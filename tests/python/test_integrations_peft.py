"""PEFT on NF4Linear: adopted unasked, equal to PEFT's own path, and its files are PEFT's."""

import copy
import types

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import nn

import halfbyte
from halfbyte.integrations import peft as bridge
from halfbyte.nn import NF4Linear

K, N = 40, 33
bridge.enable()


class Two(nn.Module):
    """Two linear layers, one with a bias; K = 40 is no multiple of the block size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(K, N)
        self.second = nn.Linear(N, K, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def _config(**changes) -> LoraConfig:
    settings = {"r": 5, "lora_alpha": 7, "target_modules": ["first", "second"]}
    return LoraConfig(**(settings | changes))


def _randomize(model) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


def _packed(**changes):
    model = get_peft_model(halfbyte.quantize_(Two()), _config(**changes))
    _randomize(model)
    return model


def _dense(**changes):
    """The same model with dequantized dense layers, on plain PEFT."""
    base = Two()
    packed = halfbyte.quantize_(Two())
    for name in ("first", "second"):
        setattr(base, name, getattr(packed, name).to_linear(torch.float32))
    model = get_peft_model(base, _config(**changes))
    _randomize(model)
    return model


def _layers(model):
    return [module for module in model.modules() if isinstance(module, PeftLoraLinear)]


@pytest.fixture
def fused_calls(monkeypatch):
    """How often the fused op ran with an adapter."""
    calls = types.SimpleNamespace(count=0)
    original = halfbyte.lora_linear

    def counting(*args, **kwargs):
        calls.count += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(halfbyte, "lora_linear", counting)
    return calls


def _close(actual, expected, tolerance=1e-5):
    error = (actual - expected).norm() / expected.norm()
    assert error <= tolerance, f"relative error {error:.2e}, expected at most {tolerance:.0e}"


def test_layers_are_adopted_and_dense_ones_left_alone():
    assert [type(layer) for layer in _layers(_packed())] == [bridge.LoraLinear] * 2
    assert [type(layer) for layer in _layers(_dense())] == [PeftLoraLinear] * 2
    adapters = {p.dtype for n, p in _packed().named_parameters() if "lora_" in n}
    assert adapters == {torch.float32}


def test_disable_stops_adoption():
    bridge.disable()
    try:
        assert type(_layers(_packed())[0]) is PeftLoraLinear
    finally:
        bridge.enable()
    bridge.enable()
    assert type(_layers(_packed())[0]) is bridge.LoraLinear


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"rank_pattern": {"first": 9}}])
def test_fused_equals_plain_peft_forward_and_backward(fused_calls, changes):
    packed, dense = _packed(**changes), _dense(**changes)
    x = torch.randn(3, 4, K, generator=torch.Generator().manual_seed(2))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(i) for model, i in zip((packed, dense), inputs, strict=True)]
    assert fused_calls.count == 2
    _close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    _close(inputs[0].grad, inputs[1].grad)
    dense_gradients = {n: p.grad for n, p in dense.named_parameters() if "lora_" in n}
    assert len(dense_gradients) == 4
    for name, gradient in dense_gradients.items():
        _close(packed.get_parameter(name).grad, gradient)


def test_dropout_acts_in_training_only_and_follows_torchs_seed(fused_calls):
    model = _packed(lora_dropout=0.5)
    x = torch.randn(6, K)
    model.eval()
    _close(model(x), _packed()(x), 1e-6)
    model.train()
    torch.manual_seed(3)
    first, second = model(x), model(x)
    torch.manual_seed(3)
    again = model(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert fused_calls.count == 2 * 5


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_recomputes_the_same_mask(use_reentrant):
    model = _packed(lora_dropout=0.5).train()
    x = torch.randn(6, K, requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        torch.manual_seed(4)
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant)
        else:
            y = model(x)
        y.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 4
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


def test_autocast_is_followed():
    model, x = _packed(), torch.randn(6, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    _close(y.float(), model(x), 2e-2)


def test_several_active_adapters_take_pefts_path(fused_calls):
    packed, dense = _packed(), _dense()
    for model in (packed, dense):
        model.add_adapter("other", _config(r=3))
        _randomize(model)
        model.base_model.set_adapter(["default", "other"])
    x = torch.randn(6, K)
    _close(packed(x), dense(x))
    assert fused_calls.count == 0
    for model in (packed, dense):
        model.set_adapter("other")
    _close(packed(x), dense(x))
    assert fused_calls.count == 2


def test_mixed_batches_take_pefts_path(fused_calls):
    packed, dense = _packed().eval(), _dense().eval()
    x = torch.randn(2, K)
    names = ["default", "__base__"]
    _close(packed(x, adapter_names=names), dense(x, adapter_names=names))
    assert fused_calls.count == 0


def test_disabled_adapters_give_the_base():
    packed, x = _packed(), torch.randn(6, K)
    with packed.disable_adapter():
        assert torch.equal(packed(x), halfbyte.quantize_(Two())(x))


def test_hooks_on_submodules_are_honoured(fused_calls):
    model, seen = _packed(), []
    _layers(model)[0].lora_A["default"].register_forward_hook(lambda *args: seen.append(1))
    model(torch.randn(6, K))
    assert seen == [1]
    assert fused_calls.count == 1  # the other layer


def test_merge_and_unload_gives_dense_layers():
    model, x = _packed(), torch.randn(6, K)
    expected = model(x)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged.first) is nn.Linear and type(merged.second) is nn.Linear
    _close(merged(x), expected)


def test_unload_gives_the_packed_base_back():
    x = torch.randn(6, K)
    base = _packed().unload()
    assert isinstance(base.first, NF4Linear)
    assert torch.equal(base(x), halfbyte.quantize_(Two())(x))


def test_in_place_merge_is_refused_and_changes_nothing():
    model, x = _packed(), torch.randn(6, K)
    before, codes = model(x), _layers(model)[0].base_layer.weight.clone()
    with pytest.raises(NotImplementedError, match="use merge_and_unload"):
        model.merge_adapter()
    assert torch.equal(_layers(model)[0].base_layer.weight, codes)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_what_rewrites_the_base_weight_is_refused(changes):
    with pytest.raises(NotImplementedError, match="packed 4-bit"):
        get_peft_model(halfbyte.quantize_(Two()), _config(**changes))


def test_saved_adapter_loads_in_plain_peft(tmp_path):
    packed = _packed()
    packed.save_pretrained(tmp_path)
    files = sorted(file.name for file in tmp_path.iterdir())
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
    dense = peft.PeftModel.from_pretrained(_dense().unload(), tmp_path)
    assert type(_layers(dense)[0]) is PeftLoraLinear
    x = torch.randn(6, K)
    _close(packed(x), dense(x))
    again = peft.PeftModel.from_pretrained(halfbyte.quantize_(Two()), tmp_path)
    assert type(_layers(again)[0]) is bridge.LoraLinear
    assert torch.equal(again(x), packed(x))


def test_deepcopy_stays_fused(fused_calls):
    model, x = _packed(), torch.randn(6, K)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert fused_calls.count == 4
