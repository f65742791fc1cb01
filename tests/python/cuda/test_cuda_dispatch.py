"""What torch's dispatcher, tracing and export make of our operators on CUDA tensors, cardless.

Fake tensors say that they lie on a CUDA device and hold nothing; the CPU's real results are the
oracle for shapes and dtypes. Not there: torch's autograd engine, which a torch without CUDA cannot
start for a CUDA tensor, so forward and backward of the autograd functions are called by hand.
"""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import halfbyte
from halfbyte.autograd import LoraLinearFunction, lora_linear
from halfbyte.nn import LoraLinear, NF4Linear

N, K, R = 72, 160, 4
OPERATORS = [
    name for name in torch._C._dispatch_get_all_op_names() if name.startswith("halfbyte::")
]


class OnlyOnCuda(TorchDispatchMode):
    """Fails on an operator that takes or gives a tensor of another device; notes those that ran."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        assert {t.device.type for t in tensors} <= {"cuda"}, f"{operator}: {tensors}"
        self.ran.append(operator.name().removesuffix(".default"))
        return result


@pytest.fixture
def mode():
    return FakeTensorMode(allow_non_fake_inputs=False)


def fakes(mode, tree):
    """The tree with every tensor as a fake one on CUDA device 0."""

    def fake(tensor):
        with mode:
            return torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda"
            )

    return tree_map_only(torch.Tensor, fake, tree)


def assert_like(got, expected) -> None:
    """Same tree, shapes, strides and dtypes; `got` on CUDA."""
    got, expected = tree_leaves(got), tree_leaves(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        if b is None:
            assert a is None
            continue
        assert (a.device.type, a.shape, a.dtype) == ("cuda", b.shape, b.dtype)
        assert a.stride() == b.stride()


def layer(dtype, bias=True, lora=True, dropout=0.5, lead=(2, 3)):
    """The operators' arguments of a forward, and of its backward."""
    weight = halfbyte.quantize_nf4(torch.randn(N, K)).op_args()
    a, b = (torch.randn(R, K), torch.randn(N, R)) if lora else (None, None)
    seed = torch.tensor([3]) if lora and dropout else None
    tail = (a, b, 0.5, dropout if lora else 0.0, seed)
    x = torch.randn(*lead, K).to(dtype)
    return (x, *weight, N, torch.randn(N) if bias else None, *tail), weight


# --- operators ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_a_kernel_for_each_device_and_a_fake(name):
    for key in ("CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), key


def through_fakes(mode, name, *args) -> None:
    """The operator on fakes gives what it gives on the CPU, and runs no other."""
    operator = getattr(torch.ops.halfbyte, name)
    expected, given = operator(*args), fakes(mode, args)
    with mode, OnlyOnCuda() as only:
        got = operator(*given)
    assert_like(got, expected)
    assert only.ran[0] == f"halfbyte::{name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantize_and_dequantize(mode, dtype):
    dense = torch.randn(7, 33).to(dtype)
    through_fakes(mode, "quantize_4bit", dense, "nf4", 64)
    through_fakes(mode, "double_quantize", torch.rand(300), torch.tensor([0.5]))
    for double_quant in (False, True):
        weight = halfbyte.quantize_nf4(dense, double_quant=double_quant).op_args()
        through_fakes(mode, "dequantize_4bit", *weight, [7, 33], dtype)
        through_fakes(mode, "dequantize_4bit_into", *weight, dense.clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"lora": False}, {"lead": (0,)}], ids=str)
def test_lora_linear(mode, dtype, options):
    args, weight = layer(dtype, **options)
    through_fakes(mode, "lora_linear", *args)
    x, (bias, a, b, scaling, dropout, seed) = args[0], args[-6:]
    _, t = torch.ops.halfbyte.lora_linear(*args)
    dy = torch.randn(*x.shape[:-1], N).to(dtype)
    for wanted in ([True] * 4, [True, False, False, False], [False, True, True, False]):
        wanted = [w and (i == 0 or a is not None or i == 3) for i, w in enumerate(wanted)]
        through_fakes(
            mode, "lora_linear_backward", dy, x, *weight, K,
            None if bias is None else bias.dtype, a, b, t if a is not None else None, scaling,
            dropout, seed, wanted,
        )  # fmt: skip


# --- autograd functions, modules, tracing ---------------------------------------------------------


class Context(SimpleNamespace):
    """What an autograd function asks of its context."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


@pytest.mark.parametrize("lora", [True, False])
def test_forward_and_backward_of_the_autograd_function(mode, lora):
    args, _ = layer(torch.bfloat16, lora=lora)
    needs = (True, *[False] * 9, True, lora, lora, *[False] * 3)
    results = []
    for put in (lambda tree: tree, lambda tree: fakes(mode, tree)):
        context, given = Context(needs_input_grad=needs), put(args)
        with mode if given is not args else torch.no_grad(), torch.no_grad():
            y = LoraLinearFunction.forward(context, *given)
            gradients = LoraLinearFunction.backward(context, torch.ones_like(y))
        results.append((y, gradients))
    assert_like(results[1], results[0])
    y, gradients = results[1]
    assert [g is not None for g in gradients] == list(needs)


def test_a_seed_is_made_where_the_activations_are(mode):
    args, _ = layer(torch.bfloat16)
    x, a, b = (fakes(mode, args[i]) for i in (0, 11, 12))
    weight = halfbyte.quantize_nf4(torch.randn(N, K))
    moved = {name: fakes(mode, tensor) for name, tensor in weight.tensors().items()}
    moved = halfbyte.NF4Weight(shape=weight.shape, dtype=weight.dtype, **moved)
    with mode, torch.no_grad(), OnlyOnCuda() as only:
        assert lora_linear(x, moved, a, b, dropout=0.5).is_cuda
    assert only.ran.count("halfbyte::lora_linear") == 1


def on_cuda(mode, module):
    """The module with fakes for parameters and buffers. None needs a gradient: see above."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                moved = fakes(mode, parameter.detach())
                each._parameters[name] = torch.nn.Parameter(moved, requires_grad=False)
        for name, buffer in each._buffers.items():
            each._buffers[name] = fakes(mode, buffer)
    return module


@pytest.mark.parametrize("kind", [NF4Linear, LoraLinear])
def test_modules_export_and_compile_as_one_operator(mode, kind):
    dense = torch.nn.Linear(K, N)
    module = kind.from_linear(dense, R) if kind is LoraLinear else kind.from_linear(dense)
    module, x = on_cuda(mode, module), fakes(mode, torch.randn(2, 5, K, dtype=torch.bfloat16))
    expected = torch.empty(2, 5, N, dtype=torch.bfloat16)
    with mode, torch.no_grad():
        with OnlyOnCuda() as only:
            y = module(x)
        assert_like(y, expected)
        graph = torch.export.export(module, (x,)).graph
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert_like(compiled(x), expected)
    assert only.ran.count("halfbyte::lora_linear") == 1
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert called[0] == "halfbyte.lora_linear.default"
    assert set(called[1:]) == {"<built-in function getitem>"}
