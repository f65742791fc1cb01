"""One native AdamW step over many tensors (maths and formats: C++ header `adamw8_format.h`).

State of a parameter with n elements, blocks = ceil(n / 256):

    encoding     exp_avg                 exp_avg_sq             exp_avg_absmax, exp_avg_sq_absmax
    "ratio"      uint8 m / sqrt(v)       uint8 sqrt(v)          float32 [blocks]
    "moments"    uint8 m                 uint8 v                float32 [blocks]
    "float32"    float32 m               float32 v              (none)

exp_avg and exp_avg_sq have the parameter's shape, row-major; `step` is a float32 scalar. All lie on
the parameter's device, or in its pageable memory (`halfbyte.paging`).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from operator import is_

import torch

from halfbyte._native import _C, stream_of, thread_count

BLOCK = 256
PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SIGNED_ZERO = 127  # code of 0 in the signed map

_COLUMNS = {name: i for i, name in enumerate(_C.adamw8_columns)}
_WIDTH = len(_COLUMNS)
_DTYPE_CODES = {
    torch.float32: int(_C.DType.float32),
    torch.bfloat16: int(_C.DType.bfloat16),
    torch.float16: int(_C.DType.float16),
}
_STATE_CODES = {
    "float32": int(_C.AdamW8State.float32),
    "moments": int(_C.AdamW8State.moments),
    "ratio": int(_C.AdamW8State.ratio),
}
_MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALES = ("exp_avg_absmax", "exp_avg_sq_absmax")
_data_ptr = torch.Tensor.data_ptr
_numel = torch.Tensor.numel
_is_contiguous = torch.Tensor.is_contiguous
_STRIDED = torch.strided
_END = object()

Layout = Mapping[str, tuple[torch.dtype, torch.Size]]
Groups = list[tuple[float, float, float, float, float, bool]]
FINITE = (-1, -1)


def state_layout(shape: torch.Size, encoding: str) -> Layout:
    """Name -> (dtype, shape) of a parameter's state tensors."""
    layout = {"step": (torch.float32, torch.Size([]))}
    if encoding == "float32":
        return layout | {name: (torch.float32, shape) for name in _MOMENTS}
    blocks = torch.Size([-(-shape.numel() // BLOCK)])
    layout |= {name: (torch.uint8, shape) for name in _MOMENTS}
    return layout | {name: (torch.float32, blocks) for name in _SCALES}


def allocate(layouts: Sequence[Layout], device: torch.device) -> list[dict[str, torch.Tensor]]:
    """State tensors of unknown content for each layout, in `device`'s ordinary memory."""
    return [
        {
            name: torch.empty(size, dtype=dtype, device=device)
            for name, (dtype, size) in each.items()
        }
        for each in layouts
    ]


def holds(state: Mapping[str, torch.Tensor], device: torch.device) -> bool:
    """Whether `state` lies where `allocate` would put it."""
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    return all(value.device == device and value.is_contiguous() for value in tensors)


def clear(state: dict[str, torch.Tensor]) -> None:
    """State of a parameter before its first step: both moments zero."""
    for value in state.values():
        value.zero_()
    if is_coded(state):
        state["exp_avg"].fill_(_SIGNED_ZERO)


def is_coded(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether the moments are 8-bit codes."""
    return state["exp_avg"].dtype == torch.uint8


def state_problem(state: dict, layout: Layout) -> str:
    """What in `state` is not as `layout` says, or "". Does not wait for a device."""
    if not isinstance(state, dict) or not layout.keys() <= state.keys():
        got = sorted(state) if isinstance(state, dict) else type(state).__name__
        return f"expected {sorted(layout)}, got {got}"
    for name, (dtype, shape) in layout.items():
        value = state[name]
        if not isinstance(value, torch.Tensor):
            return f"{name}: expected a tensor, got {type(value).__name__}"
        if value.dtype != dtype or value.shape != shape:
            return f"{name}: expected {dtype} {list(shape)}, got {value.dtype} {list(value.shape)}"
    return step_problem(state["step"]) if state["step"].is_cpu else ""


def step_problem(step: torch.Tensor) -> str:
    """Why `step` is no count, or ""."""
    count = step.item()
    return "" if 0 <= count < math.inf else f"step: expected a count, got {count}"


def scale_problem(state: Mapping[str, torch.Tensor]) -> str:
    """Why the scales of 8-bit moments decode to no numbers, or "". Waits for a device."""
    for name in _SCALES:
        if name in state and not torch.isfinite(state[name]).all():
            return f"{name}: expected finite scales, got an infinity or a NaN"
    return ""


def tensor_problem(param: torch.Tensor, grad: torch.Tensor) -> str:
    """Why this pair cannot be updated, or ""."""
    if param.dtype not in PARAM_DTYPES:
        return f"expected float32, bfloat16 or float16, got {param.dtype}"
    if param.layout is not torch.strided or grad.layout is not torch.strided:
        return f"expected dense parameter and gradient, got {param.layout} and {grad.layout}"
    if param.device.type not in ("cpu", "cuda") or grad.device != param.device:
        return (
            "expected parameter and gradient together on the CPU or a CUDA device, "
            f"got {param.device} and gradient on {grad.device}"
        )
    if grad.dtype not in (param.dtype, torch.float32):
        return f"expected a gradient of {param.dtype} or float32, got {grad.dtype}"
    if grad.shape != param.shape:
        return f"expected a gradient of shape {list(param.shape)}, got {list(grad.shape)}"
    if not param.is_contiguous() and torch._debug_has_internal_overlap(param) == 1:
        return "several elements of the parameter share memory (an expanded tensor)"
    return ""


def first_nonfinite(grads: Sequence[torch.Tensor]) -> tuple[int, int]:
    """(row, flat index) of the first non-finite element of gradients on any devices, or FINITE.
    Waits for the devices."""
    filled = [grad for grad in grads if grad.numel()]
    if not filled or math.isfinite(torch.nn.utils.get_total_norm(filled, math.inf).item()):
        return FINITE
    for row, grad in enumerate(grads):
        bad = torch.isfinite(grad).logical_not().flatten()
        if bad.any():
            return row, int(bad.byte().argmax())
    return FINITE


class Verdict:
    """Where a step on CUDA says which gradient element was not finite, without anyone waiting.

    `bad` is the word the step writes; it is copied to pinned memory behind the step, and whoever
    wants to know waits for that copy only.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.bad = torch.full((1,), -1, dtype=torch.int64, device=device)
        self._host = torch.full((1,), -1, dtype=torch.int64, pin_memory=True)
        self._event = torch.cuda.Event()
        self.captured = False

    def follow(self) -> None:
        """Enqueues the copy on the current stream. In a CUDA graph every replay makes it anew."""
        self._host.copy_(self.bad, non_blocking=True)
        if torch.cuda.is_current_stream_capturing():
            self.captured = True
        else:
            self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> tuple[int, int]:
        """(row, flat index) that the last step found, or FINITE; told once."""
        if self.captured:
            torch.cuda.synchronize(self._device)
        else:
            self._event.synchronize()
        word = int(self._host)
        self._host.fill_(-1)
        return FINITE if word < 0 else (word >> 40, word & ((1 << 40) - 1))


class StepTable:
    """The rows of a step for one fixed list of parameters on one device, and their state.

    State addresses are filled in once (the storages are kept alive here); parameters and gradients
    may move between steps, on the device.
    """

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        states: Sequence[dict[str, torch.Tensor]],
        groups: Sequence[int],
        encodings: Sequence[str],
        memory=None,
    ):
        """Row i: `params[i]`, in hyperparameter group `groups[i]`, coded as `encodings[i]`.

        `memory` is the `halfbyte.paging.PagedMemory` that the state lies in, if any.
        """
        self.params = list(params)
        self.groups = list(groups)
        self.device = params[0].device
        self.verdict = Verdict(self.device) if self.device.type == "cuda" else None
        self._index = -1 if self.device.index is None else self.device.index
        self._counts = list(map(_numel, params))
        self._dtypes = [param.dtype for param in params]
        self._grad_dtypes: list[torch.dtype] = []
        self._state_values = [*_values(states), _END]
        self._storages = [
            value.untyped_storage()
            for value in self._state_values
            if isinstance(value, torch.Tensor)
        ]
        self._memory = memory
        self._pages = memory.pages(states) if memory is not None else []
        self._rows = array("q", bytes(8 * _WIDTH * len(params)))
        self._set("count", self._counts)
        self._set("param_dtype", [_DTYPE_CODES[dtype] for dtype in self._dtypes])
        self._set("state", [_STATE_CODES[encoding] for encoding in encodings])
        self._set("group", groups)
        for name in ("step", *_MOMENTS, *_SCALES):
            self._set(name, [state[name].data_ptr() if name in state else 0 for state in states])

    def _set(self, column: str, values) -> None:
        self._rows[_COLUMNS[column] :: _WIDTH] = array("q", values)

    def holds(
        self,
        params: list[torch.Tensor],
        states: list[dict[str, torch.Tensor]],
        groups: list[int],
    ) -> bool:
        """Whether this table was made for these very tensors, unchanged in size, dtype and
        device."""
        return (
            len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and groups == self.groups
            and all(map(is_, chain(_values(states), (_END,)), self._state_values))
            and self._here(params)
            and list(map(_numel, params)) == self._counts
            and [param.dtype for param in params] == self._dtypes
        )

    def _here(self, tensors: list[torch.Tensor]) -> bool:
        if self._index < 0:
            return all([tensor.is_cpu for tensor in tensors])
        return all([tensor.get_device() == self._index for tensor in tensors])

    def takes(self, params: list[torch.Tensor], grads: list[torch.Tensor]) -> bool:
        """Whether the pairs can be handed over as they are. The usual case, so it is cheap: for the
        others `tensor_problem` and `run_any` look closer."""
        return (
            self._here(grads)
            and all([grad.layout is _STRIDED for grad in grads])
            and all(map(_is_contiguous, params))
            and all(map(_is_contiguous, grads))
            and not any(map(torch.Tensor.is_neg, grads))
            and list(map(_numel, grads)) == self._counts
            and [grad.dtype for grad in grads] == self._dtypes
        )

    def run(
        self, params: list[torch.Tensor], grads: list[torch.Tensor], groups: Groups
    ) -> tuple[int, int]:
        """Steps every row, for pairs that it `takes`.

        Returns (row, flat index) of the first non-finite gradient element, with nothing changed, or
        FINITE. On CUDA nothing waits and the answer is always FINITE: `verdict` will know.
        """
        return self._run(params, grads, self._dtypes, groups)

    def _run(self, params, grads, grad_dtypes, groups) -> tuple[int, int]:
        self._set("param", map(_data_ptr, params))
        self._set("grad", map(_data_ptr, grads))
        if grad_dtypes != self._grad_dtypes:
            self._grad_dtypes = grad_dtypes
            self._set("grad_dtype", [_DTYPE_CODES[dtype] for dtype in grad_dtypes])
        if self.verdict is not None:
            return self._run_cuda(self.verdict, groups)
        if len(self._pages) > 1:
            return self._run_pages(grads, groups)
        return _C.adamw8_step(self._rows, groups, thread_count())

    def _run_cuda(self, verdict: Verdict, groups: Groups) -> tuple[int, int]:
        bad = verdict.bad
        stream = stream_of(bad)
        if self._memory is None:
            _C.adamw8_step(self._rows, groups, 1, self._index, stream, bad)
        else:
            pages = [(p.arena, p.begin, p.end, p.first, p.count) for p in self._pages]
            ahead, evict = self._memory.look_ahead, self._memory.evict
            _C.adamw8_paged_step(self._rows, groups, pages, ahead, evict, self._index, stream, bad)
        verdict.follow()
        return FINITE

    def _run_pages(self, grads, groups: Groups) -> tuple[int, int]:
        """On the CPU, page by page, so that no more than a few pages need to be in memory."""
        bad = first_nonfinite(grads)
        if bad != FINITE:
            return bad
        rows, coming = memoryview(self._rows), iter(self._pages)
        for ahead in islice(coming, self._memory.look_ahead):
            ahead.arena.fetch(ahead.begin, ahead.end)
        for page in self._pages:
            for ahead in islice(coming, 1):
                ahead.arena.fetch(ahead.begin, ahead.end)
            part = rows[page.first * _WIDTH : (page.first + page.count) * _WIDTH]
            _C.adamw8_step(part, groups, thread_count())
            if self._memory.evict:
                page.arena.evict(page.begin, page.end)
        return FINITE

    def run_any(self, params, grads, groups: Groups) -> tuple[int, int]:
        """`run` for pairs of any strides and gradient dtype.

        Where a tensor is not contiguous: through a copy, which is written back.
        """
        dense = [param.detach().contiguous() for param in params]
        grads = [grad.resolve_neg().contiguous() for grad in grads]
        bad = self._run(dense, grads, [grad.dtype for grad in grads], groups)
        if bad == FINITE:
            for param, result in zip(params, dense, strict=True):
                if not param.is_contiguous():
                    param.copy_(result)
        return bad


def _values(states: Sequence[dict[str, torch.Tensor]]):
    return chain.from_iterable(map(dict.values, states))
