"""Tensors of an AdamW step on the device, and the same step on the CPU."""

from dataclasses import dataclass, field

import torch

import cuda_api as api
from formats import same_bits

BLOCK = 256
SIGNED_ZERO = 127  # code of 0 in the signed map
NAMES = ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")


@dataclass
class Case:
    """One parameter: its values, its state as the CPU optimizer names it, its group."""

    param: torch.Tensor
    encoding: str
    state: dict[str, torch.Tensor]
    grad: torch.Tensor | None = None
    group: int = 0
    device: dict[str, torch.Tensor] = field(default_factory=dict)


def new_case(count, encoding="ratio", dtype=torch.float32, seed=0, group=0, step=0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    param = torch.randn(count, generator=generator).to(dtype)
    state = {"step": torch.full((1,), float(step))}
    if encoding == "float32":
        state |= {name: torch.zeros(count) for name in NAMES[:2]}
    else:
        state |= {name: torch.zeros(count, dtype=torch.uint8) for name in NAMES[:2]}
        state |= {name: torch.zeros(-(-count // BLOCK)) for name in NAMES[2:]}
        state["exp_avg"].fill_(SIGNED_ZERO)
    return Case(param, encoding, state, group=group)


def random_gradient(count, seed, sigma=2.0, dtype=torch.float32):
    """Normal values with a log-normal scale a coordinate; some exact zeros."""
    generator = torch.Generator().manual_seed(1000 + seed)
    scale = torch.exp(sigma * torch.randn(count, generator=generator))
    gradient = scale * torch.randn(count, generator=generator)
    gradient[torch.rand(count, generator=generator) < 0.05] = 0
    return gradient.clamp(-6e4, 6e4).to(dtype)


def upload(gpu, case: Case, shift: int = 0) -> None:
    """Copies of everything on the device, `shift` elements off alignment."""

    def moved(tensor):
        room = torch.empty(tensor.numel() + shift + 64, dtype=tensor.dtype)
        start = -room.data_ptr() % 64 // tensor.element_size() + shift
        room[start : start + tensor.numel()] = tensor
        return gpu.put(room[start : start + tensor.numel()])

    case.device = {name: moved(value) for name, value in case.state.items()}
    case.device["param"] = moved(case.param)
    case.device["grad"] = moved(case.grad)


def set_gradient(gpu, case: Case, grad: torch.Tensor) -> None:
    case.grad = grad
    if case.device and case.device["grad"].dtype == grad.dtype:
        case.device["grad"].copy_(grad)


def row(case: Case) -> api.AdamW8Tensor:
    at = {name: api.address(case.device.get(name)) for name in ("param", "grad", "step", *NAMES)}
    return api.AdamW8Tensor(
        count=case.param.numel(), param_dtype=api.DTYPES[case.param.dtype],
        grad_dtype=api.DTYPES[case.grad.dtype], state=api.STATES[case.encoding], group=case.group,
        **at,
    )  # fmt: skip


DEFAULT_GROUPS = [(1e-2, 0.9, 0.999, 1e-8, 1e-2, False)]


def make_launch(gpu, cases, groups=None) -> tuple[api.AdamW8Launch, torch.Tensor]:
    """The launch and its `bad` word, which holds rubbish before it runs."""
    groups = groups or DEFAULT_GROUPS
    bad = gpu.put(torch.full((1,), 12345, dtype=torch.int64))
    launch = api.AdamW8Launch(
        (api.AdamW8Tensor * len(cases))(*map(row, cases)), len(cases),
        (api.AdamW8Group * len(groups))(*(api.AdamW8Group(*g) for g in groups)), len(groups),
        api.address(bad),
    )  # fmt: skip
    return launch, bad


def cpu_step(cases, groups=None) -> None:
    """The native CPU step, in place on `param` and `state`."""
    from halfbyte.ops.adamw8 import StepTable

    groups = groups or DEFAULT_GROUPS
    params = [case.param for case in cases]
    table = StepTable(
        params, [case.state for case in cases], [case.group for case in cases],
        [case.encoding for case in cases],
    )  # fmt: skip
    grads = [case.grad for case in cases]
    result = (table.run if table.takes(params, grads) else table.run_any)(params, grads, groups)
    assert result[0] < 0, result


def assert_same(case: Case, what: str = "") -> None:
    """Parameter and state on the device have the CPU's bits."""
    pairs = {"param": case.param, **case.state}
    for name, want in pairs.items():
        got = case.device[name].cpu()
        if not same_bits(got, want):
            at = int((got.view(-1) != want.view(-1)).nonzero()[0])
            raise AssertionError(
                f"{what} {name} of {case.encoding} {case.param.dtype}: element {at} is "
                f"{got.view(-1)[at].item()!r}, expected {want.view(-1)[at].item()!r}"
            )


def snapshot(cases) -> list[dict[str, torch.Tensor]]:
    return [{name: value.cpu().clone() for name, value in case.device.items()} for case in cases]
