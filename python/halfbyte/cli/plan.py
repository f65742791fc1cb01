"""`halfbyte plan`: what fine-tuning a model needs in memory, and where it fits, before anything is
downloaded or loaded."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from halfbyte.memory_plan import Plan, RankPlan, Settings, Shape

DOES_NOT_FIT = 1
THIS_MACHINE = "this machine"


def command(
    model: Annotated[
        str, typer.Argument(help="A Hugging Face folder, a config.json, or a name: Llama-2-7B.")
    ],
    seq: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    batch: Annotated[int, typer.Option(help="Sequences a forward pass.")] = 1,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    targets: Annotated[
        str, typer.Option(help="Layers with an adapter: all-linear, or names: q_proj,v_proj.")
    ] = "all-linear",
    block_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Quantize the scales too.")] = True,
    dtype: Annotated[str, typer.Option(help="Compute type: bf16, fp16, fp32.")] = "bf16",
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations.")] = False,
    optimizer: Annotated[
        str, typer.Option(help="adamw8bit, adamw32, paged-adamw8bit, paged-adamw32.")
    ] = "adamw8bit",
    method: Annotated[str, typer.Option(help="qlora, lora (16-bit base), full.")] = "qlora",
    loss: Annotated[
        str, typer.Option(help="tiled (halfbyte finetune's) or full (transformers' logits).")
    ] = "tiled",
    gpus: Annotated[
        int, typer.Option("--gpus", "--ranks", help="Processes with a GPU each, under FSDP2.")
    ] = 1,
    gpu: Annotated[
        str | None, typer.Option(help="Exit with 1 if it does not fit there: h100-80gb, cpu.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict the memory of a fine-tuning step: by category, on this machine and on GPUs.

    Example: halfbyte plan Llama-3.1-8B --seq 2048 --checkpointing --gpu rtx4090
    """
    from halfbyte.cli.errors import plain_errors

    with plain_errors():
        names = () if targets == "all-linear" else tuple(t.strip() for t in targets.split(","))
        facts = collect(
            model, gpus, gpu, method=method, sequence=seq, batch=batch, rank=rank, targets=names,
            block_size=block_size, double_quant=double_quant, dtype=dtype,
            checkpointing=checkpointing, optimizer=optimizer, loss=loss,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _show(facts)
    if gpu is not None and not facts["devices"][0]["fits"]:
        raise typer.Exit(DOES_NOT_FIT)


def collect(model: str, gpus: int = 1, gpu: str | None = None, **settings: Any) -> dict[str, Any]:
    """All facts as plain values: model, settings, cpu and gpu (bytes by category), devices."""
    from halfbyte import memory_plan
    from halfbyte.finetune.errors import FinetuneError

    try:
        shape = memory_plan.load_shape(model)
        chosen = memory_plan.Settings(**settings)
        if gpus < 1:
            raise ValueError(f"gpus: expected at least 1, got {gpus}")
        known = (*memory_plan.DEVICES, "cpu")
        if gpu is not None and gpu not in known:
            raise ValueError(f"gpu: expected one of {', '.join(known)}, got {gpu!r}")
        on_cpu = memory_plan.plan(shape, chosen, "cpu")
        on_gpu = memory_plan.plan(shape, chosen, "cuda")
        shared = memory_plan.rank_plan(shape, chosen, gpus) if gpus > 1 else None
    except ValueError as error:
        raise FinetuneError(str(error)) from None
    wanted = [gpu] if gpu else ["cpu", *memory_plan.DEVICES]
    return {
        "model": {
            "name": shape.name,
            "parameters": shape.parameters,
            "packed_parameters": shape.linear_parameters,
            "bits_per_packed_parameter": on_gpu.bits_per_parameter if on_gpu.packed else None,
        },
        "settings": settings | {"gpus": gpus},
        "cpu": _bytes(on_cpu),
        "gpu": _bytes(shared.plan if shared else on_gpu, shared),
        "devices": [_verdict(name, shape, chosen, on_cpu, shared or on_gpu) for name in wanted],
    }


def _bytes(made: Plan, shared: RankPlan | None = None) -> dict[str, int]:
    found = dict(made.categories)
    if shared is not None:
        found["gathered layers"] = shared.gathered
    return found | {"peak": sum(found.values())}


def _verdict(
    name: str, shape: Shape, settings: Settings, on_cpu: Plan, on_gpu: Plan | RankPlan
) -> dict[str, Any]:
    """Whether it fits on one device, and what to change if not."""
    from halfbyte import memory_plan
    from halfbyte.memory_plan.advice import changes_that_fit

    made, device = (on_cpu, "cpu") if name == "cpu" else (on_gpu, "cuda")
    single = made.plan if isinstance(made, memory_plan.RankPlan) else made
    memory = _machine_memory() if name == "cpu" else memory_plan.DEVICES[name].memory
    spill = made.peak > memory and made.peak - single.pageable <= memory
    fits = made.peak <= memory or spill
    changes = (
        []
        if fits
        else changes_that_fit(
            shape,
            settings,
            memory,
            device,
            made.ranks if made is not single and name != "cpu" else 1,
        )
    )
    return {
        "device": THIS_MACHINE if name == "cpu" else name,
        "memory": memory,
        "peak": made.peak,
        "fits": fits,
        "paged_out": spill,
        "changes": [{"flags": change.flags, "peak": change.peak} for change in changes],
    }


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    model, settings = facts["model"], facts["settings"]
    bits = model["bits_per_packed_parameter"]
    packed = f", {bits:.3f} bits a packed parameter" if bits else ""
    console.print(
        f"[bold]{model['name']}[/bold]: {model['parameters'] / 1e9:.2f} G parameters{packed}; "
        f"{settings['batch']} x {settings['sequence']} tokens"
    )
    gpus = settings["gpus"]
    table = Table()
    table.add_column("")
    table.add_column("CPU process, GB", justify="right")
    table.add_column("GPU, GB" if gpus == 1 else f"each of {gpus} GPUs, GB", justify="right")
    for name, size in facts["gpu"].items():
        style = "bold" if name == "peak" else None
        on_cpu = facts["cpu"].get(name)
        cpu = "" if on_cpu is None else f"{on_cpu / 1e9:.2f}"
        table.add_row(name, cpu, f"{size / 1e9:.2f}", style=style)
    console.print(table)
    table = Table()
    for column in ("device", "has, GB", "needs, GB", "fits", "what to change"):
        table.add_column(column, justify="right" if "GB" in column else "left")
    for row in facts["devices"]:
        changes = [f"{c['flags']} ({c['peak'] / 1e9:.1f} GB)" for c in row["changes"]]
        advice = "\n".join(changes) or ("" if row["fits"] else "no setting here is enough")
        verdict = "[green]yes[/green]" if row["fits"] else "[red]no[/red]"
        if row["paged_out"]:
            verdict, advice = "[yellow]yes[/yellow]", "optimizer state moves to the host at peaks"
        table.add_row(
            row["device"], f"{row['memory'] / 1e9:.1f}", f"{row['peak'] / 1e9:.1f}", verdict, advice
        )
    console.print(table)
    console.print("[dim]GPU figures and the CPU's runtime are estimates: docs/scaling.md.[/dim]")
