"""`halfbyte generate`: the answers of transformers itself, from one base with adapters switched."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import halfbyte
from cli_cases import error, run, save_adapter, save_base
from halfbyte.cli import models
from tiny_model import build_tokenizer

GREEDY = ("--temperature", 0, "--max-new-tokens", 6, "--dtype", "fp32")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    save_base(folder / "base")
    save_adapter(folder / "one", folder / "base", seed=1)
    save_adapter(folder / "two", folder / "base", seed=2, target_modules=["q_proj", "up_proj"])
    return folder


def _expected(files, adapter: str | None, messages: list[dict], tokens: int = 6) -> str:
    """What transformers and PEFT answer on the same 4-bit base."""
    model = AutoModelForCausalLM.from_pretrained(
        files / "base", quantization_config=halfbyte.NF4Config(), dtype=torch.float32
    )
    if adapter is not None:
        model = PeftModel.from_pretrained(model, files / adapter)
    tokenizer = AutoTokenizer.from_pretrained(files / "base")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    ids = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


@pytest.mark.parametrize("adapter", [None, "one"])
def test_one_prompt(files, adapter):
    named = ["--adapter", f"a={files / adapter}"] if adapter else []
    result = run("generate", "--base", files / "base", *named, "--prompt", "red thing", *GREEDY)
    assert result.stdout == _expected(files, adapter, [_user("red thing")]) + "\n"
    assert (
        "tokens/s]" in result.stderr and f"[{'a' if adapter else 'none'}: 6 tokens" in result.stderr
    )


def test_adapters_switch_on_one_base(files, monkeypatch):
    loads = []
    load = models.load_model
    monkeypatch.setattr(models, "load_model", lambda *a: loads.append(a) or load(*a))
    lines = ["red"]
    for name in ("two", "none", "one"):
        lines += [f"/adapter {name}", "/reset", "red"]
    lines += ["/help", "/adapter", "/quit", "never read"]
    result = run(
        "generate", "--base", files / "base", "--adapter", files / "one", "--adapter",
        f"two={files / 'two'}", *GREEDY, "--json", text="\n".join(lines),
    )  # fmt: skip
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [a["adapter"] for a in answers] == ["one", "two", None, "one"]
    expected = {name: _expected(files, name, [_user("red")]) for name in ("one", "two", None)}
    assert len(set(expected.values())) == 3
    assert [a["text"] for a in answers] == [expected[a["adapter"]] for a in answers]
    assert all(a["tokens"] == 6 and a["tokens_per_s"] > 0 for a in answers)
    assert "* one\n  two\n  none" in result.stderr and "/reset" in result.stderr
    assert len(loads) == 1


def test_a_conversation_goes_on(files):
    result = run(
        "generate", "--base", files / "base", *GREEDY, "--json", text="red\n\nblue\n/reset\nblue\n"
    )
    texts = [json.loads(line)["text"] for line in result.stdout.splitlines()]
    turns = [_user("red"), {"role": "assistant", "content": texts[0]}, _user("blue")]
    assert texts[1] == _expected(files, None, turns)
    assert texts[2] == _expected(files, None, [_user("blue")])


def test_sampling_repeats_with_its_seed(files):
    def answer(*flags):
        result = run(
            "generate", "--base", files / "base", "--prompt", "red", "--max-new-tokens", 20,
            "--temperature", 1.5, *flags, "--json",
        )  # fmt: skip
        return json.loads(result.stdout)["text"]

    assert answer("--seed", 3) == answer("--seed", 3)
    assert answer("--seed", 3) != answer("--seed", 4)
    assert answer("--seed", 3, "--top-p", 1e-6) == answer("--seed", 4, "--top-p", 1e-6)


def test_a_packed_folder_and_no_chat_template(files, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        files / "base", quantization_config=halfbyte.NF4Config(), dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "nf4")
    tokenizer = build_tokenizer(template=None)
    tokenizer.save_pretrained(tmp_path / "nf4")
    result = run("generate", "--base", tmp_path / "nf4", *GREEDY, text="The red\nThe red\n")
    ids = tokenizer("The red", return_tensors="pt")["input_ids"]
    new = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
        pad_token_id=0,
    )[0, ids.shape[1] :]  # fmt: skip
    assert result.stdout == (tokenizer.decode(new, skip_special_tokens=True) + "\n") * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter", "absent"], "adapter absent: no such folder"),
        (["--adapter", "none=one"], "expected NAME=FOLDER"),
        (["--adapter", "a.b=one"], "expected NAME=FOLDER"),
        (["--adapter", "one", "--adapter", "one=two"], "the name 'one' is taken"),
        (["--temperature", -1], "temperature: expected 0 or more, got -1.0"),
        (["--top-p", 0], "top_p: expected more than 0 and at most 1, got 0.0"),
        (["--max-new-tokens", 0], "max_new_tokens: expected at least 1, got 0"),
        (["--dtype", "fp8"], "--dtype: expected one of auto, bf16, fp32, got 'fp8'"),
        (["--seed", -1], "--seed: expected 0 or more"),
        (["--base", "absent"], "base absent: no such file or folder"),
        (["--block-size", 48], "block_size: expected a power of two"),
    ],
)
def test_mistakes(files, monkeypatch, flags, message):
    monkeypatch.chdir(files)
    base = [] if "--base" in flags else ["--base", "base"]
    assert message in error("generate", *base, *flags, "--prompt", "red")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/adapter three", "adapter 'three': expected one of one, none"),
        ("/nope", "/nope: no such command; /help lists them"),
        ("red " * 200, "expected at most the model's 128 positions"),
    ],
)
def test_mistakes_in_a_pipe_end_it(files, line, message):
    assert message in error(
        "generate", "--base", files / "base", "--adapter", files / "one", *GREEDY, text=line
    )


def test_an_adapter_of_another_model(files, tmp_path):
    save_base(tmp_path / "wide", hidden_size=64)
    save_adapter(tmp_path / "other", tmp_path / "wide")
    line = error(
        "generate", "--base", files / "base", "--adapter", tmp_path / "other", "--prompt", "red"
    )
    assert "does not fit the base" in line
