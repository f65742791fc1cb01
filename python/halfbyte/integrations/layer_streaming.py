"""Layers of a mapped model brought from disk just before they are used, and let go just after.

    forward of layer i     ask for layer i + 1, compute i, let go of i
    backward of layer i    let go of layer i + 1, ask for i - 1, compute i

"Ask for" starts the reading of the layer's packed bytes without waiting (`MADV_WILLNEED`); "let go"
takes the pages out of the process (`MADV_DONTNEED`), after which they are page cache that the
system may drop at any time: the next use takes them from there or from the disk. So the process
holds two layers of packed weights at a time, whatever the size of the model; results are the same
to the bit.

Only whole pages of packed codes and of their scales are let go of. What a process wrote to them is
its own copy, which letting go would lose: a layer that was written to stays where it is.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from halfbyte.integrations.safetensors_files import mapping_of
from halfbyte.nn import NF4Linear


@dataclass
class LayerStream:
    """What `stream_layers` set up; `remove()` takes it away again.

    tensors  for each layer its mapped tensors, each with the count of writes it had
    ranges   for each layer its (mapping, first byte, length) of whole pages
    nbytes   for each layer the bytes of these
    """

    layers: nn.ModuleList
    tensors: list[list[tuple[torch.Tensor, int]]] = field(init=False)
    ranges: list[list[tuple[mmap.mmap, int, int]]] = field(init=False)
    handles: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        found = [_mapped_tensors(layer) for layer in self.layers]
        self.tensors = [[(tensor, tensor._version) for tensor in tensors] for tensors in found]
        self.ranges = [_whole_pages(tensors) for tensors in found]

    @property
    def nbytes(self) -> list[int]:
        return [sum(length for *_, length in ranges) for ranges in self.ranges]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def ask_for(self, index: int) -> None:
        self._advise(index, mmap.MADV_WILLNEED)

    def let_go(self, index: int) -> None:
        if 0 <= index < len(self.tensors):
            if all(tensor._version == writes for tensor, writes in self.tensors[index]):
                self._advise(index, mmap.MADV_DONTNEED)

    def _advise(self, index: int, advice: int) -> None:
        if 0 <= index < len(self.ranges):
            for mapping, start, length in self.ranges[index]:
                mapping.madvise(advice, start, length)

    def _before_forward(self, index: int) -> None:
        self.ask_for(index - 1 if _in_backward() else index + 1)

    def _after_forward(self, index: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        with_gradient = isinstance(hidden, torch.Tensor) and hidden.requires_grad
        if with_gradient:
            hidden.register_hook(lambda gradient: self._before_backward(index))
        # The last layer's backward comes next; a recomputed layer's does, too.
        if not _in_backward() and not (with_gradient and index == len(self.ranges) - 1):
            self.let_go(index)

    def _before_backward(self, index: int) -> None:
        self.let_go(index + 1)
        self.ask_for(index)
        self.ask_for(index - 1)


def stream_layers(model: nn.Module) -> LayerStream:
    """Streams the decoder layers of a model that `load_model` mapped, from the next forward on.

    The layers are the list of modules (`nn.ModuleList`) that holds most of the mapped bytes. Works
    under PEFT, with and without gradient checkpointing. ValueError where no packed weight is
    mapped, RuntimeError where the system has no madvise.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        raise RuntimeError("stream_layers: expected a system with madvise, got one without")
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    streams = [LayerStream(module) for module in lists]
    best = max(streams, key=lambda s: (sum(s.nbytes), len(s.layers)), default=None)
    if best is None or not sum(best.nbytes):
        raise ValueError(
            "model: expected layers whose packed weights are mapped, got none; load a packed "
            "folder with load_model(folder, mapped=True) and leave it on the CPU"
        )
    for index, layer in enumerate(best.layers):
        best.handles += [
            layer.register_forward_pre_hook(
                lambda module, args, index=index: best._before_forward(index)
            ),
            layer.register_forward_hook(
                lambda module, args, output, index=index: best._after_forward(index, output)
            ),
        ]
        best.let_go(index)
    return best


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _mapped_tensors(layer: nn.Module) -> list[torch.Tensor]:
    """Packed codes and scales of a layer that lie in a mapped file."""
    modules = [module for module in layer.modules() if isinstance(module, NF4Linear)]
    tensors = [tensor for module in modules for tensor in (module.weight, module.absmax)]
    return [tensor for tensor in tensors if mapping_of(tensor) is not None]


def _whole_pages(tensors: list[torch.Tensor]) -> list[tuple[mmap.mmap, int, int]]:
    """The pages that `tensors` fill; neighbours in a file are taken together."""
    spans: list[list[Any]] = []
    places = [(*mapping_of(tensor), tensor.numel() * tensor.element_size()) for tensor in tensors]
    for mapping, start, size in sorted(places, key=lambda place: (id(place[0]), place[1])):
        if spans and spans[-1][0] is mapping and spans[-1][2] == start:
            spans[-1][2] = start + size
        else:
            spans.append([mapping, start, start + size])
    page = mmap.PAGESIZE
    pages = [
        (mapping, -(-start // page) * page, end // page * page) for mapping, start, end in spans
    ]
    return [(mapping, first, end - first) for mapping, first, end in pages if end > first]
