"""One optimizer step of LoRA fine-tuning, end to end: halfbyte, PEFT + bitsandbytes, PEFT on bf16.

    python -m benchmarks.python.train_step [--model smollm2|tinyllama|llama7b] [--layers N]
                                           [--sequence 128,512] [--rank 16] [--steps 4]

Same model, data and adapter initialisation; every system in a process of its own, so that peak
memory is its own, and the processes take turns. The time is the fastest step. `smollm2` is the
demo's model (real weights), the others have the shape and random weights. Needs `make build` and,
for smollm2, the demo's packages.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.python.timing import ROOT, commit, machine, print_table, write_csv

SYSTEMS = ("halfbyte", "peft+bitsandbytes", "peft bf16")
SHAPES = {
    "tinyllama": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "llama7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
}


def prepare(model: str, layers: int | None, folder: Path) -> Path:
    """A Hugging Face folder in bf16: the demo's model, or random weights of a shape."""
    import torch
    import transformers

    if model == "smollm2":
        from halfbyte.finetune import base, demo

        package = demo._package_folder(demo.MODEL_PACKAGE, demo.MODEL_REQUIREMENT)
        return base.convert(base.open_base(package / demo.MODEL_FILE)).folder
    settings = dict(SHAPES[model])
    if layers:
        settings["num_hidden_layers"] = layers
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**settings)
    dense = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dense.save_pretrained(folder)
    return folder


def load(system: str, folder: Path, rank: int):
    """(model with adapters, optimizer) of one system."""
    import peft
    import torch
    import transformers

    options = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    if system == "peft+bitsandbytes":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        options["device_map"] = "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    if system == "halfbyte":
        import halfbyte
        from halfbyte.integrations import peft as bridge

        halfbyte.quantize_(model)
        bridge.enable()
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    model = peft.get_peft_model(model, settings)
    adapters = [p for p in model.parameters() if p.requires_grad]
    if system == "halfbyte":
        return model, halfbyte.optim.AdamW8bit(adapters, lr=1e-4)
    if system == "peft+bitsandbytes":
        import bitsandbytes

        return model, bitsandbytes.optim.AdamW8bit(adapters, lr=1e-4)
    return model, torch.optim.AdamW(adapters, lr=1e-4, fused=True)


def child(system: str, folder: Path, sequence: int, rank: int, steps: int) -> None:
    """Times one system; prints a JSON line."""
    import torch

    model, optimizer = load(system, folder, rank)
    model.train()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (1, sequence), generator=generator)
    times, losses = [], []
    for _ in range(steps + 1):  # the first warms up
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
        losses.append(loss.item())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {"seconds": min(times[1:]), "peak": peak, "first": losses[0], "last": losses[-1]}
    print("RESULT " + json.dumps(result), flush=True)


def run_child(system: str, folder: Path, sequence: int, options) -> dict:
    command = [
        *(sys.executable, "-m", "benchmarks.python.train_step", "--child", system),
        *("--folder", str(folder), "--sequence", str(sequence)),
        *("--rank", str(options.rank), "--steps", str(options.steps)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise RuntimeError(f"{system}: no result\n{done.stderr[-2000:]}")


def compare(options) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = prepare(options.model, options.layers, Path(scratch))
        for sequence in (int(n) for n in options.sequence.split(",")):
            best: dict[str, dict] = {}
            for _ in range(options.rounds):
                for system in SYSTEMS:
                    result = run_child(system, folder, sequence, options)
                    if system not in best or result["seconds"] < best[system]["seconds"]:
                        best[system] = result
            baseline = best["peft+bitsandbytes"]["seconds"]
            for system, result in best.items():
                rows.append(
                    {
                        "model": options.model
                        + (f" ({options.layers} layers)" if options.layers else ""),
                        "sequence": sequence,
                        "system": system,
                        "tokens/s": sequence / result["seconds"],
                        "vs PEFT + bitsandbytes": baseline / result["seconds"],
                        "peak MB": round(result["peak"] / 1e6),
                        "first loss": result["first"],
                        "last loss": result["last"],
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", choices=["smollm2", *SHAPES])
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--sequence", default="128,512")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--child", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.folder, int(options.sequence), options.rank, options.steps)
        return
    print(f"machine: {machine()}; commit {commit()}")
    rows = compare(options)
    print_table("One optimizer step, LoRA on all linear layers", rows)
    write_csv(options.output / f"train_step_{options.model}.csv", rows)


if __name__ == "__main__":
    main()
