"""Runs of `halfbyte finetune` that are interrupted and go on, and what must be equal afterwards."""

import json
import signal
from pathlib import Path

import pytest
import torch

from halfbyte.finetune.config import FinetuneConfig
from halfbyte.finetune.errors import Interrupted
from halfbyte.finetune.report import Report
from halfbyte.finetune.run import finetune
from tiny_model import colour_rows, save_model, write_jsonl

TIMES = {"tokens_per_s", "peak_rss_bytes", "elapsed_s"}
RESULTS = ["adapter", "config.yaml", "loss.png", "metrics.jsonl", "run.json"]


def save_inputs(folder: Path) -> Path:
    """A base, 13 rows to train on (4 batches of 4, the last of one) and held-out rows."""
    save_model(folder / "base")
    rows = [
        {"prompt": "What colour?" * (1 + i % 3), "completion": f"It is {i}."} for i in range(13)
    ]
    write_jsonl(folder / "rows.jsonl", rows)
    write_jsonl(folder / "held-out.jsonl", colour_rows(5))
    return folder


def settings(inputs: Path, out: Path, **changes) -> dict:
    """The settings of a short run with dropout."""
    values = {
        "base": inputs / "base", "data": inputs / "rows.jsonl", "out": out,
        "eval_data": inputs / "held-out.jsonl", "dtype": "fp32", "batch": 4, "steps": 10,
        "rank": 4, "lr": 1e-2, "warmup": 2.0, "dropout": 0.3, "sample_tokens": 3,
    }  # fmt: skip
    return values | changes


class At(Report):
    """Calls `act` when the record of `step` is written; keeps what it is told."""

    def __init__(self, step=None, act=None):
        self.step, self.act, self.facts = step, act, {}

    def record(self, record):
        if record.kind == "step" and record.step == self.step:
            self.act()

    def fact(self, name, text):
        self.facts[name] = text


def run(inputs: Path, out: Path, report: Report | None = None, **changes) -> None:
    """Run to the end; on one thread, as subprocesses do: torch's sums depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        finetune(FinetuneConfig.load(None, **settings(inputs, out, **changes)), report)
    finally:
        torch.set_num_threads(threads)


def stop(inputs: Path, out: Path, step: int, number=signal.SIGTERM, **changes) -> Interrupted:
    """Run until a signal comes while the record of `step` is written: the next step is the last."""
    with pytest.raises(Interrupted) as caught:
        run(inputs, out, At(step, lambda: signal.raise_signal(number)), **changes)
    return caught.value


def records(out: Path) -> list[dict]:
    """metrics.jsonl without what a clock says."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def adapter_config(out: Path) -> dict:
    """PEFT writes a set of names, in any order."""
    config = json.loads((out / "adapter/adapter_config.json").read_text())
    return config | {"target_modules": sorted(config["target_modules"])}


def assert_same(out: Path, expected: Path) -> None:
    """Losses, adapter, answers and counts are equal to the bit, and nothing else is left."""
    assert records(out) == records(expected)
    weights = "adapter/adapter_model.safetensors"
    assert (out / weights).read_bytes() == (expected / weights).read_bytes()
    assert adapter_config(out) == adapter_config(expected)
    mine, theirs = (json.loads((folder / "run.json").read_text()) for folder in (out, expected))
    assert mine["sample"] == theirs["sample"] and mine["sample"] is not None
    assert (mine["steps"], mine["tokens"]) == (theirs["steps"], theirs["tokens"])
    assert sorted(path.name for path in out.iterdir()) == RESULTS
