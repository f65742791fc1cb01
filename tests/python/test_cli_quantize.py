"""`halfbyte quantize`: a folder that halfbyte, stock transformers and bitsandbytes load alike."""

import json
import os
import signal
import subprocess
import sys
import time

import bitsandbytes
import pytest
import safetensors.torch
import torch
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
from halfbyte.cli.main import app
from halfbyte.integrations import packed_folder
from halfbyte.integrations.folder_check import verify_folder
from halfbyte.integrations.safetensors_files import INDEX
from halfbyte.integrations.streaming import load_model
from tiny_model import build_config, build_tokenizer, save_gguf, save_model

pytestmark = pytest.mark.usefixtures("plain_bitsandbytes")

TOKENS = torch.arange(3, 15).view(2, 6)
UNTIED = {"tie_word_embeddings": False, "vocab_size": 321, "intermediate_size": 101}


def run(*arguments, code: int = 0):
    result = CliRunner().invoke(app, ["quantize", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    LlamaForCausalLM(build_config(**UNTIED)).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def assert_same_state(one, other) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert all(same_bits(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ([], {}),
        (["--shard-size", "30KB", "--threads", 4], {}),
        (["--block-size", 32, "--no-double-quant", "--codebook", "fp4"],
         {"block_size": 32, "double_quant": False, "codebook": "fp4"}),
        (["--codebook", "int4", "--skip", "down_proj", "--skip", "layers.0.mlp.up_proj"],
         {"codebook": "int4", "skip_modules": ["down_proj", "layers.0.mlp.up_proj"]}),
        (["--dtype", "fp16"], {"dtype": torch.float16}),
    ],
)  # fmt: skip
def test_the_folder_is_the_model_that_from_pretrained_packs(source, tmp_path, flags, settings):
    out = tmp_path / "out"
    assert "tensors packed" in run(source, out, *flags).stdout
    options = {"dtype": settings.pop("dtype")} if "dtype" in settings else {}
    config = halfbyte.NF4Config(**settings)
    expected = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, **options)
    for model in (load_model(out, verify=True), AutoModelForCausalLM.from_pretrained(out)):
        assert_same_state(model, expected)
        assert same_bits(logits(model), logits(expected))
        assert model.config.quantization_config.to_dict() == expected.config.quantization_config.to_dict()  # fmt: skip  # noqa: E501
    text = "What colour is the red thing?"
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (source, out)]
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids
    names = {f.name for f in out.iterdir()}
    assert (INDEX in names) == ("--shard-size" in flags) and "generation_config.json" in names
    assert not [f for f in tmp_path.iterdir() if f != out]


def test_stock_bitsandbytes_loads_it(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(source, out)
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes_4bit", BitsAndBytesConfig)
    with torch.compiler.set_stance("force_eager"):
        stock = AutoModelForCausalLM.from_pretrained(out)
        layer = stock.model.layers[0].mlp.up_proj
        assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    mine, state = load_model(out).model.layers[0].mlp.up_proj, layer.weight.quant_state
    assert torch.equal(layer.weight.data.flatten(), mine.weight.flatten())
    assert torch.equal(state.absmax, mine.absmax) and state.nested
    assert torch.equal(state.state2.absmax, mine.nested_absmax.view(torch.float32))


@pytest.mark.parametrize(
    "kind",
    [
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
        {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["down_proj"]},
    ],
)
def test_a_bitsandbytes_folder_keeps_its_bytes(source, tmp_path, monkeypatch, kind):
    config = BitsAndBytesConfig(load_in_4bit=True, **kind)
    with torch.compiler.set_stance("force_eager"):
        stock = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
        stock.save_pretrained(tmp_path / "bnb")
    run(tmp_path / "bnb", tmp_path / "out")
    assert_same_state(load_model(tmp_path / "out", verify=True), load_model(tmp_path / "bnb"))
    old = safetensors.torch.load_file(tmp_path / "bnb" / "model.safetensors")
    new = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        if ".quant_state." not in name:
            assert same_bits(
                tensor.view(-1).view(torch.uint8), new[name].view(-1).view(torch.uint8)
            )
    with torch.compiler.set_stance("force_eager"):
        if "llm_int8_skip_modules" not in kind:
            marked = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
            assert isinstance(marked.model.layers[0].mlp.up_proj, halfbyte.nn.NF4Linear)
        monkeypatch.setitem(
            AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes_4bit", BitsAndBytesConfig
        )
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert same_bits(logits(again), logits(stock))


def test_a_gguf_file(tmp_path):
    path = save_gguf(tmp_path / "x.gguf")
    run(path, tmp_path / "out", "--dtype", "fp32")
    assert_same_state(load_model(tmp_path / "out"), load_model(path, dtype=torch.float32))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    stock = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    text = "<|im_start|>user\nred<|im_end|>"
    assert tokenizer(text).input_ids == stock(text).input_ids
    assert tokenizer.chat_template == stock.chat_template


def test_layers_that_hold_their_weight_transposed(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=48, n_layer=2, n_head=4))
    model.save_pretrained(tmp_path / "dense")
    run(tmp_path / "dense", tmp_path / "out")
    assert_same_state(load_model(tmp_path / "out"), load_model(tmp_path / "dense"))


def test_every_tensor_starts_on_its_alignment(source, tmp_path):
    run(source, tmp_path / "out", "--shard-size", "50KB")
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        sizes = {"F32": 4, "U8": 1}
        for name, fields in header.items():
            if name != "__metadata__":
                assert (8 + length + fields["data_offsets"][0]) % sizes[fields["dtype"]] == 0


# --- whole or not there ---------------------------------------------------------------------------


def error(*arguments) -> str:
    lines = run(*arguments, code=2).stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_mistakes_are_one_line_and_leave_nothing(source, tmp_path):
    out = tmp_path / "out"
    assert "no such file or folder" in error(tmp_path / "absent", out)
    assert "shard-size: expected a size" in error(source, out, "--shard-size", "large")
    assert "block_size: expected a power of two" in error(source, out, "--block-size", 60)
    assert "codebook: expected nf4, fp4 or int4" in error(source, out, "--codebook", "nf5")
    assert "dtype: expected one of" in error(source, out, "--dtype", "int8")
    assert "threads: expected at least 1" in error(source, out, "--threads", 0)
    assert "skip_modules: expected names of modules" in error(source, out, "--skip", "no_such")
    assert not list(tmp_path.iterdir())
    run(source, out)
    assert "is there already" in error(source, out)
    assert "is packed already" in error(out, tmp_path / "again", "--block-size", 32)
    assert "other than the source" in error(out, out, "--overwrite")
    run(source, out, "--overwrite", "--codebook", "fp4")
    assert load_model(out).config.quantization_config.codebook == "fp4"


def test_a_bad_tensor_is_named_and_an_older_folder_stays(source, tmp_path):
    run(source, tmp_path / "out")
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    state = safetensors.torch.load_file(source / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    bad = save_model(tmp_path / "bad")
    safetensors.torch.save_file(state, bad / "model.safetensors")
    (bad / "config.json").write_bytes((source / "config.json").read_bytes())
    message = error(bad, tmp_path / "out", "--overwrite")
    assert "layers.1.mlp.up_proj.weight: expected finite values, got nan at index 149" in message
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["bad", "out"]


def test_a_full_disk_is_found_before_work_is_done(source, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(packed_folder.shutil, "disk_usage", lambda path: usage)
    message = error(source, tmp_path / "out")
    assert "bytes are needed there, 1,000 are free" in message and not list(tmp_path.iterdir())


SLOW = """
import sys, time
from halfbyte.integrations import packed_folder
put = packed_folder._put

def slow(*arguments):
    print("writing", flush=True)
    time.sleep(0.02)
    put(*arguments)

packed_folder._put = slow
from halfbyte.cli.main import app
app(["quantize", *sys.argv[1:]])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_folder_of_a_run_that_was_stopped_is_not_there(source, tmp_path, number):
    command = [sys.executable, "-c", SLOW, str(source), str(tmp_path / "out"), "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    time.sleep(0.2)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), errors
    assert not (tmp_path / "out").exists()
    run(source, tmp_path / "out")
    assert not verify_folder(tmp_path / "out").damage
