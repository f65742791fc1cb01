"""DDP and FSDP2 over a tiny 4-bit Llama with LoRA, beside one process on the whole batch.

torchrun ... worker_training.py FOLDER

Measures; process 0 writes FOLDER/training.json. The tests judge.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from distributed import cases, llama
from halfbyte.integrations.distributed import (
    load_checkpoint,
    local_bytes,
    save_adapter,
    save_checkpoint,
    shard_model,
)
from halfbyte.optim import AdamW8bit, AdamW32bit

MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def sharded(dtype: torch.dtype = torch.float32, **options):
    return shard_model(llama.build(dtype), **options)


def dtypes_in_forward() -> dict[str, str]:
    """Under bf16 compute: what a layer sees of its parameters."""
    model, seen = sharded(mp_policy=MIXED), {}
    lora = model.base_model.model.model.layers[0].mlp.up_proj
    lora.register_forward_pre_hook(
        lambda module, _: seen.update({n: str(p.dtype) for n, p in module.named_parameters()})
    )
    cases.loss_of(model, cases.mine(cases.batch()))
    return seen


def trainable(model) -> list:
    return list(cases.named_trainable(model).values())


def optimizers(folder: Path) -> dict[str, list[float]]:
    """Losses of sharded training beside one process's; saved and resumed; the adapter, whole."""
    found = {}
    for kind, options in ((AdamW32bit, {}), (AdamW8bit, {"min_8bit_size": 0})):
        name, options = kind.__name__, {"lr": 1e-2, **options}
        model = sharded()
        optimizer = kind(trainable(model), **options)
        losses = cases.train(model, optimizer, 2)
        save_checkpoint(folder / name, model, optimizer)
        found[f"{name} sharded"] = losses + cases.train(model, optimizer, 2)
        resumed = sharded()
        optimizer = kind(trainable(resumed), **options)
        cases.train(resumed, optimizer, 1)  # somewhere else before loading
        load_checkpoint(folder / name, resumed, optimizer)
        found[f"{name} resumed"] = cases.train(resumed, optimizer, 2)
    save_adapter(model, folder / "adapter")
    values = cases.values(model)
    ddp = DistributedDataParallel(llama.build())
    optimizer = AdamW8bit(trainable(ddp), lr=1e-2, min_8bit_size=0)
    losses = cases.train(ddp, optimizer, 2)
    save_checkpoint(folder / "ddp", ddp, optimizer)
    found["ddp"] = losses + cases.train(ddp, optimizer, 2)
    if dist.get_rank() == 0:
        torch.save(values, folder / "adapter.pt")
    return found


def state_dicts() -> dict:
    """torch's own functions for state dicts of sharded models, packed weights included."""
    model, other = sharded(), sharded()
    state = get_model_state_dict(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    set_model_state_dict(other, state)
    same = all(
        torch.equal(a.to_local(), b.to_local())
        for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    names = {key.rpartition(".")[2] for key in state if "up_proj.base_layer" in key}
    return {"same": all(cases.gathered(same)), "names": sorted(names)}


def accelerator_with_fsdp2(efficient: bool) -> Accelerator:
    """accelerate 1.15 shards on accelerators only and falls back to DDP on the CPU, so its verdict
    on the kind of run is set here by hand; all that follows is accelerate's own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=efficient,
        reshard_after_forward=True,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    for state in (PartialState._shared_state, AcceleratorState._shared_state):
        state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return accelerator


def accelerated(folder: Path, efficient: bool, expected) -> dict:
    """Through `Accelerator.prepare`; with `efficient`, only process 0 has the weights."""
    accelerator = accelerator_with_fsdp2(efficient)

    def prepare():
        model = llama.build()
        if efficient and dist.get_rank() > 0:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
        optimizer = AdamW8bit(trainable(model), lr=1e-2, min_8bit_size=0)
        return accelerator.prepare(model, optimizer)

    model, optimizer = prepare()
    found = cases.compare(model, expected) | {"bytes": cases.gathered(local_bytes(model))}
    optimizer.zero_grad()
    losses = cases.train(model, optimizer, 2)
    accelerator.save_state(str(folder / f"accelerate-{efficient}"))
    found["losses"] = losses + cases.train(model, optimizer, 2)
    accelerator.free_memory()
    model, optimizer = prepare()
    accelerator.load_state(str(folder / f"accelerate-{efficient}"))
    found["resumed"] = cases.train(model, optimizer, 2)
    accelerator.free_memory()
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    fp32 = cases.reference(llama.build())
    bf16 = cases.reference(llama.in_bf16(), dist.get_world_size())
    found = {
        "ddp": cases.compare(DistributedDataParallel(llama.build()), fp32),
        "reshard": cases.compare(sharded(reshard_after_forward=True), fp32),
        "stay": cases.compare(sharded(reshard_after_forward=False), fp32),
        "mixed": cases.compare(sharded(mp_policy=MIXED), bf16),
        "bf16 adapter": cases.compare(sharded(torch.bfloat16, mp_policy=MIXED), bf16),
        "dtypes": dtypes_in_forward(),
        "optimizers": optimizers(folder),
        "state dicts": state_dicts(),
        "accelerate": accelerated(folder, False, fp32),
        "accelerate, process 0 loads": accelerated(folder, True, fp32),
        "whole": local_bytes(llama.build()),
    }
    if dist.get_rank() == 0:
        (folder / "training.json").write_text(json.dumps(found, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
