"""`halfbyte eval`: against losses computed from whole logits."""

import json
import math
import sys
import types

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

import halfbyte
from cli_cases import error, load_dense, run, save_adapter, save_base
from halfbyte.integrations.evaluation import held_out_loss, windows
from tiny_model import write_jsonl

TEXT = "What colour is the red thing? The red thing is red. " * 20
ROWS = [
    {"prompt": "What colour is it?", "completion": "The thing is red."},
    {"text": "The blue thing is blue."},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "pink"}]},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    save_base(folder / "base")
    save_adapter(folder / "adapter", folder / "base")
    (folder / "text.txt").write_text(TEXT)
    write_jsonl(folder / "rows.jsonl", ROWS)
    return folder


def _direct(model, samples) -> tuple[float, int]:
    """(mean loss, tokens): one sequence at a time, whole logits."""
    total, count = 0.0, 0
    for ids, labels in samples:
        with torch.no_grad():
            logits = model(torch.tensor([list(ids)])).logits[0, :-1].double()
        wanted = torch.tensor(list(labels))[1:]
        total += torch.nn.functional.cross_entropy(
            logits, wanted, ignore_index=-100, reduction="sum"
        ).item()
        count += int((wanted != -100).sum())
    return total / count, count


def _packed(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=halfbyte.NF4Config(), dtype=torch.float32
    )


@pytest.mark.parametrize(("length", "stride"), [(64, 32), (50, 17), (128, 127)])
def test_a_text(files, length, stride):
    result = run(
        "eval", "--base", files / "base", "--adapter", files / "adapter", "--data",
        files / "text.txt", "--max-length", length, "--stride", stride, "--batch", 3,
        "--dtype", "fp32", "--json",
    )  # fmt: skip
    facts = json.loads(result.stdout)
    ids = AutoTokenizer.from_pretrained(files / "base")(TEXT)["input_ids"]
    model = PeftModel.from_pretrained(_packed(files / "base"), files / "adapter").eval()
    # Each token once, after as many others as its window holds.
    samples, scored = [], 1
    for start in range(0, len(ids), stride):
        window = ids[start : start + length]
        if start + len(window) > scored:
            keep = start + len(window) - scored
            samples.append((window, [-100] * (len(window) - keep) + window[-keep:]))
            scored = start + len(window)
    loss, count = _direct(model, samples)
    assert facts["tokens"] == count == len(ids) - 1
    assert facts["loss"] == pytest.approx(loss, rel=1e-5)
    assert facts["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("flags", [[], ["--dense"]])
def test_rows(files, flags):
    """The loss is on the answers alone, and does not depend on batches."""
    found = [
        json.loads(
            run(
                "eval", "--base", files / "base", "--data", files / "rows.jsonl", "--batch", batch,
                "--dtype", "fp32", *flags, "--json",
            ).stdout
        )
        for batch in (1, 8)
    ]  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(files / "base")
    starts = ["<|im_start|>user\nWhat colour is it?<|im_end|>\n<|im_start|>assistant\n", "",
              "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"]  # fmt: skip
    answers = ["The thing is red.<|im_end|>", "The blue thing is blue.<|im_end|>", "pink<|im_end|>"]
    samples = []
    for start, answer in zip(starts, answers, strict=True):
        before, after = (
            tokenizer(t, add_special_tokens=False)["input_ids"] for t in (start, answer)
        )
        samples.append((before + after, [-100] * len(before) + after))
    model = load_dense(files / "base") if flags else _packed(files / "base").eval()
    loss, count = _direct(model, samples)
    for facts in found:
        assert facts["tokens"] == count and facts["sequences"] == 3
        assert facts["loss"] == pytest.approx(loss, rel=1e-5)


def test_the_output_for_people(files):
    result = run("eval", "--base", files / "base", "--data", files / "rows.jsonl")
    assert "nats a token, perplexity" in result.stdout


def test_chunks_and_soft_capping():
    """The model's own head on a few positions at a time, its soft-capping included."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=0.5,
        initializer_range=0.5,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).train()
    samples = list(windows(list(range(3, 40)), 20, 7))
    seen = []
    handle = model.lm_head.register_forward_hook(lambda m, a, out: seen.append(out.shape[-2]))
    found = held_out_loss(model, samples, batch=4, chunk=10)
    handle.remove()
    assert max(seen) == 10 and sum(seen) == found.tokens == 36
    assert model.training
    model.eval()
    assert "forward" not in vars(model.base_model)
    assert found.loss == pytest.approx(_direct(model, samples)[0], rel=1e-5)


def test_windows():
    found = list(windows(range(7), 4, 2))
    assert [list(ids) for ids, _ in found] == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6]]
    assert [list(labels) for _, labels in found] == [
        [-100, 1, 2, 3], [-100, -100, 4, 5], [-100, -100, 6],
    ]  # fmt: skip
    for length, stride in ((1, 1), (4, 0), (4, 4)):
        with pytest.raises(ValueError, match="expected"):
            list(windows(range(7), length, stride))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data": None}, "expected --data, --tasks or both"),
        ({"data": "absent.jsonl"}, "absent.jsonl: no such file"),
        ({"adapter": "absent"}, "adapter absent: no such folder"),
        ({"max-length": 4096}, "--max-length: expected 2 to the model's 128 positions, got 4096"),
        ({"data": "text.txt", "max-length": 8, "stride": 8}, "stride: expected 1 to 7, got 8"),
        ({"stride": 8}, "--stride is for a text"),
        ({"batch": 0}, "--batch: expected at least 1, got 0"),
        ({"limit": 3}, "--limit: expected at least 1, with --tasks"),
        ({"task-path": "."}, "--task-path .: expected a folder, with --tasks"),
        ({"max-length": 4}, "tokens, expected at most 4"),
    ],
)
def test_mistakes(files, monkeypatch, flags, message):
    monkeypatch.chdir(files)
    flags = {"base": "base", "data": "rows.jsonl"} | flags
    arguments = [x for k, v in flags.items() if v is not None for x in (f"--{k}", v)]
    assert message in error("eval", *arguments)


def test_tasks_without_the_harness(files, monkeypatch):
    find = sys.modules["importlib.util"].find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda n, *a: None if n == "lm_eval" else find(n, *a)
    )
    message = error("eval", "--base", files / "base", "--tasks", "hellaswag")
    assert message.endswith("is not installed; run: pip install lm_eval")


def test_tasks_go_to_the_harness(files, monkeypatch):
    """What lm_eval is called with; its place is taken by a stand-in."""
    called = {}

    class HFLM:
        def __init__(self, **settings):
            called.update(settings)

    def simple_evaluate(model, tasks, limit, task_manager):
        assert isinstance(model, HFLM)
        called.update(tasks=tasks, limit=limit)
        return {"results": {"arc": {"alias": "arc", "acc,none": 0.5}}}

    manager = types.SimpleNamespace(match_tasks=lambda names: [n for n in names if n == "arc"])
    modules = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
        "lm_eval.tasks": {"TaskManager": lambda **settings: called.update(settings) or manager},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    result = run("eval", "--base", files / "base", "--tasks", "arc", "--limit", 3, "--batch", 2,
                 "--task-path", files)  # fmt: skip
    assert result.stdout == "arc: acc,none 0.5000\n"
    assert called["include_path"] == str(files)
    assert called["tasks"] == ["arc"] and called["limit"] == 3 and called["batch_size"] == 2
    assert any(isinstance(m, halfbyte.nn.NF4Linear) for m in called["pretrained"].modules())
    line = error("eval", "--base", files / "base", "--tasks", "arc,nope")
    assert "expected names that lm_eval knows, got nope" in line
