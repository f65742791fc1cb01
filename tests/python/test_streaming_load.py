"""load_model: the model that `from_pretrained` gives, from folders and GGUF files."""

import json
import random
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import pytest
import safetensors.torch
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GgufConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import halfbyte
from formats import bitsandbytes_values, same_bits
from halfbyte.integrations.experts import NF4Experts
from halfbyte.integrations.packed_folder import write_packed_folder
from halfbyte.integrations.safetensors_files import ModelFileError, mapping_of
from halfbyte.integrations.streaming import load_model
from halfbyte.nn import NF4Linear
from test_safetensors_files import mutate
from tiny_model import build_config, save_gguf

TOKENS = torch.arange(3, 15).view(2, 6)
UNTIED = {"tie_word_embeddings": False, "vocab_size": 317, "intermediate_size": 101}
DECODER = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def build(kind: str):
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(build_config(**UNTIED))
    if kind == "tied":
        return LlamaForCausalLM(build_config())
    if kind == "biases":
        return Qwen2ForCausalLM(Qwen2Config(**DECODER))
    if kind == "buffers":
        return Gemma2ForCausalLM(Gemma2Config(head_dim=12, **DECODER))
    return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=48, n_layer=2, n_head=4))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One dense folder a kind, made when first asked for."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            size = "40KB" if kind == "llama" else "5GB"  # several shards
            build(kind).save_pretrained(made[kind], max_shard_size=size)
        return made[kind]

    return folder


@pytest.fixture(scope="module")
def packed(folders, tmp_path_factory):
    """A packed folder with checksums."""
    path = tmp_path_factory.mktemp("packed")
    write_packed_folder(folders("llama"), path)
    return path


def stock(folder, config=None, **options):
    config = config or halfbyte.NF4Config()
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def assert_same(ours, theirs) -> None:
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == other[name].dtype and same_bits(tensor, other[name]), name
    assert same_bits(logits(ours), logits(theirs))
    assert not ours.training and type(ours) is type(theirs)
    grads = {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == grads


# --- dense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "tied", "biases", "buffers", "gpt2"])
def test_a_dense_folder_loads_as_from_pretrained_loads_it(folders, kind):
    assert_same(load_model(folders(kind)), stock(folders(kind)))


@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 32, "double_quant": False, "codebook": "int4"},
        {"block_size": 4096, "codebook": "fp4", "compute_dtype": torch.bfloat16},
        {"skip_modules": ["down_proj"]},
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_settings_and_dtypes(folders, settings, dtype):
    config = halfbyte.NF4Config(**settings)
    ours = load_model(folders("llama"), dtype=dtype, config=config)
    assert_same(ours, stock(folders("llama"), config, dtype=dtype))


def test_threads_change_nothing_and_progress_counts_bytes(folders):
    calls = []
    one = load_model(folders("llama"), threads=1, progress=lambda *call: calls.append(call))
    assert_same(one, load_model(folders("llama"), threads=4))
    assert calls[-1][0] == calls[-1][1] == sum(p.numel() * 4 for p in build("llama").parameters())
    assert [c[0] for c in calls] == sorted(c[0] for c in calls)
    assert len({c[2] for c in calls}) == len(calls)


@pytest.mark.parametrize("kind", ["tied", "llama"])
def test_keys_may_lack_the_base_models_prefix(folders, tmp_path, kind):
    model = build(kind)
    state = {n.removeprefix("model."): t for n, t in model.state_dict().items()}
    if kind == "tied":
        state.pop("lm_head.weight")
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    assert_same(load_model(tmp_path), stock(folders(kind)))


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_weight_may_be_stored_under_either_name_or_both(folders, tmp_path, key):
    model = build("tied")
    state = {n: t for n, t in model.state_dict().items() if n != key}
    if key == "lm_head.weight":
        state[key] = model.lm_head.weight.detach().clone()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same(loaded, stock(folders("tied")))


def test_fused_experts_are_left_to_transformers(tmp_path):
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(num_local_experts=4, **DECODER)).save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert any(isinstance(m, NF4Experts) for m in ours.modules())
    assert same_bits(logits(ours), logits(stock(tmp_path)))
    ours.save_pretrained(tmp_path / "packed")
    assert same_bits(logits(load_model(tmp_path / "packed")), logits(ours))


def test_a_gguf_file_loads_as_transformers_loads_it(tmp_path):
    path = save_gguf(tmp_path / "x.gguf")
    ours = load_model(path, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )  # fmt: skip
    halfbyte.quantize_(theirs)
    assert same_bits(logits(ours), logits(theirs))
    assert load_model(path).dtype == torch.bfloat16


# --- packed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [True, False])
def test_a_packed_folder(packed, folders, mapped):
    model = load_model(packed, mapped=mapped, verify=True)
    assert_same(model, stock(folders("llama")))
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    own = [*(m.weight for m in layers), *(m.absmax for m in layers), model.lm_head.weight]
    assert all((mapping_of(tensor) is not None) == mapped for tensor in own)


def test_a_mapped_model_saves_moves_and_is_written_to_without_the_file_changing(packed, tmp_path):
    before = {f.name: f.read_bytes() for f in packed.iterdir()}
    model = load_model(packed)
    model.save_pretrained(tmp_path)
    assert_same(load_model(tmp_path), model)
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    assert {f.name: f.read_bytes() for f in packed.iterdir()} == before
    assert mapping_of(model.to(torch.float16).lm_head.weight) is None


KINDS = [
    {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    {"bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
    {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["down_proj"]},  # packs the head
]


@pytest.fixture(scope="module")
def bnb_folders(folders, tmp_path_factory):
    """What stock transformers and bitsandbytes save, and their models."""
    made = []
    with torch.compiler.set_stance("force_eager"):
        for kind in KINDS:
            config = BitsAndBytesConfig(load_in_4bit=True, **kind)
            model = stock(folders("biases"), config)
            made.append((tmp_path_factory.mktemp("bnb"), model))
            model.save_pretrained(made[-1][0])
    return made


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_bitsandbytes_folders_keep_their_bytes(bnb_folders, kind):
    path, theirs = bnb_folders[kind]
    ours = load_model(path)
    count = 0
    for name, module in theirs.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            layer = ours.get_submodule(name)
            assert isinstance(layer, NF4Linear), name
            assert same_bits(layer.weight.view(-1), module.weight.view(torch.uint8).view(-1))
            assert torch.equal(layer.dequantize(), bitsandbytes_values(module.weight))
            count += 1
    assert count == sum(isinstance(m, NF4Linear) for m in ours.modules())


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def copy_of(tmp_path):
    """A folder's copy with its state dict and config changed by a function."""

    def copy(folder, change=lambda state: None, **config):
        state = {}
        for file in sorted(folder.glob("*.safetensors")):
            state |= safetensors.torch.load_file(file)
        change(state)
        safetensors.torch.save_file(state, tmp_path / "model.safetensors")
        settings = json.loads((folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(settings | config))
        return tmp_path

    return copy


DOWN = "model.layers.1.mlp.down_proj.weight"
NAN, INF = float("nan"), float("inf")


def put(key, value=None, at=None):
    """A change of a state dict: a value in a tensor, another tensor, or none."""

    def change(state):
        if at is not None:
            state[key].view(-1)[at] = value
        elif value is None:
            del state[key]
        else:
            state[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(DOWN), f"1 tensors are absent: {DOWN}"),
        (put("model.norm.weight"), "1 tensors are absent: model.norm.weight"),
        (put("model.layers.0.extra", torch.ones(1)), "not the model's: model.layers.0.extra"),
        (put(DOWN, torch.ones(101, 48)), rf"{DOWN}: expected shape \[48, 101\], got \[101, 48\]"),
        (put("model.norm.weight", torch.ones(47)), r"norm.weight: expected shape \[48\]"),
        (put(DOWN, torch.ones(48, 101, dtype=torch.int8)), f"{DOWN}: expected a floating-point"),
        (put(DOWN, NAN, 4000), f"{DOWN}: expected finite values, got nan at index 4000"),
        (
            put("model.norm.weight", -INF, 7),
            "norm.weight: expected finite values, got -inf at index 7",
        ),
    ],
)
def test_dense_tensors_that_do_not_fit(folders, copy_of, change, message):
    with pytest.raises(ModelFileError, match=message):
        load_model(copy_of(folders("llama"), change))


def test_old_rotary_buffers_are_passed_over(folders, copy_of):
    change = put("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(6))
    assert_same(load_model(copy_of(folders("llama"), change)), stock(folders("llama")))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected at most"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: expected at most"),
        ({"num_hidden_layers": 3}, "are absent: model.layers.2"),
        ({"num_hidden_layers": 1}, "not the model's: model.layers.1"),
        ({"hidden_size": 10**15}, "config.json|no model of this configuration|expected shape"),
        ({"hidden_size": "large"}, "config.json|no model of this configuration"),
        ({"model_type": "no-such-model"}, "config.json"),
        ({"model_type": "vit"}, "expected a causal language model, got 'vit'|config.json"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "config.json: expected dense",
        ),
        (
            {"tie_word_embeddings": True},
            "lm_head.weight: expected the values of model.embed_tokens",
        ),
    ],
)
def test_configurations_that_do_not_fit(folders, copy_of, config, message):
    with pytest.raises(ModelFileError, match=message):
        load_model(copy_of(folders("llama"), **config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(f"{DOWN}.nested_absmax", NAN, 0), f"{DOWN}.nested_absmax: expected finite values"),
        (put(f"{DOWN}.quant_map", INF, 3), f"{DOWN}.quant_map: expected finite values"),
        (put(f"{DOWN}.absmax"), f"{DOWN}.absmax: expected torch.uint8"),
        (put(DOWN, torch.zeros(8, 1, dtype=torch.uint8)), f"{DOWN}: expected torch.uint8"),
        (put(f"{DOWN}.extra", torch.ones(1)), f"not the model's: {DOWN}.extra"),
        (put("model.layers.1.mlp.up_proj.weight"), "up_proj.weight"),
        (put("model.norm.weight.quant_state.bitsandbytes__nf4", torch.ones(1, dtype=torch.uint8)),
         "norm: expected a linear layer"),
        (put("a.weight.quant_state.bitsandbytes__nf4", torch.ones(1, dtype=torch.uint8)),
         "a.weight: the model has no such weight"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mapped", [True, False])
def test_packed_weights_that_do_not_fit(packed, copy_of, change, message, mapped):
    with pytest.raises(ModelFileError, match=message):
        load_model(copy_of(packed, change), mapped=mapped)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[" * 100_000,
        b'{"shape": 7}',
        {"shape": [10**30, 10**30]},
        {"shape": [True, 101]},
        {"shape": [-48, -101]},
        {"shape": [101, 48]},
        {"dtype": []},
        {"dtype": "int8"},
        {"blocksize": 63},
        {"blocksize": 2**70},
        {"quant_type": "fp4"},
        {"nested_blocksize": 64},
        {"nested_offset": 1e39},
        {"nested_offset": 10**400},
        {"nested_offset": NAN},
        {"nested_offset": None},
    ],
)
def test_headers_of_packed_weights_that_do_not_fit(packed, copy_of, header):
    key = f"{DOWN}.quant_state.bitsandbytes__nf4"

    def change(state):
        text = header
        if isinstance(header, dict):
            text = json.dumps(json.loads(bytes(state[key].tolist())) | header).encode()
        state[key] = torch.tensor(list(text), dtype=torch.uint8)

    with pytest.raises(ModelFileError, match=f"{DOWN}"):
        load_model(copy_of(packed, change))


def test_a_packed_weight_of_another_shape(packed, copy_of):
    other = halfbyte.nn.NF4Linear.from_linear(torch.nn.Linear(64, 8, bias=False))
    entries = {f"model.layers.1.mlp.down_proj.{k}": t for k, t in other.state_dict().items()}
    with pytest.raises(ModelFileError, match=rf"{DOWN}: expected a packed weight of \[48, 101\]"):
        load_model(copy_of(packed, lambda state: state.update(entries)))


def test_arguments_and_places_that_do_not_fit(packed, folders, tmp_path):
    with pytest.raises(ValueError, match="config: expected None"):
        load_model(packed, config=halfbyte.NF4Config())
    with pytest.raises(ValueError, match="threads: expected at least 1"):
        load_model(packed, threads=0)
    with pytest.raises(ModelFileError, match="no such file or folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(ModelFileError, match="expected a config.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"')
    with pytest.raises(ModelFileError, match="config.json: not valid JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelFileError, match="expected model.safetensors or"):
        load_model(tmp_path)
    with pytest.raises(ModelFileError, match="has no checksum"):
        load_model(folders("llama"), verify=True)


def test_mutated_packed_folders_load_equal_or_are_refused(packed, tmp_path):
    """150 seeded changes anywhere in the file, its checksums and the config."""
    data = (packed / "model.safetensors").read_bytes()
    config = (packed / "config.json").read_bytes()
    reference = load_model(packed).state_dict()
    draw = random.Random(0)
    refused = 0
    header = 8 + int.from_bytes(data[:8], "little")
    for case in range(150):
        changed = data
        (tmp_path / "config.json").write_bytes(config)
        if case % 10 == 0:
            (tmp_path / "config.json").write_bytes(mutate(config, len(config), draw))
        else:
            changed = mutate(data, header if case % 3 else len(data), draw)
        (tmp_path / "model.safetensors").write_bytes(changed)
        try:
            found = load_model(tmp_path, verify=True).state_dict()
        except (ModelFileError, ValueError) as error:
            refused += 1
            assert isinstance(error, ModelFileError), error
            continue
        assert found.keys() == reference.keys()
        if changed is not data:
            assert all(same_bits(found[n], reference[n]) for n in reference)
    assert refused > 100


# --- memory ---------------------------------------------------------------------------------------

MEASURE = """
import json, sys
from halfbyte.integrations.streaming import load_model

def status(key):
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(key))

def measure(folder):
    before = status("VmRSS:")
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    model = load_model(folder)
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    return {"peak": status("VmHWM:") - before, "size": size}

small, mapped, dense = sys.argv[1:]
load_model(small)
print(json.dumps({"mapped": measure(mapped), "dense": measure(dense)}))
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs"
)
def test_peak_memory_is_the_packed_model_and_a_tensor(folders, tmp_path):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 8000,
        "num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(build_config(**sizes)).bfloat16()
    state = {n: torch.zeros(t.shape, dtype=t.dtype) + 0.01 for n, t in model.state_dict().items()}
    (tmp_path / "dense").mkdir()
    safetensors.torch.save_file(state, tmp_path / "dense" / "model.safetensors")
    model.config.save_pretrained(tmp_path / "dense")
    (tmp_path / "packed").mkdir()
    write_packed_folder(tmp_path / "dense", tmp_path / "packed")
    places = [folders("tied"), tmp_path / "packed", tmp_path / "dense"]
    command = [sys.executable, "-c", MEASURE, *map(str, places)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    sizes = [t.nbytes for t in state.values()]
    assert sum(sizes) > 2 * found["dense"]["size"]
    assert found["dense"]["peak"] < 1.1 * (found["dense"]["size"] + max(sizes)), found
    assert found["mapped"]["peak"] < 0.3 * found["mapped"]["size"], found
