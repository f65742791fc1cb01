"""How much of what NF4 costs SmolLM2-135M is gone after calibration, on three texts.

    python -m benchmarks.quality.calibration --texts FOLDER [--resume] [--image PNG]

Block 64, double quantization, all linear layers but the head. Rows: 16 bits; absmax; calibrated
with the default text, with foreign text (a dictionary, a manual, quotations; see
benchmarks.quality.texts), and with the calibration part of each text that is scored. The share of
the gap that is gone is (absmax - calibrated) / (absmax - 16 bits). Each row is written to
quality_calibration.csv once it is measured; `--resume` measures those that are not there.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path

import torch

import halfbyte
from benchmarks.python import models, timing
from benchmarks.quality import measure, texts
from halfbyte.integrations.calibrate import (
    SAMPLES,
    default_text,
    quantize_calibrated_,
    token_windows,
)

BASE, PLAIN = "16 bits", "absmax"
KINDS = (BASE, PLAIN, "default", "foreign", *texts.SCORED)
OWN = "own"
COLOURS = {PLAIN: "#b8402f", "default": "#c98a2b", "foreign": "#7fb3c8", OWN: "#2a7f9e"}
LABELS = {PLAIN: "absmax, uncalibrated", "default": "calibrated, default text",
          "foreign": "calibrated, foreign text", OWN: "calibrated, own domain"}  # fmt: skip
TITLES = {"kjv": "King James Bible", "jargon": "Jargon File", "qa": "questions and answers"}


def calibration_windows(kind: str, tokenizer, options) -> torch.Tensor:
    text = default_text() if kind == "default" else texts.read(options.texts, kind, "calibration")
    return token_windows(text, tokenizer, options.samples, options.length)


def measured(kind: str, dense, tokenizer, held_out, options) -> dict:
    """The row of one way to choose codes and scales, without the shares of the gap."""
    row = {"weights": kind, "calibration tokens": "", "seconds": ""}
    model = dense if kind == BASE else copy.deepcopy(dense)
    if kind == PLAIN:
        halfbyte.quantize_(model)
    elif kind != BASE:
        windows = calibration_windows(kind, tokenizer, options)
        start = time.perf_counter()
        quantize_calibrated_(model, windows)
        seconds = round(time.perf_counter() - start)
        row |= {"calibration tokens": windows.numel(), "seconds": seconds}
    return row | measure.columns(measure.losses(model, held_out))


def with_shares(rows: list[dict]) -> list[dict]:
    """The rows with the share of the gap that is gone, where it is known."""
    by_kind = {row["weights"]: row for row in rows}
    base, plain = by_kind.get(BASE), by_kind.get(PLAIN)
    for kind, row in by_kind.items():
        if kind not in (BASE, PLAIN) and base and plain:
            for name in texts.SCORED:
                key = f"{name} loss"
                share = (plain[key] - row[key]) / (plain[key] - base[key])
                row[f"{name} gap gone"] = f"{100 * share:.0f} %"
    return rows


def draw(rows: list[dict], output: Path) -> None:
    """Loss above 16 bits: a group of bars a text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_kind = {row["weights"]: row for row in rows}
    figure, axes = pyplot.subplots(figsize=(7.6, 4.2), dpi=150)
    width = 0.8 / len(COLOURS)
    for i, kind in enumerate(COLOURS):
        for n, name in enumerate(texts.SCORED):
            row = by_kind[name if kind == OWN else kind]
            x = n + (i - (len(COLOURS) - 1) / 2) * width
            y = row[f"{name} loss"] - by_kind[BASE][f"{name} loss"]
            axes.bar(x, y, 0.92 * width, color=COLOURS[kind], label="" if n else LABELS[kind])
            text = f"{y:.2f}" if kind == PLAIN else f"−{row[f'{name} gap gone']}"
            axes.annotate(text, (x, y), (0, 3), textcoords="offset points",
                          ha="center", fontsize=8)  # fmt: skip
    axes.set_xticks(range(len(texts.SCORED)), [TITLES[name] for name in texts.SCORED])
    axes.set_ylabel("loss above 16 bits, nats a token")
    measure.save_figure(
        figure, axes, "SmolLM2-135M in NF4 + double quantization, held-out text", output
    )


def main(arguments: list[str] | None = None) -> None:
    command = measure.parser(__doc__)
    command.add_argument("--samples", type=int, default=SAMPLES, help="calibration windows")
    options = command.parse_args(arguments)
    timing.print_birthplace()
    path = options.output / "quality_calibration.csv"
    rows = measure.read_rows(path) if options.resume else []
    left = [kind for kind in KINDS if kind not in {row["weights"] for row in rows}]
    if left:
        dense, tokenizer = models.load_smollm2()
        held_out = measure.held_out(tokenizer, options)
    for kind in left:
        rows.append(measured(kind, dense, tokenizer, held_out, options))
        timing.write_csv(path, with_shares(rows))
        print(rows[-1], flush=True)
    timing.print_table("SmolLM2-135M in NF4 + DQ: chosen by absmax or calibrated with ...", rows)
    if options.image:
        draw(rows, options.image)


if __name__ == "__main__":
    main()
