"""The linear layer against torch, bitsandbytes and torchao; formats; older instruction sets.

    python -m benchmarks.python.compare            the short form: two shapes, bfloat16
    python -m benchmarks.python.compare --full     all shapes of shapes.csv, all dtypes

Checks results first, then times in one process, in turns; ratios are time of the peer / time of
halfbyte. Writes linear.csv (times and ratios of all peers), formats.csv and isa.csv.
`halfbyte bench` is the form for one shape of your own.

Example: python -m benchmarks.python.compare --shape tinyllama-1.1b.up_proj --rows 1,512
"""

from __future__ import annotations

import torch

from benchmarks.python import formats, isa, linear, peers, timing

SHORT = {
    "shape": ["llama-2-7b.q_proj", "smollm2-135m.up_proj"],
    "rows": [1, 4, 16, 64, 128, 512],
    "dtypes": ["bfloat16"],
    "isa_rows": [1, 512],
}
FULL = {
    "shape": list(timing.named_shapes()),
    "rows": [1, 2, 4, 8, 16, 32, 64, 128, 512, 2048],
    "dtypes": ["bfloat16", "float32", "float16"],
    "isa_rows": [1, 16, 128, 512, 2048],
}
COLD_ROWS = 32  # with more rows the arithmetic hides where the weight comes from
PARTS = ("formats", "linear", "isa")


def compare_linear(options) -> list[dict]:
    """Warm and cold rows of every shape and dtype; each shape's tables are printed when done."""
    table = []
    for dtype in (getattr(torch, name) for name in options.dtypes):
        roof = linear.compute_roof(dtype)
        print(f"arithmetic roof, {dtype}, operands in cache: {roof:.0f} GFLOP/s", flush=True)
        for name in options.shape:
            task = linear.Task(
                name,
                timing.named_shapes()[name],
                dtype,
                options.rank,
                tuple(options.peers),
                seconds=options.seconds,
            )
            rows = linear.warm(task, options.rows, roof)
            few = [m for m in options.rows if m <= COLD_ROWS]
            rows += linear.cold(task, few, roof) if few else []
            for weights, case in dict.fromkeys((row["weights"], row["case"]) for row in rows):
                chosen = [r for r in rows if (r["weights"], r["case"]) == (weights, case)]
                title = f"{name}, {dtype}, {weights} weights: {case}"
                timing.print_table(title, linear.short(chosen))
            table += rows
    return table


def main(arguments: list[str] | None = None) -> None:
    command = timing.parser(__doc__)
    command.add_argument("--full", action="store_true", help="every shape and dtype: long")
    command.add_argument(
        "--only", type=timing.names(PARTS), default=list(PARTS), metavar="PART,PART"
    )
    command.add_argument("--shape", action="append", choices=list(timing.named_shapes()))
    command.add_argument("--rows", type=timing.numbers, metavar="M,M")
    command.add_argument("--dtypes", type=timing.dtypes, metavar="DTYPE,DTYPE")
    command.add_argument("--rank", type=int, default=16)
    some_peers = timing.names(peers.LINEAR)
    command.add_argument("--peers", type=some_peers, default=list(peers.LINEAR), metavar="P,P")
    command.add_argument("--seconds", type=float, default=0.3, help="time a call, at least")
    options = command.parse_args(arguments)
    chosen = FULL if options.full else SHORT
    isa_rows = options.rows or chosen["isa_rows"]
    for name in ("shape", "rows", "dtypes"):
        setattr(options, name, getattr(options, name) or chosen[name])
    timing.print_birthplace()
    if "formats" in options.only:
        formats.write(formats.compare((4096, 4096), options.seconds), options.output)
    if "linear" in options.only:
        timing.write_csv(options.output / "linear.csv", compare_linear(options))
    if "isa" in options.only:
        capped = [name for name in options.dtypes if name != "float16"]
        table = isa.compare(options.shape[0], isa_rows, capped, options.seconds)
        isa.write(table, options.output)


if __name__ == "__main__":
    main()
