"""Whole models calibrated: the layers of `quantize_`, nearer to the dense model."""

import copy
import json

import bitsandbytes
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from typer.testing import CliRunner

import halfbyte
from formats import same_bits
from halfbyte.calibrate import InputMoments, quantize_calibrated
from halfbyte.cli.main import app
from halfbyte.finetune.data import read_rows
from halfbyte.finetune.encode import encode_row
from halfbyte.integrations import calibrate
from halfbyte.integrations.calibrate import (
    calibrate_model,
    quantize_calibrated_,
    row_windows,
    token_windows,
)
from halfbyte.integrations.folder_check import verify_folder
from halfbyte.integrations.streaming import load_dense
from halfbyte.nn import NF4Linear
from tiny_model import build_config, build_tokenizer, save_gguf

TEXT = "What colour is the red thing? The red thing is red. " * 40


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return LlamaForCausalLM(build_config(hidden_size=64, tie_word_embeddings=False)).eval()


@pytest.fixture
def model(dense):
    return copy.deepcopy(dense)


@pytest.fixture(scope="module")
def windows():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 320, (12, 40), generator=generator)


def packed_layers(model) -> dict[str, NF4Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, NF4Linear)}


def in_dtype(model, dtype):
    """Parameters in `dtype`; rotary frequencies stay float32, as in a model that is loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def distance(model, dense, tokens) -> float:
    """Mean squared difference of the logits."""
    with torch.no_grad():
        return float((model(tokens).logits - dense(tokens).logits).pow(2).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequential", [True, False])
def test_nearer_to_the_dense_model_than_absmax(model, dense, windows, sequential, dtype):
    model = in_dtype(model, dtype)
    absmax = halfbyte.quantize_(copy.deepcopy(model)).float()
    assert quantize_calibrated_(model, windows, sequential=sequential) is model
    layers, plain = packed_layers(model), packed_layers(absmax)
    assert layers.keys() == plain.keys() and len(layers) == 14
    assert all(m.weight_dtype == dtype for m in layers.values())
    assert model.lm_head.weight.dtype == dtype and model.model.norm.weight.dtype == dtype
    assert model.model.layers[0].input_layernorm.weight.dtype == dtype
    generator = torch.Generator().manual_seed(2)
    unseen = torch.randint(3, 320, (4, 40), generator=generator)
    model = model.float()
    assert distance(model, dense, windows) < 0.75 * distance(absmax, dense, windows)
    assert distance(model, dense, unseen) < 0.9 * distance(absmax, dense, unseen)


def test_the_first_layer_gets_the_moments_of_its_inputs(model, dense, windows):
    inputs = []
    layer = copy.deepcopy(dense)
    handle = layer.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda module, arguments: inputs.append(arguments[0].detach())
    )
    with torch.no_grad():
        for window in windows:
            layer(window[None])
    handle.remove()
    rows = torch.cat(inputs).reshape(-1, 64)
    weight = dense.model.layers[0].self_attn.q_proj.weight
    expected = quantize_calibrated(weight, rows.T @ rows)
    quantize_calibrated_(model, windows)
    got = model.model.layers[0].self_attn.q_proj.dequantize()
    assert (got != expected.dequantize()).float().mean() < 0.02  # sums in another order


def test_layers_on_one_input_share_its_moments(model, windows, monkeypatch):
    made = []
    original = InputMoments.from_moments
    monkeypatch.setattr(
        InputMoments, "from_moments", lambda *a: made.append(a[0].shape) or original(*a)
    )
    quantize_calibrated_(model, windows)
    assert [tuple(shape) for shape in made] == [(64, 64), (64, 64), (64, 64), (100, 100)] * 2


def test_sequential_shows_a_layer_what_the_packed_ones_yield(dense, windows):
    results = {}
    for sequential in (True, False):
        model = copy.deepcopy(dense)
        quantize_calibrated_(model, windows, sequential=sequential)
        results[sequential] = packed_layers(model)
    for name, layer in results[True].items():
        same = same_bits(layer.weight, results[False][name].weight)
        assert same == name.startswith("model.layers.0."), name


def test_the_model_runs_and_loads_as_any_quantized_one(model, windows):
    model.train()
    linear = model.model.layers[1].mlp.up_proj
    calls = []
    linear.register_forward_hook(lambda *a: calls.append(a))
    seen = []
    quantize_calibrated_(model, windows, progress=lambda *a: seen.append(a))
    assert seen == [(1, 2, "model.layers.0"), (2, 2, "model.layers.1")]
    assert model.training and all(m.training for m in model.modules())
    assert all("forward" not in vars(m) for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())
    calls.clear()
    logits = model(windows).logits
    assert len(calls) == 1
    other = halfbyte.quantize_(copy.deepcopy(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(windows).logits, logits)


@pytest.mark.parametrize(
    "skip", [None, ["down_proj", "layers.0.mlp.up_proj"]], ids=["head", "more"]
)
def test_it_is_saved_and_loaded_as_any_packed_model(model, windows, tmp_path, skip):
    model = in_dtype(model, torch.bfloat16)
    assert calibrate_model(model, windows, config=halfbyte.NF4Config(skip_modules=skip)) is model
    model.save_pretrained(tmp_path)
    ours = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert packed_layers(ours).keys() == packed_layers(model).keys()
    assert len(packed_layers(ours)) == (14 if skip is None else 11)
    for name, layer in packed_layers(ours).items():
        assert same_bits(layer.dequantize(), model.get_submodule(name).dequantize()), name
    assert torch.equal(ours(windows).logits, model(windows).logits)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "bitsandbytes" and settings["bnb_4bit_use_double_quant"]


def test_settings_and_what_cannot_be_calibrated(model, dense, windows):
    config = halfbyte.NF4Config(32, False, "fp4", compute_dtype="bfloat16")
    layers = packed_layers(calibrate_model(model, windows, config=config))
    for layer in layers.values():
        assert layer.block_size == 32 and layer.nested_absmax is None and layer.codebook == "fp4"
        assert layer.compute_dtype == torch.bfloat16
    assert config.left_dense is None  # the caller's own stays as it is
    with pytest.raises(ValueError, match=r"fc1: expected|c_attn: expected linear layers"):
        calibrate_model(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2)), windows)
    with pytest.raises(ValueError, match="skip_modules: expected names of modules of Llama"):
        calibrate_model(dense, windows, config=halfbyte.NF4Config(skip_modules=["nothing"]))


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(dense, tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    in_dtype(copy.deepcopy(dense), torch.bfloat16).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def quantize(*arguments, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["quantize", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture(params=["text", "rows"])
def text(request, tmp_path):
    """A text, or rows of which one is a chat."""
    if request.param == "text":
        (tmp_path / "a.txt").write_text(TEXT)
        return tmp_path / "a.txt"
    turns = [{"role": "user", "content": "Red?"}, {"role": "assistant", "content": "Blue."}]
    rows = [{"messages": turns}, {"prompt": "The red ", "completion": "thing."}] * 30
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "a.jsonl"


@pytest.mark.usefixtures("plain_bitsandbytes")
def test_the_command_writes_what_stock_bitsandbytes_loads(source, text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    found = quantize(source, out, "--calibrate", text, "--skip", "layers.0.mlp.up_proj")
    assert "14 of" not in found and "13 of" in found and "calibrated with" in found
    assert sorted(tmp_path.iterdir()) == [text, out]  # nothing is left beside it
    verify_folder(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    rows = [tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    if text.suffix == ".jsonl":
        rows = [encode_row(row, tokenizer).input_ids for row in read_rows(text)]
    config = halfbyte.NF4Config(skip_modules=["layers.0.mlp.up_proj"])
    expected = calibrate_model(load_dense(source), row_windows(rows), config=config)
    ours = AutoModelForCausalLM.from_pretrained(out)
    assert ours.config.quantization_config.to_dict() == config_of(expected)
    assert packed_layers(ours).keys() == packed_layers(expected).keys()
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes_4bit", BitsAndBytesConfig)
    with torch.compiler.set_stance("force_eager"):
        stock = AutoModelForCausalLM.from_pretrained(out)
    for name, layer in packed_layers(ours).items():
        assert same_bits(layer.dequantize(), expected.get_submodule(name).dequantize()), name
        theirs = stock.get_submodule(name).weight
        assert isinstance(theirs, bitsandbytes.nn.Params4bit)
        values = bitsandbytes.functional.dequantize_4bit(theirs.data, theirs.quant_state)
        assert torch.equal(values, layer.dequantize()), name


def config_of(model) -> dict:
    return model.config.quantization_config.to_dict()


def test_the_command_takes_gguf_and_the_default_text(tmp_path):
    save_gguf(tmp_path / "a.gguf")
    out = tmp_path / "out"
    assert "calibrated with" in quantize(tmp_path / "a.gguf", out, "--calibrate", "default")
    verify_folder(out)
    assert len(packed_layers(AutoModelForCausalLM.from_pretrained(out))) == 14
    assert AutoTokenizer.from_pretrained(out)("The red thing.").input_ids
    again = quantize(out, tmp_path / "b", "--calibrate", "default", code=2)
    assert "is packed already: expected no" in again and not (tmp_path / "b").exists()


def test_bad_calibration_text_is_one_sentence(source, tmp_path):
    out = tmp_path / "out"
    found = quantize(source, out, "--calibrate", tmp_path / "absent.txt", code=2)
    assert "absent.txt: expected a text file or the word default" in found
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    assert "expected UTF-8" in quantize(source, out, "--calibrate", tmp_path / "a.txt", code=2)
    (tmp_path / "b.txt").write_text("")
    found = quantize(source, out, "--calibrate", tmp_path / "b.txt", code=2)
    assert "expected text to calibrate with" in found
    (tmp_path / "a.jsonl").write_text('{"messages": 3}')
    assert "a.jsonl, line 1" in quantize(source, out, "--calibrate", tmp_path / "a.jsonl", code=2)
    assert not out.exists()


# --- details --------------------------------------------------------------------------------------


def test_skipped_and_unreached_layers(model, windows):
    model.extra = nn.Linear(64, 32)
    extra = model.extra.weight.detach().clone()
    quantize_calibrated_(model, windows, skip_modules=["lm_head", "down_proj"])
    layers = packed_layers(model)
    assert not any("down_proj" in name for name in layers)
    assert same_bits(
        layers["extra"].nf4_weight.dequantize(), halfbyte.quantize_nf4(extra).dequantize()
    )


def test_windows_are_spread_over_the_texts():
    tokenizer = build_tokenizer()
    whole = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    windows = token_windows(TEXT, tokenizer, samples=4, length=16)
    assert windows.shape == (4, 16)
    there = len(whole) // 16
    starts = [i * there // 4 * 16 for i in range(4)]
    assert windows.tolist() == [whole[s : s + 16] for s in starts]
    short = token_windows("The red thing.", tokenizer, samples=4, length=512)
    assert short.shape[0] == 1 and short.shape[1] < 40
    two = token_windows(["The red thing.", "The thing."], tokenizer, samples=4, length=512)
    assert tokenizer.eos_token_id in two[0].tolist()


@pytest.mark.parametrize("texts", [TEXT, [TEXT, "The thing is blue."], None])
def test_texts_and_the_default_text(model, texts):
    quantize_calibrated_(model, texts, build_tokenizer(), samples=4, length=32)
    assert len(packed_layers(model)) == 14
    assert len(calibrate.default_text()) > 4000


def test_bad_input_is_named(dense, windows):
    def message(change=lambda model: None, texts=windows, **options) -> str:
        model = copy.deepcopy(dense)
        change(model)
        with pytest.raises(ValueError) as caught:
            quantize_calibrated_(model, texts, **options)
        assert not any(m._forward_pre_hooks for m in model.modules())
        assert all("forward" not in vars(m) for m in model.modules())
        return str(caught.value)

    def bad_weight(model):
        model.model.layers[1].mlp.up_proj.weight.data[0, 3] = float("nan")

    def bad_activation(model):
        model.model.layers[1].input_layernorm.weight.data[5] = float("inf")

    found = message(bad_weight)
    assert (
        "model.layers.1" in found and "weight: expected finite values, got nan at index 3" in found
    )
    found = message(bad_activation)
    assert found.startswith("model.layers.1.self_attn.q_proj: inputs: moments: expected finite")
    assert "expected tokens int64 [windows, length]" in message(texts=torch.zeros(3, 4))
    assert "tokenizer: expected the model's tokenizer" in message(texts=TEXT)
    assert "expected text to calibrate with" in message(texts="", tokenizer=build_tokenizer())
    assert "skip_modules: expected names of modules" in message(skip_modules=["nothing"])
    with pytest.raises(ValueError, match="expected a list of layers with linear layers"):
        quantize_calibrated_(nn.Sequential(nn.Linear(4, 4)), windows)
