"""report.html of a run: whole in itself, escaped, and what it says is run.json."""

import json
import re

import pytest
from typer.testing import CliRunner

from halfbyte.cli.main import app
from tiny_model import colour_rows, save_model, write_jsonl

HOSTILE = "red <script>alert(1)</script> & more?"


def _run(*arguments):
    return CliRunner().invoke(app, ["finetune", *map(str, arguments)])


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_model(folder / "base")
    write_jsonl(folder / "rows.jsonl", colour_rows(24))
    result = _run(
        "--base", folder / "base", "--data", folder / "rows.jsonl", "--out", folder / "out",
        "--steps", 5, "--dtype", "fp32", "--sample-prompt", HOSTILE, "--sample-tokens", 4,
        "--report",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
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


def test_what_is_not_installed_is_refused_before_any_work(out, tmp_path):
    result = _run("--base", tmp_path, "--data", tmp_path, "--out", tmp_path / "x",
                  "--report-to", "no_such_service")  # fmt: skip
    assert result.exit_code == 2
    assert "report_to: expected what is installed here" in " ".join(result.output.split())
