"""The base model: what is refused before loading, and GGUF files converted once."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlamaForCausalLM

from halfbyte.finetune import base as bases
from halfbyte.finetune.errors import FinetuneError
from tiny_model import build_config, save_gguf, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def _message(path, step=bases.open_base):
    with pytest.raises(FinetuneError) as caught:
        step(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("base ")
    return str(caught.value)


def test_absent(tmp_path):
    assert "no such file or folder" in _message(tmp_path / "absent")


def test_neither_folder_nor_gguf(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "expected a Hugging Face folder or a .gguf file" in _message(tmp_path / "model.bin")


def test_not_a_gguf_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"<html>")
    assert "expected a GGUF file, got first bytes b'<htm'" in _message(tmp_path / "model.gguf")


def test_folder_without_config_and_adapter_folder(tmp_path):
    assert _message(tmp_path).endswith("expected a config.json in it, got none")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "this is an adapter, name the model it was trained on" in _message(tmp_path)


def test_broken_config(copy):
    (copy / "config.json").write_text("{")
    assert "config.json is not valid JSON" in _message(copy)


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    assert "expected *.safetensors weights in it, got none" in _message(copy)


def test_cut_weights(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "not a readable safetensors file" in _message(copy)


def test_absent_tensors(copy):
    file = copy / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    message = _message(bases.open_base(copy), lambda base: bases.load_model(base, torch.float32))
    assert message.endswith("1 tensors are absent, the first is model.layers.1.mlp.up_proj.weight")


def test_not_a_language_model(copy):
    BertConfig(hidden_size=8, num_attention_heads=1, architectures=["x"]).save_pretrained(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))
    assert "expected a causal language model, got 'vit'" in _message(
        bases.open_base(copy), bases.load_config
    )


def test_unknown_architecture(copy):
    (copy / "config.json").write_text('{"model_type": "no-such-model"}')
    assert "no-such-model" in _message(bases.open_base(copy), bases.load_config)


def test_already_quantized(copy):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (copy / "config.json").write_text(json.dumps(config))
    assert "got a quantized model" in _message(bases.open_base(copy), bases.load_config)


def test_targets_are_matched_as_peft_does():
    linear, head = bases.linear_names(build_config())
    assert head == "lm_head" and head not in linear
    assert len(linear) == 2 * 7
    bases.check_targets((), linear, head)
    bases.check_targets(("q_proj", "mlp.up_proj", "model.layers.0.self_attn.v_proj"), linear, head)
    for target, message in (
        ("q_prj", "expected linear layers (down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, "
         "v_proj), got 'q_prj'"),
        ("proj", "got 'proj'"),
        ("embed_tokens", "got 'embed_tokens'"),
        ("lm_head", "'lm_head' is the head, which stays as it is"),
    ):  # fmt: skip
        with pytest.raises(FinetuneError) as caught:
            bases.check_targets((target,), linear, head)
        assert message in str(caught.value)
    with pytest.raises(FinetuneError, match="got a model without any"):
        bases.check_targets((), [], None)


def test_gguf_is_converted_once_and_dense(tmp_path, monkeypatch):
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    path = save_gguf(tmp_path / "tiny.F16.gguf")
    base = bases.open_base(path)
    assert base.folder is None
    assert base.origin == "dequantized F16 release used as the 16-bit base"
    assert bases.load_config(base).num_hidden_layers == 2
    assert bases.load_tokenizer(base).eos_token == "<|im_end|>"
    converted = bases.convert(base)
    assert converted.folder.is_relative_to(tmp_path / "cache")

    again = bases.open_base(path)
    assert again == converted
    stamp = (converted.folder / "config.json").stat().st_mtime_ns
    assert bases.convert(again) == converted
    assert (converted.folder / "config.json").stat().st_mtime_ns == stamp

    model = bases.load_model(again, torch.bfloat16)
    assert not model.is_quantized
    assert getattr(model, "hf_quantizer", None) is None
    assert getattr(model.config, "quantization_config", None) is None
    torch.manual_seed(0)
    expected = LlamaForCausalLM(build_config())
    weight = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(
        model.get_parameter(weight), expected.get_parameter(weight).half().bfloat16()
    )
    tokenizer = bases.load_tokenizer(again)
    assert (
        tokenizer.decode(tokenizer("red\nblue \U0001f534")["input_ids"]) == "red\nblue \U0001f534"
    )


def test_another_gguf_file_is_another_cache_entry(tmp_path, monkeypatch):
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    path = save_gguf(tmp_path / "tiny.F16.gguf")
    first = bases.convert(bases.open_base(path)).folder
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    assert bases.open_base(path).folder is None
    assert bases.convert(bases.open_base(path)).folder != first


def test_cut_gguf_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    path = save_gguf(tmp_path / "tiny.F16.gguf")
    path.write_bytes(path.read_bytes()[:-5000])
    base = bases.open_base(path)
    assert "cannot be read" in _message(base, bases.load_config)
    assert not (tmp_path / "cache").exists()
