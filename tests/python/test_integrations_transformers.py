"""transformers: models packed while they load, saved, read by stock bitsandbytes, unpacked."""

import copy
import json
import os
import subprocess
import sys

import bitsandbytes
import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

import halfbyte
import halfbyte.integrations.bitsandbytes
from formats import bitsandbytes_values, relative_error, same_bits
from halfbyte.nn import NF4Linear
from tiny_model import build_config

pytestmark = pytest.mark.usefixtures("plain_bitsandbytes")

TOKENS = torch.arange(3, 15).view(2, 6)


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False}
    return LlamaForCausalLM(build_config(**(sizes | changes)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense Llama, float32, with an untied head; every weight is whole blocks wide."""
    path = tmp_path_factory.mktemp("dense")
    llama().save_pretrained(path)
    return path


def load(path, *args, **options):
    config = halfbyte.NF4Config(*args, **options)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def packed_state(model) -> dict:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same_states(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)


def packed_names(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, NF4Linear)}


# --- the config ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"block_size": 48}, ValueError, "block_size: expected a power of two .* got 48"),
        ({"block_size": 16}, ValueError, "block_size: .* got 16"),
        ({"block_size": 64.0}, ValueError, "block_size: .* got 64.0"),
        ({"double_quant": 1}, TypeError, "double_quant: expected True or False, got 1"),
        ({"codebook": "nf3"}, ValueError, "codebook: expected nf4, fp4 or int4, got 'nf3'"),
        ({"compute_dtype": "bf16"}, ValueError, "compute_dtype: .* got 'bf16'"),
        ({"compute_dtype": torch.int8}, ValueError, "compute_dtype: .* got torch.int8"),
        ({"skip_modules": "lm_head"}, TypeError, "skip_modules: .* list of names .* 'lm_head'"),
        ({"skip_modules": [3]}, TypeError, r"skip_modules: .* list of names .* \[3\]"),
    ],
)
def test_values_that_do_not_fit_are_errors(options, error, message):
    with pytest.raises(error, match=message):
        halfbyte.NF4Config(**options)


def test_the_package_offers_the_config_and_nothing_unknown():
    assert halfbyte.NF4Config.__module__ == "halfbyte.integrations.transformers"
    with pytest.raises(AttributeError, match="no attribute 'NF4Confg'"):
        halfbyte.NF4Confg  # noqa: B018


def test_a_config_goes_through_json_and_stock_accepts_it():
    config = halfbyte.NF4Config(128, False, "fp4", "bfloat16", ["q_proj"])
    data = json.loads(json.dumps(config.to_dict()))
    again = AutoQuantizationConfig.from_dict(data)
    assert type(again) is halfbyte.NF4Config and again.to_dict() == config.to_dict()
    assert (again.block_size, again.codebook, again.compute_dtype) == (128, "fp4", torch.bfloat16)
    stock = BitsAndBytesConfig.from_dict(data)
    assert stock.load_in_4bit and stock.bnb_4bit_quant_type == "fp4"
    assert stock.bnb_4bit_compute_dtype == torch.bfloat16
    assert not stock.bnb_4bit_use_double_quant
    given = {"quant_method": "halfbyte", "block_size": 256}
    assert AutoQuantizationConfig.from_dict(given).block_size == 256
    assert "bitsandbytes" not in str(halfbyte.NF4Config(codebook="int4").to_dict())


def test_other_bitsandbytes_configs_are_read_as_before():
    for data in ({"load_in_4bit": True}, BitsAndBytesConfig(load_in_4bit=True).to_dict()):
        config = AutoQuantizationConfig.from_dict(data)
        assert type(config) is BitsAndBytesConfig and config.load_in_4bit


# --- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"block_size": 32, "double_quant": False}),
        (torch.bfloat16, {"codebook": "fp4"}),
        (torch.float16, {"codebook": "int4", "block_size": 256}),
    ],
)
@pytest.mark.parametrize("size", [64, 48], ids=["whole", "odd"])
def test_a_model_is_packed_as_quantize_packs_it(tmp_path, size, dtype, options):
    sizes = {"hidden_size": size, "intermediate_size": 100 if size == 48 else 128}
    llama(**sizes).save_pretrained(tmp_path)
    config = halfbyte.NF4Config(**options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=dtype)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    want = halfbyte.quantize_(dense, **options)
    assert packed_names(model) == packed_names(want) and len(packed_names(model)) == 14
    assert same_states(packed_state(model), packed_state(want))
    assert same_bits(logits(model), logits(want))
    floating = {p.dtype for p in model.parameters() if p.is_floating_point()}
    assert floating == {dtype} and model.dtype == dtype
    assert not any(p.is_meta for p in model.parameters())


def test_the_values_are_those_of_the_dense_model_with_dequantized_weights(folder):
    model = load(folder)
    dense = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name in packed_names(model):
            weight = dense.get_submodule(name).weight
            weight.copy_(halfbyte.quantize_nf4(weight).dequantize())
    assert relative_error(logits(model), logits(dense)) <= 1e-5


def test_biases_are_loaded_and_zero_where_there_are_none(tmp_path):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=60,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    dense = Qwen2ForCausalLM(config)
    nn.init.normal_(dense.model.layers[0].self_attn.q_proj.bias)
    dense.save_pretrained(tmp_path)
    layer = load(tmp_path).model.layers[0].self_attn.q_proj
    assert torch.equal(layer.bias, dense.model.layers[0].self_attn.q_proj.bias)
    assert isinstance(layer, NF4Linear)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del state["model.layers.0.self_attn.q_proj.bias"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert not load(tmp_path).model.layers[0].self_attn.q_proj.bias.any()


def test_head_tied_weights_and_named_modules_stay_dense(folder, tmp_path):
    model = load(folder, skip_modules=["self_attn.q_proj", "model.layers.1.mlp"])
    dense = {n for n, module in model.named_modules() if type(module) is nn.Linear}
    assert dense == {"lm_head"} | {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)} | {
        f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")
    }
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert packed_names(again) == packed_names(model)
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    tied = load(tmp_path, skip_modules=["down_proj"])
    assert type(tied.lm_head) is nn.Linear
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert len(packed_names(tied)) == 12


def test_a_name_that_fits_no_module_is_an_error(folder):
    message = "skip_modules: .* LlamaForCausalLM, got 'q_prj', which fits none"
    with pytest.raises(ValueError, match=message):
        load(folder, skip_modules=["q_prj", "k_proj"])


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_weight_that_cannot_be_packed_is_an_error_with_its_name(tmp_path, value):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = float(value)
    model.save_pretrained(tmp_path)
    message = rf"model\.layers\.1\.mlp\.up_proj\.weight: weight: .*{value} at flat index 131 "
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_checkpoint_without_a_weight_is_an_error(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.weight"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"found none|model\.layers\.0\.mlp\.up_proj\.weight"):
        load(tmp_path)


def test_device_maps(folder):
    config = halfbyte.NF4Config()
    for place in ("cpu", {"": "cpu"}, "auto"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, device_map=place
        )
        assert len(packed_names(model)) == 14
    parts = {"model.embed_tokens": "cpu", "model": "disk", "lm_head": "cpu"}
    with pytest.raises(ValueError, match="device_map: expected accelerators or the CPU alone"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map=parts)


def test_one_config_serves_several_models(folder, tmp_path):
    config = halfbyte.NF4Config(skip_modules=["q_proj"])
    before = config.to_dict()
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert config.to_dict() == before


MEMORY = """
import gc, sys, threading, torch, halfbyte
from transformers import AutoModelForCausalLM

def anonymous():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

peak, done = 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, anonymous())

AutoModelForCausalLM.from_pretrained(sys.argv[2], quantization_config=halfbyte.NF4Config())
gc.collect()
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=halfbyte.NF4Config(), dtype=torch.float32)
done.set()
thread.join()
print(peak - before, model.get_memory_footprint())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_peak_memory_is_the_packed_model_and_one_tensor(folder, tmp_path):
    """bfloat16 on disk, read as float32: each tensor is really made, 17 MB the largest.

    The C library gives freed memory back at once, so that what is held is what is counted.
    """
    width, inner = 1024, 4096
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = llama(hidden_size=width, intermediate_size=inner, vocab_size=64)
    finally:
        torch.set_default_dtype(torch.float32)
    dense = 4 * sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path)
    del model
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    peak, packed = map(int, result.stdout.split()[-2:])
    largest = 4 * width * inner
    assert packed < dense / 5
    assert packed * 0.9 < peak < packed + 1.1 * largest + 4e6, (peak, packed, largest)


# --- saving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["5GB", "40KB"], ids=["whole", "sharded"])
@pytest.mark.parametrize(
    "options", [{}, {"block_size": 128, "double_quant": False}, {"codebook": "int4"}]
)
def test_saved_models_come_back_bit_equal_again_and_again(folder, tmp_path, options, shard):
    model = load(folder, **options)
    want, state = logits(model), packed_state(model)
    for turn in range(3):
        path = tmp_path / str(turn)
        model.save_pretrained(path, max_shard_size=shard)
        assert (path / "model.safetensors.index.json").exists() == (shard != "5GB")
        model = AutoModelForCausalLM.from_pretrained(path)
        assert isinstance(model.config.quantization_config, halfbyte.NF4Config)
        assert same_states(packed_state(model), state)
        assert same_bits(logits(model), want)
    again = load(path)  # a config beside the folder's own: the folder's counts
    assert again.config.quantization_config.block_size == options.get("block_size", 64)
    assert same_states(packed_state(again), state)


def test_dtype_reaches_the_rest_of_a_packed_model(folder, tmp_path):
    model = load(folder)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters() if p.is_floating_point()} == {torch.bfloat16}
    for name in packed_names(model):
        ours, theirs = model.get_submodule(name), again.get_submodule(name)
        assert same_bits(ours.dequantize(), theirs.dequantize())


def test_another_head_on_a_packed_body(folder, tmp_path):
    load(folder).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(model.score) is nn.Linear and len(packed_names(model)) == 14
    assert model(TOKENS[:1]).logits.shape == (1, 3)


def damage(path, change) -> None:
    state = safetensors.torch.load_file(path / "model.safetensors")
    change(state)
    safetensors.torch.save_file(state, path / "model.safetensors", {"format": "pt"})


def test_a_damaged_checkpoint_is_an_error_with_its_key(folder, tmp_path):
    key = "model.layers.0.mlp.up_proj.weight"
    load(folder).save_pretrained(tmp_path)
    damage(tmp_path, lambda state: state.pop(f"{key}.nested_absmax"))
    with pytest.raises(ValueError, match=rf"{key}\.nested_absmax: expected .*no such entry"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    load(folder).save_pretrained(tmp_path)
    damage(tmp_path, lambda s: [s.pop(k) for k in list(s) if k.startswith(key)])
    with pytest.raises(ValueError, match=key):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(folder)
    load(folder).save_pretrained(tmp_path)

    def unpack(state):
        for k in list(state):
            if k.startswith(key):
                del state[k]
        state[key] = dense.get_parameter(key).detach()

    damage(tmp_path, unpack)
    with pytest.raises(ValueError, match=rf"{key}: expected an entry"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# --- stock bitsandbytes reads it -----------------------------------------------------------------


@pytest.fixture
def stock(monkeypatch):
    """transformers' registry as it is without halfbyte."""
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes_4bit", BitsAndBytesConfig)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"double_quant": False, "codebook": "fp4", "skip_modules": ["layers.1.mlp.up_proj"]},
        {"block_size": 256, "compute_dtype": "bfloat16"},
        {"block_size": 32},
    ],
)
def test_stock_bitsandbytes_loads_what_is_saved(folder, tmp_path, stock, options):
    model = load(folder, **options)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    layers = {n for n, m in theirs.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert layers == packed_names(model)
    for name in layers:
        dense = bitsandbytes_values(theirs.get_submodule(name).weight)
        # fp4 has two zeros, and theirs may be negative: equal values, not equal bits.
        assert torch.equal(dense, model.get_submodule(name).dequantize())
    if options.get("block_size", 64) <= 64:  # rows of whole blocks
        assert relative_error(logits(model), logits(theirs)) <= 1e-5


def test_one_folder_is_stock_s_without_halfbyte_and_halfbyte_s_with_it(folder, tmp_path):
    load(folder).save_pretrained(tmp_path)
    code = """
import sys
from transformers import AutoModelForCausalLM
def kind():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    return type(model.model.layers[0].mlp.up_proj).__module__.split(".")[0]
first = kind()
import halfbyte
halfbyte.NF4Config
print(first, kind())
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert result.stdout.split()[-2:] == ["bitsandbytes", "halfbyte"]


# --- what a loaded model can do ------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"skip_modules": ["lm_head", "k_proj"]}])
@pytest.mark.parametrize("take_over", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear"])
def test_merged_adapters_are_dense_in_what_is_saved(folder, tmp_path, targets, take_over, options):
    if take_over:
        halfbyte.integrations.bitsandbytes.take_over()
    try:
        config = halfbyte.NF4Config(**options)
        if take_over:
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                llm_int8_skip_modules=options.get("skip_modules"),
            )
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, target_modules=targets))
        merged = adapted.merge_and_unload()
        merged.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        halfbyte.integrations.bitsandbytes.give_back()
    assert packed_names(again) == packed_names(merged)
    assert same_states(packed_state(again), packed_state(merged))
    quantized = "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    assert quantized == bool(packed_names(merged)) == (targets != "all-linear")
    assert torch.equal(logits(again), logits(merged))


def test_dequantize_gives_a_dense_model_to_save(folder, tmp_path):
    model = load(folder)
    want = logits(model)
    weights = {n: model.get_submodule(n).dequantize() for n in packed_names(model)}
    assert model.dequantize() is model
    assert not packed_names(model) and not model.is_quantized
    assert not hasattr(model, "hf_quantizer")
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear and same_bits(layer.weight.detach(), weight)
    assert relative_error(logits(model), want) <= 1e-5
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_bits(logits(again), logits(model))
    assert load(folder).dequantize(torch.bfloat16).model.layers[0].mlp.up_proj.weight.dtype == (
        torch.bfloat16
    )


def test_traits_sizes_and_text(folder):
    model = load(folder)
    quantizer = model.hf_quantizer
    assert quantizer.is_trainable and quantizer.is_serializable()
    assert not hasattr(model, "is_loaded_in_4bit")
    stored = sum(p.numel() for p in model.parameters())
    assert model.num_parameters() == stored
    packed = sum(model.get_submodule(n).nf4_weight.nbytes for n in packed_names(model))
    floating = sum(4 * p.numel() for p in model.parameters() if p.is_floating_point())
    assert model.get_memory_footprint(return_buffers=False) == packed + floating
    text = "NF4Linear(in_features=64, out_features=128, bias=False, nf4, block_size=64"
    assert text in str(model)


def test_copies_casts_and_generation(folder):
    model = load(folder)
    want = logits(model)
    twin = copy.deepcopy(model)
    assert same_bits(logits(twin), want)
    assert same_states(packed_state(twin.to(torch.float32)), packed_state(model))
    assert twin.to(torch.bfloat16)(TOKENS).logits.dtype == torch.bfloat16
    out = model.generate(TOKENS[:, :3], max_new_tokens=4, do_sample=False, eos_token_id=-1)
    assert out.shape == (2, 7)


def test_trainer_trains_an_adapter(folder, tmp_path):
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load(folder), config)
    before = packed_state(model.base_model.model)
    rows = [{"input_ids": list(range(3, 11)), "labels": list(range(3, 11))}] * 4
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=3,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[2] < losses[1] < losses[0]
    after = packed_state(model.base_model.model)
    assert all(same_bits(after[key], before[key]) for key in before if "lora_" not in key)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=load(folder), args=arguments, train_dataset=rows)


def test_statistics_under_their_own_names_are_no_missing_keys(folder, tmp_path, monkeypatch):
    """What accelerate's FSDP has a state dict list while it loads."""
    want = load(folder)
    want.save_pretrained(tmp_path)
    monkeypatch.setattr(halfbyte.nn, "_accelerate_shards", lambda: True)
    for path in (folder, tmp_path):
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            quantization_config=halfbyte.NF4Config(),
            output_loading_info=True,
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert same_bits(logits(model), logits(want))


def test_compute_dtype_is_the_dtype_of_the_products(folder, tmp_path):
    model = load(folder, compute_dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(5, 64)
    plain = NF4Linear(layer.nf4_weight)
    assert same_bits(layer(x), plain(x.bfloat16()).float()) and layer(x).dtype == torch.float32
    assert not torch.equal(layer(x), plain(x))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.quantization_config.compute_dtype == torch.bfloat16
    assert same_bits(logits(again), logits(model))
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.dtype == torch.float32
    with pytest.raises(ValueError, match="compute_dtype: expected .* got torch.float64"):
        NF4Linear(layer.nf4_weight, compute_dtype=torch.float64)


def test_gpt2_s_transposed_layers(tmp_path, stock):
    torch.manual_seed(0)
    size = {"vocab_size": 60, "n_embd": 64, "n_head": 4, "n_layer": 1, "n_positions": 32}
    dense = GPT2LMHeadModel(GPT2Config(**size)).eval()
    dense.save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense")
    assert len(packed_names(model)) == 4
    layer = model.transformer.h[0].mlp.c_fc
    assert (layer.in_features, layer.out_features) == (64, 256)
    want = halfbyte.quantize_nf4(dense.transformer.h[0].mlp.c_fc.weight.T.contiguous())
    assert same_bits(layer.dequantize(), want.dequantize())
    model.save_pretrained(tmp_path / "packed")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert relative_error(logits(theirs), logits(model)) <= 1e-5
    AUTO_QUANTIZATION_CONFIG_MAPPING["bitsandbytes_4bit"] = (
        halfbyte.integrations.transformers.MarkedBitsAndBytesConfig
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert same_bits(logits(again), logits(model))
    again.dequantize().save_pretrained(tmp_path / "unpacked")
    assert type(again.transformer.h[0].mlp.c_fc) is Conv1D
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked")
    assert relative_error(logits(plain), logits(model)) <= 1e-5
