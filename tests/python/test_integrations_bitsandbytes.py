"""Scripts and checkpoints for bitsandbytes on halfbyte, with bitsandbytes there and without."""

import json
import subprocess
import sys

import bitsandbytes
import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from formats import bitsandbytes_values, relative_error, same_bits
from halfbyte import checkpoint
from halfbyte.integrations.bitsandbytes import give_back, take_over, taken_over
from halfbyte.nn import NF4Linear
from tiny_model import build_config

pytestmark = pytest.mark.usefixtures("plain_bitsandbytes")

TOKENS = torch.arange(3, 15).view(2, 6)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False}

KINDS = [
    {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    {"bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
    {
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float16,
    },
    {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": torch.bfloat16,
        "llm_int8_skip_modules": ["down_proj", "lm_head"],
    },
    {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["down_proj"]},
]
BY_KIND = pytest.mark.parametrize("kind", range(len(KINDS)))


@pytest.fixture(scope="module", autouse=True)
def eager():
    """bitsandbytes compiles its fallbacks; the plain ones are what is compared."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dense")
    LlamaForCausalLM(build_config(**SIZES)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def stock(folder, tmp_path_factory):
    """For each kind: the folder that stock transformers and bitsandbytes save, and their model."""
    saved = []
    for kind in KINDS:
        model = load(folder, **kind)
        assert type(model.hf_quantizer) is Bnb4BitHfQuantizer
        path = tmp_path_factory.mktemp("bnb-4bit")
        model.save_pretrained(path)
        saved.append((path, model))
    return saved


@pytest.fixture
def taken():
    take_over()
    yield
    give_back()


def load(path, **kind):
    config = BitsAndBytesConfig(load_in_4bit=True, **kind)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def packed_names(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, NF4Linear)}


def compare(ours, theirs, kind) -> None:
    """Equal layers packed, equal dense values, and logits as near as the products' dtype allows."""
    layers = {n: m for n, m in theirs.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert packed_names(ours) == set(layers)
    for name, layer in layers.items():
        dense = bitsandbytes_values(layer.weight)
        # fp4 has two zeros, and theirs may be negative: equal values, not equal bits.
        assert torch.equal(dense, ours.get_submodule(name).dequantize()), name
    compute = kind.get("bnb_4bit_compute_dtype", torch.float32)
    tolerance = 1e-5 if compute == torch.float32 else 10 * torch.finfo(compute).eps
    assert logits(ours).dtype == torch.float32
    assert relative_error(logits(ours), logits(theirs)) <= tolerance


@BY_KIND
def test_what_stock_saved_loads_bit_equal(stock, taken, kind):
    path, theirs = stock[kind]
    ours = AutoModelForCausalLM.from_pretrained(path)
    compare(ours, theirs, KINDS[kind])
    state = safetensors.torch.load_file(path / "model.safetensors")
    for name in packed_names(ours):
        packed = ours.get_submodule(name).weight.view(-1)
        assert torch.equal(packed, state[f"{name}.weight"].view(torch.uint8).view(-1)), name
    with_config = load(path, **KINDS[kind])  # as scripts do
    compare(with_config, theirs, KINDS[kind])


@BY_KIND
def test_what_is_saved_here_stock_loads(stock, tmp_path, kind):
    path, theirs = stock[kind]
    take_over()
    ours = AutoModelForCausalLM.from_pretrained(path)
    want = logits(ours)
    ours.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_bits(logits(again), want)
    again.save_pretrained(tmp_path)
    give_back()
    data = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert data["quant_method"] == "bitsandbytes" and data["bnb_4bit_quant_storage"] == "uint8"
    assert "halfbyte" not in data
    compare(ours, AutoModelForCausalLM.from_pretrained(tmp_path), KINDS[kind])


@BY_KIND
def test_a_config_packs_a_dense_model_as_stock_does(folder, stock, taken, kind):
    """But for the 8-bit codes of double quantization, where theirs are not always the nearest."""
    _, theirs = stock[kind]
    ours = load(folder, **KINDS[kind])
    layers = {n for n, m in theirs.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert packed_names(ours) == layers
    for name in layers:
        weight = theirs.get_submodule(name).weight
        packed = ours.get_submodule(name).nf4_weight
        assert torch.equal(packed.packed.view(-1), weight.data.view(torch.uint8).view(-1)), name
        state = weight.quant_state
        if state.nested:
            assert int((packed.absmax.int() - state.absmax.int()).abs().max()) <= 1
            assert same_bits(checkpoint.as_float(packed.offset)[0], state.offset)
        else:
            assert same_bits(checkpoint.as_float(packed.absmax), state.absmax)
    assert relative_error(logits(ours), logits(theirs)) <= 2e-2


def test_a_name_that_fits_no_module_is_warned_about(folder, taken, caplog):
    load(folder, llm_int8_skip_modules=["down_prj", "lm_head"])
    assert "llm_int8_skip_modules: 'down_prj' fits no module of LlamaForCausalLM" in caplog.text


def test_tied_weights_stay_dense_whatever_the_list_says(tmp_path, taken):
    torch.manual_seed(0)
    LlamaForCausalLM(build_config()).save_pretrained(tmp_path)
    model = load(tmp_path, llm_int8_skip_modules=["q_proj"])
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_taking_over_is_one_entry_that_is_given_back():
    stock = AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    before = dict(AUTO_QUANTIZER_MAPPING)
    take_over()
    take_over()
    changed = {k for k, v in AUTO_QUANTIZER_MAPPING.items() if v is not before[k]}
    assert changed == {"bitsandbytes_4bit"}
    give_back()
    give_back()
    assert stock is AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is Bnb4BitHfQuantizer


def test_for_a_while_leaves_all_as_it_was():
    def current() -> type:
        return AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]

    stock = current()
    with pytest.raises(KeyError), taken_over():
        ours = current()
        raise KeyError
    assert current() is stock is not ours
    take_over()
    with taken_over():
        pass
    assert current() is ours
    give_back()


def test_scripts_find_what_they_look_for(folder, taken):
    model = load(folder, bnb_4bit_quant_type="nf4")
    assert model.is_loaded_in_4bit and model.quantization_method == "bitsandbytes"
    assert model.num_parameters() > 0 and model.get_memory_footprint() > 0
    with pytest.raises(ValueError, match="cannot cast a bitsandbytes model"):
        model.to(torch.bfloat16)
    assert model.dequantize() is model and not hasattr(model, "is_loaded_in_4bit")
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


# The script of a user of bitsandbytes, from folder to trained adapter.
SCRIPT = """
import sys
if sys.argv[1] == "without":
    sys.modules["bitsandbytes"] = None
import torch
import halfbyte
from halfbyte.integrations import bitsandbytes
bitsandbytes.take_over()
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

dense, saved, out = sys.argv[2:5]
packed = AutoModelForCausalLM.from_pretrained(saved)
torch.save({n: m.dequantize() for n, m in packed.named_modules() if hasattr(m, "nf4_weight")},
           out + "/weights.pt")
own = AutoModelForCausalLM.from_pretrained(dense, quantization_config=halfbyte.NF4Config())
assert own.num_parameters() > 0 and not hasattr(own, "is_loaded_in_4bit")
own.save_pretrained(out + "/own")
assert type(AutoModelForCausalLM.from_pretrained(out + "/own").config.quantization_config) is (
    halfbyte.NF4Config)
config = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
assert hasattr(model, "is_loaded_in_4bit") == (sys.argv[1] == "with")
assert model.num_parameters() > 0
model = prepare_model_for_kbit_training(model)
model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
rows = [{"input_ids": list(range(3, 11)), "labels": list(range(3, 11))}] * 4
arguments = TrainingArguments(
    output_dir=out, max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no",
    use_cpu=True, disable_tqdm=True)
loss = Trainer(model=model, args=arguments, train_dataset=rows).train().training_loss
model.save_pretrained(out + "/adapter")
assert ("bitsandbytes" in sys.modules) and (sys.modules["bitsandbytes"] is None) == (
    sys.argv[1] == "without")
print("loss", loss)
"""


@pytest.mark.parametrize("how", ["with", "without"])
def test_a_script_runs_with_bitsandbytes_and_without(folder, stock, tmp_path, how):
    path, theirs = stock[0]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, how, str(folder), str(path), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert torch.isfinite(torch.tensor(float(result.stdout.split()[-1])))
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()
    weights = torch.load(tmp_path / "weights.pt")
    layers = {
        n: m.weight for n, m in theirs.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)
    }
    assert weights.keys() == layers.keys()
    for name, weight in layers.items():
        dense = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(weights[name], dense), name
