"""One run through the command line, and what it leaves behind."""

import json
import math

import peft
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import halfbyte
from halfbyte.cli.main import app
from halfbyte.finetune.data import read_rows
from halfbyte.finetune.encode import IGNORED, encode_row
from halfbyte.integrations import peft as bridge
from tiny_model import colour_rows, save_model, write_jsonl

STEPS = 20


def _run(*arguments):
    return CliRunner().invoke(app, ["finetune", *map(str, arguments)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, result) of one run with a YAML file and flags that override it."""
    folder = tmp_path_factory.mktemp("run")
    save_model(folder / "base")
    write_jsonl(folder / "train.jsonl", colour_rows(24))
    write_jsonl(folder / "held-out.jsonl", colour_rows(30)[24:])
    (folder / "run.yaml").write_text(
        "base: base\ndata: train.jsonl\neval_data: held-out.jsonl\nout: out\n"
        f"steps: {STEPS}\nrank: 99\nlr: 3e-2\nbatch: 8\ndtype: fp32\nsample_tokens: 6\n"
    )
    result = _run("--config", folder / "run.yaml", "--rank", 8, "--eval-every", 10)
    assert result.exit_code == 0, result.output
    return folder, result


def _jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_output_folder_is_complete_and_clean(run):
    folder, _ = run
    names = sorted(path.name for path in (folder / "out").iterdir())
    assert names == ["adapter", "config.yaml", "loss.png", "metrics.jsonl", "run.json"]
    adapter = sorted(path.name for path in (folder / "out" / "adapter").iterdir())
    assert adapter == ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "base", "held-out.jsonl", "out", "run.yaml", "train.jsonl"
    ]  # fmt: skip


def test_flags_override_the_yaml_file(run):
    folder, _ = run
    assert json.loads((folder / "out/run.json").read_text())["config"]["rank"] == 8
    assert json.loads((folder / "out/adapter/adapter_config.json").read_text())["r"] == 8


def test_metrics_are_complete(run):
    folder, _ = run
    records = _jsonl(folder / "out" / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    for record in steps:
        assert set(record) == {
            "kind", "step", "loss", "lr", "grad_norm", "tokens", "completion_tokens",
            "tokens_per_s", "peak_rss_bytes", "elapsed_s",
        }  # fmt: skip
        assert math.isfinite(record["loss"]) and record["tokens"] > 0
        assert record["peak_rss_bytes"] > 50e6
    assert max(record["lr"] for record in steps) == pytest.approx(3e-2)
    assert [r["elapsed_s"] for r in steps] == sorted(r["elapsed_s"] for r in steps)
    evals = [record for record in records if record["kind"] == "eval"]
    assert [record["step"] for record in evals] == [0, 10, STEPS]


def test_token_counts_are_the_datas(run):
    folder, _ = run
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    rows = read_rows(folder / "train.jsonl")
    tokens = sum(len(encode_row(row, tokenizer).input_ids) for row in rows)
    data = json.loads((folder / "out/run.json").read_text())["data"]
    assert data["train"]["tokens"] == tokens and data["train"]["rows"] == 24
    steps = [r for r in _jsonl(folder / "out/metrics.jsonl") if r["kind"] == "step"]
    assert sum(record["tokens"] for record in steps[:3]) == tokens  # 24 rows = 3 batches of 8
    learned = sum(record["completion_tokens"] for record in steps[:3])
    assert learned == data["train"]["completion_tokens"]


def test_training_lowers_both_losses(run):
    folder, _ = run
    summary = json.loads((folder / "out" / "run.json").read_text())
    before, after = summary["held_out_before"]["loss"], summary["held_out_after"]["loss"]
    assert before > 0.9 * math.log(320)  # an untrained model guesses
    assert after < 0.5 * before
    steps = [r for r in _jsonl(folder / "out/metrics.jsonl") if r["kind"] == "step"]
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert summary["sample"]["before"] != summary["sample"]["after"]
    assert summary["versions"]["halfbyte"] == halfbyte.__version__


def _held_out_loss(model, folder):
    """Mean loss over completion tokens, one row at a time, from full logits."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    total, tokens = 0.0, 0
    for row in read_rows(folder / "held-out.jsonl"):
        sample = encode_row(row, tokenizer)
        ids, labels = torch.tensor([sample.input_ids]), torch.tensor([sample.labels])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=labels).loss
        learned = int((labels[:, 1:] != IGNORED).sum())
        total, tokens = total + loss.item() * learned, tokens + learned
    return total / tokens, tokens


def _dequantized_base(folder):
    """The base as plain transformers sees it: dense, with dequantized linear layers."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    halfbyte.quantize_(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, halfbyte.nn.NF4Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.to_linear())
    return model


def test_the_adapter_loads_in_plain_peft_and_gives_the_reported_losses(run):
    folder, _ = run
    summary = json.loads((folder / "out" / "run.json").read_text())
    bridge.disable()  # nothing of ours in the layers
    try:
        base = _dequantized_base(folder)
        loss, tokens = _held_out_loss(base, folder)
        assert loss == pytest.approx(summary["held_out_before"]["loss"], rel=1e-4)
        assert tokens == summary["held_out_before"]["tokens"]
        model = peft.PeftModel.from_pretrained(base, folder / "out" / "adapter")
        loss, _ = _held_out_loss(model, folder)
        assert loss == pytest.approx(summary["held_out_after"]["loss"], rel=1e-4)
    finally:
        bridge.enable()


def test_the_loss_curve_is_an_image_with_content(run):
    folder, _ = run
    with Image.open(folder / "out" / "loss.png") as image:
        image.load()
        assert image.format == "PNG"
        assert image.size == (1200, 675)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50


def test_what_a_person_reads(run):
    folder, result = run
    assert f"step 1/{STEPS}" in result.output and f"step {STEPS}/{STEPS}" in result.output
    for word in ("loss", "lr", "tok/s", "peak", "left", "held-out", "before", "after"):
        assert word in result.output
    assert str(folder / "out" / "adapter").replace("\n", "") in result.output.replace("\n", "")


def test_a_second_run_needs_overwrite(run):
    folder, _ = run
    before = (folder / "out" / "run.json").read_bytes()
    result = _run("--config", folder / "run.yaml", "--rank", 8)
    assert result.exit_code == 2
    assert "already holds a run (adapter); pass --overwrite" in result.stderr
    assert (folder / "out" / "run.json").read_bytes() == before


def test_overwrite_replaces_the_run(run, tmp_path):
    folder, _ = run
    common = ["--config", folder / "run.yaml", "--out", tmp_path / "out", "--steps", 1]
    for rank in (2, 3):
        flags = ["--rank", rank, "--sample-tokens", 0, "--overwrite"]
        result = _run(*common, *flags)
        assert result.exit_code == 0, result.output
        config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
        assert config["r"] == rank
    assert len(_jsonl(tmp_path / "out/metrics.jsonl")) == 3


def test_the_written_config_repeats_the_run(run, tmp_path):
    folder, _ = run
    result = _run("--config", folder / "out" / "config.yaml", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output

    def losses(out):
        return [record["loss"] for record in _jsonl(out / "metrics.jsonl")]

    assert losses(tmp_path / "out") == losses(folder / "out")


def test_a_run_that_diverges_stops_with_a_plain_error(run, tmp_path, monkeypatch):
    folder, _ = run
    from halfbyte.finetune.trainer import CompletionTrainer

    original = CompletionTrainer.compute_loss

    def diverging(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss * torch.nan if self.model.training else loss

    monkeypatch.setattr(CompletionTrainer, "compute_loss", diverging)
    result = _run("--config", folder / "run.yaml", "--rank", 8, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "error: step 1: expected a finite loss, got nan" in result.stderr
    assert not (tmp_path / "out" / "run.json").exists()
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
