"""stream_layers: a model larger than the memory it may hold trains, with the same losses."""

import mmap
from pathlib import Path

import pytest
import torch
from benchmarks.python import load, processes
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from halfbyte.integrations.layer_streaming import LayerStream
from halfbyte.integrations.packed_folder import write_packed_folder
from halfbyte.integrations.streaming import load_model, stream_layers
from tiny_model import build_config

pytestmark = pytest.mark.skipif(
    not hasattr(mmap, "MADV_DONTNEED"), reason="this system has no madvise"
)
TOKENS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Packed, four layers of about 20 pages each."""
    dense, path = tmp_path_factory.mktemp("dense"), tmp_path_factory.mktemp("packed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4}
    LlamaForCausalLM(build_config(**sizes)).save_pretrained(dense)
    write_packed_folder(dense, path)
    return path


def adapted(folder, checkpointing: bool | None):
    """A model with LoRA; checkpointing: None, or whether it is the reentrant kind."""
    model = load_model(folder)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    return model.train()


def losses(model, steps: int = 3) -> list[float]:
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    made = []
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        made.append(loss.item())
    return made


@pytest.fixture
def calls(monkeypatch):
    """What was asked for and let go of, in order."""
    made = []
    for name in ("ask_for", "let_go"):
        method = getattr(LayerStream, name)

        def record(self, index, name=name, method=method):
            if 0 <= index < len(self.layers):
                made.append((name, index))
            method(self, index)

        monkeypatch.setattr(LayerStream, name, record)
    return made


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_losses_are_the_same_to_the_bit(folder, checkpointing):
    plain = losses(adapted(folder, checkpointing))
    model = adapted(folder, checkpointing)
    stream_layers(model)
    assert losses(model) == plain and plain[-1] < plain[0]


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_a_layer_is_asked_for_before_and_let_go_of_after_its_use(folder, calls, checkpointing):
    model = adapted(folder, checkpointing)
    stream = stream_layers(model)
    assert calls == [("let_go", i) for i in range(4)]
    assert len(stream.layers) == 4 and all(size > 4 * mmap.PAGESIZE for size in stream.nbytes)
    del calls[:]
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    forward = list(calls)
    del calls[:]
    loss.backward()
    let_go = [i for name, i in forward if name == "let_go"]
    assert let_go[:3] == [0, 1, 2]
    assert [i for name, i in forward if name == "ask_for"][:3] == [1, 2, 3]
    backward = [i for name, i in calls if name == "let_go"]
    assert [i for i in backward if i > 0] == [3, 2, 1]
    asked = [i for name, i in calls if name == "ask_for"]
    assert [asked.index(i) for i in (2, 1, 0)] == sorted(asked.index(i) for i in (2, 1, 0))
    for index in range(3):  # asked for while the layer behind it is at work, never later
        assert calls.index(("ask_for", index)) < len(calls) - 1
    del calls[:]
    stream.remove()
    with torch.no_grad():
        model(input_ids=TOKENS)
    assert calls == []


def test_a_layer_that_was_written_to_is_kept(folder):
    model = load_model(folder)
    stream = stream_layers(model)
    layer = model.model.layers[1].mlp.up_proj
    before = model(TOKENS).logits
    with torch.no_grad():
        layer.weight.fill_(0x77)  # zeros
    changed = model(TOKENS).logits
    assert not torch.equal(changed, before)
    stream.let_go(1)
    assert (layer.weight == 0x77).all() and torch.equal(model(TOKENS).logits, changed)


def test_inference_holds_no_layer_afterwards(folder):
    model = load_model(folder)
    with torch.no_grad():
        plain = model(TOKENS).logits
    stream_layers(model)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, plain)
        assert torch.equal(model(TOKENS).logits, plain)


def test_a_model_that_is_not_mapped_is_refused(folder):
    with pytest.raises(ValueError, match="expected layers whose packed weights are mapped"):
        stream_layers(load_model(folder, mapped=False))


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs the kernel's count of peak memory"
)
def test_twice_the_memory_allowed_trains_with_the_same_losses(tmp_path):
    """The kernel's own count of what a process held stays under half of the packed weights, while
    pages that no process holds are dropped from the page cache all the time."""
    sizes = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "vocab_size": 1000,
        "num_attention_heads": 8, "num_key_value_heads": 8,
    }  # fmt: skip
    folder = load.write_packed(tmp_path / "packed", **sizes)
    flags = ["--child", "train", "--folder", str(folder), "--sequence", "4", "--rank", "2"]
    found = processes.run("benchmarks.python.load", flags)
    streamed, plain = found["streamed"], found["plain"]
    assert streamed["losses"] == plain["losses"]
    assert plain["packed"] > 100e6 and plain["peak"] > 0.95 * plain["packed"], plain
    assert streamed["peak"] < 0.5 * plain["packed"], streamed
