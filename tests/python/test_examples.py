"""Every example runs, in a short form, and does what it says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import tiny_model
from formats import ROOT

EXAMPLES = ROOT / "examples"


def run(folder: Path, *arguments: object) -> str:
    """The output of `python ARGUMENTS` in `folder`."""
    ran = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def test_each_example_has_a_test():
    shown = Path(__file__).read_text(encoding="utf-8")
    for example in EXAMPLES.iterdir():
        assert f'"{example.name}"' in shown


def test_custom_model(tmp_path):
    output = run(tmp_path, EXAMPLES / "custom_model.py", "--steps", 60)
    dense, packed, trained = (float(loss) for loss in re.findall(r"Zen (\d+\.\d+)", output))
    assert abs(packed - dense) < 0.2  # 4 bits change little
    assert trained < packed - 0.2  # the adapters learn
    assert "4.1" in output


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_model.save_model(tmp_path / "my-model")
    tiny_model.write_jsonl(tmp_path / "chat.jsonl", tiny_model.colour_rows())
    (tmp_path / "book.txt").write_text("What colour is the red thing? It is red.\n" * 40)
    return tmp_path


def check_adapter(adapter: Path) -> None:
    """PEFT's files, and B is no longer zero."""
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 16
    tensors = load_file(adapter / "adapter_model.safetensors")
    trained = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    assert len(trained) == 14 and all(tensor.any() for tensor in trained)


def test_trainer(folder):
    output = run(
        folder, EXAMPLES / "trainer.py", "--model", "my-model", "--text", "book.txt",
        "--steps", 2, "--length", 32,
    )  # fmt: skip
    assert "adapter: trainer-run/adapter" in output
    check_adapter(folder / "trainer-run/adapter")


def test_sft_trainer(folder):
    pytest.importorskip("trl")
    run(
        folder, EXAMPLES / "sft_trainer.py", "--model", "my-model", "--data", "chat.jsonl",
        "--steps", 2,
    )  # fmt: skip
    check_adapter(folder / "sft-run/adapter")


def test_notebook(tmp_path):
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    (tmp_path / "notebook.py").write_text("\n\n".join("".join(cell["source"]) for cell in code))
    output = run(tmp_path, "notebook.py")
    first, last = (float(loss) for loss in re.search(r"loss (\S+) -> (\S+)", output).groups())
    assert last < first / 4
