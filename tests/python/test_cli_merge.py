"""`halfbyte merge` against PEFT's own merge, on dense and 4-bit bases; the writing of folders."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import halfbyte
from cli_cases import error, load_dense, load_merged, run, save_adapter, save_base
from halfbyte import checkpoint
from halfbyte.integrations.merging import MergedWeights, write_dense, write_packed
from halfbyte.integrations.model_folder import ModelFolder, ShardWriter


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    save_base(folder / "fp32")
    save_base(folder / "bf16", torch.bfloat16)
    save_adapter(folder / "one", folder / "fp32", seed=1)
    save_adapter(
        folder / "two", folder / "fp32", seed=2, r=3, use_rslora=True, target_modules=["q_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 5}, alpha_pattern={"layers.0.*": 2},
    )  # fmt: skip
    quantized = AutoModelForCausalLM.from_pretrained(
        folder / "bf16", quantization_config=halfbyte.NF4Config(), dtype=torch.bfloat16
    )
    quantized.save_pretrained(folder / "nf4")
    AutoTokenizer.from_pretrained(folder / "bf16").save_pretrained(folder / "nf4")
    return folder


def _state(folder) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize("adapter", ["one", "two"])
def test_weights_are_those_of_peft(files, tmp_path, adapter):
    out = tmp_path / "out"
    run("merge", "--base", files / "fp32", "--adapter", files / adapter, "--out", out)
    expected = load_merged(files / "fp32", files / adapter).state_dict()
    merged = load_dense(out)
    assert merged.dtype == torch.float32
    for name, value in merged.state_dict().items():
        assert torch.equal(value, expected[name]), name
    before = load_dense(files / "fp32").state_dict()
    assert not all(torch.equal(v, before[k]) for k, v in expected.items())
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert not list(tmp_path.glob(".out*"))


def test_a_bf16_base_is_rounded_once(files, tmp_path):
    run("merge", "--base", files / "bf16", "--adapter", files / "one", "--out", tmp_path / "out")
    model = PeftModel.from_pretrained(
        load_dense(files / "bf16").float(), files / "one"
    ).merge_and_unload()
    for name, value in load_dense(tmp_path / "out").state_dict().items():
        assert torch.equal(value, model.state_dict()[name].bfloat16()), name


def test_several_adapters_with_weights(files, tmp_path):
    out = tmp_path / "out"
    result = run(
        "merge", "--base", files / "fp32", "--adapter", files / "one", "--weight", 0.7,
        "--adapter", files / "two", "--weight", -0.25, "--out", out, "--dtype", "bf16", "--json",
    )  # fmt: skip
    facts = json.loads(result.stdout)
    assert [a["weight"] for a in facts["adapters"]] == [0.7, -0.25]
    assert facts["merged_weights"] == 14
    base = load_dense(files / "fp32").state_dict()
    one = load_merged(files / "fp32", files / "one").state_dict()
    two = load_merged(files / "fp32", files / "two").state_dict()
    for name, value in load_dense(out).state_dict().items():
        w = base[name]
        wanted = w + 0.7 * (one[name] - w) - 0.25 * (two[name] - w)
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.float(), wanted, rtol=2**-8, atol=1e-6)


def test_a_packed_base_becomes_dense(files, tmp_path):
    run(
        "merge", "--base", files / "nf4", "--adapter", files / "one", "--out", tmp_path / "out",
        "--dtype", "fp32",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(files / "nf4", dtype=torch.float32)
    for module in model.modules():  # a packed layer remembers what it was packed from
        if isinstance(module, halfbyte.nn.NF4Linear):
            module.weight_dtype = torch.float32
    expected = PeftModel.from_pretrained(model, files / "one").merge_and_unload().state_dict()
    merged = load_dense(tmp_path / "out")
    assert getattr(merged.config, "quantization_config", None) is None
    for name, value in merged.state_dict().items():
        assert torch.equal(value, expected[name].float()), name


def test_a_dense_base_packed_afterwards(files, tmp_path):
    result = run(
        "merge", "--base", files / "fp32", "--adapter", files / "one", "--out", tmp_path / "out",
        "--nf4", "--block-size", 128, "--json",
    )  # fmt: skip
    found = json.loads(result.stdout)["added_error"]
    model = load_merged(files / "fp32", files / "one")
    errors, total = {}, [0.0, 0.0]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            w = module.weight.detach()
            difference = halfbyte.quantize_nf4(w, 128).dequantize() - w
            errors[name] = (difference.norm() / w.norm()).item()
            total[0] += difference.square().sum().item()
            total[1] += w.square().sum().item()
    assert found["layers"] == pytest.approx(errors, rel=1e-4)
    assert found["overall"] == pytest.approx((total[0] / total[1]) ** 0.5, rel=1e-4)
    assert found["worst"]["error"] == max(found["layers"].values())
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "dense")
    wanted = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=halfbyte.NF4Config(block_size=128)
    )
    wanted_state = wanted.state_dict()
    assert packed.state_dict().keys() == wanted_state.keys()
    for name, value in packed.state_dict().items():
        assert torch.equal(value, wanted_state[name]), name


def test_a_packed_base_stays_packed(files, tmp_path):
    """What no adapter changes keeps its bytes; what one changes is merge_adapter's result."""
    result = run(
        "merge", "--base", files / "nf4", "--adapter", files / "two", "--out", tmp_path / "out",
        "--nf4",
    )  # fmt: skip
    assert "added by 4 bits" in result.stdout
    before, after = _state(files / "nf4"), _state(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, value in after.items():
        if "q_proj" not in name:
            assert torch.equal(value, before[name]), name
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(files / "nf4"), files / "two"
    )
    with pytest.warns(UserWarning, match="re-quantizes"):
        model.merge_adapter()
    prefix = "model.layers.1.self_attn.q_proj.weight"
    layer = model.get_base_model().model.layers[1].self_attn.q_proj.base_layer
    packed = checkpoint.from_entries(after, prefix).packed
    assert torch.equal(packed, layer.nf4_weight.packed.reshape(-1))
    ids = torch.arange(3, 40)[None]
    model.unmerge_adapter()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model.merge_adapter()
        torch.testing.assert_close(merged(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"base": "absent"}, "base absent: no such folder"),
        ({"adapter": "absent"}, "adapter absent: no such folder"),
        ({"adapter": "fp32"}, "expected an adapter_config.json in it, got none"),
        ({"out": "fp32"}, "expected another place than what is read"),
        ({"out": "one"}, "expected another place than what is read"),
        ({"out": "two"}, "exists already; pass --overwrite"),
        ({"dtype": "int8"}, "--dtype: expected one of bf16, fp16, fp32, got 'int8'"),
        ({"dtype": "bf16", "nf4": ""}, "--dtype and --nf4 exclude each other"),
        ({"block-size": 64}, "need --nf4"),
        ({"nf4": "", "block-size": 48}, "block_size: expected a power of two"),
        ({"weight": "nan"}, "weight: expected a finite number, got nan"),
        ({"base": "nf4", "nf4": "", "block-size": 64}, "is in 4 bits already and keeps its format"),
    ],
)
def test_mistakes(files, monkeypatch, flags, message):
    monkeypatch.chdir(files)
    flags = {"base": "fp32", "adapter": "one", "out": "out"} | flags
    arguments = [x for k, v in flags.items() for x in ([f"--{k}", v] if v != "" else [f"--{k}"])]
    assert message in error("merge", *arguments)
    assert not (files / "out").exists()


def test_one_weight_for_each_adapter(files, tmp_path):
    message = error(
        "merge", "--base", files / "fp32", "--adapter", files / "one", "--weight", 1,
        "--weight", 2, "--out", tmp_path / "out",
    )  # fmt: skip
    assert "expected none, or one for each of 1 adapters, got 2" in message


def _changed(files, tmp_path, tensors=None, **config):
    """The adapter `one` with other tensors or settings."""
    folder = tmp_path / "changed"
    folder.mkdir()
    settings = json.loads((files / "one/adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    state = load_file(files / "one/adapter_model.safetensors") | (tensors or {})
    save_file(
        {k: v for k, v in state.items() if v is not None}, folder / "adapter_model.safetensors"
    )
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({}, {"use_dora": True}, "use_dora=True: a variant of LoRA that is not known here"),
        ({}, {"peft_type": "IA3"}, "peft_type: expected 'LORA', got 'IA3'"),
        ({}, {"r": 5}, "expected A [5, "),
        ({f"{Q}.lora_A.weight": None}, {}, "self_attn.q_proj: no lora_A"),
        ({f"{Q}.lora_B.weight": torch.zeros(47, 4)}, {}, "got [4, 48] and [47, 4]"),
        ({f"{Q}.lora_magnitude_vector": torch.zeros(48)}, {}, "expected lora_A and lora_B"),
        (
            {
                "base_model.model.head.lora_A.weight": torch.zeros(4, 48),
                "base_model.model.head.lora_B.weight": torch.zeros(9, 4),
            },
            {},
            "has no weight 'head.weight'",
        ),
    ],
)
def test_adapters_that_do_not_fit(files, tmp_path, tensors, config, message):
    adapter = _changed(files, tmp_path, tensors, **config)
    line = error("merge", "--base", files / "fp32", "--adapter", adapter, "--out", tmp_path / "out")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_values_that_do_not_fit_the_dtype(files, tmp_path):
    adapter = _changed(files, tmp_path, {f"{Q}.lora_B.weight": torch.full((48, 4), 1e6)})
    line = error(
        "merge", "--base", files / "fp32", "--adapter", adapter, "--out", tmp_path / "out",
        "--dtype", "fp16",
    )  # fmt: skip
    assert "model.layers.0.self_attn.q_proj.weight: expected finite merged values" in line
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_files_are_split_and_aligned(files, tmp_path):
    """Odd byte counts go to the end of a file; transformers reads several files and the index."""
    out = tmp_path / "out"
    out.mkdir()
    merged = MergedWeights(files / "fp32")
    written = write_packed(merged, out, halfbyte.NF4Config(), shard_bytes=40_000)
    assert written.files == len(list(out.glob("*.safetensors"))) > 2
    folder = ModelFolder(out)
    assert sorted(folder.names) == sorted(merged.names)
    for name in folder.names:
        weight = merged.dense(name)
        if folder.is_packed(name):
            weight = halfbyte.quantize_nf4(weight).dequantize()
        assert torch.equal(folder.dense(name), weight), name
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_the_writer_against_safetensors(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{shape}": torch.randint(0, 100, shape, generator=generator).to(dtype)
        for shape in [(3, 5), (), (0, 4), (8, 8), (7,), (2, 3, 4)]
    }
    writer = ShardWriter(tmp_path, tensors)
    writer.add({"odd": torch.ones(3, dtype=torch.uint8)} | tensors)
    writer.close()
    found = load_file(tmp_path / "model.safetensors")
    assert found.pop("odd").tolist() == [1, 1, 1]
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == dtype for k, v in tensors.items())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_conv1d_layers_are_transposed(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=24, vocab_size=50, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    save_adapter(
        tmp_path / "adapter", tmp_path / "base", target_modules=["c_attn"], fan_in_fan_out=True
    )
    (tmp_path / "out").mkdir()
    write_dense(MergedWeights(tmp_path / "base", [(tmp_path / "adapter", 1.0)]), tmp_path / "out")
    expected = load_merged(tmp_path / "base", tmp_path / "adapter").state_dict()
    for name, value in load_dense(tmp_path / "out").state_dict().items():
        assert torch.equal(value, expected[name]), name
