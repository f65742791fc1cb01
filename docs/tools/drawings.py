"""Draws docs/images/*.svg, the pictures of docs/kernels.md.

python docs/tools/drawings.py
"""

from pathlib import Path
from xml.sax.saxutils import escape

IMAGES = Path(__file__).resolve().parents[1] / "images"

INK, GREY = "#1f2933", "#8896a5"
BLUE, GREEN, ORANGE, ROSE, PAPER = "#cfe2ff", "#d3f0da", "#ffe3c2", "#f9d3de", "#f4f6f8"


class Drawing:
    """Boxes, words and arrows on a white ground; x and y in pixels from the upper left."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.parts: list[str] = []

    def box(self, x, y, w, h, fill=PAPER, text="", dashed=False):
        """A rectangle with lines of text in its middle."""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="3" fill="{fill}" '
            f'stroke="{INK}" stroke-width="1"{dash}/>'
        )
        lines = text.split("\n") if text else []
        for i, line in enumerate(lines):
            self.text(x + w / 2, y + h / 2 + 4 + 15 * (i - (len(lines) - 1) / 2), line, "middle")

    def cells(self, x, y, w, h, columns, rows=1, fill=PAPER, texts=()):
        """A grid of equal boxes, with texts in reading order."""
        for i in range(rows * columns):
            text = str(texts[i]) if i < len(texts) else ""
            self.box(x + i % columns * w, y + i // columns * h, w, h, fill, text)

    def text(self, x, y, words, anchor="start", colour=INK, size=12):
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}" '
            f'font-size="{size}">{escape(words)}</text>'
        )

    def note(self, x, y, words, anchor="start"):
        self.text(x, y, words, anchor, "#52606d", 11)

    def arrow(self, x1, y1, x2, y2):
        self.parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" stroke-width="1.3" '
            f'marker-end="url(#head)"/>'
        )

    def svg(self) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" '
            'font-family="Helvetica, Arial, sans-serif">\n'
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker>'
            "</defs>\n"
            f'<rect width="{self.width}" height="{self.height}" rx="6" fill="white"/>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def quantize() -> str:
    """Two passes over a block; then the way back by one look-up."""
    d = Drawing(760, 300)
    d.text(20, 28, "quantize: a block of 64 elements, in L1 for both passes", size=13)
    d.cells(20, 42, 30, 26, 8, fill=BLUE)
    d.box(260, 42, 60, 26, BLUE, "…")
    d.note(20, 84, "w, float32 / bfloat16 / float16")
    d.arrow(325, 55, 385, 55)
    d.note(355, 46, "pass 1", "middle")
    d.box(390, 38, 130, 34, ORANGE, "max |w| as integers")
    d.arrow(525, 55, 575, 55)
    d.box(580, 38, 160, 34, GREEN, "absmax, 1 / absmax")
    d.arrow(170, 92, 170, 122)
    d.note(180, 112, "pass 2: x = w · (1 / absmax)")
    d.box(20, 126, 330, 34, ORANGE, "bucket of x → one threshold → code")
    d.arrow(355, 143, 405, 143)
    d.cells(410, 130, 44, 26, 4, fill=GREEN, texts=("c0 c1", "c2 c3", "c4 c5", "…"))
    d.note(600, 147, "two codes a byte, first one high")
    d.text(20, 200, "dequantize: the scale goes into the table, once a block", size=13)
    d.cells(20, 214, 44, 26, 4, fill=GREEN, texts=("c0 c1", "c2 c3", "c4 c5", "…"))
    d.arrow(200, 227, 260, 227)
    d.note(230, 218, "nibbles", "middle")
    d.box(265, 208, 250, 38, ORANGE, "16 entries: round(level · scale)\na permute looks them up")
    d.arrow(520, 227, 575, 227)
    d.cells(580, 214, 30, 26, 5, fill=BLUE)
    d.note(580, 256, "finished values")
    d.note(20, 280, "bfloat16 entries are 16 bits: vpermw yields 32 weights an instruction")
    return d.svg()


def panels() -> str:
    """A task: a block of rows times a panel of 64 lanes."""
    d = Drawing(760, 380)
    d.text(20, 28, "rows × panel: one task decodes a panel and multiplies its rows by it", size=13)
    d.box(20, 50, 150, 250, PAPER)
    d.text(95, 45, "x  [M, K]", "middle")
    d.box(20, 90, 150, 110, BLUE, "block of rows\n60 to 516")
    d.note(20, 316, "read where it lies, row-major")
    d.box(560, 50, 180, 110, PAPER)
    d.text(650, 45, "packed W  [N, K / 2]", "middle")
    d.box(560, 78, 180, 34, GREEN, "64 rows of W")
    d.arrow(560, 95, 470, 95)
    d.note(515, 86, "decode", "middle")
    d.box(300, 60, 165, 120, ORANGE)
    d.text(382, 55, "panel in L2", "middle")
    d.cells(300, 60, 41.25, 30, 4, 4, ORANGE)
    d.note(382, 197, "unit × 64 lanes, 512 KB at most", "middle")
    d.note(382, 212, "a unit: one fp32 or a pair of bf16", "middle")
    d.arrow(175, 140, 295, 140)
    d.note(235, 131, "broadcast a unit", "middle")
    d.arrow(382, 220, 382, 246)
    d.box(300, 250, 165, 84, ROSE)
    d.cells(300, 250, 41.25, 14, 4, 6, ROSE)
    d.note(382, 350, "6 rows × 4 vectors of sums,", "middle")
    d.note(382, 365, "in registers", "middle")
    d.arrow(470, 292, 555, 292)
    d.note(512, 283, "+ bias, round", "middle")
    d.box(560, 235, 180, 110, PAPER)
    d.text(650, 230, "y  [M, N]", "middle")
    d.box(620, 262, 50, 50, BLUE, "64")
    d.note(740, 362, "the next panel's bytes are fetched meanwhile", "end")
    d.note(20, 340, "LoRA: T (s B)ᵀ is a first,")
    d.note(20, 355, "short panel of R units")
    return d.svg()


def few_rows() -> str:
    """M ≤ 8: weights are looked up where they lie and used at once."""
    d = Drawing(760, 270)
    d.text(20, 28, "few rows: packed bytes are read once, in order; no panel", size=13)
    d.text(20, 62, "W, 2 or 4 rows side by side")
    for row in range(4):
        d.cells(20, 72 + 24 * row, 34, 22, 5, fill=GREEN, texts=("nib",) * 4 + ("…",))
    d.arrow(195, 118, 255, 118)
    d.box(260, 84, 150, 68, ORANGE, "look up levels\nunscaled, in the order\nthe nibbles have")
    d.arrow(415, 118, 470, 118)
    d.box(475, 84, 130, 68, ROSE, "x · level\nsum of 64 elements\na vector of lanes")
    d.arrow(610, 118, 650, 118)
    d.box(655, 84, 90, 68, ROSE, "sum +=\npart · scale")
    d.box(260, 186, 150, 34, BLUE, "x, permuted once")
    d.arrow(415, 203, 520, 156)
    d.box(475, 212, 270, 34, GREEN, "scales of a row, decoded ahead")
    d.arrow(700, 208, 700, 156)
    d.note(20, 190, "fetched 8 KB ahead into L2")
    d.note(20, 240, "One scale a segment of 64, not a weight: a 64th of the multiplications.")
    return d.svg()


def amx() -> str:
    """Two A tiles and two B tiles give four C tiles."""
    d = Drawing(760, 330)
    d.text(20, 28, "AMX: a step of 16 units (32 values of the reduction)", size=13)
    d.text(330, 62, "B: panel, 16 units × 16 lanes", "middle")
    d.box(200, 72, 120, 80, ORANGE, "tile 6")
    d.box(340, 72, 120, 80, ORANGE, "tile 7")
    d.text(20, 166, "A: activations,")
    d.text(20, 181, "16 rows × 16 units")
    d.box(60, 192, 110, 50, BLUE, "tile 4")
    d.box(60, 252, 110, 50, BLUE, "tile 5")
    for row, y in enumerate((192, 252)):
        for column, x in enumerate((200, 340)):
            d.box(x, y, 120, 50, ROSE, f"C tile {2 * row + column}")
    d.arrow(172, 217, 197, 217)
    d.arrow(172, 277, 197, 277)
    d.arrow(260, 154, 260, 189)
    d.arrow(400, 154, 400, 189)
    d.note(330, 320, "32 rows × 32 lanes of fp32 sums, 4 loads for 4 products", "middle")
    d.box(520, 72, 220, 46, PAPER, "before: the LoRA branch,\nmasked, in vectors")
    d.arrow(630, 120, 630, 144)
    d.box(520, 148, 220, 46, ROSE, "whole steps in tiles\n(TDPBF16PS)")
    d.arrow(630, 196, 630, 220)
    d.box(520, 224, 220, 46, PAPER, "after: ragged end, bias,\nrounding, in vectors")
    d.note(630, 292, "they meet in 32 × 64 sums in L1", "middle")
    return d.svg()


def adamw8() -> str:
    """Four blocks of 256 go through two stages in L1."""
    d = Drawing(760, 300)
    d.text(
        20,
        28,
        "AdamW: four blocks of 256 stay in L1 from first load to last store",
        size=13,
    )
    d.cells(20, 56, 44, 30, 4, fill=GREEN, texts=("m, v",) * 4)
    d.note(20, 102, "codes and scales")
    d.cells(20, 122, 44, 30, 4, fill=BLUE, texts=("g",) * 4)
    d.cells(20, 162, 44, 30, 4, fill=BLUE, texts=("p",) * 4)
    d.arrow(200, 71, 255, 110)
    d.arrow(200, 137, 255, 128)
    d.arrow(200, 177, 255, 146)
    d.box(260, 90, 170, 76, ORANGE, "1  update\ncodes → fp32 → fresh\nm, v; p is written once")
    d.arrow(345, 170, 345, 198)
    d.box(260, 202, 170, 34, BLUE, "p, rounded to its dtype")
    d.arrow(435, 128, 495, 128)
    d.note(465, 119, "fp32 in L1", "middle")
    d.box(500, 90, 180, 76, ORANGE, "2  encode\na block's largest, then\ncode = a rounded line")
    d.arrow(590, 170, 590, 198)
    d.cells(502, 202, 44, 30, 4, fill=GREEN, texts=("m, v",) * 4)
    d.note(502, 250, "codes and scales, in place")
    d.note(20, 270, "The map is evenly spaced within a decade, so a code is a line of the value;")
    d.note(20, 286, "only blocks with an element near the middle of two codes look at thresholds.")
    return d.svg()


def feedback() -> str:
    """Columns one after the other, errors passed on."""
    d = Drawing(760, 250)
    d.text(20, 28, "calibrated codes: columns in order, rows as lanes of a vector", size=13)
    d.cells(20, 50, 42, 120, 3, fill=GREEN, texts=("done", "done", "done"))
    d.box(146, 50, 42, 120, ORANGE, "now")
    d.cells(188, 50, 42, 120, 2, fill=PAPER, texts=("later", "later"))
    d.note(20, 188, "W, columns by falling H[k, k]")
    d.arrow(277, 110, 315, 110)
    d.box(
        320,
        60,
        190,
        100,
        BLUE,
        "target\nt = w + Σ d[j] A[k][j]\nover columns done\n(8 at a time)",
    )
    d.arrow(515, 110, 565, 110)
    d.box(570, 60, 170, 44, ORANGE, "nearest level · scale")
    d.arrow(655, 106, 655, 126)
    d.box(570, 130, 170, 44, GREEN, "code,  d = w − q")
    d.note(570, 194, "d is what later columns make good")
    d.note(
        20,
        228,
        "A sweep is the same with all other columns' errors in the sum.",
    )
    return d.svg()


DRAWINGS = {
    "kernel-quantize": quantize,
    "kernel-panels": panels,
    "kernel-few-rows": few_rows,
    "kernel-amx": amx,
    "kernel-adamw8": adamw8,
    "kernel-feedback": feedback,
}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (IMAGES / f"{name}.svg").write_text(draw(), encoding="utf-8")
