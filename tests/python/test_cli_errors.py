"""Mistakes on the command line: one line on stderr, exit code 2, no traceback, nothing loaded."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from halfbyte.cli.main import app
from halfbyte.finetune import base as bases
from tiny_model import colour_rows, save_model, write_jsonl


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_model(folder / "base")
    write_jsonl(folder / "rows.jsonl", colour_rows(8))
    long_row = {"prompt": "red", "completion": "blue " * 300}
    write_jsonl(folder / "long.jsonl", [*colour_rows(3), long_row])
    write_jsonl(folder / "bad.jsonl", [*colour_rows(3), {"question": "red"}])
    (folder / "a-file").write_text("")
    return folder


def _error(files, monkeypatch, **flags) -> str:
    """The one line that `halfbyte finetune` prints; fails if it reads a weight first."""

    def must_not_load(*args):
        raise AssertionError("weights were read before the mistake was found")

    monkeypatch.setattr(bases, "load_model", must_not_load)
    monkeypatch.chdir(files)
    flags = {"base": "base", "data": "rows.jsonl", "out": "out"} | flags
    arguments = []
    for name, value in flags.items():
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}"] + ([str(value)] if value != "" else [])
    result = CliRunner().invoke(app, ["finetune", *arguments])
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert not (files / "out").exists()
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"base": None}, "base: required; pass --base"),
        ({"base": "absent"}, "base absent: no such file or folder"),
        ({"data": "absent.jsonl"}, "absent.jsonl: no such file"),
        ({"eval_data": "absent.jsonl"}, "absent.jsonl: no such file"),
        ({"config": "absent.yaml"}, "--config absent.yaml: no such file"),
        ({"out": "a-file"}, "out a-file: expected a folder, got a file"),
        ({"data": "bad.jsonl"}, "bad.jsonl, line 4: expected `messages`, `prompt` + `completion`"),
        ({"eval_data": "bad.jsonl"}, "bad.jsonl, line 4: expected"),
        ({"data": "long.jsonl"}, "long.jsonl, line 4: "),
        ({"data": "long.jsonl"}, "tokens, expected at most 128; raise --max-length, or pass"),
        ({"max_length": 4096}, "max_length: expected at most the model's 128 positions, got 4096"),
        ({"target_modules": "q_proj,nope"}, "target_modules: expected linear layers"),
        ({"rank": 0}, "rank: expected at least 1, got 0"),
        ({"schedule": "step"}, "schedule: expected one of cosine, linear, constant, got 'step'"),
        ({"truncate": "", "skip_long": ""}, "--truncate and --skip-long exclude each other"),
    ],
)
def test_mistakes_are_found_before_any_work(files, monkeypatch, flags, message):
    assert message in _error(files, monkeypatch, **flags)


def test_a_tokenizer_without_pad_and_eos(files, monkeypatch):
    folder = save_model(files / "no-pad", pad=None, eos=None)
    message = _error(files, monkeypatch, base=folder)
    assert "neither a pad token nor an end-of-sequence token; set `pad_token`" in message


def test_a_tokenizer_of_another_model(files, monkeypatch):
    folder = save_model(files / "small-vocabulary")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"vocab_size": 320', '"vocab_size": 100'))
    message = _error(files, monkeypatch, base=folder)
    assert "expected token ids below the model's 100" in message


def test_in_a_process_of_its_own(files):
    """The installed entry point: same line, same code."""
    program = "from halfbyte.cli import command_line; command_line()"
    result = subprocess.run(
        [sys.executable, "-c", program, "finetune", "--base", "base", "--data", "bad.jsonl",
         "--out", "out"],
        cwd=files, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: bad.jsonl, line 4: expected")
    assert "Traceback" not in result.stderr


def test_help_imports_no_heavy_library_and_names_every_setting():
    program = (
        "import sys\n"
        "from halfbyte.cli.main import app\n"
        "try:\n    app(['finetune', '--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'transformers', 'peft', 'trl', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for flag in ("--config", "--base", "--rank", "--target-modules", "--skip-long", "--no-double"):
        assert flag in result.stdout


def test_an_absent_library_is_named_with_its_command(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "halfbyte.finetune.run", None)  # import raises
    message = _error(files, monkeypatch)
    assert message.endswith("is not installed; run: pip install 'halfbyte[finetune]'")


def test_unknown_flags_are_refused():
    result = CliRunner().invoke(app, ["finetune", "--rnak", "3"])
    assert result.exit_code == 2
    assert "--rnak" in result.stderr and "Traceback" not in result.output


def test_the_command_without_its_extra_says_what_to_install(monkeypatch):
    from halfbyte.cli import command_line

    monkeypatch.setitem(sys.modules, "halfbyte.cli.main", None)  # import raises
    with pytest.raises(SystemExit) as stop:
        command_line()
    assert str(stop.value).endswith("is not installed; run: pip install 'halfbyte[finetune]'")
