"""Mixture-of-experts weights, packed expert by expert: loading, products, LoRA, saving."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

import halfbyte
from formats import relative_error, same_bits
from halfbyte.integrations.experts import PARAMETERS, NF4Experts, why_not_packed

TOKENS = torch.arange(3, 15).view(2, 6)
EXPERTS = "model.layers.0.mlp.experts"
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

SHARED = {
    "vocab_size": 60,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def qwen3_moe() -> nn.Module:
    """Experts of odd size: rows of 35 weights in `down_proj`, matrices of 35 * 48."""
    sizes = {"intermediate_size": 96, "moe_intermediate_size": 35, "head_dim": 12}
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHARED, **sizes, num_experts=5, num_experts_per_tok=2)
    )


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SHARED, intermediate_size=80, num_local_experts=4))


MODELS = {"qwen3_moe": qwen3_moe, "mixtral": mixtral}
BY_MODEL = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    paths = {}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        paths[name] = tmp_path_factory.mktemp(name)
        build().save_pretrained(paths[name])
    return paths


def load(path, dtype=torch.float32, **options):
    """Dense twins run eagerly: torch's grouped product takes rows of whole 16 bytes only."""
    return AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=halfbyte.NF4Config(**options),
        dtype=dtype,
        experts_implementation="eager",
    )


def dense_twin(model) -> nn.Module:
    return copy.deepcopy(model).dequantize()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


# --- packing -------------------------------------------------------------------------------------


@BY_MODEL
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"block_size": 32, "double_quant": False}),
        (torch.float16, {"codebook": "int4"}),
    ],
)
def test_each_expert_is_a_packed_weight_of_its_own(folders, name, dtype, options):
    dense = AutoModelForCausalLM.from_pretrained(folders[name], dtype=dtype)
    model = load(folders[name], dtype, **options)
    for layer in (0, 1):
        path = f"model.layers.{layer}.mlp.experts"
        experts, source = model.get_submodule(path), dense.get_submodule(path)
        assert isinstance(experts, NF4Experts) and why_not_packed(source) == ""
        for parameter in PARAMETERS:
            for expert, matrix in enumerate(getattr(source, parameter)):
                want = halfbyte.quantize_4bit(matrix, **{"codebook": "nf4"} | options)
                got = experts.nf4_weight(parameter, expert)
                for field, tensor in want.tensors().items():
                    assert same_bits(got.tensors()[field].view(tensor.dtype), tensor), field
                values = experts.dequantize(parameter)[expert]
                assert values.dtype == dtype and same_bits(values, want.dequantize())
        assert not any(p.requires_grad or p.is_floating_point() for p in experts.parameters())


def test_packed_bytes_are_few(folders):
    experts = load(folders["mixtral"], double_quant=False).get_submodule(EXPERTS)
    weights = sum(shape.numel() for shape in experts.shapes.values())
    stored = sum(p.numel() * p.element_size() for p in experts.parameters())
    assert stored == weights / 2 + 4 * weights / 64
    assert "gate_up_proj=[4, 160, 48], down_proj=[4, 48, 80], nf4, block_size=64" in repr(experts)


def test_named_experts_stay_dense_and_the_folder_is_bitsandbytes_s(folders, tmp_path):
    model = load(folders["mixtral"], skip_modules=["experts"])
    assert isinstance(model.get_submodule(EXPERTS).gate_up_proj, nn.Parameter)
    assert model.get_submodule(EXPERTS).gate_up_proj.is_floating_point()
    model.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert data["quant_method"] == "bitsandbytes"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_bits(logits(again), logits(model))


def test_an_expert_that_cannot_be_packed_is_an_error_with_its_name(tmp_path):
    model = qwen3_moe()
    with torch.no_grad():
        model.get_submodule(EXPERTS).down_proj[3, 1, 2] = float("nan")
    model.save_pretrained(tmp_path)
    message = rf"{EXPERTS}\.down_proj: expert 3: weight: .*nan at flat index 37 "
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_dense_module_is_packed_without_a_model():
    torch.manual_seed(0)
    dense = mixtral().get_submodule(EXPERTS)
    experts = NF4Experts(dense)
    x = torch.randn(7, 48)
    index, weights = torch.randint(4, (7, 2)), torch.rand(7, 2)
    want = experts.to_experts().eval()(x, index, weights)
    assert relative_error(experts(x, index, weights), want) <= 1e-5
    assert dense.gate_up_proj.is_floating_point()
    index[2, 1] = 4  # a place without an expert
    got = experts(x, index, weights)
    torch.testing.assert_close(got[:2], want[:2], rtol=1e-5, atol=1e-5)
    assert not torch.equal(got[2], want[2])


def test_other_experts_are_refused_with_the_reason(tmp_path, caplog):
    config = GptOssConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=32,
        num_local_experts=2,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts_per_tok=1,
        pad_token_id=0,
    )
    with pytest.raises(ValueError, match="experts: expected has_bias=False, got True"):
        NF4Experts(GptOssExperts(config))
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert "GptOssExperts: its fused experts stay dense: expected has_bias=False" in caplog.text
    assert logits(model).isfinite().all()
    with pytest.raises(ValueError, match="expected Parameters gate_up_proj"):
        NF4Experts(nn.Linear(3, 3))


# --- products ------------------------------------------------------------------------------------


@BY_MODEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_dense_model(folders, name, dtype):
    model = load(folders[name], dtype)
    dense = dense_twin(model)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert relative_error(logits(model), logits(dense)) <= tolerance
    experts, twin = model.get_submodule(EXPERTS), dense.get_submodule(EXPERTS)
    torch.manual_seed(0)
    index, dy = torch.randint(4, (9, 2)), torch.randn(9, 48, dtype=dtype)
    grads = []
    for module in (experts, twin):
        torch.manual_seed(1)
        x = torch.randn(9, 48, dtype=dtype, requires_grad=True)
        weights = torch.rand(9, 2, dtype=dtype).requires_grad_()
        module(x, index, weights).backward(dy)
        grads.append((x.grad, weights.grad))
    for got, want in zip(*grads, strict=True):
        assert relative_error(got, want) <= tolerance


def test_compute_dtype_and_autocast(folders):
    experts = load(folders["mixtral"], compute_dtype="bfloat16").get_submodule(EXPERTS)
    plain = load(folders["mixtral"]).get_submodule(EXPERTS)
    torch.manual_seed(0)
    x, index, weights = torch.randn(9, 48), torch.randint(4, (9, 2)), torch.rand(9, 2)
    y = experts(x, index, weights)
    assert y.dtype == torch.float32 and not torch.equal(y, plain(x, index, weights))
    assert relative_error(y, plain(x, index, weights)) <= 2e-2
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(plain(x, index, weights), y) <= 2e-2


# --- saving --------------------------------------------------------------------------------------


@BY_MODEL
@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["whole", "sharded"])
def test_saved_models_come_back_bit_equal(folders, tmp_path, name, shard):
    model = load(folders[name], block_size=32)
    state, want = model.state_dict(), logits(model)
    for turn in ("first", "second"):
        model.save_pretrained(tmp_path / turn, max_shard_size=shard)
        data = json.loads((tmp_path / turn / "config.json").read_text())["quantization_config"]
        assert data["quant_method"] == "halfbyte" and "load_in_4bit" not in data
        model = AutoModelForCausalLM.from_pretrained(tmp_path / turn)
        again = model.state_dict()
        assert again.keys() == state.keys()
        assert all(same_bits(again[key], state[key]) for key in state)
        assert same_bits(logits(model), want)


@BY_MODEL
def test_dequantize_gives_the_dense_model_to_save(folders, tmp_path, name):
    model = load(folders[name])
    dense = dense_twin(model)
    assert type(dense.get_submodule(EXPERTS)).__name__.endswith("Experts")
    assert same_bits(
        dense.get_submodule(EXPERTS).down_proj.detach(),
        model.get_submodule(EXPERTS).dequantize("down_proj"),
    )
    dense.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert same_bits(logits(plain), logits(dense))
    assert "quantization_config" not in plain.config.to_dict()


# --- LoRA ----------------------------------------------------------------------------------------


def with_adapter(model, targets=TARGETS, **options) -> nn.Module:
    """A PEFT model whose adapter is the same for models of the same shapes, and not zero."""
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=targets, **options
    )
    model = get_peft_model(model, config)
    fill(model)
    return model


def fill(model) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


def trained(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@BY_MODEL
@pytest.mark.parametrize("targets", [TARGETS, TARGETS[:1], TARGETS[1:]], ids=["both", "up", "down"])
def test_lora_is_peft_s_on_the_dense_model(folders, name, targets):
    model = load(folders[name])
    dense = with_adapter(dense_twin(model), targets)
    ours = with_adapter(model, targets)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in dense.named_parameters() if p.requires_grad
    }
    assert relative_error(logits(ours), logits(dense)) <= 1e-5
    got, want = trained(ours), trained(dense)
    assert got.keys() == want.keys() and any("experts" in key for key in got)
    for key in want:
        assert relative_error(got[key], want[key]) <= 1e-4, key
    with ours.disable_adapter(), dense.disable_adapter():
        assert relative_error(logits(ours), logits(dense)) <= 1e-5


def test_no_dense_copy_of_the_experts_is_made_for_lora(folders, monkeypatch):
    ours = with_adapter(load(folders["mixtral"]))

    def refuse(*args, **kwargs):
        raise AssertionError("dequantized")

    monkeypatch.setattr(halfbyte.NF4Weight, "dequantize", refuse)
    assert any("experts" in name for name in trained(ours))


def test_gradient_checkpointing_gives_the_same_gradients(folders):
    ours = with_adapter(load(folders["qwen3_moe"])).train()
    want = trained(ours)
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    got = trained(ours)
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_several_adapters(folders):
    model = load(folders["mixtral"])
    dense, ours = with_adapter(dense_twin(model)), with_adapter(model)
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=TARGETS)
    for each in (dense, ours):
        each.add_adapter("other", copy.deepcopy(config))
        fill(each)
    for active in (["other"], ["default", "other"], ["default"]):
        for each in (dense, ours):
            each.base_model.set_adapter(active)
        assert relative_error(logits(ours), logits(dense)) <= 1e-5, active


def test_adapters_are_files_of_peft_both_ways(folders, tmp_path):
    model = load(folders["mixtral"])
    twin, again = dense_twin(model), load(folders["mixtral"])
    ours = with_adapter(model)
    ours.save_pretrained(tmp_path)
    want = logits(ours)
    assert relative_error(logits(PeftModel.from_pretrained(twin, tmp_path)), want) <= 1e-5
    assert same_bits(logits(PeftModel.from_pretrained(again, tmp_path)), want)


def test_merging_gives_dense_experts_and_unloading_packed_ones(folders):
    ours = with_adapter(load(folders["qwen3_moe"]))
    want = logits(ours)
    with pytest.raises(NotImplementedError, match="use merge_and_unload"):
        ours.base_model.model.get_submodule(EXPERTS).merge()
    merged = ours.merge_and_unload()
    assert type(merged.get_submodule(EXPERTS)).__name__ == "Qwen3MoeExperts"
    assert relative_error(logits(merged), want) <= 1e-4
    plain = logits(load(folders["qwen3_moe"]))
    unloaded = with_adapter(load(folders["qwen3_moe"])).unload()
    assert isinstance(unloaded.get_submodule(EXPERTS), NF4Experts)
    assert same_bits(logits(unloaded), plain)


def test_adapters_that_do_not_fit_are_errors(folders):
    with pytest.raises(ValueError, match="r: expected a rank of 1 to 512, got 600"):
        get_peft_model(
            load(folders["mixtral"]),
            LoraConfig(r=600, target_modules=[], target_parameters=TARGETS),
        )
    with pytest.raises(ValueError, match="init_lora_weights: .* got 'pissa'"):
        with_adapter(load(folders["mixtral"]), init_lora_weights="pissa")
    with pytest.raises(ValueError, match="gate_up_proj_absmax"):
        with_adapter(load(folders["mixtral"]), ["mlp.experts.gate_up_proj_absmax"])
