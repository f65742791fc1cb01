"""The base model: what is refused before loading, and what each kind of base gives."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlamaForCausalLM

import halfbyte
from formats import same_bits
from halfbyte.finetune import base as bases
from halfbyte.finetune.errors import FinetuneError
from halfbyte.integrations.safetensors_files import mapping_of
from halfbyte.integrations.transformers import NF4Config
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
    assert "model.gguf: expected at least 24 bytes, got 6" in _message(tmp_path / "model.gguf")


def test_folder_without_config_and_adapter_folder(tmp_path):
    assert _message(tmp_path).endswith("expected a config.json in it, got none")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "this is an adapter, name the model it was trained on" in _message(tmp_path)


def test_broken_config(copy):
    (copy / "config.json").write_text("{")
    assert "config.json: not valid JSON" in _message(copy)


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    assert "expected model.safetensors or model.safetensors.index.json, got neither" in _message(
        copy
    )


def test_cut_weights(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "expected offsets within" in _message(copy)


def test_absent_tensors(copy):
    file = copy / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    message = _message(bases.open_base(copy), lambda base: bases.load_model(base, torch.float32))
    assert "model.layers.1.mlp.up_proj.weight" in message


def test_not_a_language_model(copy):
    BertConfig(hidden_size=8, num_attention_heads=1, architectures=["x"]).save_pretrained(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))
    assert "expected a causal language model, got 'vit'" in _message(copy)


def test_unknown_architecture(copy):
    (copy / "config.json").write_text('{"model_type": "no-such-model"}')
    assert "no-such-model" in _message(copy)


def test_already_quantized_in_another_way(copy):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (copy / "config.json").write_text(json.dumps(config))
    assert "got a quantized model" in _message(copy)


def test_targets_are_matched_as_peft_does():
    linear, head = bases.linear_names(bases.without_weights(build_config()))
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


def test_parameters_are_counted_as_in_the_dense_model():
    for tied in (True, False):
        config = build_config(tie_word_embeddings=tied)
        counted = bases.without_weights(config).num_parameters()
        assert counted == LlamaForCausalLM(config).num_parameters()


def test_a_gguf_file_is_packed_as_it_is_read(tmp_path):
    base = bases.open_base(save_gguf(tmp_path / "tiny.F16.gguf"))
    assert base.is_gguf and not base.is_packed
    assert base.origin == "dequantized F16 release used as the 16-bit base"
    assert base.opened.config.num_hidden_layers == 2
    tokenizer = bases.load_tokenizer(base)
    assert tokenizer.eos_token == "<|im_end|>"
    assert (
        tokenizer.decode(tokenizer("red\nblue \U0001f534")["input_ids"]) == "red\nblue \U0001f534"
    )

    model = bases.load_model(base, torch.bfloat16, NF4Config(block_size=32))
    torch.manual_seed(0)
    dense = LlamaForCausalLM(build_config()).get_parameter("model.layers.1.mlp.down_proj.weight")
    expected = halfbyte.quantize_nf4(dense.data.half().bfloat16(), block_size=32)
    assert same_bits(model.model.layers[1].mlp.down_proj.dequantize(), expected.dequantize())


def test_a_packed_folder_is_mapped(folder, tmp_path):
    packed = tmp_path / "packed"
    bases.load_model(bases.open_base(folder), torch.float32, NF4Config()).save_pretrained(packed)
    for file in folder.glob("*token*"):
        shutil.copy(file, packed)
    base = bases.open_base(packed)
    assert base.is_packed and base.origin == "packed to 4 bits before"
    weight = bases.load_model(base, torch.float32).model.layers[0].mlp.up_proj.weight
    assert mapping_of(weight) is not None
    with pytest.raises(FinetuneError, match="which is packed already"):
        bases.load_model(base, torch.float32, NF4Config())


def test_cut_gguf_file(tmp_path):
    path = save_gguf(tmp_path / "tiny.F16.gguf")
    path.write_bytes(path.read_bytes()[:-5000])
    assert "tiny.F16.gguf: " in _message(path)
