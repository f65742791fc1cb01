"""torch.compile of a whole PEFT model over a 4-bit base in one graph, and torch.library.opcheck of
every operator that is registered."""

import peft
import pytest
import torch
from transformers import LlamaForCausalLM

import halfbyte
import halfbyte.calibrate  # registers operators of its own
from tiny_model import build_config

BATCH, LENGTH = 2, 9


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build_model(dropout: float = 0.0, dtype=torch.float32, layers: int = 1) -> peft.PeftModel:
    """A random Llama, quantized to NF4, with a LoRA that does something on every linear layer."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(build_config(num_hidden_layers=layers)).to(dtype)
    config = peft.LoraConfig(
        r=4, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(halfbyte.quantize_(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def tokens(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, 300, (BATCH, length), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(call, model, length: int = LENGTH) -> dict[str, torch.Tensor]:
    model.zero_grad()
    ids = tokens(length)
    torch.manual_seed(5)
    out = call(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **grads}


def assert_same(got, want, rtol: float, atol: float) -> None:
    """Sums may be taken in another order; a share of the largest element is allowed."""
    assert got.keys() == want.keys() and len(got) > 10
    for name, value in want.items():
        assert value.abs().max() > 0, name
        largest = value.abs().max().item()
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol * largest, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_peft_model_is_one_graph_with_eagers_bits(dropout):
    """Dropout too: the graph draws its seeds from the generator as eager does."""
    model = build_model(dropout)
    want = loss_and_gradients(model, model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_same(loss_and_gradients(compiled, model), want, rtol=0.0, atol=0.0)


# In bfloat16 the gradients of key and value, shared by heads, are summed in another order.
BF16 = {"rtol": 2**-7, "atol": 2**-7}


def test_a_bfloat16_model_is_one_graph():
    model = build_model(dtype=torch.bfloat16)
    want = loss_and_gradients(model, model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_same(loss_and_gradients(compiled, model), want, **BF16)


def test_dynamic_lengths_take_one_compilation():
    model = build_model(0.2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    loss_and_gradients(compiled, model)
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (12, 17):
            got = loss_and_gradients(compiled, model, length)
            assert_same(got, loss_and_gradients(model, model, length), rtol=1e-5, atol=1e-5)


def test_autocast_inside_the_graph():
    model = build_model()

    def run(**inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**inputs)

    want = loss_and_gradients(run, model)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_same(loss_and_gradients(compiled, model), want, **BF16)


def test_inductor_agrees_with_eager():
    model = build_model()
    want = loss_and_gradients(model, model)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    assert_same(loss_and_gradients(compiled, model), want, rtol=1e-4, atol=1e-5)


def test_generation_runs_compiled():
    model = build_model().eval()
    with torch.inference_mode():
        want = model(input_ids=tokens(), use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
        assert torch.equal(compiled(input_ids=tokens(), use_cache=False).logits, want)


# --- operators -----------------------------------------------------------------------------------

OUT, IN, RANK, ROWS = 9, 10, 3, 6


def registered() -> set[str]:
    """Names of all operators in the `halfbyte` namespace."""
    names = torch._C._dispatch_get_all_op_names()
    return {n.removeprefix("halfbyte::") for n in names if n.startswith("halfbyte::")}


def _weight(double_quant: bool = True, codebook: str = "nf4"):
    dense = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    return halfbyte.quantize_4bit(dense, codebook, 32, double_quant)


def _lora(dtype, rank: int, dropout: float, leading=(ROWS,)):
    make = torch.Generator().manual_seed(1)
    x = torch.randn(*leading, IN, generator=make).to(dtype)
    bias = torch.randn(OUT, generator=make).to(dtype)
    a = torch.randn(rank, IN, generator=make) if rank else None
    b = torch.randn(OUT, rank, generator=make) if rank else None
    seed = torch.tensor([3]) if dropout else None
    return x, (*_weight().op_args(), OUT, bias, a, b, 1.5, dropout, seed)


def lora_linear_cases(dtype):
    for rank, dropout in ((0, 0.0), (RANK, 0.0), (RANK, 0.4)):
        x, args = _lora(dtype, rank, dropout)
        yield x, *args
    x, args = _lora(dtype, RANK, 0.0, leading=(2, 3))
    yield x, *args


def lora_linear_backward_cases(dtype):
    for rank, dropout in ((0, 0.0), (RANK, 0.4)):
        x, args = _lora(dtype, rank, dropout)
        y, t = torch.ops.halfbyte.lora_linear(x, *args)
        *weight, _, _, a, b, scaling, dropout, seed = args
        for wanted in ([True, bool(rank), bool(rank), True], [False, False, False, True]):
            yield (
                torch.ones_like(y), x, *weight, IN, torch.float32, a, b, t if rank else None,
                scaling, dropout, seed, wanted,
            )  # fmt: skip


def quantize_4bit_cases(dtype):
    for codebook in ("nf4", "fp4", "int4"):
        yield torch.randn(OUT, IN + 1).to(dtype), codebook, 64


def double_quantize_cases(dtype):
    if dtype is torch.float32:
        yield torch.rand(300), torch.rand(1)


def dequantize_4bit_cases(dtype):
    for double_quant in (True, False):
        yield *_weight(double_quant).op_args(), [OUT, IN], dtype


def dequantize_4bit_into_cases(dtype):
    yield *_weight().op_args(), torch.zeros(OUT, IN, dtype=dtype)


def search_scales_cases(dtype):
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2)).to(dtype)
    for codebook in ("nf4", "fp4"):
        yield weight, torch.rand(IN), codebook, 32


def feedback_codes_cases(dtype):
    if dtype is not torch.float32:
        return
    weight, scales = torch.randn(OUT, IN), torch.rand(-(-OUT * IN // 32))
    for triangular in (True, False):
        coefficients = torch.rand(IN, IN) / IN
        order, errors = torch.arange(IN), torch.zeros(OUT, IN)
        yield weight, scales, coefficients, order, triangular, "nf4", 32, errors


CASES = {
    name.removesuffix("_cases"): make
    for name, make in list(globals().items())
    if name.endswith("_cases")
}


def test_no_operator_is_forgotten():
    assert registered() == set(CASES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(CASES))
def test_opcheck(name, dtype):
    operator = getattr(torch.ops.halfbyte, name).default
    for args in CASES[name](dtype):
        torch.library.opcheck(operator, args)
