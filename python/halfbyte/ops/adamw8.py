"""One native AdamW step over many tensors (maths and formats: C++ header `adamw8_format.h`).

State of a parameter with n elements, blocks = ceil(n / 256):

    encoding     exp_avg                 exp_avg_sq             exp_avg_absmax, exp_avg_sq_absmax
    "ratio"      uint8 m / sqrt(v)       uint8 sqrt(v)          float32 [blocks]
    "moments"    uint8 m                 uint8 v                float32 [blocks]
    "float32"    float32 m               float32 v              (none)

exp_avg and exp_avg_sq have the parameter's shape, row-major; `step` is a float32 scalar.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from halfbyte._native import _C, thread_count

BLOCK = 256
ENCODINGS = ("ratio", "moments")
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


def state_layout(shape: torch.Size, encoding: str) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Name -> (dtype, shape) of a parameter's state tensors."""
    layout = {"step": (torch.float32, torch.Size([]))}
    if encoding == "float32":
        return layout | {name: (torch.float32, shape) for name in _MOMENTS}
    blocks = torch.Size([-(-shape.numel() // BLOCK)])
    layout |= {name: (torch.uint8, shape) for name in _MOMENTS}
    return layout | {name: (torch.float32, blocks) for name in _SCALES}


def new_state(shape: torch.Size, encoding: str) -> dict[str, torch.Tensor]:
    """State of a parameter before its first step: both moments zero."""
    state = {
        name: torch.zeros(size, dtype=dtype)
        for name, (dtype, size) in state_layout(shape, encoding).items()
    }
    if encoding != "float32":
        state["exp_avg"].fill_(_SIGNED_ZERO)
    return state


def state_problem(state: dict, layout: dict[str, tuple[torch.dtype, torch.Size]]) -> str:
    """What in `state` is not as `layout` says, or ""."""
    if not isinstance(state, dict) or not layout.keys() <= state.keys():
        got = sorted(state) if isinstance(state, dict) else type(state).__name__
        return f"expected {sorted(layout)}, got {got}"
    for name, (dtype, shape) in layout.items():
        value = state[name]
        if not isinstance(value, torch.Tensor):
            return f"{name}: expected a tensor, got {type(value).__name__}"
        if value.dtype != dtype or value.shape != shape:
            return f"{name}: expected {dtype} {list(shape)}, got {value.dtype} {list(value.shape)}"
    step = state["step"].item()
    return "" if 0 <= step < float("inf") else f"step: expected a count, got {step}"


def tensor_problem(param: torch.Tensor, grad: torch.Tensor) -> str:
    """Why this pair cannot be updated, or ""."""
    if param.dtype not in PARAM_DTYPES:
        return f"expected float32, bfloat16 or float16, got {param.dtype}"
    if param.layout is not torch.strided or grad.layout is not torch.strided:
        return f"expected dense parameter and gradient, got {param.layout} and {grad.layout}"
    if not (param.is_cpu and grad.is_cpu):
        return f"expected CPU tensors, got {param.device} and gradient on {grad.device}"
    if grad.dtype not in (param.dtype, torch.float32):
        return f"expected a gradient of {param.dtype} or float32, got {grad.dtype}"
    if grad.shape != param.shape:
        return f"expected a gradient of shape {list(param.shape)}, got {list(grad.shape)}"
    if not param.is_contiguous() and torch._debug_has_internal_overlap(param) == 1:
        return "several elements of the parameter share memory (an expanded tensor)"
    return ""


class StepTable:
    """The rows of a step for one fixed list of parameters and their state.

    State addresses are filled in once (the storages are kept alive here); parameters and gradients
    may move between steps.
    """

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        states: Sequence[dict[str, torch.Tensor]],
        groups: Sequence[int],
        encodings: Sequence[str],
    ):
        """Row i: `params[i]`, in hyperparameter group `groups[i]`, coded as `encodings[i]`."""
        self._params = list(params)
        self._param_ids = list(map(id, params))
        self._groups = list(groups)
        self._counts = list(map(_numel, params))
        self._dtypes = [param.dtype for param in params]
        self._grad_dtypes: list[torch.dtype] = []
        self._moments = [state["exp_avg"] for state in states]
        self._moment_ids = list(map(id, self._moments))
        self._storages = [
            value.untyped_storage()
            for state in states
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
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
        """Whether this table was made for these very tensors, unchanged in size and dtype.

        A state that was replaced shows in its exp_avg: looking at every tensor of every state costs
        a cache miss each.
        """
        return (
            list(map(id, params)) == self._param_ids
            and groups == self._groups
            and [id(state.get("exp_avg")) for state in states] == self._moment_ids
            and list(map(_numel, params)) == self._counts
            and [param.dtype for param in params] == self._dtypes
        )

    def takes(self, params: list[torch.Tensor], grads: list[torch.Tensor]) -> bool:
        """Whether the pairs can be handed over as they are. The usual case, so it is cheap: for the
        others `tensor_problem` and `run` look closer."""
        return (
            all([param.is_cpu for param in params])
            and all([grad.is_cpu for grad in grads])
            and all([grad.layout is torch.strided for grad in grads])
            and all(map(torch.Tensor.is_contiguous, params))
            and all(map(torch.Tensor.is_contiguous, grads))
            and not any(map(torch.Tensor.is_neg, grads))
            and list(map(_numel, grads)) == self._counts
            and [grad.dtype for grad in grads] == self._dtypes
        )

    def run(
        self,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        groups: list[tuple[float, float, float, float, float, bool]],
    ) -> tuple[int, int]:
        """Steps every row, for pairs that it `takes`.

        Returns (row, flat index) of the first non-finite gradient element, with nothing changed, or
        (-1, -1).
        """
        return self._run(params, grads, self._dtypes, groups)

    def _run(self, params, grads, grad_dtypes, groups) -> tuple[int, int]:
        self._set("param", map(_data_ptr, params))
        self._set("grad", map(_data_ptr, grads))
        if grad_dtypes != self._grad_dtypes:
            self._grad_dtypes = grad_dtypes
            self._set("grad_dtype", [_DTYPE_CODES[dtype] for dtype in grad_dtypes])
        return _C.adamw8_step(self._rows, groups, thread_count())

    def run_any(self, params, grads, groups) -> tuple[int, int]:
        """`run` for pairs of any strides and gradient dtype.

        Where a tensor is not contiguous: through a copy, which is written back.
        """
        dense = [param.detach().contiguous() for param in params]
        grads = [grad.resolve_neg().contiguous() for grad in grads]
        bad = self._run(dense, grads, [grad.dtype for grad in grads], groups)
        if bad[0] < 0:
            for param, result in zip(params, dense, strict=True):
                if not param.is_contiguous():
                    param.copy_(result)
        return bad
