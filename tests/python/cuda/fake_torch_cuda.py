"""torch's CUDA side without a card, for the Python layer over the fake runtime.

`OnCuda` is a CPU tensor that says it lies on a CUDA device; what torch computes from it says so
too. Its memory comes from one pool, which is device memory to the fake runtime. Streams and events
only note that they were used. So the Python layer's decisions and its calls into the CUDA library
are tested, and torch's own CUDA is not.
"""

from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_map

from halfbyte.ops import adamw8_shards

POOL = torch.zeros(64 << 20, dtype=torch.uint8)
ALIGNMENT = 512  # as torch's allocator
EMPTY, FULL = torch.empty, torch.full


class Pool:
    """Hands out memory of `POOL` from front to back; `reset` between tests."""

    used = 0

    @classmethod
    def reset(cls) -> None:
        cls.used = 0

    @staticmethod
    def holds(tensor: torch.Tensor) -> bool:
        start = POOL.data_ptr()
        return start <= torch.Tensor.data_ptr(tensor) < start + POOL.numel()

    @classmethod
    def copy(cls, tensor: torch.Tensor, index: int) -> "OnCuda":
        size = tensor.numel() * tensor.element_size()
        start = cls.used
        cls.used += -(-size // ALIGNMENT) * ALIGNMENT
        assert cls.used <= POOL.numel(), "the pool is too small"
        room = POOL[start : start + size].view(tensor.dtype).view(tensor.shape)
        with torch._C.DisableTorchFunctionSubclass():
            room.copy_(tensor.detach())
        return on_device(room, index)


class OnCuda(torch.Tensor):
    """A tensor in the pool."""

    index = 0
    is_cpu = False
    is_cuda = True

    @property
    def device(self):
        return torch.device("cuda", self.index)

    def get_device(self):
        return self.index

    def to(self, *args, **options):
        """Stays where it is when sent to a CUDA device."""
        kept = [a for a in args if torch.device("cuda", 0).type not in str(a)]
        return super().to(*kept, **options) if kept or options else self

    @classmethod
    def __torch_function__(cls, function, types, args=(), options=None):
        places = [a.index for a in args if isinstance(a, OnCuda)]
        index = places[0] if places else 0
        result = super().__torch_function__(function, types, args, options or {})

        def placed(value):
            if type(value) is not OnCuda or "index" in value.__dict__:
                return value
            if value.numel() and not Pool.holds(value):
                return Pool.copy(value, index)
            value.index = index
            return value

        with torch._C.DisableTorchFunctionSubclass():
            return tree_map(placed, result, is_leaf=lambda value: isinstance(value, torch.Size))


def on_device(tensor: torch.Tensor, index: int) -> OnCuda:
    """The same memory, said to lie on CUDA device `index`."""
    made = tensor.as_subclass(OnCuda)
    made.__dict__["index"] = index
    return made


def _factory(original):
    def make(*args, device=None, pin_memory=False, **options):
        device = torch.device(device) if device is not None else torch.device("cpu")
        made = original(*args, **options)
        return Pool.copy(made, device.index or 0) if device.type == "cuda" else made

    return make


def install(monkeypatch, stream: int) -> SimpleNamespace:
    """Patches torch for one test; returns what it notes: `waits`, and `capturing` to set."""
    notes = SimpleNamespace(waits=[], capturing=False, stream=stream)
    current = SimpleNamespace(cuda_stream=stream)

    class Event:
        def record(self, stream):
            assert not notes.capturing and stream is current
            self.recorded = True

        def synchronize(self):
            assert not notes.capturing and self.recorded
            notes.waits.append("event")

    monkeypatch.setattr(adamw8_shards, "_PLAIN", adamw8_shards._PLAIN | {OnCuda})
    monkeypatch.setattr(torch, "empty", _factory(EMPTY))
    monkeypatch.setattr(torch, "full", _factory(FULL))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: notes.capturing)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: notes.waits.append(str(device)))
    return notes
