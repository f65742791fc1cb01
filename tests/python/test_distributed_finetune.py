"""`halfbyte finetune` in two processes, and what becomes of them when one ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import yaml
from transformers import AutoModelForCausalLM

import halfbyte
from distributed import launch
from halfbyte.finetune import processes
from halfbyte.finetune.config import FinetuneConfig
from halfbyte.finetune.errors import FinetuneError
from halfbyte.finetune.processes import LOST
from halfbyte.finetune.run import finetune
from tiny_model import colour_rows, save_model, write_jsonl

# Two processes add the same terms in another order: see test_distributed_training.py.
ORDER_OF_SUMS = 5e-5
FSDP2 = Path(halfbyte.__file__).parent / "finetune" / "accelerate_fsdp2.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base, rows to train on and an odd number of held-out batches."""
    folder = tmp_path_factory.mktemp("finetune")
    save_model(folder / "base")
    write_jsonl(folder / "train.jsonl", colour_rows(24))
    write_jsonl(folder / "held-out.jsonl", colour_rows(33)[24:])
    return folder


def settings(folder: Path, **changes) -> dict:
    values = {
        "base": folder / "base", "data": folder / "train.jsonl",
        "eval_data": folder / "held-out.jsonl", "steps": 4, "rank": 4, "lr": 1e-2, "warmup": 1,
        "dropout": 0.0, "dtype": "fp32", "sample_tokens": 3, "eval_every": 2, "batch": 4,
    }  # fmt: skip
    return values | changes


def command(folder: Path, out: str, **changes) -> list[str]:
    values = settings(folder, out=folder / out, **changes)
    flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in values.items()]
    return ["-m", "halfbyte", "finetune", *(part for flag in flags for part in flag)]


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two(folder) -> tuple[Path, subprocess.CompletedProcess]:
    """(output, process) of two processes of batch 4 under torchrun."""
    done = launch.torchrun(2, *command(folder, "two"))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "two", done


def test_two_processes_make_the_steps_of_one(folder, two):
    """A global batch of 8, of two processes and of one."""
    finetune(FinetuneConfig.load(None, **settings(folder, out=folder / "one", batch=8)))
    got, expected = records(two[0]), records(folder / "one")
    assert [r["kind"] for r in got] == [r["kind"] for r in expected] and len(got) == 4 + 3
    for mine, theirs in zip(got, expected, strict=True):
        assert mine["step"] == theirs["step"] and mine["tokens"] == theirs["tokens"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=ORDER_OF_SUMS)
        if mine["kind"] == "step":
            assert mine["completion_tokens"] == theirs["completion_tokens"]
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=ORDER_OF_SUMS)


def test_process_0_alone_prints_and_writes(two):
    out, done = two
    for line in ("24 training rows", "step 1/4", "after step 4", "sample answer"):
        assert done.stdout.count(line) == 1, done.stdout
    assert "error:" not in done.stderr and "Traceback" not in done.stderr
    names = sorted(path.name for path in out.iterdir())
    assert names == ["adapter", "config.yaml", "loss.png", "metrics.jsonl", "run.json"]
    assert json.loads((out / "run.json").read_text())["processes"] == 2


def test_the_adapter_is_whole(folder, two):
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = peft.PeftModel.from_pretrained(base, two[0] / "adapter")
    b = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert len(b) == 2 * 7 and all(p.abs().max() > 0 for p in b)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_stops_the_others(tmp_path, victim):
    """Under `accelerate launch` with the packaged FSDP2 configuration."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FSDP2)]
    launcher += ["--num_processes", "2", "--main_process_port", str(free_port())]
    launcher += ["--num_cpu_threads_per_process", "1", str(launch.HERE / "worker_lost.py")]
    output = (tmp_path / "output").open("w+")
    run = subprocess.Popen(
        [*launcher, str(tmp_path)], stdout=output, stderr=output, env=launch.environment()
    )
    try:
        deadline = time.monotonic() + 120
        files = [tmp_path / "0", tmp_path / "1"]
        while not all(file.exists() and file.read_text() for file in files):
            assert run.poll() is None and time.monotonic() < deadline, said(output)
            time.sleep(0.1)
        os.kill(int(files[victim].read_text()), signal.SIGKILL)
        assert run.wait(timeout=30) != 0
    finally:
        run.kill()
    lines = [line for line in said(output).splitlines() if line.startswith("error:")]
    assert lines == [f"error: process {1 - victim}: {LOST}"], said(output)


def test_an_error_of_all_processes_is_told_by_the_first(monkeypatch):
    monkeypatch.setattr(processes, "FIRST_SPEAKS_WITHIN_S", 0.0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for rank, expected in (("0", "data: absent"), ("1", "process 1: data: absent")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(FinetuneError, match=f"^{expected}$"), processes.one_voice():
            raise FinetuneError("data: absent")


def said(output) -> str:
    output.seek(0)
    return output.read()


def test_the_packaged_configuration_is_fsdp2():
    config = yaml.safe_load(FSDP2.read_text())
    assert config["distributed_type"] == "FSDP" and config["fsdp_config"]["fsdp_version"] == 2
