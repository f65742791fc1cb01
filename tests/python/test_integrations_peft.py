"""PEFT's LoRA on NF4Linear: adopted unasked, equal to PEFT's own path, and its files are PEFT's."""

import copy
import json
import os
import pickle
import subprocess
import sys
import types

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLoraLinear
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig, VeloraConfig
from transformers import LlamaForCausalLM

import halfbyte
from halfbyte.integrations import peft as bridge
from halfbyte.nn import NF4Linear
from peft_cases import close, dense_base, lora_config, packed_base, pair, rows, same_step
from tiny_model import build_config


def _packed(**changes):
    return pair(lora_config(**changes))[0]


def _layers(model):
    return [module for module in model.modules() if isinstance(module, PeftLoraLinear)]


@pytest.fixture
def fused_calls(monkeypatch):
    """How often the fused op ran with an adapter."""
    calls = types.SimpleNamespace(count=0)
    original = halfbyte.nn.lora_linear

    def counting(x, weight, lora_a, *args, **kwargs):
        calls.count += lora_a is not None
        return original(x, weight, lora_a, *args, **kwargs)

    monkeypatch.setattr(halfbyte.nn, "lora_linear", counting)
    return calls


# --- adoption ------------------------------------------------------------------------------------


def test_importing_halfbyte_is_enough():
    code = """
import sys, halfbyte, peft, json, torch
early = "halfbyte.integrations" in sys.modules
model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 4))
config = peft.LoraConfig(target_modules=["0"])
dense = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 8)), config)
still = "halfbyte.integrations" in sys.modules
model = peft.get_peft_model(halfbyte.quantize_(model), config)
kinds = [type(m).__module__ for m in (dense.base_model.model[0], model.base_model.model[0])]
print(json.dumps([early, still, *kinds]))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    early, still, dense, packed = json.loads(result.stdout)
    assert not early and not still
    assert dense == "peft.tuners.lora.layer"
    assert packed == "halfbyte.integrations.peft._lora"


def test_layers_are_adopted_and_dense_ones_left_alone():
    packed, dense = pair(lora_config())
    assert [type(layer) for layer in _layers(packed)] == [bridge.LoraLinear] * 2
    assert [type(layer) for layer in _layers(dense)] == [PeftLoraLinear] * 2
    adapters = {p.dtype for n, p in packed.named_parameters() if "lora_" in n}
    assert adapters == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_a_16_bit_base_are_float32_if_peft_may_choose(dtype):
    for autocast in (True, False):  # an integer base has no dtype to follow
        model = get_peft_model(packed_base(dtype), lora_config(), autocast_adapter_dtype=autocast)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert model(rows(4).to(dtype)).dtype == dtype


def test_disable_stops_adoption():
    bridge.disable()
    try:
        assert type(_layers(_packed())[0]) is PeftLoraLinear
    finally:
        bridge.enable()
    bridge.enable()
    assert type(_layers(_packed())[0]) is bridge.LoraLinear


def test_all_linear_finds_packed_layers_and_leaves_the_head():
    model = halfbyte.quantize_(LlamaForCausalLM(build_config(num_hidden_layers=1)))
    names = {n for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    )
    prefix = "base_model.model."
    found = {n.removeprefix(prefix) for n, m in model.named_modules() if m in _layers(model)}
    assert found == names and len(names) == 7
    assert all(type(layer) is bridge.LoraLinear for layer in _layers(model))


def test_injected_adapters_are_adopted(fused_calls):
    """`inject_adapter_in_model` is what transformers' own `model.add_adapter` calls."""
    model = halfbyte.quantize_(LlamaForCausalLM(build_config(num_hidden_layers=1))).eval()
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    inject_adapter_in_model(config, model, "mine")
    assert [type(layer) for layer in _layers(model)] == [bridge.LoraLinear] * 2
    model(torch.arange(12).reshape(2, 6))
    assert fused_calls.count == 2


def test_the_compute_dtype_is_followed():
    packed, dense = pair(lora_config(lora_bias=True, target_modules=["first"]))
    layer = packed.base_model.model.first
    exact = layer(rows(6))
    layer.base_layer.compute_dtype = torch.bfloat16
    y = layer(rows(6))
    assert y.dtype == torch.float32 and not torch.equal(y, exact)
    close(y, exact, 2e-2)


def test_parameters_by_name_are_refused_on_packed_weights():
    with pytest.raises(TypeError, match="target_parameters: expected float parameters"):
        get_peft_model(packed_base(), LoraConfig(target_parameters=["first.weight"]))


# --- fused against stock PEFT --------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"first": 9}, "alpha_pattern": {"second": 3}},
        {"bias": "all"},
        {"lora_bias": True, "target_modules": ["first"]},
        {"lora_bias": True, "bias": "lora_only"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"lora_dropout": 0.0, "fan_in_fan_out": True},
    ],
    ids=str,
)
def test_fused_equals_plain_peft_forward_and_backward(fused_calls, changes):
    packed, dense = pair(lora_config(**changes))
    same_step(packed, dense, rows(3, 4))
    assert fused_calls.count == len(_layers(packed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_equals_plain_peft_in_16_bits(fused_calls, dtype):
    packed, dense = pair(lora_config(), dtype)
    same_step(packed, dense, rows(3, 4).to(dtype), tolerance=2e-2)
    assert fused_calls.count == 2


def test_a_rank_above_the_kernels_takes_pefts_path(fused_calls):
    packed, dense = pair(lora_config(r=513))
    same_step(packed, dense, rows(5))
    assert fused_calls.count == 0


def test_dropout_acts_in_training_only_and_follows_torchs_seed(fused_calls):
    model = _packed(lora_dropout=0.5)
    x = rows(6)
    model.eval()
    close(model(x), _packed()(x), 1e-6)
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
    x = rows(6).requires_grad_()
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
    model, x = _packed(), rows(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    close(y.float(), model(x), 2e-2)


# --- what PEFT's own path serves -----------------------------------------------------------------


def test_several_active_adapters_take_pefts_path(fused_calls):
    packed, dense = pair(lora_config())
    for model in (packed, dense):
        torch.manual_seed(7)
        model.add_adapter("other", lora_config(r=3, init_lora_weights=False))
        model.base_model.set_adapter(["default", "other"])
    same_step(packed, dense, rows(6))
    assert fused_calls.count == 0
    for model in (packed, dense):
        model.set_adapter("other")
    close(packed(rows(6)), dense(rows(6)))
    assert fused_calls.count == 2
    for model in (packed, dense):
        model.delete_adapter("other")
        model.set_adapter("default")
    close(packed(rows(6)), dense(rows(6)))


def test_weighted_sums_of_adapters_are_pefts():
    packed, dense = pair(lora_config())
    for model in (packed, dense):
        torch.manual_seed(7)
        model.add_adapter("other", lora_config(init_lora_weights=False))
        model.add_weighted_adapter(["default", "other"], [0.7, 0.3], "sum", "linear")
        model.set_adapter("sum")
    close(packed(rows(6)), dense(rows(6)))


def test_mixed_batches_take_pefts_path(fused_calls):
    packed, dense = pair(lora_config())
    for model in (packed.eval(), dense.eval()):
        torch.manual_seed(7)
        model.add_adapter("other", lora_config(r=3, init_lora_weights=False))
    names = ["default", "__base__", "other"]
    close(packed(rows(3), adapter_names=names), dense(rows(3), adapter_names=names))
    assert fused_calls.count == 0


def test_disabled_adapters_give_the_base():
    packed, x = _packed(), rows(6)
    with packed.disable_adapter():
        assert torch.equal(packed(x), packed_base()(x))


def test_hooks_on_submodules_are_honoured(fused_calls):
    model, seen = _packed(), []
    _layers(model)[0].lora_A["default"].register_forward_hook(lambda *args: seen.append(1))
    model(rows(6))
    assert seen == [1]
    assert fused_calls.count == 1  # the other layer


def test_activated_lora_takes_pefts_path(fused_calls):
    packed, dense = pair(lora_config(alora_invocation_tokens=[1, 2]))
    x = rows(2, 5)
    offsets = [2, None]
    layers = [model.base_model.model.first for model in (packed, dense)]
    outputs = [layer(x, alora_offsets=offsets) for layer in layers]
    close(*outputs)
    with packed.disable_adapter():
        base = packed.base_model.model.first(x)
    assert torch.equal(outputs[0][1], base[1]) and not torch.equal(outputs[0][0], base[0])
    assert fused_calls.count == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"use_bdlora": BdLoraConfig(target_modules_bd_a=["first"], nblocks=2, match_strict=False)},
        {"velora_config": VeloraConfig(num_groups=4, init_type="batch_average_once")},
        {"monteclora_config": MontecloraConfig()},
        {"init_lora_weights": "mica"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_variants_take_pefts_path(fused_calls, changes):
    packed, dense = pair(lora_config(target_modules=["first"], **changes))
    same_step(packed.eval(), dense.eval(), rows(6))
    assert fused_calls.count == 0
    close(packed.merge_and_unload()(rows(6)), dense.merge_and_unload()(rows(6)))


# --- files, copies -------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_adapter_loads_in_plain_peft_and_back(tmp_path, low_cpu_mem_usage):
    packed = _packed()
    packed.save_pretrained(tmp_path)
    files = {file.name for file in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    dense = peft.PeftModel.from_pretrained(dense_base(), tmp_path, **options)
    assert type(_layers(dense)[0]) is PeftLoraLinear
    close(packed(rows(6)), dense(rows(6)))
    again = PeftModel.from_pretrained(packed_base(), tmp_path, **options)
    assert type(_layers(again)[0]) is bridge.LoraLinear
    assert torch.equal(again(rows(6)), packed(rows(6)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stay_fused(fused_calls, copied):
    model = _packed()
    assert torch.equal(copied(model)(rows(6)), model(rows(6)))
    assert fused_calls.count == 4


def test_compiles_without_a_graph_break():
    model = _packed(lora_bias=True, target_modules=["first"]).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(rows(6)), model(rows(6)))


def test_unload_gives_the_packed_base_back():
    base = _packed().unload()
    assert isinstance(base.first, NF4Linear)
    assert torch.equal(base(rows(6)), packed_base()(rows(6)))
