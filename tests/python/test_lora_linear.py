"""The LoRA linear: forward and every gradient against float64 algebra on the dequantized weight."""

import contextlib
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import halfbyte
from formats import FLOATS, name_of, relative_error, same_bits, variant_params
from halfbyte import reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 2e-3}
BY_DTYPE = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)

# (M, N, K)
SMALL = [(1, 1, 1), (3, 5, 7), (17, 33, 100), (7, 64, 64), (13, 65, 127), (6, 70, 130)]
LARGE = [(64, 576, 1536), (5, 1152, 4304)]
LONG = [(9, 20, 9000), (9, 9000, 20), (4200, 12, 10)]  # reductions cut into chunks: K, N, M


def cases() -> list:
    """(variant, dtype) for the rows of the tables; a variant that cannot run at all is skipped by
    name, one that is not for a dtype is left out there (and tested to say so)."""
    ops = {dtype: f"lora_linear ({name_of(dtype)})" for dtype in FLOATS}
    params = []
    for param in variant_params(*ops.values()):
        (name,) = param.values
        for dtype, op in ops.items():
            row = next(row for row in halfbyte.variants()[op] if row["name"] == name)
            if param.marks or not row["why_not"]:
                case = f"{name}-{name_of(dtype)}"
                params.append(pytest.param(name, dtype, id=case, marks=param.marks))
    return params


EVERY = pytest.mark.parametrize("variant, dtype", cases(), indirect=["variant"])


@contextlib.contextmanager
def refusal_is_a_skip(allowed: bool = True):
    """A forced variant may refuse a product that is too small for it, with a sentence."""
    try:
        yield
    except ValueError as error:
        if not allowed or "cannot run: " not in str(error):
            raise
        pytest.skip(str(error))


class Problem:
    """One layer with its adapter, its input and the gradient that comes in."""

    def __init__(self, shape, rank, dtype, seed=0, adapter_dtype=None, bias_dtype=None, **options):
        M, N, K = shape
        generator = torch.Generator().manual_seed(seed + 7 * K + N)

        def normal(*size, scale=1.0):
            return torch.randn(*size, generator=generator) * scale

        adapter_dtype = adapter_dtype or dtype
        dense = normal(N, K, scale=K**-0.5)
        self.weight = halfbyte.quantize_4bit(dense, **options)
        self.x = normal(M, K).to(dtype).requires_grad_()
        self.a = normal(rank, K, scale=K**-0.5).to(adapter_dtype).requires_grad_() if rank else None
        self.b = (
            normal(N, rank, scale=rank**-0.5).to(adapter_dtype).requires_grad_() if rank else None
        )
        self.bias = normal(N).to(bias_dtype or dtype).requires_grad_()
        self.dy = normal(M, N).to(dtype)
        self.scaling = 1.5

    def leaves(self) -> dict[str, torch.Tensor]:
        every = {"x": self.x, "bias": self.bias, "lora_a": self.a, "lora_b": self.b}
        return {name: leaf for name, leaf in every.items() if leaf is not None}

    def run(self, dropout=0.0, seed=None):
        return halfbyte.lora_linear(
            self.x, self.weight, self.a, self.b, self.scaling, self.bias, dropout, seed
        )

    def results(self, dropout=0.0, seed=None) -> dict[str, torch.Tensor]:
        """y and the gradient of every leaf."""
        y = self.run(dropout, seed)
        leaves = self.leaves()
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy)
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}

    def expected(self, dropout=0.0, seed=None) -> dict[str, torch.Tensor]:
        """The same in float64."""
        leaves = {
            name: leaf.detach().double().requires_grad_() for name, leaf in self.leaves().items()
        }
        precision = torch.bfloat16 if self.x.dtype == torch.bfloat16 else torch.float32
        mask = None
        if dropout:
            mask = reference.dropout_factor(dropout, seed, *self.x.shape)
        y = reference.lora_linear(
            leaves["x"],
            self.weight.dequantize(precision),
            leaves.get("lora_a"),
            leaves.get("lora_b"),
            self.scaling,
            leaves["bias"],
            mask,
        )
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy.double())
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}

    def check(self, tolerance, dropout=0.0, seed=None) -> None:
        got, want = self.results(dropout, seed), self.expected(dropout, seed)
        assert got.keys() == want.keys()
        for name, value in got.items():
            leaf = self.leaves().get(name, self.x)
            assert value.dtype == leaf.dtype, name
            assert value.shape == want[name].shape, name
            assert value.isfinite().all(), name
            error = relative_error(value, want[name])
            assert error <= tolerance, f"{name}: {error:.2e} above {tolerance:.0e}"


@pytest.mark.parametrize("shape", SMALL, ids=str)
@EVERY
def test_small_shapes(variant, dtype, shape):
    for rank in (1, 8, 17, 64):
        with refusal_is_a_skip():
            Problem(shape, rank, dtype).check(TOLERANCE[dtype])


@pytest.mark.parametrize("shape", LARGE, ids=str)
@EVERY
def test_large_shapes(variant, dtype, shape):
    """No variant may refuse these. The one-loop reference takes a narrower slice of them."""
    if variant == "reference":
        shape = (3, 65, shape[2])
    for rank in (8, 64):
        Problem(shape, rank, dtype).check(TOLERANCE[dtype])


@pytest.mark.parametrize("shape", LONG, ids=str)
@EVERY
def test_reductions_longer_than_a_panel(variant, dtype, shape):
    with refusal_is_a_skip():
        Problem(shape, 2, dtype).check(TOLERANCE[dtype], 0.3, 5)


@pytest.mark.parametrize("rank", [0, 1, 2, 63, 65, 128, 511, 512])
@EVERY
def test_ranks(variant, dtype, rank):
    with refusal_is_a_skip():
        Problem((19, 66, 129), rank, dtype).check(TOLERANCE[dtype])


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 32, "double_quant": False},
        {"block_size": 256},
        {"block_size": 4096, "codebook": "fp4"},
        {"block_size": 32, "codebook": "int4"},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
@EVERY
def test_formats(variant, dtype, options):
    """Blocks shorter than a row, straddling rows and longer than rows."""
    with refusal_is_a_skip():
        Problem((14, 66, 101), 4, dtype, **options).check(TOLERANCE[dtype])
        Problem((14, 66, 128), 4, dtype, **options).check(TOLERANCE[dtype])


@EVERY
def test_mixed_dtypes(variant, dtype):
    for adapter_dtype in FLOATS:
        for bias_dtype in FLOATS:
            problem = Problem((33, 48, 72), 6, dtype, 0, adapter_dtype, bias_dtype)
            tolerance = max(TOLERANCE[t] for t in (dtype, adapter_dtype, bias_dtype))
            with refusal_is_a_skip():
                problem.check(tolerance)


@EVERY
def test_more_rows_than_a_task(variant, dtype):
    """Row counts around the row tile and the row block of a task."""
    for rows in (2, 5, 11, 127, 505):
        with refusal_is_a_skip(rows < 125):
            Problem((rows, 30, 70), 3, dtype).check(TOLERANCE[dtype], 0.25, rows)


# --- dropout -------------------------------------------------------------------------------------


def mask_of(shape, dropout, seed, dtype=torch.float32):
    """The factors that the kernel applies: x = 1, A = I, B = I, no weight."""
    M, K = shape
    weight = halfbyte.quantize_nf4(torch.zeros(K, K))
    eye = torch.eye(K)
    x = torch.ones(M, K, dtype=dtype)
    return halfbyte.lora_linear(x, weight, eye, eye, 1.0, None, dropout, seed)


@EVERY
def test_the_mask_is_the_specified_one(variant, dtype):
    for dropout in (0.05, 0.5, 0.9):
        for seed in (0, 1, 2**62 + 12345, -1):
            with refusal_is_a_skip():
                got = mask_of((37, 67), dropout, seed, dtype)
                want = reference.dropout_factor(dropout, seed, 37, 67)
                assert torch.equal(got != 0, want != 0), (dropout, seed)
                scale = torch.tensor(1 / (1 - dropout)).to(dtype)
                assert torch.equal(got[got != 0], scale.expand(int((got != 0).sum())))


@pytest.mark.parametrize("shape", [(17, 33, 100), (64, 130, 260)], ids=str)
@EVERY
def test_dropout_and_its_gradients(variant, dtype, shape):
    for dropout in (0.1, 0.6):
        with refusal_is_a_skip():
            Problem(shape, 8, dtype).check(TOLERANCE[dtype], dropout, 1234)


@EVERY
def test_dropping_everything_leaves_the_base(variant, dtype):
    problem = Problem((70, 40, 60), 4, dtype)
    with refusal_is_a_skip():
        dropped = problem.results(1.0, 3)
    base = halfbyte.nf4_linear(problem.x, problem.weight, problem.bias)
    assert relative_error(dropped["y"], base.detach()) <= TOLERANCE[dtype]
    assert dropped["lora_a"].count_nonzero() == 0
    assert dropped["lora_b"].count_nonzero() == 0


@pytest.mark.parametrize("dropout", [1 - 2**-33, math.nextafter(1.0, 0.0)])
def test_a_probability_next_to_one_drops_everything(dropout):
    """round(p * 2^32) does not fit 32 bits: it must not wrap to "drop nothing"."""
    assert mask_of((20, 40), dropout, 5).count_nonzero() == 0


def test_a_dropped_value_is_zero_whatever_it_was():
    """An infinity or a NaN that the mask drops does not reach the sum."""
    kept = reference.dropout_factor(0.5, 9, 8, 32) != 0
    weight = halfbyte.quantize_nf4(torch.zeros(4, 32))
    a, b = torch.ones(2, 32), torch.ones(4, 2)
    for bad in (math.inf, math.nan):
        x = torch.where(kept, 1.0, bad)
        _, t = torch.ops.halfbyte.lora_linear(
            x, *weight.op_args(), 4, None, a, b, 1.0, 0.5, torch.tensor([9])
        )
        assert torch.equal(t, 2.0 * kept.sum(1, keepdim=True).expand(8, 2))


def test_the_seed_alone_decides_the_mask():
    problem = Problem((20, 16, 64), 8, torch.float32)
    first = problem.results(0.3, 42)
    for name, value in problem.results(0.3, torch.tensor([42])).items():
        assert same_bits(value, first[name]), name
    assert not torch.equal(problem.run(0.3, 43), first["y"])
    torch.manual_seed(5)
    drawn = problem.run(0.3)
    assert not torch.equal(problem.run(0.3), drawn)
    torch.manual_seed(5)
    assert torch.equal(problem.run(0.3), drawn)


def test_the_mask_looks_random():
    """Kept share overall, a row, a column and between neighbours: within five sigma."""
    rows, columns = 2048, 256
    for dropout in (0.1, 0.5):
        kept = (mask_of((rows, columns), dropout, 77) != 0).double()
        keep, spread = 1 - dropout, math.sqrt(dropout * (1 - dropout))

        def close(mean, count, keep=keep, spread=spread):
            return bool(((mean - keep).abs() <= 5 * spread / math.sqrt(count)).all())

        assert close(kept.mean(), rows * columns)
        assert close(kept.mean(0), rows) and close(kept.mean(1), columns)
        centred = (kept - keep) / spread
        for shifted in (
            centred[1:] * centred[:-1],
            centred[:, 1:] * centred[:, :-1],
            centred[1:, 1:] * centred[:-1, :-1],
            centred[2:] * centred[:-2],
        ):
            assert abs(float(shifted.mean())) <= 5 / math.sqrt(shifted.numel())
    other = (mask_of((rows, columns), 0.5, 78) != 0).double()
    agreement = ((other * 2 - 1) * (kept * 2 - 1)).mean()
    assert abs(float(agreement)) <= 5 / math.sqrt(rows * columns)


# --- shapes, strides, which gradients ------------------------------------------------------------


@BY_DTYPE
def test_leading_dimensions(dtype):
    flat = Problem((24, 10, 33), 3, dtype)
    want = flat.results(0.2, 8)
    for leading in ((2, 3, 4), (24, 1), (1, 1, 24)):
        x = flat.x.detach().view(*leading, 33).requires_grad_()
        y = halfbyte.lora_linear(x, flat.weight, flat.a, flat.b, 1.5, flat.bias, 0.2, 8)
        assert y.shape == (*leading, 10)
        (dx,) = torch.autograd.grad(y, [x], flat.dy.view(*leading, 10))
        assert same_bits(y.detach().view(24, 10), want["y"])
        assert same_bits(dx.view(24, 33), want["x"])
    row = halfbyte.lora_linear(flat.x[0], flat.weight, flat.a, flat.b, 1.5, flat.bias)
    assert row.shape == (10,)


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)], ids=str)
@EVERY
def test_zero_rows(variant, dtype, leading):
    problem = Problem((1, 5, 7), 2, dtype)
    x = torch.zeros(*leading, 7, dtype=dtype, requires_grad=True)
    with refusal_is_a_skip():
        y = halfbyte.lora_linear(x, problem.weight, problem.a, problem.b, 1.5, problem.bias, 0.1, 3)
        assert y.shape == (*leading, 5) and y.dtype == dtype
        leaves = [x, problem.bias, problem.a, problem.b]
        grads = torch.autograd.grad(y, leaves, torch.zeros_like(y))
        for leaf, grad in zip(leaves, grads, strict=True):
            assert grad.shape == leaf.shape and grad.count_nonzero() == 0


@EVERY
def test_strided_inputs_and_gradients(variant, dtype):
    problem = Problem((30, 45, 61), 5, dtype)
    with refusal_is_a_skip():
        want = problem.results()
    strided = {
        "transposed": problem.x.detach().t().contiguous().t(),
        "sliced": torch.stack((problem.x.detach(),) * 2, 2)[:, :, 1],
    }
    for x in strided.values():
        assert not x.is_contiguous()
        x.requires_grad_()
        a = problem.a.detach().t().contiguous().t().requires_grad_()
        b = problem.b.detach().t().contiguous().t().requires_grad_()
        bias = torch.stack((problem.bias.detach(),) * 2, 1)[:, 0].requires_grad_()
        dy = problem.dy.t().contiguous().t()
        y = halfbyte.lora_linear(x, problem.weight, a, b, 1.5, bias)
        grads = torch.autograd.grad(y, [x, bias, a, b], dy)
        for name, value in zip(want, [y.detach(), *grads], strict=True):
            assert same_bits(value, want[name]), name


@EVERY
def test_an_expanded_gradient(variant, dtype):
    """`y.sum().backward()` sends one element with zero strides."""
    problem = Problem((30, 45, 61), 5, dtype)
    problem.dy = torch.ones(30, 45, dtype=dtype)
    with refusal_is_a_skip():
        want = problem.results()
    leaves = problem.leaves()
    grads = torch.autograd.grad(problem.run().sum(), list(leaves.values()))
    for (name, _), grad in zip(leaves.items(), grads, strict=True):
        assert same_bits(grad, want[name]), name


@BY_DTYPE
@pytest.mark.parametrize("wanted", ["x", "bias", "lora_a", "lora_b"])
def test_only_one_gradient(dtype, wanted):
    problem = Problem((20, 30, 40), 4, dtype)
    want = problem.results(0.3, 6)
    for name, leaf in problem.leaves().items():
        leaf.requires_grad_(name == wanted)
    y = problem.run(0.3, 6)
    y.backward(problem.dy)
    for name, leaf in problem.leaves().items():
        if name == wanted:
            assert same_bits(leaf.grad, want[name])
        else:
            assert leaf.grad is None


def test_x_is_kept_for_backward_only_when_a_needs_it():
    problem = Problem((20, 30, 40), 4, torch.float32)
    problem.a.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        problem.run()
    assert torch.Size([20, 40]) not in saved
    problem.a.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        problem.run()
    assert torch.Size([20, 40]) in saved


def test_no_gradient_without_a_leaf():
    problem = Problem((4, 5, 6), 2, torch.float32)
    with torch.no_grad():
        assert not problem.run().requires_grad
    with torch.inference_mode():
        assert not problem.run().requires_grad
    for leaf in problem.leaves().values():
        leaf.requires_grad_(False)
    assert not problem.run().requires_grad
    assert problem.run().grad_fn is None


def test_inputs_are_left_alone():
    problem = Problem((20, 30, 41), 4, torch.bfloat16)
    tensors = {**problem.leaves(), "dy": problem.dy, **problem.weight.tensors()}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    problem.results(0.2, 1)
    for name, tensor in tensors.items():
        assert same_bits(tensor.detach(), before[name]), name


def test_backward_twice_and_accumulation():
    problem = Problem((8, 9, 10), 3, torch.float32)
    want = problem.results(0.2, 1)
    y = problem.run(0.2, 1)
    y.backward(problem.dy, retain_graph=True)
    y.backward(problem.dy)
    for name, leaf in problem.leaves().items():
        assert torch.equal(leaf.grad, want[name] * 2), name


# --- memory: padding, alignment, threads ---------------------------------------------------------


@EVERY
def test_memory_around_x_and_dy_is_not_read(variant, dtype):
    """Rows that end amid NaN: nothing beyond a row's own elements takes part."""
    M, N, K = 21, 67, 99

    def amid_nan(tensor):
        buffer = torch.full((tensor.numel() + 128,), math.nan, dtype=tensor.dtype)
        inside = buffer[61 : 61 + tensor.numel()].view(tensor.shape)
        inside.copy_(tensor)
        assert inside.is_contiguous()
        return inside

    problem = Problem((M, N, K), 5, dtype)
    with refusal_is_a_skip():
        want = problem.results(0.2, 3)
    for name in ("x", "a", "b", "bias"):
        setattr(problem, name, amid_nan(getattr(problem, name).detach()).requires_grad_())
    problem.dy = amid_nan(problem.dy)
    for name, value in problem.results(0.2, 3).items():
        assert same_bits(value, want[name]), name


@EVERY
def test_a_bad_row_stays_in_its_row(variant, dtype):
    """An infinity or NaN in row m of x (or dy) reaches row m of y (or dx) and no other."""
    for bad in (math.inf, math.nan):
        problem = Problem((23, 67, 99), 5, dtype)
        with refusal_is_a_skip():
            want = problem.results(0.2, 3)
        for row, column in ((0, 0), (7, 98), (22, 50)):
            x, dy = problem.x.detach().clone(), problem.dy.clone()
            x[row, column] = bad
            dy[row, min(column, 66)] = bad
            other = Problem((23, 67, 99), 5, dtype)
            other.x, other.dy = x.requires_grad_(), dy
            got = other.results(0.2, 3)
            rest = torch.arange(23) != row
            assert same_bits(got["y"][rest], want["y"][rest])
            assert same_bits(got["x"][rest], want["x"][rest])
            assert not got["y"][row].isfinite().any()
            columns = torch.arange(67) != min(column, 66)
            assert same_bits(got["bias"][columns], want["bias"][columns])


@EVERY
def test_packed_bytes_at_any_address(variant, dtype):
    problem = Problem((30, 50, 70), 5, dtype)
    with refusal_is_a_skip():
        want = problem.results()
    packed = problem.weight.packed
    for shift in (1, 2, 3, 5):
        buffer = torch.full((len(packed) + 64,), 0xFF, dtype=torch.uint8)
        buffer[shift : shift + len(packed)] = packed
        problem.weight = halfbyte.NF4Weight(
            **{**vars(problem.weight), "packed": buffer[shift : shift + len(packed)]}
        )
        for name, value in problem.results().items():
            assert same_bits(value, want[name]), name


@EVERY
def test_every_output_is_written(variant, dtype):
    """torch fills fresh tensors with NaN here: nothing of an output is left as it was allocated."""
    problem = Problem((20, 67, 99), 5, dtype)
    with refusal_is_a_skip():
        want = problem.results(0.2, 3)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for name, value in problem.results(0.2, 3).items():
            assert same_bits(value, want[name]), name
    finally:
        torch.use_deterministic_algorithms(False)


@EVERY
def test_the_same_bits_for_any_thread_count_and_run_to_run(variant, dtype):
    problem = Problem((300, 200, 150), 20, dtype)
    threads = torch.get_num_threads()
    try:
        want = None
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            got = problem.results(0.1, 4)
            want = want or got
            for name, value in got.items():
                assert same_bits(value, want[name]), f"{name}, {count} threads"
    finally:
        torch.set_num_threads(threads)


# --- torch around it -----------------------------------------------------------------------------


def test_autocast_is_followed():
    problem = Problem((20, 30, 40), 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = problem.run()
        base = halfbyte.nf4_linear(problem.x, problem.weight)
    assert y.dtype == base.dtype == torch.bfloat16
    y.backward(problem.dy.bfloat16())
    want = problem.expected()
    for name, leaf in problem.leaves().items():
        assert leaf.grad.dtype == torch.float32, name
        assert relative_error(leaf.grad, want[name]) <= 1e-2, name
    halves = Problem((20, 30, 40), 4, torch.float32)
    halves.x = halves.x.detach().bfloat16()
    assert same_bits(y.detach(), halves.run().detach())
    with torch.autocast("cpu", torch.float16):
        assert problem.run().dtype == torch.float16
    with torch.autocast("cpu", enabled=False):
        assert problem.run().dtype == torch.float32


@pytest.mark.filterwarnings("ignore:Input #.*double precision")
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(dropout):
    """Finite differences in fp32: y is linear in each argument, so a wide step is exact."""
    problem = Problem((3, 4, 5), 2, torch.float32)

    def run(x, bias, a, b):
        return halfbyte.lora_linear(x, problem.weight, a, b, 1.5, bias, dropout, 11)

    leaves = tuple(problem.leaves().values())
    assert torch.autograd.gradcheck(run, leaves, eps=0.25, atol=1e-4, rtol=1e-4, nondet_tol=0.0)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("rank", [0, 3])
@BY_DTYPE
def test_operators_pass_opcheck(dtype, rank, dropout):
    if rank == 0 and dropout:
        dropout = 0.0
    problem = Problem((6, 9, 10), rank, dtype)
    seed = torch.tensor([3]) if dropout else None
    x, bias = problem.x.detach(), problem.bias.detach()
    a = problem.a.detach() if rank else None
    b = problem.b.detach() if rank else None
    args = (x, *problem.weight.op_args(), 9, bias, a, b, 1.5, dropout, seed)
    torch.library.opcheck(torch.ops.halfbyte.lora_linear.default, args)
    t = torch.ops.halfbyte.lora_linear(*args)[1]
    for wanted in ([True, bool(rank), bool(rank), True], [False, False, False, True]):
        backward = (
            problem.dy,
            x,
            *problem.weight.op_args(),
            10,
            torch.float32,
            a,
            b,
            t if rank else None,
            1.5,
            dropout,
            seed,
            wanted,
        )
        torch.library.opcheck(torch.ops.halfbyte.lora_linear_backward.default, backward)


def _compiled_grads(call, leaves, dy):
    y = call()
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@BY_DTYPE
def test_a_compiled_function(dtype, dropout):
    torch._dynamo.reset()
    problem = Problem((12, 20, 30), 4, dtype)

    def run(x, bias, a, b):
        return torch.tanh(
            halfbyte.lora_linear(torch.sin(x), problem.weight, a, b, 1.5, bias, dropout, 3)
        )

    leaves = list(problem.leaves().values())
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want = _compiled_grads(lambda: run(*leaves), leaves, problem.dy)
    got = _compiled_grads(lambda: compiled(*leaves), leaves, problem.dy)
    for value, expected in zip(got, want, strict=True):
        assert same_bits(value, expected)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_compiled_module(train):
    torch._dynamo.reset()
    torch.manual_seed(0)
    linear = torch.nn.Linear(40, 24)
    layer = halfbyte.nn.LoraLinear.from_linear(linear, r=3, alpha=6, dropout=0.3).train(train)
    torch.nn.init.normal_(layer.lora_b)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (5, 9):
        x = torch.randn(rows, 40, requires_grad=True)
        leaves = [x, layer.lora_a, layer.lora_b]
        results = []
        for call in (layer, compiled):
            torch.manual_seed(3)
            y = call(x)
            results.append([y.detach(), *torch.autograd.grad(y.sum(), leaves)])
        for want, got in zip(*results, strict=True):
            assert same_bits(got, want)


def test_a_module_compiled_by_inductor():
    torch._dynamo.reset()
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 16)
    layer = halfbyte.nn.LoraLinear.from_linear(linear, r=4, dropout=0.0)
    torch.nn.init.normal_(layer.lora_b)

    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(6, 32, requires_grad=True)
    leaves = [x, layer.lora_a, layer.lora_b]
    want = _compiled_grads(lambda: layer(x), leaves, torch.ones(6, 16))
    got = _compiled_grads(lambda: compiled(x), leaves, torch.ones(6, 16))
    for value, expected in zip(got, want, strict=True):
        assert same_bits(value, expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["graph", "reentrant"])
@BY_DTYPE
def test_gradient_checkpointing_with_dropout(dtype, reentrant):
    problem = Problem((12, 20, 30), 4, dtype)
    leaves = problem.leaves()

    def run(x):
        return torch.tanh(
            halfbyte.lora_linear(x, problem.weight, problem.a, problem.b, 1.5, problem.bias, 0.4)
        )

    results = []
    for call in (run, lambda x: checkpoint(run, x, use_reentrant=reentrant)):
        torch.manual_seed(8)
        for leaf in leaves.values():
            leaf.grad = None
        y = call(problem.x)
        y.backward(problem.dy)
        results.append({"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}})
    for name, want in results[0].items():
        assert same_bits(results[1][name], want), name


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"x": torch.ones(3, 8)},
            r"x: expected a last dimension of 7 .*\[5, 7\], got \[3, 8\]",
        ),
        ({"x": torch.ones(3, 7, dtype=torch.float64)}, "float64"),
        ({"x": torch.ones(3, 7, dtype=torch.int64)}, "int64"),
        ({"lora_a": torch.ones(2, 8)}, r"lora_a: expected shape \[2, 7\], got float32\[2, 8\]"),
        ({"lora_a": torch.ones(7)}, "lora_a: expected 2 dimensions"),
        ({"lora_a": torch.ones(2, 7, dtype=torch.float64)}, "float64"),
        ({"lora_a": None}, "lora_a and lora_b: expected both or neither"),
        ({"lora_a": torch.ones(513, 7), "lora_b": torch.ones(5, 513)}, "rank of 1 to 512"),
        ({"lora_a": torch.ones(0, 7), "lora_b": torch.ones(5, 0)}, "rank of 1 to 512"),
        ({"lora_b": torch.ones(2, 5)}, r"lora_b: expected shape \[5, 2\], got float32\[2, 5\]"),
        ({"lora_b": None}, "lora_a and lora_b: expected both or neither"),
        ({"bias": torch.ones(4)}, r"bias: expected shape \[5\], got float32\[4\]"),
        ({"bias": torch.ones(1, 5)}, r"bias: expected shape \[5\], got float32\[1, 5\]"),
        ({"dropout": -0.1}, "dropout: expected 0 <= p <= 1, got -0.1"),
        ({"dropout": 1.5}, "dropout: expected 0 <= p <= 1, got 1.5"),
        ({"dropout": math.nan}, "dropout: expected 0 <= p <= 1, got nan"),
        ({"dropout": 0.5, "seed": torch.tensor([1, 2])}, r"seed: expected shape \[1\]"),
        ({"dropout": 0.5, "seed": torch.tensor([1.0])}, "seed: expected int64"),
        ({"weight": halfbyte.quantize_nf4(torch.ones(35))}, "weight"),
    ],
)
def test_mistakes_name_the_argument(change, message):
    args = {
        "x": torch.ones(3, 7),
        "weight": halfbyte.quantize_nf4(torch.ones(5, 7)),
        "lora_a": torch.ones(2, 7),
        "lora_b": torch.ones(5, 2),
    }
    with pytest.raises(ValueError, match=message):
        halfbyte.lora_linear(**{**args, **change})


def test_a_forced_variant_that_cannot_run_says_why(monkeypatch):
    refused = [row for row in halfbyte.variants()["lora_linear (float32)"] if row["why_not"]]
    for row in refused:
        monkeypatch.setenv("HALFBYTE_FORCE_VARIANT", f"lora_linear:{row['name']}")
        problem = Problem((512, 64, 64), 2, torch.float32)
        with pytest.raises(ValueError, match=f"variant '{row['name']}' cannot run: "):
            problem.run()


def test_forcing_one_operation_leaves_the_others(monkeypatch):
    monkeypatch.setenv("HALFBYTE_FORCE_VARIANT", "lora_linear:portable")
    chosen = {
        op: next(row["name"] for row in rows if row["chosen"])
        for op, rows in halfbyte.variants().items()
    }
    monkeypatch.delenv("HALFBYTE_FORCE_VARIANT")
    free = {
        op: next(row["name"] for row in rows if row["chosen"])
        for op, rows in halfbyte.variants().items()
    }
    for op, name in chosen.items():
        assert name == ("portable" if op.startswith("lora_linear") else free[op]), op


def test_a_weight_of_more_than_2_31_elements():
    """One row of x against a weight whose last rows lie beyond 2^31: 1 GiB of codes."""
    N, K = 2**16 + 3, 2**15
    packed = torch.full((N * K // 2,), 0x77, dtype=torch.uint8)
    packed[-3 * K // 2 :] = torch.randint(0, 256, (3 * K // 2,), dtype=torch.uint8)
    weight = halfbyte.NF4Weight(
        packed, torch.rand(N * K // 4096) + 0.5, torch.Size([N, K]), torch.float32, 4096
    )
    x = torch.randn(1, K, requires_grad=True)
    y = halfbyte.nf4_linear(x, weight)
    tail = halfbyte.NF4Weight(
        packed[-3 * K // 2 :], weight.absmax[-24:], torch.Size([3, K]), torch.float32, 4096
    ).dequantize()
    assert y[0, :-3].count_nonzero() == 0
    want = x.detach().double() @ tail.double().T
    assert relative_error(y[:, -3:].detach(), want) <= 1e-5
    dy = torch.zeros(1, N)
    dy[0, -3:] = torch.randn(3)
    (dx,) = torch.autograd.grad(y, [x], dy)
    assert relative_error(dx, dy[:, -3:].double() @ tail.double()) <= 1e-5


def test_a_second_derivative_is_refused_not_wrong():
    problem = Problem((3, 5, 7), 2, torch.float32)
    x = problem.x.detach().requires_grad_()
    y = halfbyte.nf4_linear(x, problem.weight)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


def test_autocast_leaves_float64_to_the_check():
    problem = Problem((3, 5, 7), 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="float64"):
        halfbyte.nf4_linear(problem.x.detach().double(), problem.weight)
