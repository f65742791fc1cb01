"""Draws the ratio chart of the README from the CSV files that the benchmarks wrote.

    python -m benchmarks.python.chart [--results FOLDER] [--output docs/images/speed.png]

Example: python -m benchmarks.python.chart --output speed.png
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from benchmarks.python.timing import ROOT  # noqa: E402

SHAPE = "llama-2-7b.q_proj"
FILES = ("formats.csv", "adamw8.csv", "linear.csv", "train_step.csv", "generate.csv")
INK, BAR, PARITY = "#22303c", "#2a7f9e", "#b8402f"


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def ratio(text: str) -> float | None:
    """A ratio, or None where the table says why there is none."""
    try:
        return float(text)
    except ValueError:
        return None


def bars(results: Path) -> list[tuple[str, float]]:
    """(label, ratio) from top to bottom."""
    rows = []
    for case in read(results / "formats.csv"):
        label = {
            ("quantize", "float32"): "quantize float32 -> NF4 + DQ",
            ("dequantize", "bfloat16"): "dequantize -> bfloat16",
        }.get((case["case"], case["dtype"]))
        if label:
            rows.append((f"{label}\nagainst bitsandbytes", ratio(case["vs bitsandbytes"])))
    for case in read(results / "adamw8.csv"):
        if case["optimizer"].startswith("bitsandbytes"):
            label = "AdamW 8-bit step, 4 M parameters\nagainst bitsandbytes"
            rows.append((label, ratio(case["times halfbyte"])))
    for case in read(results / "linear.csv"):
        key = (case["shape"], case["dtype"], case["weights"])
        if key != (SHAPE, "bfloat16", "warm") or case["M"] not in ("1", "16", "512"):
            continue
        if case["case"] == "forward":
            for peer, name in (("dense", "dense bf16"), ("bitsandbytes eval",) * 2):
                label = f"linear, M = {case['M']}\nagainst {name}"
                rows.append((label, ratio(case.get(f"vs {peer}", ""))))
        if case["case"] == "LoRA step" and case["M"] == "512":
            label = "LoRA forward + backward, M = 512\nagainst dense bf16"
            rows.append((label, ratio(case["vs dense"])))
    for file, what in (("train_step.csv", "training step"), ("generate.csv", "generation")):
        for case in read(results / file):
            if case["system"] != "halfbyte" or case.get("adapter") == "none":
                continue
            length = f", sequence {case['sequence']}" if "sequence" in case else ", LoRA"
            model = case["model"].removesuffix(", random weights")
            label = f"{model}:\n{what}{length}, against PEFT + bitsandbytes"
            rows.append((label, ratio(case["vs PEFT + bitsandbytes"])))
    return [(label, value) for label, value in rows if value is not None]


def birthplace(results: Path) -> str:
    """Machines and commits of everything that is drawn."""
    cases = [case for name in FILES for case in read(results / name)]
    places = dict.fromkeys(f"{case['machine']}, commit {case['commit']}" for case in cases)
    return "benchmarks.python on " + "; ".join(places)


def draw(rows: list[tuple[str, float]], where: str, output: Path) -> None:
    figure, axes = plt.subplots(figsize=(9.4, 0.46 * len(rows) + 1.2), dpi=150)
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
    title = "Time of the peer / time of halfbyte (layers and weights: N = K = 4096)"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
    figure.text(0.01, 0.01, where, fontsize=7, color="#667")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "speed.png")
    options = parser.parse_args(arguments)
    rows = bars(options.results)
    if not rows:
        raise SystemExit(f"{options.results}: no results; run benchmarks.python.compare first")
    draw(rows, birthplace(options.results), options.output)
    print(options.output)


if __name__ == "__main__":
    main()
