"""Merging adapters into packed bases: dense results are exact, re-quantized ones reported, and
unmerging restores every byte."""

import copy

import pytest
import torch
from peft import IA3Config, LoHaConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from halfbyte.integrations.peft import requantization_errors
from halfbyte.nn import NF4Linear
from peft_cases import close, lora_config, packed_base, pair, randomize, rows

pytestmark = pytest.mark.filterwarnings("ignore:merging into a 4-bit base")
BIAS = {"lora_bias": True, "target_modules": ["first"]}


def _bytes(model):
    """Every packed tensor and bias."""
    return {
        f"{name}.{key}": value.clone()
        for name, module in model.named_modules()
        if isinstance(module, NF4Linear)
        for key, value in module.state_dict().items()
    }


def _equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def _layer(model):
    return next(m for m in model.modules() if isinstance(m, BaseTunerLayer))


@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, BIAS, {"use_dora": True}, {"bias": "all"}], ids=str
)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload_gives_dense_layers(changes, safe_merge):
    packed, dense = pair(lora_config(**changes))
    merged = packed.merge_and_unload(safe_merge=safe_merge)
    assert type(merged.first) is nn.Linear
    close(merged.first.weight, dense.merge_and_unload().first.weight, 1e-6)
    close(merged(rows(6)), dense(rows(6)), 1e-5)


def test_merge_and_unload_is_in_the_bases_own_dtype():
    packed, dense = pair(lora_config(), torch.bfloat16)
    merged = packed.merge_and_unload()
    assert merged.first.weight.dtype == merged.first.bias.dtype == torch.bfloat16
    x = rows(6).bfloat16()
    close(merged(x), dense(x), 2e-2)


@pytest.mark.parametrize("changes", [{}, BIAS, {"use_dora": True}, {"bias": "lora_only"}], ids=str)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_requantizes_reports_and_unmerges_bit_for_bit(changes, safe_merge):
    packed, dense = pair(lora_config(**changes))
    before, y = _bytes(packed), packed(rows(6))
    packed.merge_adapter(safe_merge=safe_merge)
    dense.merge_adapter()
    layer = packed.base_model.model.first
    wanted = dense.base_model.model.first.base_layer
    got = layer.base_layer.to_linear()
    error = (got.weight - wanted.weight).norm() / wanted.weight.norm()
    reported = requantization_errors(packed)
    assert reported.layers["base_model.model.first"] == pytest.approx(error.item(), rel=1e-4)
    assert 0.01 < reported.overall < 0.2
    if got.bias is not None:
        close(got.bias, wanted.bias)
    # The merged forward pass is the merged weight's product.
    x = rows(6)
    assert not _equal(_bytes(packed), before)
    close(layer(x), nn.functional.linear(x, got.weight, got.bias))
    packed.unmerge_adapter()
    assert _equal(_bytes(packed), before)
    assert torch.equal(packed(rows(6)), y)
    assert requantization_errors(packed).layers == {}
    assert requantization_errors(packed).overall == 0.0


def test_the_format_is_kept():
    model = get_peft_model(packed_base(), lora_config())
    randomize(model)
    old = model.base_model.model.first.base_layer.nf4_weight
    model.merge_adapter()
    new = model.base_model.model.first.base_layer.nf4_weight
    for name in ("codebook", "block_size", "double_quant", "dtype", "shape", "nbytes"):
        assert getattr(new, name) == getattr(old, name), name


def test_merging_warns_once_and_says_where_the_error_is():
    model = get_peft_model(packed_base(), lora_config())
    with pytest.warns(UserWarning, match=r"requantization_errors\(model\)"):
        model.merge_adapter()


@pytest.mark.parametrize("second", [{}, {"use_dora": True}], ids=str)
def test_several_adapters_merge_from_the_unmerged_base(second):
    packed, dense = pair(lora_config())
    for model in (packed, dense):
        torch.manual_seed(7)
        model.add_adapter("other", lora_config(r=3, init_lora_weights=False, **second))
    before = _bytes(packed)
    for model in (packed, dense):
        model.merge_adapter(["default"])
        model.merge_adapter(["other"])
        assert model.base_model.model.first.merged_adapters == ["default", "other"]
    wanted = dense.base_model.model.first.base_layer.weight
    got = packed.base_model.model.first.base_layer.dequantize()
    assert (got - wanted).norm() / wanted.norm() < 0.15
    both = copy.deepcopy(packed).merge_and_unload()
    close(both.first.weight, wanted, 1e-5)
    packed.unmerge_adapter()
    assert _equal(_bytes(packed), before)


def test_a_merged_copy_unmerges_too():
    packed, _ = pair(lora_config())
    before = _bytes(packed)
    packed.merge_adapter()
    twin = copy.deepcopy(packed)
    twin.unmerge_adapter()
    assert _equal(_bytes(twin), before) and not _equal(_bytes(packed), before)


def test_disabling_unmerges_as_in_peft():
    packed, _ = pair(lora_config())
    before = _bytes(packed)
    packed.merge_adapter()
    with packed.disable_adapter():
        assert torch.equal(packed(rows(6)), packed_base()(rows(6)))
    assert _equal(_bytes(packed), before)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_weights_that_are_not_finite_change_nothing(safe_merge):
    packed, _ = pair(lora_config())
    layer = packed.base_model.model.first
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    before = _bytes(packed)
    with pytest.raises(ValueError):
        packed.merge_adapter(safe_merge=safe_merge)
    assert _equal(_bytes(packed), before) and not layer.merged
    with pytest.raises(ValueError, match="NaN"):
        packed.merge_and_unload(safe_merge=True)


def test_a_merge_that_peft_refuses_changes_nothing():
    packed, _ = pair(lora_config(lora_bias=True, target_modules=["second"]))  # no bias to add to
    before = _bytes(packed)
    with pytest.raises(RuntimeError, match="has no bias"):
        packed.merge_adapter()
    assert _equal(_bytes(packed), before) and not packed.base_model.model.second.merged


def test_activated_lora_cannot_be_merged():
    packed, _ = pair(lora_config(alora_invocation_tokens=[1]))
    before = _bytes(packed)
    for merge in (packed.merge_adapter, packed.merge_and_unload):
        with pytest.raises(NotImplementedError):
            merge()
    assert _equal(_bytes(packed), before)


IA3 = IA3Config(target_modules=["first", "second"], feedforward_modules=["second"])
LOHA = LoHaConfig(r=3, target_modules=["first", "second"])


@pytest.mark.parametrize("config", [IA3, LOHA], ids=["ia3", "loha"])
def test_other_methods_merge_right_too(config):
    packed, dense = pair(config)
    before, y = _bytes(packed), packed(rows(6))
    packed.merge_adapter(safe_merge=True)
    assert requantization_errors(packed).overall < 0.2
    close(packed(rows(6)), y, 0.5)
    merged = copy.deepcopy(packed).merge_and_unload()
    assert type(merged.first) is nn.Linear
    close(merged(rows(6)), dense(rows(6)))
    packed.unmerge_adapter()
    assert _equal(_bytes(packed), before)
    assert torch.equal(packed(rows(6)), y)
