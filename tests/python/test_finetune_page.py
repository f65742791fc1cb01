"""report.html of a run: whole in itself, escaped, and what it says is run.json; --report-to."""

import json
import re

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

import cli_cases
from finetune_cases import records, run, save_inputs, stop
from halfbyte.finetune import plan
from tiny_model import colour_rows, save_model, write_jsonl

HOSTILE = "red <script>alert(1)</script> & more?"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_model(folder / "base")
    write_jsonl(folder / "rows.jsonl", colour_rows(24))
    result = cli_cases.run(
        "finetune", "--base", folder / "base", "--data", folder / "rows.jsonl",
        "--out", folder / "out",
        "--steps", 5, "--dtype", "fp32", "--sample-prompt", HOSTILE, "--sample-tokens", 4,
        "--report",
    )  # fmt: skip
    assert "report.html" in result.output
    return folder / "out"


def test_it_refers_to_nothing_outside(out):
    page = (out / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and page.rstrip().endswith("</html>")
    assert not re.search(r"<(script|link|img|iframe)\b|@import|url\((?!#)", page)
    for address in re.findall(r"(?:href|src)=\"([^\"]*)\"", page):
        assert address.startswith("#"), address


def test_user_text_is_escaped(out):
    page = (out / "report.html").read_text()
    assert "red &lt;script&gt;alert(1)&lt;/script&gt; &amp; more?" in page


def test_it_says_what_the_run_says(out):
    page, run = (out / "report.html").read_text(), json.loads((out / "run.json").read_text())
    assert page.count("<svg") == 5
    for loss in (run["held_out_before"]["loss"], run["held_out_after"]["loss"]):
        assert f"{loss:.3f}" in page
    for name, value in [*run["versions"].items(), *run["config"].items()]:
        assert f"<tr><td>{name}</td>" in page and (value is None or str(value)[:10]), name
    assert run["versions"]["torch"] in page and run["machine"] in page
    assert f"{run['tokens']:,}" in page


def test_a_resumed_run_shows_every_step(tmp_path):
    """The page of the rest of a run has the losses of all of it."""
    inputs, out = save_inputs(tmp_path), tmp_path / "out"
    stop(inputs, out, 3, eval_every=2)
    cli_cases.run("finetune", "--out", out, "--resume", "--report")
    losses = re.search(r"<svg.*?</svg>", (out / "report.html").read_text(), re.DOTALL).group()
    lines = re.findall(r'<path d="([^"]*)" clip-path', losses)
    points = [len(re.findall("[ML]", line)) for line in lines]
    held_out = sum(line["kind"] == "eval" for line in records(out))
    assert held_out == 6 and sorted(points)[-3:] == [held_out, 10, 10]


class Follower(TrainerCallback):
    """As tensorboard's: told the logs of a run."""

    told: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.told.append({"step": state.global_step, **logs})


def test_followers_hear_of_steps_and_held_out_losses(tmp_path, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "follower", Follower)
    monkeypatch.setattr(plan, "get_available_reporting_integrations", lambda: ["follower"])
    monkeypatch.setattr(Follower, "told", [])
    changes = {"report_to": "follower", "eval_every": 2, "steps": 4}
    run(save_inputs(tmp_path), tmp_path / "out", **changes)
    heard = {
        kind: [t["step"] for t in Follower.told if kind in t] for kind in ("loss", "eval_loss")
    }
    assert heard == {"loss": [1, 2, 3, 4], "eval_loss": [0, 2, 4]}
    measured = [line["loss"] for line in records(tmp_path / "out") if line["kind"] == "eval"]
    assert [t["eval_loss"] for t in Follower.told if "eval_loss" in t] == measured


def test_what_is_not_installed_is_refused_before_any_work(out, tmp_path):
    line = cli_cases.error("finetune", "--base", tmp_path, "--data", tmp_path,
                           "--out", tmp_path / "x", "--report-to", "no_such_service")  # fmt: skip
    assert "report_to: expected what is installed here" in line
