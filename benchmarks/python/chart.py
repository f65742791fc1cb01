"""Draws the ratio chart of the README from the CSV files that the benchmarks wrote.

python -m benchmarks.python.chart [--results FOLDER] [--output docs/images/speed.png]
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from benchmarks.python.timing import ROOT  # noqa: E402

SHAPE = "llama-2-7b.q_proj 4096 x 4096"
INK, BAR, PARITY = "#22303c", "#2a7f9e", "#b8402f"


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def bars(results: Path) -> list[tuple[str, float]]:
    """(label, ratio) from top to bottom."""
    rows = []
    for case in read(results / "formats.csv"):
        if "out=" in case["case"]:
            continue
        label = case["case"].split(",")[0].replace(" + double quantization", " + DQ")
        rows.append((f"{label}\nagainst bitsandbytes", float(case["ratio"])))
    for case in read(results / "adamw8.csv"):
        if case["optimizer"].startswith("bitsandbytes"):
            ratio = float(case["times halfbyte"])
            rows.append(("AdamW 8-bit step, 4 M parameters\nagainst bitsandbytes", ratio))
    for case in read(results / "linear_bfloat16.csv"):
        if case["shape"] != SHAPE or case["M"] not in ("1", "16", "512"):
            continue
        rows.append((f"linear, M = {case['M']}\nagainst dense bf16", float(case["vs dense"])))
        if case["M"] == "512":
            ratio = float(case["LoRA vs dense"])
            rows.append(("LoRA forward + backward, M = 512\nagainst dense bf16", ratio))
    for case in read(results / "train_step_smollm2.csv"):
        if case["system"] == "halfbyte":
            label = f"SmolLM2-135M training step, sequence {case['sequence']}"
            ratio = float(case["vs PEFT + bitsandbytes"])
            rows.append((f"{label}\nagainst PEFT + bitsandbytes", ratio))
    return rows


def draw(rows: list[tuple[str, float]], birthplace: str, output: Path) -> None:
    figure, axes = plt.subplots(figsize=(8.4, 0.62 * len(rows) + 1.2), dpi=150)
    labels, values = zip(*rows, strict=True)
    places = range(len(rows), 0, -1)
    axes.barh(places, [value - 1 for value in values], left=1, color=BAR, height=0.62)
    for place, value in zip(places, values, strict=True):
        text = f"{value:.0f}x" if value >= 10 else f"{value:.2f}x"
        axes.text(value * 1.06, place, text, va="center", color=INK, fontsize=9)
    axes.axvline(1, color=PARITY, linewidth=1.2)
    axes.text(1.03, len(rows) + 0.55, "parity", color=PARITY, fontsize=8)
    axes.set_yticks(list(places), labels, fontsize=8.5, color=INK)
    axes.set_xscale("log")
    axes.set_xlim(min(0.8, *values) * 0.95, max(values) * 2)
    axes.set_ylim(0.4, len(rows) + 0.9)
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if t < max(values) * 2]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(
        "Time of the peer / time of halfbyte (layers and weights: N = K = 4096)",
        fontsize=10,
        color=INK,
        loc="left",
    )
    figure.text(0.01, 0.01, birthplace, fontsize=7, color="#667")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "speed.png")
    options = parser.parse_args()
    rows = bars(options.results)
    if not rows:
        raise SystemExit(f"{options.results}: no results; run benchmarks.python.compare first")
    first = read(options.results / "formats.csv")[0]
    birthplace = f"make bench on {first['machine']}, commit {first['commit']}"
    draw(rows, birthplace, options.output)
    print(options.output)


if __name__ == "__main__":
    main()
