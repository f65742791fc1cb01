"""FSDP2, DDP and the optimizers over a decoder in plain torch, in any number of processes.

torchrun ... worker_shards.py FOLDER [CHECKPOINTS OF ANOTHER NUMBER OF PROCESSES]

Measures; process 0 writes FOLDER/shards.json. The tests judge.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from distributed import cases
from halfbyte.integrations.distributed import (
    load_checkpoint,
    local_bytes,
    save_checkpoint,
    shard_model,
)
from halfbyte.optim import AdamW8bit, AdamW32bit, NonFiniteGradient, PagedAdamW8bit

SHAPES = ([10, 100], [3, 300], [1000], [1], [2, 0])
KINDS = {
    "8bit": lambda params: AdamW8bit(params, lr=1e-2, min_8bit_size=0),
    "moments": lambda params: AdamW8bit(params, lr=1e-2, min_8bit_size=0, state="moments"),
    "32bit": lambda params: AdamW32bit(params, lr=1e-2),
    "paged": lambda params: PagedAdamW8bit(params, lr=1e-2, min_8bit_size=0, page_bytes=4096),
}


def sharded():
    return shard_model(cases.decoder())


def sharding() -> dict:
    """Bytes a process holds, and the sizes of one layer's parts, before and after a step."""
    whole = local_bytes(cases.decoder())
    model = sharded()
    before = local_bytes(model)
    cases.loss_of(model, cases.mine(cases.batch())).backward()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    layer = model.blocks[0].up.base
    return {
        "whole": whole,
        "before": cases.gathered(before),
        "after": cases.gathered(local_bytes(model)),
        "sizes": {name: p.numel() for name, p in layer.named_parameters()},
        "parts": cases.gathered({n: p.to_local().numel() for n, p in layer.named_parameters()}),
    }


def parameters(mesh, dtype: torch.dtype) -> tuple[list, list]:
    """Sharded parameters, and ordinary ones with the same content as this process's parts."""
    generator = torch.Generator().manual_seed(7)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    params = [torch.nn.Parameter(distribute_tensor(t, mesh, [Shard(0)])) for t in tensors]
    return params, [torch.nn.Parameter(p.to_local().detach().clone()) for p in params]


def give_gradients(mesh, params, alone, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param, one in zip(params, alone, strict=True):
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = distribute_tensor(grad, mesh, [Shard(0)])
        one.grad = param.grad.to_local().clone()


def same_bits(params, alone) -> bool:
    return all(torch.equal(p.to_local(), one) for p, one in zip(params, alone, strict=True))


def exact_steps(mesh) -> dict[str, bool]:
    """Each process's part is stepped like a parameter of its own; a loaded optimizer goes on."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, make in KINDS.items():
            params, alone = parameters(mesh, dtype)
            optimizer, other = make(params), make(alone)
            for step in range(3):
                give_gradients(mesh, params, alone, step)
                optimizer.step()
                other.step()
            equal = same_bits(params, alone)
            loaded = make(params)
            loaded.load_state_dict(optimizer.state_dict())
            give_gradients(mesh, params, alone, 3)
            loaded.step()
            other.step()
            found[f"{name} {dtype}"] = equal and same_bits(params, alone)
    return {name: all(cases.gathered(same)) for name, same in found.items()}


def state_of_a_part(mesh) -> dict:
    """What the state dict says of a parameter whose parts differ in size."""
    params, alone = parameters(mesh, torch.float32)
    optimizer = KINDS["8bit"](params)
    give_gradients(mesh, params, alone, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    state = saved["state"][0]
    found = {
        "shards": saved["param_groups"][0]["shards"],
        "sharded": sorted(name for name, value in state.items() if isinstance(value, DTensor)),
        "shapes": {name: list(value.shape) for name, value in state.items()},
    }
    ordinary = KINDS["8bit"]([torch.nn.Parameter(torch.zeros(10, 100))])
    ordinary.param_groups[0]["params"][0].grad = torch.zeros(10, 100)
    ordinary.step()
    whole = ordinary.state_dict()
    try:
        KINDS["8bit"](params[:1]).load_state_dict(whole)
    except ValueError as error:
        found["refusal"] = str(error)
    return found


def nonfinite(mesh) -> dict:
    """An infinity in the last process's part: no process steps, each says so or counts."""
    found = {}
    for policy in ("raise", "skip"):
        params, alone = parameters(mesh, torch.float32)
        optimizer = AdamW8bit(params, on_nonfinite=policy)
        give_gradients(mesh, params, alone, 0)
        if dist.get_rank() == dist.get_world_size() - 1:
            params[0].grad.to_local()[0, 3] = float("inf")
        try:
            optimizer.step()
            said = f"skipped {optimizer.skipped_steps}"
        except NonFiniteGradient as error:
            said = str(error)
        found[policy] = cases.gathered([said, same_bits(params, alone)])
    return found


def checkpoints(folder: Path) -> dict[str, list[float]]:
    """Two steps, saved, two more."""
    found = {}
    for name in ("8bit", "32bit"):
        model = sharded()
        optimizer = KINDS[name](list(cases.named_trainable(model).values()))
        cases.train(model, optimizer, 2)
        save_checkpoint(folder / name, model, optimizer)
        found[name] = cases.train(model, optimizer, 2)
    return found


def from_others(folder: Path) -> dict:
    """Checkpoints of another number of processes."""
    model = sharded()
    params = list(cases.named_trainable(model).values())
    optimizer = KINDS["32bit"](params)
    load_checkpoint(folder / "32bit", model, optimizer)
    found = {"32bit": cases.train(model, optimizer, 2)}
    model = sharded()
    before = cases.values(model)
    optimizer = KINDS["8bit"](list(cases.named_trainable(model).values()))
    try:
        load_checkpoint(folder / "8bit", model, optimizer)
    except ValueError as error:
        found["refusal"] = str(error)
    found["unchanged"] = all(torch.equal(before[n], v) for n, v in cases.values(model).items())
    load_checkpoint(folder / "8bit", model)
    found["8bit adapter"] = cases.train(model, optimizer, 1)
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    reference = cases.reference(cases.decoder())
    found = {
        "ddp": cases.compare(DistributedDataParallel(cases.decoder()), reference),
        "reshard": cases.compare(shard_model(cases.decoder()), reference),
        "stay": cases.compare(
            shard_model(cases.decoder(), mesh, reshard_after_forward=False), reference
        ),
        "sharding": sharding(),
        "exact": exact_steps(mesh),
        "state": state_of_a_part(mesh),
        "nonfinite": nonfinite(mesh),
        "losses": checkpoints(folder),
    }
    if len(sys.argv) > 2:
        found["from others"] = from_others(Path(sys.argv[2]))
    if dist.get_rank() == 0:
        (folder / "shards.json").write_text(json.dumps(found, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
