"""Peak resident memory of LoRA fine-tuning, measured in processes of their own, against the plan.

    python -m benchmarks.python.memory [--model SmolLM2-135M] [--layers N] [--sequence 512]
                                       [--rank 16] [--dtype bfloat16] [--checkpointing]
                                       [--loss model|linear_cross_entropy] [--systems ...]

A decoder of a named shape with random weights; adapters on all linear layers; 8-bit AdamW of each
library, torch's fused AdamW for the dense base. A process first trains a toy model, so that what it
holds then, `baseline`, is Python and the libraries; then it loads, and trains a few steps. `peak`
is the most it holds in a step, `loading` the most before; in between it gives back the free heap
that loading left, `left`. "freed returned" is the same process with glibc told to return freed
blocks (MALLOC_TRIM_THRESHOLD_), `plan` what `halfbyte plan` predicts on top of the baseline.
The peers run in bfloat16 only. Writes memory_MODEL.csv.

Example: python -m benchmarks.python.memory --sequence 128 --systems halfbyte
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import tempfile
from pathlib import Path

import torch

from benchmarks.python import models, peers, processes, timing, train_step
from halfbyte import memory_plan

RETURNED = "halfbyte, freed returned"
SYSTEMS = ("halfbyte", RETURNED, *models.SYSTEMS[1:])
DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
# glibc stops adjusting its thresholds once one is set: blocks from 128 KiB on are mappings, and
# go back when they are freed.
RETURN_FREED = {"MALLOC_TRIM_THRESHOLD_": str(128 << 10)}
TOY = memory_plan.Shape("toy", 64, 128, 1, 2, 1, 128, 32, tied=True)


def write_model(shape: memory_plan.Shape, folder: Path, dtype: torch.dtype) -> Path:
    """A Hugging Face folder with random weights."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder / shape.name)
    return folder / shape.name


def start(system: str, folder: Path, options) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A system's model and optimizer, ready for its first step."""
    from halfbyte.integrations.peft import prepare_model_for_training
    from halfbyte.integrations.streaming import load_model
    from halfbyte.integrations.transformers import NF4Config

    system, dtype = system.split(",")[0], getattr(torch, options.dtype)
    if system == "halfbyte":
        model = load_model(folder, dtype=dtype, config=NF4Config())
    else:
        model = models.load_base(system, folder)
    if options.checkpointing:
        prepare_model_for_training(model)
    model = models.add_adapter(system, model, options.rank).train()
    adapters = [p for p in model.parameters() if p.requires_grad]
    return model, train_step.make_optimizer(system, adapters)


def run_steps(model, optimizer, steps: int, sequence: int, loss: str) -> float:
    """Trains; returns the last loss."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (1, sequence), generator=generator)
    for _ in range(steps):
        value = train_step.loss_of(model, tokens, loss)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    return value.item()


def _resident() -> int:
    """Bytes that this process holds now."""
    processes.forget_peak()
    return processes.peak_memory()


def child(system: str, toy: Path, folder: Path, options) -> dict[str, float]:
    """Measures one system in this process."""
    run_steps(*start(system, toy, options), 2, 32, options.loss)
    gc.collect()
    baseline = _resident()
    model, optimizer = start(system, folder, options)
    gc.collect()
    loading = processes.peak_memory()
    left = _resident()
    ctypes.CDLL(None).malloc_trim(0)
    left -= _resident()
    loss = run_steps(model, optimizer, options.steps, options.sequence[0], options.loss)
    peak = processes.peak_memory()
    return {"baseline": baseline, "loading": loading, "left": left, "peak": peak, "loss": loss}


def measure(system: str, shape: memory_plan.Shape, options, scratch: Path) -> dict[str, float]:
    """What `child` measures in a new process."""
    for each in (TOY, shape):
        if not (scratch / each.name).exists():
            with peers.quiet():
                write_model(each, scratch, getattr(torch, options.dtype))
    arguments = ["--child", system, "--folder", str(scratch), "--model", shape.name]
    arguments += ["--rank", str(options.rank), "--steps", str(options.steps)]
    arguments += ["--sequence", str(options.sequence[0]), "--dtype", options.dtype]
    arguments += ["--loss", options.loss] + ["--checkpointing"] * options.checkpointing
    environment = RETURN_FREED if system == RETURNED else {}
    return processes.run("benchmarks.python.memory", arguments, environment)


def predicted(shape: memory_plan.Shape, system: str, options, baseline: int) -> int | None:
    """The plan's peak; None where it describes no such process."""
    if system not in ("halfbyte", RETURNED) or options.loss != "model":
        return None
    settings = memory_plan.Settings(
        sequence=options.sequence[0],
        rank=options.rank,
        dtype=DTYPES[options.dtype],
        checkpointing=options.checkpointing,
        loss="full",
        heap="returned" if system == RETURNED else "kept",
    )
    return memory_plan.plan(shape, settings, "cpu", baseline).peak


def compare(shape: memory_plan.Shape, options) -> list[dict]:
    """One row a system."""
    table, peaks = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for system in options.systems:
            found = measure(system, shape, options, Path(scratch))
            peaks[system] = found["peak"]
            plan = predicted(shape, system, options, found["baseline"])
            row = {
                "model": f"{shape.name} shape, {shape.layers} layers, random weights",
                "sequence": options.sequence[0],
                "rank": options.rank,
                "dtype": options.dtype,
                "checkpointing": "yes" if options.checkpointing else "no",
                "loss": options.loss,
                "system": system,
                "baseline MB": round(found["baseline"] / 1e6),
                "loading MB": round(found["loading"] / 1e6),
                "left MB": round(found["left"] / 1e6),
                "peak MB": round(found["peak"] / 1e6),
                "plan MB": "" if plan is None else round(plan / 1e6),
                "last loss": round(found["loss"], 4),
            }
            table.append(row)
    for row in table:
        for peer in models.SYSTEMS[1:]:
            if peer in peaks:
                row[f"of {peer}"] = peaks[row["system"]] / peaks[peer]
    return table


def main(arguments: list[str] | None = None) -> None:
    command = timing.parser(__doc__)
    command.add_argument("--model", default="SmolLM2-135M", help="a shape that halfbyte plan knows")
    command.add_argument("--layers", type=int)
    command.add_argument("--sequence", type=timing.numbers, default=[512], metavar="S,S")
    command.add_argument("--rank", type=int, default=16)
    command.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    command.add_argument("--checkpointing", action="store_true")
    command.add_argument("--loss", default="model", choices=list(train_step.LOSSES))
    command.add_argument("--steps", type=int, default=3)
    command.add_argument("--systems", type=lambda text: text.split(";"), default=list(SYSTEMS))
    command.add_argument("--child", choices=SYSTEMS, help="measure in this process")
    command.add_argument("--folder", type=Path, help="the child's models")
    options = command.parse_args(arguments)
    if options.child:
        folder = options.folder
        processes.report(child(options.child, folder / TOY.name, folder / options.model, options))
        return
    shape = memory_plan.load_shape(options.model)
    if options.layers:
        shape = dataclasses.replace(shape, layers=options.layers)
    timing.print_birthplace()
    table = []
    for sequence in list(options.sequence):
        options.sequence = [sequence]
        table += compare(shape, options)
    timing.print_table("Peak resident memory of a training process", table)
    timing.write_csv(options.output / f"memory_{shape.name}.csv", table)


if __name__ == "__main__":
    main()
