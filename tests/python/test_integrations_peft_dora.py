"""DoRA on packed weights against stock PEFT on the dequantized ones."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import halfbyte
from halfbyte.integrations import peft as bridge
from halfbyte.integrations.peft import _dora
from halfbyte.ops import lora_linear as ops
from peft_cases import close, dense_base, lora_config, packed_base, pair, rows, same_step

DORA = {"use_dora": True}


@pytest.mark.parametrize("shape", [(33, 40), (1, 7), (300, 65), (64, 128)])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("panel_bytes", [1, 1 << 24])
def test_row_norms_come_from_panels(shape, double_quant, panel_bytes, monkeypatch):
    monkeypatch.setattr(ops, "PANEL_BYTES", panel_bytes)
    torch.manual_seed(0)
    weight = halfbyte.quantize_nf4(torch.randn(shape), double_quant=double_quant)
    a, b = torch.randn(5, shape[1]), torch.randn(shape[0], 5)
    exact = weight.dequantize(torch.float32).double() + 0.7 * b.double() @ a.double()
    norms = _dora.adapted_row_norms(weight, a, b, 0.7)
    torch.testing.assert_close(norms.double(), exact.norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"r": 1}], ids=str)
def test_equals_stock_peft(changes, monkeypatch):
    packed, dense = pair(lora_config(**DORA, **changes))
    assert packed.base_model.model.first.lora_magnitude_vector["default"].weight.requires_grad

    def refuse(*args, **kwargs):
        raise AssertionError("a dense copy of the weight was made")

    monkeypatch.setattr(halfbyte.nn.NF4Linear, "dequantize", refuse)
    same_step(packed, dense, rows(3, 4))


def test_starts_at_the_base_and_with_its_norms():
    packed = get_peft_model(packed_base(), lora_config(**DORA))
    dense = get_peft_model(dense_base(), lora_config(**DORA))
    close(packed(rows(4)), packed_base()(rows(4)))
    for name, parameter in dense.named_parameters():
        if "magnitude" in name:
            close(packed.get_parameter(name), parameter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype):
    packed, dense = pair(lora_config(**DORA), dtype)
    same_step(packed, dense, rows(3, 4).to(dtype), tolerance=2e-2)


def test_autocast():
    packed, dense = pair(lora_config(**DORA))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = packed(rows(5))
    assert y.dtype == torch.bfloat16
    close(y.float(), dense(rows(5)), 3e-2)


def test_dropout_is_pefts(monkeypatch):
    """With the same mask, which is torch's dropout in both."""
    packed, dense = pair(lora_config(**DORA, lora_dropout=0.4))
    for model in (packed.train(), dense.train()):
        model.base_model.model.second = nn.Identity()  # one layer, one mask
    same_step(packed, dense, rows(6))
    packed.eval(), dense.eval()
    close(packed(rows(6)), dense(rows(6)))


def test_several_adapters_and_hooks_take_pefts_path():
    packed, dense = pair(lora_config(**DORA))
    for model in (packed, dense):
        torch.manual_seed(7)
        model.add_adapter("other", lora_config(r=3, init_lora_weights=False))
        model.base_model.set_adapter(["default", "other"])
    same_step(packed, dense, rows(6))
    packed, dense = pair(lora_config(**DORA))
    seen = []
    layer = packed.base_model.model.first
    layer.lora_A["default"].register_forward_hook(lambda *args: seen.append(1))
    same_step(packed, dense, rows(6))
    assert seen


def test_norms_follow_the_weights():
    """Whatever way A and W change, the next forward pass sees it."""
    packed, dense = pair(lora_config(**DORA))
    packed.eval(), dense.eval()
    packed(rows(4))
    for model in (packed, dense):
        model.base_model.model.first.lora_A["default"].weight.data.mul_(2)
    close(packed(rows(4)), dense(rows(4)))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saves_and_loads(tmp_path, low_cpu_mem_usage):
    packed, dense = pair(lora_config(**DORA))
    packed.save_pretrained(tmp_path)
    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    again = PeftModel.from_pretrained(packed_base(), tmp_path, **options)
    assert torch.equal(again(rows(6)), packed(rows(6)))
    stock = PeftModel.from_pretrained(dense_base(), tmp_path, **options)
    close(stock(rows(6)), packed(rows(6)))


def test_without_adoption_peft_dequantizes_by_itself():
    """PEFT's own layer finds `W_q` and `dequantize()`."""
    _, dense = pair(lora_config(**DORA))
    bridge.disable()
    try:
        packed, _ = pair(lora_config(**DORA))
    finally:
        bridge.enable()
    assert type(packed.base_model.model.first).__module__.startswith("peft.")
    same_step(packed, dense, rows(6))


def test_copies_compute_the_same():
    packed, _ = pair(lora_config(**DORA))
    assert torch.equal(copy.deepcopy(packed)(rows(6)), packed(rows(6)))


def test_compiles_without_a_graph_break():
    packed, _ = pair(lora_config(**DORA))
    compiled = torch.compile(packed.eval(), fullgraph=True, backend="eager")
    assert torch.equal(compiled(rows(6)), packed(rows(6)))
