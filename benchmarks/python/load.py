"""Loading: from dense shards, packed as they are read; from a packed folder, mapped; and training
a model that is larger than the memory it may hold.

    python -m benchmarks.python.load [--part dense,mapped,train] [--layers 2] [--mapped-layers 32]
                                     [--train-layers 32] [--sequence 64] [--steps 2] [--threads 2]

A Llama of 7B shape (hidden size 4096, random weights) with as many layers as said; every
measurement in a process of its own, that first loads a toy model, so that what it holds then,
Python and the libraries, is not counted. `cold`: the files' pages are dropped from the page cache
first.

dense   fp16 shards: `load_model`, transformers' `from_pretrained` with the same `NF4Config`, and
        `halfbyte quantize` (which also writes); GB/s of fp16, beside the plain reading of the same
        files; `peak` beside `bound` = the packed model + the largest tensor + 10 %
mapped  seconds until a packed folder's model is there, and until it has made one token
train   steps with LoRA r=64 on all linear layers and checkpointing, the packed layers streamed
        from the disk. `bound` is half of the packed weights: a run that ever held more, by the
        kernel's own count (VmHWM), fails. While it runs, pages of the files that no process holds
        are dropped from the page cache over and over, so that every layer does come from the disk
        (`read`). The losses must be those of the same steps without streaming, to the bit.

Writes load.csv. Example: python -m benchmarks.python.load --part dense --layers 2
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import threading
import time
from pathlib import Path

import torch

from benchmarks.python import processes, timing

PARTS = ("dense", "mapped", "train")
TOY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 128,
}
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
SHARD = "500MB"


def write_dense(folder: Path, **sizes) -> Path:
    """fp16 shards of random weights; one layer's are used in every layer."""
    return _write(folder, lambda weight, key: {key: weight.half()}, {}, **sizes)


def write_packed(folder: Path, **sizes) -> Path:
    """The same, packed: made without a dense model, one shard a layer."""
    import halfbyte
    from halfbyte import checkpoint

    def pack(weight: torch.Tensor, key: str) -> dict[str, torch.Tensor]:
        return checkpoint.to_entries(halfbyte.quantize_nf4(weight.bfloat16()), key)

    return _write(folder, pack, halfbyte.NF4Config().to_dict(), **sizes)


def _write(folder: Path, linear, quantization: dict, **sizes) -> Path:
    import safetensors.torch
    import transformers

    config = transformers.LlamaConfig(tie_word_embeddings=False, **sizes)
    config.dtype = torch.bfloat16 if quantization else torch.float16
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    placed: dict[str, str] = {}

    def save(name: str, state: dict[str, torch.Tensor]) -> None:
        safetensors.torch.save_file(state, folder / name, {"format": "pt"})
        placed.update(dict.fromkeys(state, name))

    def values(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 1:
            return torch.ones(tensor.shape, dtype=config.dtype)
        return torch.randn(tensor.shape) * 0.02

    layer = {n: values(t) for n, t in model.model.layers[0].state_dict().items()}
    for index in range(config.num_hidden_layers):
        state: dict[str, torch.Tensor] = {}
        for name, tensor in layer.items():
            key = f"model.layers.{index}.{name}"
            state |= linear(tensor, key) if tensor.dim() == 2 else {key: tensor.clone()}
        save(f"layer-{index:03}.safetensors", state)
    rest = {n: t for n, t in model.state_dict().items() if ".layers." not in n}
    save("rest.safetensors", {n: values(t).to(config.dtype) for n, t in rest.items()})
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = config.to_dict() | ({"quantization_config": quantization} if quantization else {})
    settings |= {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(settings, default=str))
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    return folder


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def drop_pages(folder: Path) -> None:
    """Takes the files' pages that no process has mapped out of the page cache."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(folder: Path) -> float:
    """Plain reading of all files, one after the other."""
    buffer = bytearray(8 << 20)
    start = time.perf_counter()
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    return time.perf_counter() - start


# --- what a child process does --------------------------------------------------------------------


def child_load(options) -> dict[str, float]:
    """One way of loading: seconds, and peak memory on top of a process that is warm."""
    from transformers import AutoModelForCausalLM

    import halfbyte
    from halfbyte.integrations.packed_folder import write_packed_folder
    from halfbyte.integrations.streaming import load_model

    calls = {
        "load_model": lambda path: load_model(path, threads=options.threads),
        "from_pretrained": lambda path: AutoModelForCausalLM.from_pretrained(
            path, quantization_config=halfbyte.NF4Config()
        ),
        "quantize": lambda path: write_packed_folder(
            path, Path(tempfile.mkdtemp(dir=options.scratch)), threads=options.threads
        ),
    }
    call = calls[options.call]
    call(options.toy)
    if options.cold:
        drop_pages(options.folder)
    held = memory("VmRSS")
    processes.forget_peak()
    start = time.perf_counter()
    model = call(options.folder)
    seconds = time.perf_counter() - start
    peak = processes.peak_memory() - held
    found = {"seconds": seconds, "peak": peak}
    if isinstance(model, torch.nn.Module):
        tensors = [*model.parameters(), *model.buffers()]
        found["model"] = sum(t.numel() * t.element_size() for t in tensors)
        start = time.perf_counter()
        with torch.no_grad():
            model(torch.ones(1, 1, dtype=torch.long))
        found["token"] = seconds + time.perf_counter() - start
    return found


def child_train(options) -> dict[str, dict]:
    """The same training steps streamed, then without."""
    return {"streamed": train(options, True), "plain": train(options, False)}


def train(options, streamed: bool) -> dict[str, object]:
    """Losses, size of the packed weights, peak memory of the steps, bytes read from the disk."""
    from peft import LoraConfig, get_peft_model

    import halfbyte
    from halfbyte.integrations.streaming import load_model, stream_layers

    torch.manual_seed(0)
    model = load_model(options.folder)
    packed = [m for m in model.modules() if isinstance(m, halfbyte.nn.NF4Linear)]
    size = sum(m.nf4_weight.nbytes for m in packed)
    settings = LoraConfig(r=options.rank, target_modules="all-linear", lora_dropout=0.05)
    model = get_peft_model(model, settings).train()
    model.gradient_checkpointing_enable()
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = halfbyte.optim.AdamW8bit(adapters, lr=1e-3)
    tokens = torch.randint(0, model.config.vocab_size, (1, options.sequence))
    stop = threading.Event()
    if streamed:
        stream_layers(model)
        threading.Thread(target=_keep_dropping, args=(options.folder, stop), daemon=True).start()
    held, read = memory("VmRSS"), bytes_read()
    processes.forget_peak()
    losses, start = [], time.perf_counter()
    for _ in range(options.steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item().hex())
    seconds = (time.perf_counter() - start) / options.steps
    stop.set()
    return {
        "losses": losses,
        "packed": size,
        "peak": processes.peak_memory() - held,
        "read": bytes_read() - read,
        "seconds": seconds,
    }


def _keep_dropping(folder: Path, stop: threading.Event) -> None:
    while not stop.wait(0.02):
        drop_pages(folder)


def memory(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+) kB", text).group(1)) * 1024


def bytes_read() -> int:
    """Bytes that this process's reads, mapped ones too, fetched from the disk."""
    return int(re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.M).group(1))


# --- the parts ------------------------------------------------------------------------------------


def run_child(kind: str, folder: Path, toy: Path, scratch: Path, options, *flags: str):
    arguments = ["--child", kind, "--folder", str(folder), "--toy", str(toy)]
    arguments += ["--scratch", str(scratch), "--threads", str(options.threads)]
    arguments += ["--sequence", str(options.sequence), "--steps", str(options.steps)]
    arguments += ["--rank", str(options.rank), *flags]
    return processes.run("benchmarks.python.load", arguments)


def part_dense(scratch: Path, options) -> list[dict]:
    folder = write_dense(scratch / "dense", num_hidden_layers=options.layers, **LLAMA_7B)
    toy = write_dense(scratch / "dense-toy", **TOY)
    size = size_of(folder)
    largest = 2 * max(LLAMA_7B["vocab_size"], 11008) * LLAMA_7B["hidden_size"]
    rows = []
    for cold in (True, False):
        if cold:
            drop_pages(folder)
        plain = read_seconds(folder)
        for call in ("load_model", "from_pretrained", "quantize"):
            flags = ["--call", call, *(["--cold"] if cold else [])]
            found = run_child("load", folder, toy, scratch, options, *flags)
            bound = 1.1 * (found.get("model", 0) + largest)
            rows.append(
                {
                    "part": "dense",
                    "call": call,
                    "files": f"{size / 1e9:.2f} GB fp16, {'cold' if cold else 'cached'}",
                    "s": found["seconds"],
                    "GB/s": size / 1e9 / found["seconds"],
                    "plain reading, GB/s": size / 1e9 / plain,
                    "peak, MB": found["peak"] / 1e6,
                    "bound, MB": bound / 1e6,
                }
            )
    return rows


def part_mapped(scratch: Path, options) -> list[dict]:
    folder = write_packed(scratch / "packed", num_hidden_layers=options.mapped_layers, **LLAMA_7B)
    toy = write_packed(scratch / "packed-toy", **TOY)
    rows = []
    for cold in (True, False):
        flags = ["--call", "load_model", *(["--cold"] if cold else [])]
        found = run_child("load", folder, toy, scratch, options, *flags)
        rows.append(
            {
                "part": "mapped",
                "call": "load_model",
                "files": f"{size_of(folder) / 1e9:.2f} GB packed, {'cold' if cold else 'cached'}",
                "s": found["seconds"],
                "first token, s": found["token"],
                "peak, MB": found["peak"] / 1e6,
            }
        )
    return rows


def part_train(scratch: Path, options) -> list[dict]:
    folder = write_packed(scratch / "train", num_hidden_layers=options.train_layers, **LLAMA_7B)
    found = run_child("train", folder, folder, scratch, options)
    streamed, plain = found["streamed"], found["plain"]
    limit = streamed["packed"] / 2
    if streamed["losses"] != plain["losses"]:
        raise SystemExit(f"losses differ: {streamed['losses']} {plain['losses']}")
    if streamed["peak"] > limit:
        raise SystemExit(f"held {streamed['peak']:,} bytes, more than the limit {limit:,.0f}")
    return [
        {
            "part": "train",
            "call": call,
            "files": f"{run['packed'] / 1e9:.2f} GB packed in {options.train_layers} layers",
            "s": run["seconds"],
            "peak, MB": run["peak"] / 1e6,
            "bound, MB": limit / 1e6 if run is streamed else None,
            "read, GB": run["read"] / 1e9,
            "last loss": float.fromhex(run["losses"][-1]),
        }
        for call, run in found.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    command = timing.parser(__doc__)
    command.add_argument("--part", type=timing.names(PARTS), default=list(PARTS))
    command.add_argument("--layers", type=int, default=2)
    command.add_argument("--mapped-layers", type=int, default=32)
    command.add_argument("--train-layers", type=int, default=32)
    command.add_argument("--sequence", type=int, default=64)
    command.add_argument("--steps", type=int, default=2)
    command.add_argument("--rank", type=int, default=64)
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--scratch", type=Path, help="where files are written; several GB")
    for flag in ("--child", "--call"):
        command.add_argument(flag, help=argparse.SUPPRESS)
    for flag in ("--folder", "--toy"):
        command.add_argument(flag, type=Path, help=argparse.SUPPRESS)
    command.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    options = command.parse_args(arguments)
    if options.child:
        processes.report({"load": child_load, "train": child_train}[options.child](options))
        return
    timing.print_birthplace()
    run = {"dense": part_dense, "mapped": part_mapped, "train": part_train}
    table = []
    for part in options.part:
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            rows = run[part](Path(scratch), options)
        timing.print_table(f"Loading: {part}", rows)
        table += rows
    timing.write_csv(options.output / "load.csv", table)


if __name__ == "__main__":
    main()
