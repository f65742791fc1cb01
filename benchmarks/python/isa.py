"""Older instruction sets: torch capped and halfbyte forced to the same one, a process each.

    python -m benchmarks.python.isa [--isa avx2,avx512] [--shape NAME] [--rows 1,16,128,512]

torch reads its caps at start: ATEN_CPU_CAPABILITY for its own kernels, ONEDNN_MAX_CPU_ISA for
oneDNN's, MKL_ENABLE_INSTRUCTIONS for MKL's (a cap that MKL heeds on Intel processors only).
"avx512" is AVX-512 without the BF16 instruction. Writes isa.csv.

Example: python -m benchmarks.python.isa --isa avx2 --rows 512 --dtypes bfloat16
"""

from __future__ import annotations

import torch

from benchmarks.python import linear, processes, timing

CAPS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "HALFBYTE_FORCE_VARIANT": "avx2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "HALFBYTE_FORCE_VARIANT": "avx512",
    },
}
CASES = ("forward", "dX", "LoRA step")
# dy W in bfloat16 falls to torch's plain loop there: many seconds a call, not worth a ratio.
FORWARD_ONLY = ("avx2", "bfloat16")


def compare(
    shape: str, rows: list[int], dtypes: list[str], seconds: float, isas: list[str] | None = None
) -> list[dict]:
    """The linear layer against torch dense, both limited to each instruction set."""
    table = []
    for isa in isas or CAPS:
        for dtype in dtypes:
            arguments = ["--child", "--shape", shape, "--dtypes", dtype]
            arguments += ["--rows", ",".join(map(str, rows)), "--seconds", str(seconds)]
            cases = CASES[:1] if (isa, dtype) == FORWARD_ONLY else CASES
            arguments += ["--cases", ",".join(cases)]
            measured = processes.run("benchmarks.python.isa", arguments, CAPS[isa])
            table += [{"instruction set": isa} | row for row in measured]
    return table


def write(table: list[dict], folder) -> None:
    """Table to the terminal, CSV to `folder`."""
    for case in CASES:
        rows = [row for row in table if row["case"] == case]
        if not rows:
            continue
        timing.print_table(
            f"Instruction sets capped alike, warm: {case}", linear.short(rows, "dtype")
        )
    timing.write_csv(folder / "isa.csv", table)


def main(arguments: list[str] | None = None) -> None:
    command = timing.parser(__doc__)
    command.add_argument("--isa", type=timing.names(CAPS), default=list(CAPS), metavar="ISA,ISA")
    command.add_argument("--shape", default="llama-2-7b.q_proj", help="a name from shapes.csv")
    command.add_argument("--rows", type=timing.numbers, default=[1, 16, 128, 512], metavar="M,M")
    command.add_argument("--dtypes", type=timing.dtypes, default=["bfloat16", "float32"])
    command.add_argument("--seconds", type=float, default=0.3, help="time a call, at least")
    command.add_argument(
        "--cases", type=timing.names(CASES), default=list(CASES), help="of a child"
    )
    command.add_argument("--child", action="store_true", help="measure in this process")
    options = command.parse_args(arguments)
    if options.child:
        dtype = getattr(torch, options.dtypes[0])
        shape = timing.named_shapes()[options.shape]
        task = linear.Task(
            options.shape,
            shape,
            dtype,
            peers=("dense",),
            cases=tuple(options.cases),
            seconds=options.seconds,
        )
        processes.report(linear.warm(task, options.rows, linear.compute_roof(dtype)))
        return
    timing.print_birthplace()
    table = compare(options.shape, options.rows, options.dtypes, options.seconds, options.isa)
    write(table, options.output)


if __name__ == "__main__":
    main()
