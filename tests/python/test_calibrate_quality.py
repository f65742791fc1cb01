"""The quality benchmarks run on a tiny model and write what they measured."""

import csv
import math

import pytest
import torch
from benchmarks.python import models
from benchmarks.quality import calibration, formats, measure, texts
from transformers import LlamaForCausalLM

import halfbyte
from halfbyte.integrations.calibrate import default_text
from tiny_model import build_config, build_tokenizer

WORDS = "The red thing is green. What colour is the blue thing? "


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = LlamaForCausalLM(build_config(hidden_size=64, tie_word_embeddings=False)).eval()
    return model, build_tokenizer()


@pytest.fixture
def folder(tmp_path, tiny, monkeypatch):
    """Texts, and the tiny model in the place of SmolLM2."""
    monkeypatch.setattr(models, "load_smollm2", lambda: tiny)
    words = WORDS.split()
    for i, name in enumerate((*texts.SCORED, "foreign")):
        for j, part in enumerate(("calibration", "held-out")):
            text = " ".join(words[(k * (i + 2) + j) % len(words)] for k in range(300))
            (tmp_path / f"{name}.{part}.txt").write_text(text)
    return tmp_path


def options(folder) -> list[str]:
    words = f"--texts {folder} --output {folder} --windows 2 --length 32 --image {folder / 'a.png'}"
    return words.split()


def read(path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_loss_is_the_mean_cross_entropy(tiny):
    model, _ = tiny
    windows = torch.randint(3, 320, (3, 20))
    with torch.no_grad():
        found = model(windows, labels=windows).loss
    assert measure.loss(model, windows) == pytest.approx(float(found), rel=1e-5)


def test_formats(folder, monkeypatch, tiny):
    monkeypatch.setattr(formats, "BLOCK_SIZES", (64,))
    before = {name: t.clone() for name, t in tiny[0].state_dict().items()}
    formats.main(options(folder))
    rows = read(folder / "quality_formats.csv")
    assert [(r["format"], r["block"]) for r in rows] == [
        ("16 bits", ""), ("NF4", "64"), ("NF4 + DQ", "64"), ("FP4", "64"), ("INT4", "64"),
    ]  # fmt: skip
    errors = {r["format"]: float(r["relative weight error"]) for r in rows}
    assert errors["16 bits"] == 0 and errors["NF4"] < errors["INT4"] < errors["FP4"]
    layers = measure.linear_layers(tiny[0])
    dense = torch.cat([before[f"{name}.weight"].flatten() for name in layers])
    for kind, (codebook, double_quant) in formats.FORMATS.items():
        packed = [
            halfbyte.quantize_4bit(before[f"{name}.weight"], codebook, 64, double_quant)
            for name in layers
        ]
        values = torch.cat([weight.dequantize(torch.float32).flatten() for weight in packed])
        expected = float((values - dense).norm() / dense.norm())
        assert errors[kind] == pytest.approx(expected, rel=1e-3)
    assert float(rows[1]["bits a parameter"]) == pytest.approx(4.5, abs=0.01)
    for row in rows:
        assert row["machine"] and row["commit"]
        for name in texts.SCORED:
            expected = math.exp(float(row[f"{name} loss"]))
            assert float(row[f"{name} perplexity"]) == pytest.approx(expected, rel=1e-3)
    assert (folder / "a.png").stat().st_size > 10_000
    tiny[0].load_state_dict(before)
    path = folder / "quality_formats.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]))
    formats.main([*options(folder), "--resume"])
    assert read(path) == rows and path.read_text().splitlines()[0] == lines[0].strip()
    tiny[0].load_state_dict(before)


def test_calibration(folder, tiny):
    calibration.main([*options(folder), "--samples", "4"])
    path = folder / "quality_calibration.csv"
    rows = {row["weights"]: row for row in read(path)}
    assert tuple(rows) == ("16 bits", "absmax", "default", "foreign", "kjv", "jargon", "qa")
    assert int(rows["qa"]["calibration tokens"]) == 128
    base, plain = float(rows["16 bits"]["kjv loss"]), float(rows["absmax"]["kjv loss"])
    share = (plain - float(rows["foreign"]["kjv loss"])) / (plain - base)
    assert float(rows["foreign"]["kjv gap gone"].removesuffix(" %")) == pytest.approx(
        100 * share, abs=1 + 0.02 / abs(plain - base)
    )
    assert (folder / "a.png").stat().st_size > 10_000
    assert not any(isinstance(m, halfbyte.nn.NF4Linear) for m in tiny[0].modules())
    text, lines = path.read_text(), path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    calibration.main([*options(folder), "--samples", "4", "--resume"])
    again = read(path)
    assert [row["kjv loss"] for row in again] == [row["kjv loss"] for row in rows.values()]
    assert len(text.splitlines()) == len(again) + 1


def test_texts_are_split_without_overlap():
    paragraphs = texts.unwrapped("one\ntwo\n\nthree\n \nfour")
    assert paragraphs == ["one two", "three", "four"]
    pieces = [f"<{i}>" for i in range(9)]
    calibration_part, held_out = texts.split(pieces)
    assert calibration_part == "<0><1><2><4><5><6><8>" and held_out == "<3><7>"
    long = texts.passages(["x" * 1500] * 7)
    assert [len(piece) for piece in long] == [4506, 4506, 1502]


def test_an_absent_text_names_the_command(tmp_path):
    with pytest.raises(SystemExit, match="python -m benchmarks.quality.texts"):
        texts.read(tmp_path, "kjv", "held-out")


def test_the_default_text_is_varied_and_plain():
    text = default_text()
    assert 8_000 < len(text) < 20_000
    for sign in ("Question:", "def ", "SELECT", "User:", "1.", "{"):
        assert sign in text
