"""transformers' Trainer and TRL's SFTTrainer with our optimizers on a PEFT model over a 4-bit base:
train, evaluate, checkpoint, and go on bit for bit as if nothing had stopped."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import halfbyte
from halfbyte.optim import AdamW8bit, AdamW32bit, NonFiniteGradient, PagedAdamW8bit
from optim_cases import assert_same_state
from tiny_model import build_config, build_tokenizer

STEPS, SAVED = 6, 3
OPTIMIZERS = [PagedAdamW8bit, AdamW8bit, AdamW32bit]
# Every tensor in 8 bits, however small: these adapters are tiny.
EIGHT_BIT = {"min_8bit_size": 0}


def build_model(seed: int = 0) -> peft.PeftModel:
    """LoRA with dropout on every linear layer of a random Llama with a 4-bit base."""
    torch.manual_seed(0)
    base = halfbyte.quantize_(LlamaForCausalLM(build_config()))
    config = peft.LoraConfig(
        r=4, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    torch.manual_seed(seed)
    return peft.get_peft_model(base, config)


def token_rows(count: int = 40) -> Dataset:
    rows = torch.randint(3, 300, (count, 12), generator=torch.Generator().manual_seed(1)).tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def arguments(kind, folder: Path, **changes):
    settings = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4, "gradient_accumulation_steps": 2, "save_steps": SAVED,
        "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": SAVED,
        "lr_scheduler_type": "cosine", "warmup_steps": 1, "max_grad_norm": 1.0,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 7,
        "gradient_checkpointing": False,
    }  # fmt: skip
    return kind(**(settings | changes))


def build_trainer(folder: Path, optimizer, options, seed=0, model=None, **changes) -> Trainer:
    model = build_model(seed) if model is None else model
    rows = token_rows()
    return Trainer(
        model,
        arguments(TrainingArguments, folder, **changes),
        train_dataset=rows.select(range(32)),
        eval_dataset=rows.select(range(32, 40)),
        optimizer_cls_and_kwargs=(optimizer, {"lr": 1e-2, **options}),
    )


def build_sft_trainer(folder: Path, optimizer, options, seed=0, **changes) -> SFTTrainer:
    torch.manual_seed(0)
    base = halfbyte.quantize_(LlamaForCausalLM(build_config()))
    torch.manual_seed(seed)
    rows = Dataset.from_list([
        {"prompt": f"What colour is thing {i}?", "completion": f" The thing is {'red' * (i % 3)}."}
        for i in range(32)
    ])  # fmt: skip
    return SFTTrainer(
        base,
        arguments(SFTConfig, folder, max_length=32, **changes),
        train_dataset=rows.select(range(24)),
        eval_dataset=rows.select(range(24, 32)),
        processing_class=build_tokenizer(),
        peft_config=peft.LoraConfig(
            r=4, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        optimizer_cls_and_kwargs=(optimizer, {"lr": 1e-2, **options}),
    )


def losses(trainer: Trainer) -> list[tuple[int, str, float]]:
    """(step, name, value) of everything the trainer measured."""
    names = ("loss", "eval_loss", "grad_norm")
    return [
        (row["step"], name, row[name])
        for row in trainer.state.log_history
        for name in names
        if name in row
    ]


def trained(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}


def inner(trainer: Trainer) -> torch.optim.Optimizer:
    """Our optimizer behind accelerate's wrapper."""
    optimizer = trainer.optimizer
    return getattr(optimizer, "optimizer", optimizer)


def checkpoint(folder: Path) -> str:
    return str(folder / f"checkpoint-{SAVED}")


def assert_resumes(build, folder: Path, optimizer, options, **changes) -> None:
    straight = build(folder / "straight", optimizer, options, **changes)
    frozen = {n: p.clone() for n, p in straight.model.named_parameters() if not p.requires_grad}
    straight.train()
    assert len(losses(straight)) == 2 * STEPS + STEPS // SAVED

    # Other adapters and another state of the generator: all must come from the checkpoint.
    torch.manual_seed(99)
    resumed = build(folder / "resumed", optimizer, options, seed=5, **changes)
    resumed.train(resume_from_checkpoint=checkpoint(folder / "straight"))
    assert losses(resumed) == losses(straight)
    for name, value in trained(straight).items():
        assert torch.equal(value, trained(resumed)[name]), name
    ours, theirs = inner(straight), inner(resumed)
    assert type(theirs) is optimizer and theirs.paged == ours.paged
    assert_same_state(ours.state_dict()["state"], theirs.state_dict()["state"])
    for name, value in frozen.items():
        assert torch.equal(value, straight.model.get_parameter(name)), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trainer_resumes_bit_for_bit(optimizer, tmp_path):
    options = {} if optimizer is AdamW32bit else EIGHT_BIT
    assert_resumes(build_trainer, tmp_path, optimizer, options)


@pytest.mark.parametrize("optimizer", [PagedAdamW8bit, AdamW32bit])
def test_sft_trainer_resumes_bit_for_bit_under_bf16_autocast(optimizer, tmp_path):
    """TRL loads in fp32 and leaves the rest to autocast; checkpointing recomputes dropout."""
    options = {} if optimizer is AdamW32bit else EIGHT_BIT
    assert_resumes(
        build_sft_trainer, tmp_path, optimizer, options, bf16=True, gradient_checkpointing=True
    )


@pytest.mark.parametrize("saved_by", [AdamW8bit, PagedAdamW8bit])
def test_paged_state_moves_between_kinds_on_resuming(saved_by, tmp_path):
    loads = AdamW8bit if saved_by is PagedAdamW8bit else PagedAdamW8bit
    straight = build_trainer(tmp_path / "a", saved_by, EIGHT_BIT)
    straight.train()
    resumed = build_trainer(tmp_path / "b", loads, EIGHT_BIT, seed=5)
    resumed.train(resume_from_checkpoint=checkpoint(tmp_path / "a"))
    assert losses(resumed) == losses(straight)
    assert_same_state(inner(straight).state_dict()["state"], inner(resumed).state_dict()["state"])
    assert inner(resumed).paged is (loads is PagedAdamW8bit)


def test_resuming_with_another_kind_of_state_is_refused(tmp_path):
    build_trainer(tmp_path / "a", AdamW32bit, {}).train()
    resumed = build_trainer(tmp_path / "b", AdamW8bit, EIGHT_BIT)
    with pytest.raises(ValueError, match="state: expected 'ratio', got 'float32'"):
        resumed.train(resume_from_checkpoint=checkpoint(tmp_path / "a"))


def test_resumes_in_another_process(tmp_path):
    """Nothing lives on in this process's objects: a new interpreter goes on from the files."""
    straight = build_sft_trainer(tmp_path / "a", PagedAdamW8bit, EIGHT_BIT)
    straight.train()
    torch.save((losses(straight), trained(straight)), tmp_path / "expected.pt")
    script = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "import test_integrations_trainer as t\n"
        "folder = Path(sys.argv[1])\n"
        "trainer = t.build_sft_trainer(folder / 'b', t.PagedAdamW8bit, t.EIGHT_BIT, seed=5)\n"
        "trainer.train(resume_from_checkpoint=t.checkpoint(folder / 'a'))\n"
        "losses, trained = torch.load(folder / 'expected.pt')\n"
        "assert t.losses(trainer) == losses, (t.losses(trainer), losses)\n"
        "assert all(torch.equal(v, t.trained(trainer)[n]) for n, v in trained.items())\n"
    )
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, str(Path(here).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_gradient_that_is_not_finite_stops_the_trainer_before_anything_changes(tmp_path):
    """Trainer clips by the norm of all gradients, which spreads the NaN to all: the message says
    so, and names the first."""
    trainer = build_trainer(tmp_path, PagedAdamW8bit, EIGHT_BIT)
    name = list(trained(trainer))[5]
    before = {}

    def spoil(gradient):
        if trainer.state.global_step == 2:
            before.update({n: p.clone() for n, p in trained(trainer).items()})
            before["state"] = copy.deepcopy(inner(trainer).state_dict()["state"])
            gradient = gradient.clone()
            gradient[1, 3] = float("nan")
        return gradient

    trainer.model.get_parameter(name).register_hook(spoil)
    with pytest.raises(NonFiniteGradient, match="parameter 0 of group 0.*nothing was.*clipping"):
        trainer.train()
    assert_same_state(inner(trainer).state_dict()["state"], before.pop("state"))
    for key, value in before.items():
        assert torch.equal(value, trained(trainer)[key]), key


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients_with_dropout(use_reentrant):
    batch = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(2))

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = build_model().train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.manual_seed(3)
                torch.nn.init.normal_(parameter, std=0.1)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(4)
        model(input_ids=batch, labels=batch).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == 2 * 7 * 2
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, recomputed[name]), name


def test_trainers_weight_decay_groups_are_kept(tmp_path):
    model = build_model()
    model.base_model.model.model.norm.weight.requires_grad_(True)
    trainer = build_trainer(tmp_path, AdamW8bit, EIGHT_BIT, model=model, weight_decay=0.3)
    trainer.create_optimizer()
    decays = [group["weight_decay"] for group in inner(trainer).param_groups]
    assert decays == [0.3, 0.0]
    assert [len(group["params"]) for group in inner(trainer).param_groups] == [28, 1]
