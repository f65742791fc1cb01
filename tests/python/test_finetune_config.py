"""FinetuneConfig: precedence of flags, YAML and defaults; every kind of bad value."""

from pathlib import Path

import pytest
import yaml

from halfbyte.finetune.config import FinetuneConfig
from halfbyte.finetune.errors import FinetuneError

REQUIRED = {"base": Path("base"), "data": Path("data.jsonl"), "out": Path("out")}


def test_overrides_beat_yaml_beats_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("rank: 4\nlr: 2e-4\nbatch: 3\n")
    config = FinetuneConfig.load(file, **REQUIRED, rank=32, seed=None)
    assert config.rank == 32  # override
    assert config.batch == 3  # YAML
    assert config.lr == 2e-4  # YAML reads 2e-4 as text
    assert config.seed == 0 and config.schedule == "cosine"  # defaults


def test_an_override_may_equal_the_default(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("rank: 4\ndouble_quant: false\n")
    config = FinetuneConfig.load(file, **REQUIRED, rank=16, double_quant=True)
    assert (config.rank, config.double_quant) == (16, True)


def test_yaml_paths_are_relative_to_the_yaml_file(tmp_path):
    file = tmp_path / "sub" / "run.yaml"
    file.parent.mkdir()
    file.write_text("base: ../model\ndata: rows.jsonl\nout: /absolute\n")
    config = FinetuneConfig.load(file, eval_data=Path("other.jsonl"))
    assert config.base == tmp_path / "sub" / "../model"
    assert config.data == tmp_path / "sub" / "rows.jsonl"
    assert config.out == Path("/absolute")
    assert config.eval_data == Path("other.jsonl")


def test_written_settings_load_to_the_same_settings(tmp_path):
    config = FinetuneConfig.load(None, **REQUIRED, target_modules="q_proj, v_proj", steps=7)
    assert config.target_modules == ("q_proj", "v_proj")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.as_dict()))
    again = FinetuneConfig.load(file)  # wherever the file is, paths mean what they meant
    assert again.data == Path.cwd() / "data.jsonl"
    assert again.as_dict() == config.as_dict()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak: 4", "unknown setting 'rnak'; did you mean 'rank'?"),
        ("rank: four", "rank: expected a whole number, got 'four'"),
        ("rank: 2.5", "rank: expected a whole number, got 2.5"),
        ("rank: true", "rank: expected a whole number, got True"),
        ("rank: 0", "rank: expected at least 1, got 0"),
        ("rank: 513", "rank: expected at most 512, got 513"),
        ("lr: 0", "lr: expected more than 0, got 0.0"),
        ("lr: .nan", "lr: expected a number, got nan"),
        ("dropout: 1.5", "dropout: expected at most 0.95, got 1.5"),
        ("schedule: step", "schedule: expected one of cosine, linear, constant, got 'step'"),
        ("overwrite: maybe", "overwrite: expected true or false, got 'maybe'"),
        ("block_size: 48", "block_size: expected a power of two, got 48"),
        ("target_modules: 3", "target_modules: expected a list of names, got 3"),
        ("data: [1]", "data: expected a path, got [1]"),
        ("- rank", "expected `setting: value` lines, got ['rank']"),
        ("rank: [", "not valid YAML"),
    ],
)
def test_bad_yaml_is_one_plain_line(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    overrides = {key: value for key, value in REQUIRED.items() if not text.startswith(key)}
    with pytest.raises(FinetuneError) as caught:
        FinetuneConfig.load(file, **overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", list(REQUIRED))
def test_required_settings(name):
    rest = {key: value for key, value in REQUIRED.items() if key != name}
    with pytest.raises(FinetuneError, match=f"{name}: required; pass --{name}"):
        FinetuneConfig.load(None, **rest)


def test_missing_yaml_file(tmp_path):
    with pytest.raises(FinetuneError, match="no such file"):
        FinetuneConfig.load(tmp_path / "absent.yaml", **REQUIRED)
