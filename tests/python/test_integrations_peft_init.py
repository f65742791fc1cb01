"""Initialisations that look at the base weight, and LoftQ, on packed bases."""

import pytest
import torch
from peft import (
    EvaConfig,
    KasaConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
)
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM

import halfbyte
from halfbyte.integrations.peft import loftq_initialize, requantization_errors
from peft_cases import K, N, Two, close, dense_base, lora_config, packed_base, pair, rows, same_step
from tiny_model import build_config


def _both(init, **changes):
    """(packed, dense) right after PEFT's initialisation, same random numbers."""
    models = []
    for base in (packed_base(), dense_base()):
        torch.manual_seed(3)
        models.append(get_peft_model(base, lora_config(init_lora_weights=init, **changes)))
    return models


def _delta(model, name="first"):
    return model.base_model.model.get_submodule(name).get_delta_weight("default")


REWRITING = ["pissa", "pissa_niter_4", "olora"]


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("init", REWRITING)
def test_principal_parts_move_into_the_adapter_and_the_rest_is_requantized(init, changes):
    packed, dense = _both(init, **changes)
    errors = requantization_errors(packed)
    assert len(errors.layers) == 2
    for name in ("first", "second"):
        close(_delta(packed, name), _delta(dense, name), 1e-3)
        rest = dense.base_model.model.get_submodule(name).base_layer.weight
        got = packed.base_model.model.get_submodule(name).base_layer
        error = ((got.dequantize() - rest).norm() / rest.norm()).item()
        assert errors.layers[f"base_model.model.{name}"] == pytest.approx(error, rel=1e-2)
        assert 0 < error < 0.15
        assert got.weight.dtype == torch.uint8 and got.nf4_weight.double_quant
    # Less is quantized than the whole weight holds, so the start is near the base.
    x = rows(8)
    assert (packed(x) - packed_base()(x)).norm() / packed_base()(x).norm() < 0.2


@pytest.mark.parametrize("init", ["orthogonal", "mica", "eva", "gaussian", True, False])
def test_others_leave_the_base_alone(init):
    packed, dense = _both(init)
    for name, parameter in dense.named_parameters():
        if "lora_" in name:
            close(packed.get_parameter(name) + 1, parameter + 1, 1e-4)
    assert torch.equal(packed.base_model.model.first.base_layer.weight, packed_base().first.weight)
    assert requantization_errors(packed).layers == {}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_saved_adapter_finds_its_rest_again(tmp_path, init):
    """PEFT repeats the initialisation on loading; it gives the same bytes."""
    packed, _ = _both(init)
    packed.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(packed_base(), tmp_path)
    assert torch.equal(again(rows(4)), packed(rows(4)))


def test_a_rewritten_base_merges_and_unmerges():
    packed, _ = _both("pissa")
    start = requantization_errors(packed)
    y = packed(rows(4))
    with pytest.warns(UserWarning, match="re-quantizes"):
        packed.merge_adapter()
    assert requantization_errors(packed) != start
    packed.unmerge_adapter()
    assert requantization_errors(packed) == start
    assert torch.equal(packed(rows(4)), y)


def test_corda_uses_what_its_calibration_left():
    models = []
    for base in (packed_base(), dense_base()):
        generator = torch.Generator().manual_seed(1)
        for name, shape in (("first", (N, K)), ("second", (K, N))):
            u, s, v = torch.svd(torch.randn(shape, generator=generator))
            eigens = type("Eigens", (), {"U_WC": u[:, :6], "S_WC": s[:6], "V_WC": v[:, :6]})
            getattr(base, name).eigens = eigens
        models.append(get_peft_model(base, lora_config(init_lora_weights="corda")))
    packed, dense = models
    close(_delta(packed), _delta(dense), 1e-4)
    assert len(requantization_errors(packed).layers) == 2
    assert not hasattr(packed.base_model.model.first.base_layer, "eigens")


def test_eva_sees_the_same_activations():
    ids = torch.randint(3, 320, (8, 16), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    factors = []
    for dense in (False, True):
        torch.manual_seed(0)
        model = halfbyte.quantize_(LlamaForCausalLM(build_config(num_hidden_layers=1)))
        attention = model.model.layers[0].self_attn
        if dense:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(attention, name, getattr(attention, name).to_linear(torch.float32))
        config = LoraConfig(
            r=4,
            target_modules=["o_proj"],
            init_lora_weights="eva",
            eva_config=EvaConfig(rho=1.0),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
        initialize_lora_eva_weights(model, [batch, batch], show_progress_bar=False)
        factors.append(attention.o_proj.lora_A["default"].weight)
    close(factors[0].abs(), factors[1].abs(), 1e-3)


def test_lora_ga_uses_the_gradient_it_is_given():
    models = []
    for base in (packed_base(), dense_base()):
        for name, shape in (("first", (N, K)), ("second", (K, N))):
            generator = torch.Generator().manual_seed(1)
            getattr(base, name)._peft_loraga_grad = torch.randn(shape, generator=generator)
        torch.manual_seed(3)
        config = lora_config(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
        models.append(get_peft_model(base, config))
    close(_delta(models[0]), _delta(models[1]), 1e-3)
    assert len(requantization_errors(models[0]).layers) == 2


def test_kasa_truncates_the_packed_weight():
    config = lora_config(kasa_config=KasaConfig())
    packed, dense = pair(config)
    for name in ("first", "second"):
        wanted = dense.base_model.model.get_submodule(name).base_layer.weight
        got = packed.base_model.model.get_submodule(name).base_layer.dequantize()
        assert (got - wanted).norm() / wanted.norm() < 0.15
        dense.base_model.model.get_submodule(name).base_layer.weight.data = got
    same_step(packed, dense, rows(5))


def test_kasa_loaded_without_data_truncates_at_first_use(tmp_path):
    packed, _ = pair(lora_config(kasa_config=KasaConfig()))
    packed.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(packed_base(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(again(rows(4)), packed(rows(4)))


def test_loftq_by_name_says_what_it_needs():
    config = lora_config()
    config.init_lora_weights = "loftq"  # the constructor wants scipy
    with pytest.warns(UserWarning, match="loftq_initialize"):
        packed = get_peft_model(packed_base(), config)
    assert torch.equal(packed(rows(4)), packed_base()(rows(4)))


# --- loftq_initialize ----------------------------------------------------------------------------


def _model(**changes):
    return get_peft_model(packed_base(), lora_config(**changes))


def _sources(folder):
    state = Two().state_dict()
    save_file({"first.weight": state["first.weight"]}, folder / "a.safetensors")
    rest = {k: v.contiguous() for k, v in state.items() if k != "first.weight"}
    save_file(rest, folder / "b.safetensors")
    return {"folder": folder, "mapping": state, "model": Two()}


@pytest.mark.parametrize("kind", ["folder", "mapping", "model"])
def test_the_error_falls_and_the_model_comes_nearer(tmp_path, kind):
    dense, x = Two(), rows(64)
    model = _model(use_rslora=True)
    far = (model(x) - dense(x)).norm()
    errors = loftq_initialize(model, _sources(tmp_path)[kind])
    assert errors.keys() == {"base_model.model.first", "base_model.model.second"}
    for name, (zero_init, loftq) in errors.items():
        layer = model.get_submodule(name)
        weight = dense.get_submodule(name.rpartition(".")[2]).weight
        start = layer.base_layer.dequantize()
        whole = start + layer.get_delta_weight("default")
        assert ((weight - whole).norm() / weight.norm()).item() == pytest.approx(loftq, rel=1e-4)
        assert ((weight - start).norm() / weight.norm()).item() == pytest.approx(
            zero_init, rel=1e-4
        )
        # The best rank-6 approximation of the residual.
        rest = torch.linalg.svdvals(weight - start)[6:].norm() / weight.norm()
        assert loftq == pytest.approx(rest.item(), rel=1e-3) and loftq < 0.8 * zero_init
    assert (model(x) - dense(x)).norm() < 0.9 * far
    same = packed_base().first.weight
    assert torch.equal(model.base_model.model.first.base_layer.weight, same)


def test_more_iterations_are_never_worse():
    totals = []
    for iterations in (1, 3, 6):
        torch.manual_seed(0)
        errors = loftq_initialize(_model(), Two(), iterations)
        totals.append([e.loftq for e in errors.values()])
    for worse, better in zip(totals, totals[1:], strict=False):
        assert all(b <= w + 1e-6 for w, b in zip(worse, better, strict=True))
    assert sum(totals[-1]) < sum(totals[0])


def test_names_inside_and_outside_a_task_model():
    state = Two().state_dict()
    for rename in (lambda n: "model." + n, lambda n: n):
        loftq_initialize(_model(), {rename(n): t for n, t in state.items()})
    wrapped = get_peft_model(
        nn.Sequential(packed_base()), LoraConfig(r=2, target_modules=["first", "second"])
    )
    assert len(loftq_initialize(wrapped, state)) == 2


def test_what_does_not_fit_is_named_and_nothing_changes(tmp_path):
    model, state = _model(), Two().state_dict()
    y = model(rows(4))
    for weights, message in (
        ({"first.weight": state["first.weight"]}, "no tensor 'second.weight'"),
        (state | {"second.weight": torch.zeros(3, 4)}, r"second.weight: expected \[40, 33\]"),
        (tmp_path, "found none"),
    ):
        with pytest.raises(ValueError, match=message):
            loftq_initialize(model, weights)
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="x.safetensors: not a readable"):
        loftq_initialize(model, tmp_path)
    with pytest.raises(ValueError, match="iterations: expected 1 or more"):
        loftq_initialize(model, state, 0)
    with pytest.raises(ValueError, match="expected LoRA layers"):
        loftq_initialize(Two(), state)
    with pytest.raises(ValueError, match="plain, unmerged"):
        loftq_initialize(_model(use_dora=True), state)
    assert torch.equal(model(rows(4)), y)


def test_the_bases_format_is_kept():
    base = halfbyte.quantize_(Two(), block_size=32, double_quant=False, codebook="fp4")
    model = get_peft_model(base, lora_config())
    loftq_initialize(model, Two(), 2)
    weight = model.base_model.model.first.base_layer.nf4_weight
    assert (weight.block_size, weight.codebook, weight.double_quant) == (32, "fp4", False)
