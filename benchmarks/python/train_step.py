"""One optimizer step of LoRA fine-tuning, end to end: halfbyte, PEFT + bitsandbytes, PEFT on bf16.

    python -m benchmarks.python.train_step [--model smollm2,tinyllama,llama7b] [--layers N]
                                           [--sequence 128,512,2048] [--rank 16]
                                           [--loss model|linear_cross_entropy]

Same model, data, adapters and loss; 8-bit AdamW of each library, torch's fused AdamW for dense.
Every system runs in a process of its own, so that peak memory is its own, and the processes take
turns. The time is the fastest step; the step's peak leaves out what loading needed. First losses
must agree. `--loss model` is the loss of transformers' models, over all logits in float32;
`linear_cross_entropy` is torch's, in chunks: less memory, a loss in bf16, and on the CPU more time.
Models are described in models.py; without --layers, tinyllama has 4 layers here and llama7b 2.
Writes train_step.csv.

Example: python -m benchmarks.python.train_step --model tinyllama --layers 8 --sequence 512
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from benchmarks.python import models, peers, processes, timing

LAYERS = {"tinyllama": 4, "llama7b": 2}
# Loss -> how far first losses may differ, relative: bf16 in another order; a loss summed in bf16.
LOSSES = {"model": 5e-3, "linear_cross_entropy": 0.02}


def make_optimizer(system: str, adapters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if system == "halfbyte":
        import halfbyte

        return halfbyte.optim.AdamW8bit(adapters, lr=1e-4)
    if system == "PEFT + bitsandbytes":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(adapters, lr=1e-4)
    return torch.optim.AdamW(adapters, lr=1e-4, fused=True)


def loss_of(model, tokens: torch.Tensor, kind: str) -> torch.Tensor:
    """Mean cross-entropy of each next token."""
    if kind == "model":
        return model(input_ids=tokens, labels=tokens).loss
    causal = model.get_base_model()
    hidden = causal.model(input_ids=tokens).last_hidden_state[0, :-1]
    return torch.nn.functional.linear_cross_entropy(
        hidden,
        causal.lm_head.weight,
        tokens[0, 1:],
        options=torch.nn.LinearCrossEntropyOptions(acc_policy="accurate"),
    )


def child(system: str, folder: Path, sequence: int, options) -> dict:
    """Times one system in this process."""
    model = models.add_adapter(system, models.load_base(system, folder), options.rank).train()
    optimizer = make_optimizer(system, [p for p in model.parameters() if p.requires_grad])
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    tokens = torch.randint(0, vocabulary, (1, sequence), generator=generator)
    times, losses = [], []
    whole = processes.peak_memory()
    for i in range(options.steps + 1):  # the first warms up
        if i == 1:
            whole = max(whole, processes.peak_memory())
            processes.forget_peak()
        start = time.perf_counter()
        loss = loss_of(model, tokens, options.loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
        losses.append(loss.item())
    peak = processes.peak_memory()
    return {
        "seconds": min(times[1:]),
        "step peak": peak,
        "peak": max(whole, peak),
        "first": losses[0],
        "last": losses[-1],
    }


def run_child(system: str, folder: Path, sequence: int, options) -> dict:
    arguments = ["--child", system, "--folder", str(folder), "--sequence", str(sequence)]
    arguments += ["--rank", str(options.rank), "--steps", str(options.steps)]
    return processes.run("benchmarks.python.train_step", [*arguments, "--loss", options.loss])


def check(results: dict[str, dict], tolerance: float) -> None:
    """All systems start from the same loss. Raises ValueError."""
    expected = results["PEFT bf16"]["first"]
    for system, result in results.items():
        if not abs(result["first"] / expected - 1) <= tolerance:
            raise ValueError(
                f"{system}: expected a first loss of {expected:.4f}, got {result['first']:.4f}"
            )


def compare(model: str, options) -> list[dict]:
    """One row a sequence length and system."""
    table = []
    layers = options.layers if model != "smollm2" else None
    layers = layers or LAYERS.get(model)
    with tempfile.TemporaryDirectory() as scratch:
        with peers.quiet():
            folder = models.prepare(model, layers, Path(scratch))
        for sequence in options.sequence:
            best: dict[str, dict] = {}
            for _ in range(options.rounds):
                for system in models.SYSTEMS:
                    result = run_child(system, folder, sequence, options)
                    if system not in best or result["seconds"] < best[system]["seconds"]:
                        best[system] = result
            check(best, LOSSES[options.loss])
            for system, result in best.items():
                row = {
                    "model": models.describe(model, layers),
                    "loss": options.loss,
                    "rank": options.rank,
                    "sequence": sequence,
                    "system": system,
                    "tokens/s": sequence / result["seconds"],
                }
                for peer in models.SYSTEMS[1:]:
                    row[f"vs {peer}"] = best[peer]["seconds"] / result["seconds"]
                row |= {
                    "step peak MB": round(result["step peak"] / 1e6),
                    "process peak MB": round(result["peak"] / 1e6),
                    "first loss": round(result["first"], 4),
                    "last loss": round(result["last"], 4),
                }
                table.append(row)
    return table


def main(arguments: list[str] | None = None) -> None:
    command = timing.parser(__doc__)
    some_models = timing.names(models.NAMES)
    command.add_argument("--model", type=some_models, default=["smollm2", "tinyllama"])
    command.add_argument("--layers", type=int, help="of tinyllama and llama7b")
    command.add_argument("--sequence", type=timing.numbers, default=[128, 512], metavar="S,S")
    command.add_argument("--rank", type=int, default=16)
    command.add_argument("--loss", default="model", choices=list(LOSSES))
    command.add_argument("--steps", type=int, default=4)
    command.add_argument("--rounds", type=int, default=1, help="turns of each system's process")
    command.add_argument("--child", choices=models.SYSTEMS, help="measure in this process")
    command.add_argument("--folder", type=Path, help="the child's model")
    options = command.parse_args(arguments)
    if options.child:
        processes.report(child(options.child, options.folder, options.sequence[0], options))
        return
    timing.print_birthplace()
    table = []
    for model in options.model:
        rows = compare(model, options)
        timing.print_table("One optimizer step, LoRA on all linear layers", rows)
        table += rows
    timing.write_csv(options.output / "train_step.csv", table)


if __name__ == "__main__":
    main()
