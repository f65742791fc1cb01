"""What 4-bit formats cost SmolLM2-135M: weight error and held-out perplexity on three texts.

    python -m benchmarks.quality.formats --texts FOLDER [--resume] [--image PNG]

NF4, NF4 with double quantization, FP4 and INT4 at block size 32, 64 and 128 against the 16-bit
weights, all linear layers but the head, plain absmax. Each row is written to quality_formats.csv
once it is measured; `--resume` goes on after those that are there.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.python import models, timing
from benchmarks.quality import measure
from halfbyte.nf4_weight import quantize_4bit

FORMATS = {  # code book, double quantization
    "NF4": ("nf4", False),
    "NF4 + DQ": ("nf4", True),
    "FP4": ("fp4", False),
    "INT4": ("int4", False),
}
BASE = "16 bits"
BLOCK_SIZES = (32, 64, 128)
COLOURS = {"NF4": "#7fb3c8", "NF4 + DQ": "#2a7f9e", "FP4": "#c98a2b", "INT4": "#b8402f"}


@torch.no_grad()
def put_quantized(layers, dense: dict[str, torch.Tensor], kind: str, block: int) -> dict:
    """Gives each layer the weight that its packed bytes stand for; bits and relative error."""
    codebook, double_quant = FORMATS[kind]
    bits = parameters = error = size = 0.0
    for name, layer in layers.items():
        weight = quantize_4bit(dense[name], codebook, block, double_quant)
        values = weight.dequantize(torch.float32)
        layer.weight.copy_(values)
        bits += 8 * weight.nbytes
        parameters += values.numel()
        error += float((values - dense[name]).square().sum())
        size += float(dense[name].float().square().sum())
    return {
        "bits a parameter": round(bits / parameters, 4),
        "relative weight error": round((error / size) ** 0.5, 5),
    }


def measured(layers, dense, model, windows, kind: str, block: int | str) -> dict:
    """The row of one format; the model is left in it."""
    if kind == BASE:
        facts = {"bits a parameter": 16, "relative weight error": 0.0}
    else:
        facts = put_quantized(layers, dense, kind, block)
    row = {"format": kind, "block": block, **facts, "mean gap": 0.0}
    return row | measure.columns(measure.losses(model, windows))


def with_gaps(rows: list[dict]) -> list[dict]:
    """The rows with the loss above the first's, 16 bits, in the mean of the texts."""
    keys = [key for key in rows[0] if key.endswith(" loss")]
    for row in rows:
        gaps = [row[key] - rows[0][key] for key in keys]
        row["mean gap"] = round(sum(gaps) / len(gaps), 4)
    return rows


def draw(rows: list[dict], output: Path) -> None:
    """Mean gap over bits a parameter: a line a format, a point a block size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.6, 4.4), dpi=150)
    for kind in FORMATS:
        points = [row for row in rows if row["format"] == kind]
        x = [row["bits a parameter"] for row in points]
        y = [row["mean gap"] for row in points]
        axes.plot(x, y, "o-", color=COLOURS.get(kind), label=kind, linewidth=1.6, markersize=5)
        below = kind == "FP4"  # the two upper lines lie close together
        for row in points:
            place = (row["bits a parameter"], row["mean gap"])
            shift = (4, -12 if below else 5)
            axes.annotate(f"{row['block']}", place, shift, textcoords="offset points", fontsize=8)
    axes.set_xlabel("bits a parameter, scales included (numbers: block size)")
    axes.set_ylabel("loss above 16 bits, nats a token")
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    measure.save_figure(figure, axes, "SmolLM2-135M, mean of three held-out texts", output)


def main(arguments: list[str] | None = None) -> None:
    options = measure.parser(__doc__).parse_args(arguments)
    timing.print_birthplace()
    path = options.output / "quality_formats.csv"
    rows = measure.read_rows(path) if options.resume else []
    cases = [(BASE, "")] + [(kind, block) for block in BLOCK_SIZES for kind in FORMATS]
    if len(rows) < len(cases):
        model, tokenizer = models.load_smollm2()
        windows = measure.held_out(tokenizer, options)
        layers = measure.linear_layers(model)
        dense = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    for kind, block in cases[len(rows) :]:
        rows.append(measured(layers, dense, model, windows, kind, block))
        timing.write_csv(path, with_gaps(rows))
        print(f"{kind} {block}: {rows[-1]['mean gap']:.4f} nats above 16 bits", flush=True)
    timing.print_table("SmolLM2-135M in 4 bits, plain absmax", rows)
    if options.image:
        draw(rows, options.image)


if __name__ == "__main__":
    main()
