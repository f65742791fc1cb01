"""Adapters of hand-built models in PEFT's files, both ways, against PEFT itself."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from halfbyte.integrations.adapters import load_adapter, save_adapter
from halfbyte.nn import LoraLinear
from peft_cases import close, dense_base, lora_config, packed_base, randomize, rows


def _ours(r=6, alpha=7, second=None):
    """`peft_cases.Two` with LoraLinear layers built by hand."""
    model = packed_base()
    model.first = LoraLinear(model.first, r, alpha)
    model.second = LoraLinear(model.second, *(second or (r, alpha)))
    randomize(model)
    return model


def _pefts(**changes):
    model = get_peft_model(packed_base(), lora_config(**changes))
    randomize(model)
    return model


@pytest.mark.parametrize("second", [None, (3, 5.5)])
def test_what_we_save_peft_loads(tmp_path, second):
    model = _ours(second=second)
    save_adapter(model, tmp_path / "a" / "b", "some/base")
    folder = tmp_path / "a" / "b"
    assert {f.name for f in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    for base in (packed_base(), dense_base()):
        theirs = PeftModel.from_pretrained(base, folder)
        close(theirs(rows(4)), model(rows(4)))
    assert LoraConfig.from_pretrained(folder).base_model_name_or_path == "some/base"


@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"alpha_pattern": {"second": 3}}, {"lora_dropout": 0.5}]
)
def test_what_peft_saves_we_load(tmp_path, changes):
    theirs = _pefts(**changes).eval()
    theirs.save_pretrained(tmp_path)
    model = _ours(alpha=99).eval()
    assert load_adapter(model, tmp_path) is model
    close(model(rows(4)), theirs(rows(4)))


def test_a_round_trip_is_exact(tmp_path):
    model = _ours(second=(3, 2.25))
    save_adapter(model, tmp_path)
    again = _ours(alpha=1, second=(3, 1))
    load_adapter(again, tmp_path)
    assert torch.equal(again(rows(4)), model(rows(4)))


def test_names_that_end_alike_do_not_mix(tmp_path):
    """PEFT compares the ends of names: "query" alone would also fit "block.query"."""

    def build(dense):
        torch.manual_seed(0)
        base = nn.ModuleDict({"query": nn.Linear(64, 8), "block": nn.ModuleDict()})
        base["block"]["query"] = nn.Linear(64, 8)
        if not dense:
            base["query"] = LoraLinear.from_linear(base["query"], 2)
            randomize(base)
        return base

    save_adapter(build(False), tmp_path)
    theirs = PeftModel.from_pretrained(build(True), tmp_path)
    adapted = [n for n, m in theirs.named_modules() if hasattr(m, "lora_A")]
    assert adapted == ["base_model.model.query"]


def test_nulls_and_false_switches_are_ignored(tmp_path):
    model = _ours()
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text()) | {"some_new_variant": None, "use_other": False}
    path.write_text(json.dumps(config))
    load_adapter(model, tmp_path)


@pytest.fixture
def broken(tmp_path):
    """Save an adapter, change it, and expect `load_adapter` to refuse it and change nothing."""
    save_adapter(_ours(), tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"

    def check(message, change=None, tensors=None, raw=None, name=None):
        path = tmp_path / "case"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        settings = json.loads(config.read_text()) | (change or {})
        (path / config.name).write_text(json.dumps(settings))
        save_file(load_file(weights) | (tensors or {}), path / weights.name)
        if name is not None:
            (path / name).unlink()
            if raw is not None:
                (path / name).write_bytes(raw)
        model = _ours()
        y = model(rows(4))
        with pytest.raises(ValueError, match=message):
            load_adapter(model, path)
        assert torch.equal(model(rows(4)), y)

    return check


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True: a variant of LoRA that is not known"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["x"]}, r"modules_to_save=\['x'\]"),
        ({"brand_new_lora": {"a": 1}}, "brand_new_lora="),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens="),
        ({"bias": "all"}, "bias: expected 'none', got 'all'"),
        ({"peft_type": "IA3"}, "peft_type: expected 'LORA', got 'IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*rewritten base"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a finite number, got nan"),
        ({"lora_alpha": "8"}, "lora_alpha: expected a finite number, got '8'"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern"),
        ({"rank_pattern": [1]}, "rank_pattern: expected an object"),
        ({"r": 9}, "first: expected rank 6, got 9"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_named(broken, change, message):
    broken(f"adapter_config.json: {message}", change)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, None])
def test_broken_configurations(broken, raw):
    broken("adapter_config.json: ", name="adapter_config.json", raw=raw)


@pytest.mark.parametrize("raw", [b"", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0{}      ", None])
def test_broken_weights(broken, raw):
    broken("adapter_model.safetensors: ", name="adapter_model.safetensors", raw=raw)


def test_tensors_that_do_not_fit_are_named(broken):
    key = "base_model.model.second.lora_A.weight"
    broken(f"{key}: expected float .6, 33., got torch.float32 .6, 32.", tensors={
        key: torch.zeros(6, 32)
    })  # fmt: skip
    broken(f"{key}: expected float", tensors={key: torch.zeros(6, 33, dtype=torch.int32)})
    broken("'other.weight' fits no LoraLinear", tensors={"other.weight": torch.zeros(1)})


def test_models_without_layers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="LoraLinear layers, got Two"):
        save_adapter(packed_base(), tmp_path)
    with pytest.raises(ValueError, match="got LoraLinear"):
        save_adapter(_ours().first, tmp_path)


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    save_adapter(_ours(), tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("halfbyte.integrations.adapters.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_adapter(_ours(alpha=3), tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
