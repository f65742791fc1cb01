"""A 4-bit model in several processes: FSDP2, checkpoints in parts, one adapter at the end.

Data parallel (DDP, or accelerate's default) needs nothing from here: packed weights are frozen
integer Parameters, which DDP leaves alone. FSDP2 cuts every Parameter into a part a process along
its first dimension, and gathers a decoder layer's parts while that layer runs:

    model = peft.get_peft_model(halfbyte.quantize_(model), lora_config)
    shard_model(model)                            # after LoRA, before the optimizer
    optimizer = halfbyte.optim.AdamW8bit(trainable, lr=2e-4)
    ...
    save_checkpoint("step-100", model, optimizer)     # every process writes its parts
    load_checkpoint("step-100", model, optimizer)     # in as many processes, or others
    save_adapter(model, "adapter")                    # PEFT's files, whole, by process 0

Bytes a process holds of a packed layer: about 1 / processes of `NF4Weight.nbytes`, as codes
[N K / 2, 1] and statistics are all cut by rows; what does not divide leaves later parts shorter or
empty.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

Folder = str | os.PathLike


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    layers: Iterable[nn.Module] | None = None,
    **options: Any,
) -> nn.Module:
    """FSDP2 over `model`, in place: a unit for each decoder layer, and one for the rest.

    `mesh`: the processes; None: all of them. `layers`: the modules that are gathered one at a time;
    None: those a transformers model must not split, else the members of its outermost module
    lists. `options` go to `torch.distributed.fsdp.fully_shard` (`mp_policy`,
    `reshard_after_forward`, `offload_policy`). Returns `model`.

    Raises ValueError where no layers are found, or where a unit's trainable parameters differ in
    dtype: their gradients travel together.
    """
    layers = _decoder_layers(model) if layers is None else list(layers)
    if not layers:
        raise ValueError(
            f"model: expected decoder layers in {type(model).__name__}, found none; "
            "pass layers=[...], the modules to gather one at a time"
        )
    for unit in (*layers, model):
        _check_dtypes(unit, model)
    for layer in layers:
        fully_shard(layer, mesh=mesh, **options)
    # The rest is needed from the first layer to the last: by default it stays together meanwhile.
    fully_shard(model, mesh=mesh, **options)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")
    return model


def local_bytes(model: nn.Module) -> int:
    """Bytes of parameters that this process holds while nothing is gathered."""
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(part.numel() * part.element_size() for part in parts)


def save_checkpoint(
    folder: Folder, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Writes what trains, and the optimizer's state, with torch.distributed.checkpoint.

    `model`: sharded, wrapped in DDP, or whole in each process. All processes call; each writes its
    parts. Frozen weights are not written: they come from the base.
    """
    dcp.save(_state(model, optimizer), checkpoint_id=Path(folder))


def load_checkpoint(
    folder: Folder, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Loads what `save_checkpoint` wrote, in place; all processes call.

    Parameters and fp32 optimizer state load into any number of processes. 8-bit state loads into
    as many shards as it was written from, because its blocks are cut where they were: otherwise
    ValueError, before anything is changed; without `optimizer` the parameters load.
    """
    state = _state(model, optimizer)
    _check_sizes(folder, state)
    dcp.load(state, checkpoint_id=Path(folder))
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])


def save_adapter(model: nn.Module, folder: Folder) -> None:
    """Writes a PEFT model's adapter whole: adapter_config.json and adapter_model.safetensors.

    All processes call and gather, one tensor at a time; process 0 writes.
    """
    state = {}
    first = not dist.is_initialized() or dist.get_rank() == 0
    for name, parameter in _trainable(model).items():
        tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if first:
            state[name] = tensor.detach().cpu()
    if first:
        _unwrapped(model).save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    if dist.is_initialized():
        dist.barrier()


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    names: set[str] = set()
    for module in model.modules():
        names |= set(getattr(module, "_no_split_modules", None) or ())
    named = [module for module in model.modules() if type(module).__name__ in names]
    return named or _list_members(model)


def _list_members(model: nn.Module) -> list[nn.Module]:
    members: list[nn.Module] = []
    for child in model.children():
        members += child.children() if isinstance(child, nn.ModuleList) else _list_members(child)
    return members


def _check_dtypes(unit: nn.Module, model: nn.Module) -> None:
    trainable = {n: p.dtype for n, p in unit.named_parameters() if p.requires_grad}
    if len(set(trainable.values())) > 1:
        first = next(iter(trainable))
        other = next(name for name, dtype in trainable.items() if dtype != trainable[first])
        raise ValueError(
            f"model: expected trainable parameters of one dtype in {type(unit).__name__}, got "
            f"{trainable[first]} ({first}) and {trainable[other]} ({other})"
        )


def _unwrapped(model: nn.Module) -> Any:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in _unwrapped(model).named_parameters() if p.requires_grad}


def _state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """What a checkpoint holds; the tensors are the model's own, so that loading fills them."""
    for module in _unwrapped(model).modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    state: dict[str, Any] = {"model": {n: p.detach() for n, p in _trainable(model).items()}}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    return state


def _check_sizes(folder: Folder, state: Mapping[str, Any]) -> None:
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for key, tensor in _tensors(state, ""):
        size = getattr(stored.get(key), "size", None)
        if size is None:
            raise ValueError(f"{folder}: expected an entry {key}, found none")
        if size != tensor.shape:
            reason = ""
            if key.endswith("_absmax"):
                reason = (
                    ": 8-bit optimizer state loads into as many shards as it was written from; "
                    "load the model alone, or use AdamW32bit"
                )
            raise ValueError(
                f"{folder}: {key}: expected {list(tensor.shape)}, found {list(size)}{reason}"
            )


def _tensors(value: Any, key: str) -> Iterable[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _tensors(item, f"{key}.{name}" if key else str(name))
