"""PEFT's other methods on a 4-bit base: as on the dequantized weights, and trainable."""

import copy
import pickle
import warnings

import peft
import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from transformers import LlamaForCausalLM

import halfbyte
from halfbyte.nn import NF4Linear
from peft_cases import close, packed_base, pair, rows, same_step
from tiny_model import build_config

BOTH = {"target_modules": ["first", "second"]}
# Method -> a configuration for `peft_cases.Two`.
METHODS = {
    "ia3": peft.IA3Config(**BOTH, feedforward_modules=["second"]),
    "loha": peft.LoHaConfig(r=3, **BOTH),
    "lokr": peft.LoKrConfig(r=3, **BOTH),
    "adalora": peft.AdaLoraConfig(init_r=4, total_step=10, **BOTH),
    "vera": peft.VeraConfig(r=4, **BOTH),
    "oft": peft.OFTConfig(oft_block_size=0, r=1, **BOTH),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=["first"]),
    "hra": peft.HRAConfig(r=4, **BOTH),
    "fourierft": peft.FourierFTConfig(n_frequency=20, **BOTH),
    "vblora": peft.VBLoRAConfig(num_vectors=8, vector_length=1, topk=2, r=2, **BOTH),
    "randlora": peft.RandLoraConfig(r=4, **BOTH),
    "shira": peft.ShiraConfig(r=2, **BOTH),
    "miss": peft.MissConfig(r=1, **BOTH),
    "bone": peft.MissConfig(r=1, init_weights="bat", **BOTH),
    "road": peft.RoadConfig(group_size=2, target_modules=["second"]),
    "delora": peft.DeloraConfig(r=4, **BOTH),
    "hira": peft.HiraConfig(r=4, **BOTH),
}


@pytest.mark.parametrize("name", METHODS)
def test_as_on_the_dequantized_weights(name):
    packed, dense = pair(METHODS[name])
    same_step(packed, dense, rows(2, 3), 1e-4)
    codes = {n: m.weight.clone() for n, m in packed.named_modules() if isinstance(m, NF4Linear)}
    assert codes
    twin = copy.deepcopy(packed)
    close(twin(rows(4)), packed(rows(4)))
    close(pickle.loads(pickle.dumps(packed))(rows(4)), packed(rows(4)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = dense.merge_and_unload()(rows(4))
        close(twin.merge_and_unload()(rows(4)), wanted, 1e-4)
        packed.merge_adapter()
        packed.unmerge_adapter()
    for n, weight in codes.items():
        assert torch.equal(packed.get_submodule(n).weight, weight)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (peft.GloraConfig(r=4, **BOTH), ValueError, "NF4Linear.*GLoRA does not support"),
        (peft.OSFConfig(effective_rank=4, **BOTH), NotImplementedError, "PEFT's osf on a 4-bit"),
        (peft.LilyConfig(r=4, **BOTH), NotImplementedError, "PEFT's lily on a 4-bit layer"),
    ],
    ids=["glora", "osf", "lily"],
)
def test_what_cannot_be_right_is_refused(config, error, message):
    with pytest.raises(error, match=message):
        get_peft_model(packed_base(), config)


def test_one_method_around_another_is_refused():
    inner = get_peft_model(packed_base(), peft.LoHaConfig(**BOTH)).base_model.model
    with pytest.raises(NotImplementedError, match="one PEFT method a layer"):
        get_peft_model(inner, peft.HRAConfig(target_modules=["first"]))


# --- methods that train on a language model ------------------------------------------------------

CAUSAL = {"task_type": TaskType.CAUSAL_LM}
ON_MODELS = {
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=4, **CAUSAL),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=4, **CAUSAL),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **CAUSAL),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        **CAUSAL,
    ),
    "ln": peft.LNTuningConfig(target_modules=["input_layernorm"], **CAUSAL),
}


def _language_model():
    torch.manual_seed(0)
    return halfbyte.quantize_(LlamaForCausalLM(build_config()))


@pytest.mark.parametrize("name", ON_MODELS)
def test_trains_on_a_packed_language_model(name, tmp_path):
    model = get_peft_model(_language_model(), copy.deepcopy(ON_MODELS[name]))
    packed = [m for m in model.modules() if isinstance(m, NF4Linear)]
    assert len(packed) == 14
    ids = torch.randint(3, 320, (2, 9), generator=torch.Generator().manual_seed(0))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert any(p.grad is not None and p.grad.norm() > 0 for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(_language_model(), tmp_path).eval()
    close(again(input_ids=ids).logits, expected)
