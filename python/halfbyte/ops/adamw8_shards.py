"""AdamW's state where parameters are sharded (torch's DTensor, as FSDP2 makes them).

AdamW is elementwise, so each process steps its own shard like a parameter of its own; blocks of 256
start anew in every shard. Between processes a state tensor is a DTensor over the same mesh:

    exp_avg, exp_avg_sq                  the parameter's shape and placements
    exp_avg_absmax, exp_avg_sq_absmax    [shards * b], b a shard; b = blocks of the largest shard,
                                         a smaller shard's last scales are zeros that mean nothing
    step                                 an ordinary scalar, equal everywhere

which torch.distributed.checkpoint stores and loads. fp32 moments fit any other number of shards;
8-bit ones belong to the shards they were made for, because their blocks do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch.nn import Parameter

from halfbyte.ops.adamw8 import BLOCK

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_PLAIN = {torch.Tensor, Parameter}


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor, the same object each time; others as they are."""
    # to_local() makes a new view of a parameter at each call, and steps compare identities.
    return getattr(tensor, "_local_tensor", tensor)


def locals_of(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """`local` of each; the list itself where nothing is sharded."""
    return tensors if set(map(type, tensors)) <= _PLAIN else list(map(local, tensors))


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "_local_tensor")


def count(param: torch.Tensor) -> int:
    """Number of shards of a parameter; 1 for one that is whole in every process."""
    if not is_sharded(param):
        return 1
    sizes = zip(param.placements, param.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if placement.is_shard())


def anyone(flag: bool, params: Iterable[torch.Tensor]) -> bool:
    """Whether `flag` is set in any process that holds a part of these sharded parameters."""
    import torch.distributed as dist

    for mesh in {param.device_mesh for param in params if is_sharded(param)}:
        word = torch.tensor([int(flag)], device=mesh.device_type)
        for dim in range(mesh.ndim):
            dist.all_reduce(word, dist.ReduceOp.MAX, group=mesh.get_group(dim))
        flag = bool(word.item())
    return flag


def whole(state: Mapping[str, Any], param: DTensor) -> dict[str, Any]:
    """The state of `param`'s shard as DTensors; shares memory except for padded scales."""
    from torch.distributed.tensor import DTensor, Shard

    mesh = param.device_mesh
    first = [Shard(0) if each.is_shard() else each for each in param.placements]
    blocks = _largest_blocks(param)

    def wrap(name: str, value: torch.Tensor):
        if name == "step":
            return value
        if not name.endswith("_absmax"):
            return DTensor.from_local(
                value, mesh, param.placements, run_check=False,
                shape=param.shape, stride=param.stride(),
            )  # fmt: skip
        if value.numel() != blocks:
            value = torch.nn.functional.pad(value, (0, blocks - value.numel()))
        return DTensor.from_local(
            value,
            mesh,
            first,
            run_check=False,
            shape=torch.Size((blocks * count(param),)),
            stride=(1,),
        )

    return {name: wrap(name, value) for name, value in state.items()}


def part(saved: Any, layout: Mapping[str, tuple[torch.dtype, torch.Size]]) -> Any:
    """This process's part of a state that `whole` made, in the sizes of `layout`."""
    if not isinstance(saved, Mapping):
        return saved

    def unwrap(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not is_sharded(value):
            return value
        value = value._local_tensor
        wanted = layout[name][1] if name in layout else value.shape
        padded = name.endswith("_absmax") and value.numel() > wanted.numel()
        return value[: wanted.numel()] if padded else value

    return {name: unwrap(name, value) for name, value in saved.items()}


def whole_state_dict(
    state_dict: dict[str, Any], groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """An optimizer's state dict with the state of sharded parameters as DTensors.

    A group with sharded parameters says in how many parts they lie, as `shards`.
    """
    params = [param for group in groups for param in group["params"]]
    if not any(map(is_sharded, params)):
        return state_dict
    state = {
        key: whole(value, params[key]) if is_sharded(params[key]) else value
        for key, value in state_dict["state"].items()
    }
    saved_groups = [
        {**saved, "shards": max(map(count, group["params"]), default=1)}
        for saved, group in zip(state_dict["param_groups"], groups, strict=True)
    ]
    return {**state_dict, "state": state, "param_groups": saved_groups}


def _largest_blocks(param: DTensor) -> int:
    """Blocks of the largest shard: the first, as shards are cut."""
    size = list(param.shape)
    for placement, parts in zip(param.placements, param.device_mesh.shape, strict=True):
        if placement.is_shard():
            dim: int = placement.dim  # type: ignore[attr-defined]  # a Shard has it
            size[dim] = -(-size[dim] // parts)
    return -(-math.prod(size) // BLOCK)
