"""The CUDA benchmarks without a card: every case is walked, the model adds up."""

import csv
import shutil
import subprocess
import sys

import pytest
import torch
from benchmarks.python import cuda_bench, cuda_roofline, timing

from formats import ROOT

A100, H100, ADA = cuda_roofline.CARDS


def kernel(mma=0.0, wavefronts=0.0, instructions=0.0, resident=2) -> cuda_roofline.Kernel:
    nothing = cuda_roofline.Counts(0, 0, 0, 0, 0)
    step = cuda_roofline.Counts(instructions, 0, mma, wavefronts, 0)
    return cuda_roofline.Kernel(nothing, step, resident, 1 << 10)


def seconds(monkeypatch, one: cuda_roofline.Kernel, **launch) -> dict[str, float]:
    monkeypatch.setattr(cuda_roofline, "kernels", lambda: {"one": one})
    values = {"blocks": 1, "steps": 1, "dram": 0, "l2": 0} | launch
    return cuda_roofline.parts(cuda_roofline.Launch("one", **values), A100)


def test_bytes_and_mma_at_the_cards_rates(monkeypatch):
    moved = seconds(monkeypatch, kernel(), dram=A100.bandwidth)
    assert moved["memory"] == pytest.approx(1 / cuda_roofline.MEMORY_EFFICIENCY)
    full = 2 * A100.multiprocessors  # one full wave
    flop = full * cuda_roofline.MMA_FLOP
    busy = seconds(monkeypatch, kernel(mma=1), blocks=full, steps=full)
    assert busy["tensor"] == pytest.approx(flop / A100.tensor)


def test_a_wave_that_is_not_full_costs_a_full_one(monkeypatch):
    whole = A100.multiprocessors
    one = kernel(wavefronts=100.0, resident=1)
    full = seconds(monkeypatch, one, blocks=whole, steps=whole)["shared"]
    more = seconds(monkeypatch, one, blocks=whole + 1, steps=whole + 1)["shared"]
    assert full == pytest.approx(100 / A100.clock) and more == pytest.approx(2 * full)


def test_two_launches_give_a_block_and_a_step():
    a = cuda_roofline.Counts(10, 4, 2, 6, 8)
    b = cuda_roofline.Counts(16, 4, 6, 6, 8)
    step = b.combine(a, 1 / 2, -1 / 2)
    assert step == cuda_roofline.Counts(3, 0, 2, 0, 0)
    assert a.combine(step, 1, -1) == cuda_roofline.Counts(7, 4, 0, 6, 8)


def test_launches_of_a_call():
    (one,) = cuda_roofline.linear("forward", 1, 4096, 4096)
    assert one.kernel == "few rows, 8 tokens, r=0" and one.blocks == 256
    fused, total = cuda_roofline.linear("forward", 512, 4096, 4096)
    assert fused.kernel == "forward, 128 rows, r=0" and fused.blocks == 4 * 32 * 2
    assert total.kernel == "sum partials"
    names = [each.kernel for each in cuda_roofline.linear("backward", 4096, 4096, 4096, 16)]
    assert names.count("skinny") == 3 and names[-1] == "backward, 128 rows, r=16"


def test_marks_say_met_or_missed():
    rows = [
        {"card": "one", "case": case, "M": m, "shape": cuda_roofline.SHAPES[1], column: 0.82}
        for _, case, m, column, _ in cuda_roofline.MARKS
    ]
    by_case = {}
    for row in rows:
        by_case.setdefault((row["case"], row["M"]), {}).update(row)
    found = {row["mark"]: row[""] for row in cuda_roofline.marks(list(by_case.values()))}
    assert found["AdamW8bit at 80 % of bandwidth"] == "met"
    assert found["dequantize at 85 % of bandwidth"] == "missed"
    assert found["LoRA r=16 adds at most 5 %, M = 512"] == "missed"


def test_the_stored_predictions_say_what_they_are():
    with (ROOT / "benchmarks/results/cuda_roofline.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows and {row["label"] for row in rows} == {"predicted, not measured"}
    assert {row["card"] for row in rows} == {card.name for card in cuda_roofline.CARDS}


# --- on a card ------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is there: it would be measured")
def test_without_a_card_the_command_says_so(capsys):
    assert cuda_bench.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("no CUDA card:")


def test_a_dry_run_walks_every_case_and_writes_nothing(tmp_path, capsys):
    assert cuda_bench.main(["--dry-run", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for case in cuda_bench.CASES:
        assert case in said
    assert not list(tmp_path.iterdir())


def test_a_results_name_is_the_cards():
    assert cuda_bench.file_name("NVIDIA H100 80GB HBM3") == "cuda_nvidia_h100_80gb_hbm3.csv"


def test_the_harness_says_that_there_is_no_card(tmp_path):
    """Built from the library's objects, linked to the real runtime."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH: the harness cannot be built here")
    if torch.cuda.is_available():
        pytest.skip("a card is there: it would be measured")
    sys.path.insert(0, str(ROOT / "tests/python/cuda"))
    import cuda_api

    objects = [str(each.object) for each in cuda_api.build_all()]
    sources = [str(path) for path in sorted((ROOT / "benchmarks/cuda").glob("*.cu"))]
    harness = tmp_path / "harness"
    command = ["nvcc", "-std=c++17", "-arch=compute_80", *cuda_api.INCLUDES, *sources, *objects]
    subprocess.run([*command, "-o", str(harness)], check=True)
    done = subprocess.run([harness, "shapes.csv"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("no CUDA card: no NVIDIA driver was found (CUDA error 35")
    assert done.stderr.count("\n") == 1


def test_shapes_of_the_model_are_in_the_list():
    assert set(cuda_roofline.SHAPES) <= set(timing.named_shapes())
