"""A run that is stopped and goes on has the bits of one that was never stopped."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from distributed import launch
from finetune_cases import RESULTS, At, assert_same, records, run, save_inputs, settings, stop
from halfbyte.cli.main import app
from halfbyte.finetune import checkpoints
from halfbyte.finetune.errors import FinetuneError
from halfbyte.finetune.trainer import SKIPS_IN_A_ROW, CompletionTrainer
from tiny_model import colour_rows, write_jsonl


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("inputs"))


CASES = {
    "dropout": {},
    "accumulation": {"accumulation": 3, "eval_every": 2, "group_by_length": False},
    "checkpointing": {"gradient_checkpointing": True, "eval_every": 3, "weight_decay": 0.1},
}


@pytest.mark.parametrize("case", CASES)
def test_stopped_twice_and_resumed(inputs, tmp_path, case):
    """Step 4 ends an epoch; the signal during step 5 lets 5 or 6 end."""
    changes = CASES[case]
    run(inputs, tmp_path / "whole", **changes)
    out = tmp_path / "out"
    stop(inputs, out, 3, **changes)
    assert [path.name for path in checkpoints.found(out)] == ["step-4"]
    stopped = stop(inputs, out, 6, signal.SIGINT, **changes, resume=True)
    assert stopped.number == signal.SIGINT
    assert f"--out {out} --resume" in str(stopped) and "step-7 is whole" in str(stopped)
    report = At()
    run(inputs, out, report, **changes, resume=True)
    assert report.facts["resume"] == "after step 7 of 10"
    assert_same(out, tmp_path / "whole")
    elapsed = [json.loads(line)["elapsed_s"] for line in open(out / "metrics.jsonl")]
    assert elapsed == sorted(elapsed)


def test_stopped_between_the_last_step_and_the_results(inputs, tmp_path):
    run(inputs, tmp_path / "whole", steps=3)
    out = tmp_path / "out"
    stop(inputs, out, 3, steps=3)
    assert [path.name for path in checkpoints.found(out)] == ["step-3"]
    run(inputs, out, steps=3, resume=True)
    assert_same(out, tmp_path / "whole")


def test_checkpoints_on_the_way(inputs, tmp_path):
    """Every 2 steps, the newest 2; no pickled code; gone when the run is whole."""
    seen = []

    def look():
        seen.append([path.name for path in checkpoints.found(tmp_path / "out")])

    run(inputs, tmp_path / "out", At(8, look), save_every=2, keep=2)
    assert seen == [["step-4", "step-6"]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == RESULTS
    stop(inputs, tmp_path / "other", 1)
    (folder,) = checkpoints.found(tmp_path / "other")
    assert sorted(file.name for file in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "checkpoint.json", "config.yaml",
        "optimizer.pt", "rng.safetensors", "scheduler.pt", "trainer_state.json",
    ]  # fmt: skip
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(folder / name, weights_only=True)


def test_settings_and_rows_must_be_the_checkpoints(inputs, tmp_path):
    out = tmp_path / "out"
    stop(inputs, out, 1)
    write_jsonl(tmp_path / "rows.jsonl", colour_rows(13))
    shutil.copytree(inputs / "base", tmp_path / "base")
    weights = bytearray((tmp_path / "base/model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "base/model.safetensors").write_bytes(weights)
    for changes, message in (
        ({"rank": 8}, "rank: the checkpoint has 4, this run 8"),
        ({"lr": 2e-2}, "lr: the checkpoint has 0.01, this run 0.02"),
        ({"data": tmp_path / "rows.jsonl"}, "training rows: the checkpoint has"),
        ({"base": tmp_path / "base"}, "base: the checkpoint has"),
        ({"overwrite": True}, "--resume and --overwrite exclude each other"),
    ):
        with pytest.raises(FinetuneError) as caught:
            run(inputs, out, resume=True, **changes)
        assert message in str(caught.value)
    with pytest.raises(FinetuneError, match="not finished; pass --resume to go on, or --overwrite"):
        run(inputs, out)
    shutil.copy(inputs / "rows.jsonl", tmp_path / "moved.jsonl")  # the same rows elsewhere
    stop(inputs, out, 3, resume=True, data=tmp_path / "moved.jsonl")
    run(inputs, out, overwrite=True, steps=1)
    with pytest.raises(FinetuneError, match="the run is finished"):
        run(inputs, out, resume=True)


def test_a_damaged_checkpoint_is_named(inputs, tmp_path):
    out = tmp_path / "out"
    stop(inputs, out, 1)
    (folder,) = checkpoints.found(out)
    file = folder / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(FinetuneError, match=r"step-2/optimizer.pt: expected sha256 .* remove"):
        run(inputs, out, resume=True)
    for text in ("{", "[]", "{}", '{"step": 1}'):
        (folder / "checkpoint.json").write_text(text)
        with pytest.raises(FinetuneError, match="checkpoint.json: not the record of a checkpoint"):
            run(inputs, out, resume=True)


def test_records_that_are_gone_are_named(inputs, tmp_path):
    out = tmp_path / "out"
    stop(inputs, out, 1)
    (out / "metrics.jsonl.part").write_text("")
    with pytest.raises(FinetuneError, match=r"expected the checkpoint's \d+ bytes of records"):
        run(inputs, out, resume=True)


def test_resume_before_the_first_checkpoint_starts(inputs, tmp_path):
    report = At()
    run(inputs, tmp_path / "out", report, steps=1, resume=True)
    assert report.facts["resume"] == "no checkpoint yet: from the beginning"


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_command_line(inputs, tmp_path, monkeypatch, one_thread):
    """One line and the signal's exit code; `--out OUT --resume` needs no other flag."""
    out = tmp_path / "out"
    run(inputs, tmp_path / "whole", steps=4)
    flags = [
        part
        for name, value in settings(inputs, out, steps=4).items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    step = CompletionTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(CompletionTrainer, "training_step", interrupted)
    result = CliRunner().invoke(app, ["finetune", *flags])
    assert result.exit_code == 128 + signal.SIGTERM, result.output
    assert result.stderr == (
        "stopped; step-2 is whole, --resume goes on from it; go on with: "
        f"halfbyte finetune --out {out} --resume\n"
    )
    assert "SIGTERM: finishing this step and saving" in result.stdout

    def twice(self, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(CompletionTrainer, "training_step", twice)
    result = CliRunner().invoke(app, ["finetune", "--out", str(out), "--resume"])
    assert result.exit_code == 128 + signal.SIGINT and "step-2 is whole" in result.stderr
    monkeypatch.setattr(CompletionTrainer, "training_step", step)
    result = CliRunner().invoke(app, ["finetune", "--out", str(out), "--resume"])
    assert result.exit_code == 0, result.output
    assert_same(out, tmp_path / "whole")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def poison(monkeypatch, steps, what):
    """In each of these steps one element of the first gradient, or of a layer's output, is nan."""
    backward, forward = torch.Tensor.backward, CompletionTrainer.compute_loss
    at = []

    def now(trainer):
        return trainer.model.training and trainer.state.global_step + 1 in steps

    def compute_loss(self, *args, **kwargs):
        if not at:
            layer = self.model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
            layer.register_forward_hook(
                lambda *a: a[2] * torch.nan if now(self) and what == "loss" else None
            )
        at[:] = [self]
        return forward(self, *args, **kwargs)

    def poisoned(self, *args, **kwargs):
        backward(self, *args, **kwargs)
        if now(at[0]) and what == "gradient":
            next(p for p in at[0].model.parameters() if p.grad is not None).grad[1, 2] = torch.nan

    monkeypatch.setattr(CompletionTrainer, "compute_loss", compute_loss)
    monkeypatch.setattr(torch.Tensor, "backward", poisoned)


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_a_step_that_is_not_finite_stops_the_run(inputs, tmp_path, monkeypatch, what):
    run(inputs, tmp_path / "whole")
    with monkeypatch.context() as patch:
        poison(patch, {5}, what)
        with pytest.raises(FinetuneError) as caught:
            run(inputs, tmp_path / "out", save_every=2)
    expected = {
        "gradient": "step 5: the gradient of base_model.model.model.layers.0.self_attn.q_proj."
        "lora_A.default.weight is nan at [1, 2]; nothing was changed",
        "loss": "step 5: expected a finite loss, got nan: the output of layers.1.mlp.up_proj is nan"
        " at [0, 0, 0]; nothing was changed",
    }[what]
    assert str(caught.value).startswith(expected)
    assert str(caught.value).endswith("step-4 is whole, --resume goes on from it")
    run(inputs, tmp_path / "out", resume=True)
    assert_same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_a_step_that_is_not_finite_is_skipped(inputs, tmp_path, monkeypatch, what):
    report = At()
    poison(monkeypatch, {1, 4}, what)
    changes = {"non_finite": "skip", "steps": 6, "accumulation": 2}
    run(inputs, tmp_path / "out", report, **changes)
    assert report.facts["skipped"].startswith("step 4: ")
    steps = [record for record in records(tmp_path / "out") if record["kind"] == "step"]
    assert [record["step"] for record in steps if record["loss"] is None] == [1, 4]
    assert all(record["loss"] > 0 and record["grad_norm"] > 0 for record in steps[1:3] + steps[4:])
    poison(monkeypatch, {1, 4}, what)  # of the next trainer
    stop(inputs, tmp_path / "other", 4, **changes)  # skipped steps are read back
    run(inputs, tmp_path / "other", resume=True, **changes)
    assert_same(tmp_path / "other", tmp_path / "out")


def test_skipping_has_an_end(inputs, tmp_path, monkeypatch):
    poison(monkeypatch, range(2, 99), "gradient")
    with pytest.raises(FinetuneError, match=f"{SKIPS_IN_A_ROW} steps in a row"):
        run(inputs, tmp_path / "out", non_finite="skip", steps=40)


def test_two_processes_resume(inputs, tmp_path):
    """From a copy of the checkpoint of step 4 of a run that went on to its end."""
    values = settings(inputs, tmp_path / "whole", batch=2, save_every=4, keep=1, steps=7)
    flags = [part for k, v in values.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    done = launch.torchrun(2, __file__, tmp_path / "out", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in checkpoints.found(tmp_path / "out")] == ["step-4"]
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", tmp_path / "out")
    done = launch.torchrun(2, "-m", "halfbyte", "finetune", "--out", tmp_path / "out", "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(tmp_path / "out", tmp_path / "whole")


if __name__ == "__main__":  # a process of `halfbyte finetune` that copies checkpoints, then ends
    COPY, remove = Path(sys.argv[1]), checkpoints.remove_all

    def copy_and_remove(out):
        if checkpoints.found(out):
            shutil.copytree(checkpoints.root(out), checkpoints.root(COPY))
        remove(out)

    checkpoints.remove_all = copy_and_remove
    app(["finetune", *sys.argv[2:]])
