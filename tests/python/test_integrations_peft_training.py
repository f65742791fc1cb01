"""Preparing a 4-bit language model for training, and training it with TRL."""

import copy

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import LlamaForCausalLM, modeling_utils

import halfbyte
from halfbyte.integrations.peft import LoraLinear, prepare_model_for_training
from halfbyte.nn import NF4Linear
from peft_cases import packed_base
from tiny_model import build_config, build_tokenizer

CONFIG = LoraConfig(r=4, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
IDS = torch.arange(3, 27).reshape(2, 12)


def _model(dtype=torch.float32):
    torch.manual_seed(0)
    return halfbyte.quantize_(LlamaForCausalLM(build_config()).to(dtype))


def _gradients(model):
    torch.manual_seed(1)
    model = get_peft_model(model, copy.deepcopy(CONFIG)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_checkpointing_is_on_and_gradients_are_the_same(kwargs, monkeypatch):
    calls = []
    original = modeling_utils.checkpoint

    def counting(*args, **settings):
        calls.append(settings.get("use_reentrant"))
        return original(*args, **settings)

    monkeypatch.setattr(modeling_utils, "checkpoint", counting)
    model = _model()
    assert prepare_model_for_training(model, gradient_checkpointing_kwargs=kwargs) is model
    assert model.is_gradient_checkpointing
    loss, gradients = _gradients(model)
    wanted_loss, wanted = _gradients(_model())
    assert calls == [bool(kwargs and kwargs["use_reentrant"])] * 2
    assert loss == wanted_loss and gradients.keys() == wanted.keys() and len(wanted) == 28
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient)


def test_everything_is_frozen_and_dtypes_stay():
    model = _model(torch.bfloat16)
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    prepare_model_for_training(model, use_gradient_checkpointing=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == before
    assert not model.is_gradient_checkpointing


def test_adapters_and_models_without_checkpointing_are_refused():
    with pytest.raises(ValueError, match="before get_peft_model"):
        prepare_model_for_training(get_peft_model(_model(), copy.deepcopy(CONFIG)))
    with pytest.raises(ValueError, match="gradient_checkpointing_enable.*got Two"):
        prepare_model_for_training(packed_base())
    prepare_model_for_training(packed_base(), use_gradient_checkpointing=False)


def test_pefts_own_preparation_does_no_harm():
    model = _model(torch.bfloat16)
    codes = {n: m.state_dict() for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    codes = copy.deepcopy(codes)
    prepare_model_for_kbit_training(model)
    for name, state in codes.items():
        assert all(torch.equal(model.get_submodule(name).state_dict()[k], state[k]) for k in state)
    loss, gradients = _gradients(model)
    assert loss > 0 and len(gradients) == 28
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_sft_trainer_with_a_peft_config(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"text": f"The {w} thing is {w}."} for w in ("red", "blue")] * 4)
    arguments = SFTConfig(
        output_dir=tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        logging_strategy="no", save_strategy="no", max_length=32, bf16=False, learning_rate=1e-2,
    )  # fmt: skip
    trainer = SFTTrainer(
        _model(), args=arguments, train_dataset=data, processing_class=build_tokenizer(),
        peft_config=copy.deepcopy(CONFIG),
    )  # fmt: skip
    layers = [m for m in trainer.model.modules() if isinstance(m, LoraLinear)]
    assert len(layers) == 14
    assert trainer.train().training_loss > 0
    assert any(layer.lora_B["default"].weight.abs().sum() > 0 for layer in layers)
