"""A 4-bit Llama with PEFT's LoRA in two processes: DDP, FSDP2 and accelerate beside one process.

Losses and gradients are sums over tokens; two processes add the same terms in another order. With n
terms of rounding unit u = 2^-24 the relative difference of two orders is at most about n u: n is
the longest chain of sums, here 96 tokens and rows of up to 320 elements, so n u < 5e-5. What is
measured is 3e-7.
"""

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaForCausalLM

import halfbyte
from distributed import cases, launch, llama
from halfbyte.integrations.distributed import load_checkpoint
from halfbyte.nn import NF4Linear
from halfbyte.optim import AdamW32bit
from tiny_model import build_config

ORDER_OF_SUMS = 5e-5


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict]:
    """(folder, measurements) of two processes."""
    folder = tmp_path_factory.mktemp("training")
    launch.run_worker("worker_training.py", 2, folder)
    return folder, json.loads((folder / "training.json").read_text())


def check_equal(found: dict) -> None:
    assert found["loss"] == pytest.approx(found["expected_loss"], rel=ORDER_OF_SUMS)
    assert found["distance"] < ORDER_OF_SUMS


@pytest.mark.parametrize(
    "way", ["ddp", "reshard", "stay", "accelerate", "accelerate, process 0 loads"]
)
def test_losses_and_gradients_are_those_of_one_process(run, way):
    check_equal(run[1][way])


def test_mixed_precision_reduces_in_fp32(run):
    """The same bf16 computation a process, and an fp32 mean: nothing but the order of sums."""
    check_equal(run[1]["mixed"])


def test_gradients_of_a_bf16_adapter_are_rounded_once(run):
    """After the fp32 mean, to 8 bits of significand: by 2^-8 at most."""
    found = run[1]["bf16 adapter"]
    assert found["loss"] == pytest.approx(found["expected_loss"], rel=ORDER_OF_SUMS)
    assert ORDER_OF_SUMS < found["distance"] < 2**-8 + ORDER_OF_SUMS


def test_mixed_precision_leaves_packed_weights_alone(run):
    dtypes = run[1]["dtypes"]
    packed = {n: d for n, d in dtypes.items() if n.startswith("base_layer.")}
    assert packed == {
        "base_layer.weight": "torch.uint8",
        "base_layer.absmax": "torch.uint8",
        "base_layer.nested_absmax": "torch.int32",
        "base_layer.nested_offset": "torch.int32",
    }
    assert {d for n, d in dtypes.items() if "lora_" in n} == {"torch.bfloat16"}


@pytest.mark.parametrize("way", ["accelerate", "accelerate, process 0 loads"])
def test_accelerate_shards_the_packed_weights(run, way):
    whole, parts = run[1]["whole"], run[1][way]["bytes"]
    assert sum(parts) == whole
    assert max(parts) < 0.51 * whole


@pytest.mark.parametrize("kind", ["AdamW32bit", "AdamW8bit"])
def test_a_resumed_run_has_the_uninterrupted_runs_bits(run, kind):
    found = run[1]["optimizers"]
    assert found[f"{kind} resumed"] == found[f"{kind} sharded"][2:]
    assert found[f"{kind} sharded"][3] < 0.8 * found[f"{kind} sharded"][0]


@pytest.mark.parametrize("way", ["accelerate", "accelerate, process 0 loads"])
def test_accelerate_resumes_with_the_same_bits(run, way):
    assert run[1][way]["resumed"] == run[1][way]["losses"][2:]
    assert run[1][way]["losses"] == run[1]["optimizers"]["AdamW8bit sharded"]


def alone(folder=None, name=None) -> list[float]:
    """Losses of one process: four steps, or two from a checkpoint."""
    model = llama.build()
    optimizer = AdamW32bit(list(cases.named_trainable(model).values()), lr=1e-2)
    if folder is not None:
        load_checkpoint(folder / name, model, optimizer)
    losses = []
    for _ in range(4 if folder is None else 2):
        loss = cases.loss_of(model, cases.batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_training_goes_as_in_one_process(run):
    """AdamW32bit: rounding apart. AdamW8bit: codes of other blocks, 1 % of a moment each."""
    expected = alone()
    found = run[1]["optimizers"]
    assert found["AdamW32bit sharded"] == pytest.approx(expected, rel=ORDER_OF_SUMS)
    assert found["AdamW8bit sharded"] == pytest.approx(expected, rel=1e-3)
    assert found["ddp"] == pytest.approx(expected, rel=1e-3)
    resumed = alone(run[0], "AdamW32bit")
    assert resumed == pytest.approx(expected[2:], rel=ORDER_OF_SUMS)


def test_sharded_state_dicts_hold_the_parameters_by_name(run):
    names = ["absmax", "nested_absmax", "nested_offset", "weight"]
    assert run[1]["state dicts"] == {"same": True, "names": names}


def test_the_gathered_adapter_loads_in_plain_peft(run):
    folder, _ = run
    files = sorted(path.name for path in (folder / "adapter").iterdir())
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
    torch.manual_seed(0)
    base = LlamaForCausalLM(build_config())
    dense = halfbyte.quantize_(base)
    for name, module in list(dense.named_modules()):
        if isinstance(module, NF4Linear):
            parent, _, child = name.rpartition(".")
            setattr(dense.get_submodule(parent), child, module.to_linear())
    model = peft.PeftModel.from_pretrained(dense, folder / "adapter", is_trainable=True)
    expected = torch.load(folder / "adapter.pt", weights_only=True)
    got = cases.named_trainable(model)
    assert got.keys() == expected.keys() and len(got) == 2 * 7 * 2
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
