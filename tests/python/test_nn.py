"""Modules: packed parameters, state dicts in any order, adapters, in-place quantization."""

import copy
import dataclasses
import gc
import io
import json
import pickle
import weakref

import pytest
import safetensors.torch
import torch
from torch import nn

import halfbyte
from formats import FLOATS, name_of, relative_error, same_bits
from halfbyte.nn import LoraLinear, NF4Linear

K, N = 50, 24  # K is no multiple of a block
DOUBLE = pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])


def layer_of(seed=0, dtype=torch.float32, bias=True, **options) -> NF4Linear:
    torch.manual_seed(seed)
    return NF4Linear.from_linear(nn.Linear(K, N, bias=bias, dtype=dtype), **options)


def copied(state: dict) -> dict:
    return {key: value.clone() for key, value in state.items()}


def same_state(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(same_bits(a[key], b[key]) for key in a)


def own_tables(layer: NF4Linear) -> NF4Linear:
    """The same codes with tables of their own, as a foreign checkpoint may have."""
    weight = layer.nf4_weight
    levels = torch.linspace(-1, 1, 16)
    nested_map = torch.linspace(-1, 1, 256) if weight.double_quant else None
    return NF4Linear(dataclasses.replace(weight, levels=levels, nested_map=nested_map), layer.bias)


# --- NF4Linear -----------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4"])
@DOUBLE
def test_from_linear_quantizes_as_quantize_4bit_does(double_quant, codebook):
    linear = nn.Linear(K, N)
    layer = NF4Linear.from_linear(linear, 128, double_quant, codebook)
    weight = halfbyte.quantize_4bit(linear.weight, codebook, 128, double_quant)
    for name, tensor in layer.nf4_weight.tensors().items():
        want = weight.tensors()[name]
        assert same_bits(tensor.reshape(-1).view(want.dtype), want), name
    assert layer.bias is linear.bias
    assert same_bits(layer.dequantize(), weight.dequantize())
    x = torch.randn(3, K)
    assert same_bits(layer(x), halfbyte.nf4_linear(x, weight, linear.bias))
    assert relative_error(layer(x), x @ layer.dequantize().T + layer.bias) <= 1e-5
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (K, N)


def test_parameters_are_frozen_integers():
    layer = layer_of()
    packed = {name: p for name, p in layer.named_parameters() if name != "bias"}
    assert set(packed) == {"weight", "absmax", "nested_absmax", "nested_offset"}
    assert all(not p.requires_grad and not p.is_floating_point() for p in packed.values())
    assert layer.weight.dtype == torch.uint8 and layer.weight.shape == (K * N // 2, 1)
    assert list(layer.buffers()) == []
    assert type(layer.weight) is nn.Parameter
    assert sum(p.numel() * p.element_size() for p in packed.values()) == layer.nf4_weight.nbytes


def _cast(layer: NF4Linear, how: str) -> NF4Linear:
    return {
        "to": lambda: layer.to(torch.bfloat16),
        "half": layer.half,
        "bfloat16": layer.bfloat16,
        "double": layer.double,
        "device": lambda: layer.to("cpu", torch.float16),
    }[how]()


@pytest.mark.parametrize("how", ["to", "half", "bfloat16", "double", "device"])
@DOUBLE
def test_casts_leave_the_packed_weight_alone(double_quant, how):
    layer = own_tables(layer_of(bias=False, double_quant=double_quant))
    before = {name: p.clone() for name, p in layer.named_parameters()}
    x = torch.randn(4, K)
    y = layer(x)
    layer = _cast(layer, how)
    for name, parameter in layer.named_parameters():
        assert same_bits(parameter, before[name]), name
    assert same_bits(layer(x), y)
    assert layer.dequantize().dtype == torch.float32


def test_casts_do_reach_the_bias():
    layer = layer_of().bfloat16()
    assert layer.bias.dtype == torch.bfloat16
    x = torch.randn(2, K)
    assert relative_error(layer(x), x @ layer.dequantize().T + layer.bias.float()) <= 1e-5


def test_requires_grad_reaches_only_what_can_be_trained():
    layer = layer_of()
    model = nn.Sequential(layer, nn.Linear(N, 3))
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())
    layer.requires_grad_(True)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    layer.requires_grad_(False)
    assert not layer.bias.requires_grad


def test_copies_and_pickles_are_bit_equal_and_independent():
    layer = own_tables(layer_of())
    lora = LoraLinear(layer, 3, dropout=0.1)
    x = torch.randn(4, K)
    lora.eval()
    buffer = io.BytesIO()
    torch.save(lora, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(lora),
        pickle.loads(pickle.dumps(lora)),
        torch.load(buffer, weights_only=False),
    ):
        assert same_state(other.state_dict(), lora.state_dict())
        assert same_bits(other(x), lora(x))
        assert other.base.weight.data_ptr() != layer.weight.data_ptr()
        assert other.base.block_size == layer.block_size


def test_a_packed_weight_cannot_be_initialised_again():
    with pytest.raises(RuntimeError, match="cannot be re-initialised"):
        layer_of().reset_parameters()


def test_to_linear_holds_the_dequantized_weight():
    for dtype in FLOATS:
        layer = layer_of().eval()
        dense = layer.to_linear(dtype)
        assert same_bits(dense.weight.detach(), layer.dequantize(dtype))
        assert dense.bias.dtype == dtype and not dense.training
    assert layer_of(bias=False).to_linear().bias is None


def test_a_wrong_shape_at_construction_is_an_error():
    weight = halfbyte.quantize_nf4(torch.randn(N, K))
    with pytest.raises(ValueError, match=r"bias: expected shape \[24\], got \[50\]"):
        NF4Linear(weight, torch.zeros(K))
    with pytest.raises(ValueError, match=r"weight: expected shape \[N, K\], got \[8\]"):
        NF4Linear(halfbyte.quantize_nf4(torch.ones(8)))


# --- state dicts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@DOUBLE
def test_state_dict_keys_are_the_checkpoint_layout(double_quant, bias):
    state = nn.ModuleDict({"P": layer_of(bias=bias, double_quant=double_quant)}).state_dict()
    keys = ["P.weight", "P.weight.absmax", "P.weight.quant_map"]
    if double_quant:
        keys += ["P.weight.nested_absmax", "P.weight.nested_quant_map"]
    keys += ["P.weight.quant_state.bitsandbytes__nf4"] + ["P.bias"] * bias
    assert list(state) == keys
    assert all(not value.requires_grad for value in state.values())
    header = json.loads(bytes(state["P.weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert header["shape"] == [N, K] and header["dtype"] == "float32"
    assert ("nested_offset" in header) == double_quant


@pytest.mark.parametrize("tables", ["standard", "own"])
@DOUBLE
def test_train_eval_save_load_in_any_order(double_quant, tables):
    """Whatever comes before a save, its bytes are the same, and so is what a load gives back."""
    layer = layer_of(double_quant=double_quant)
    if tables == "own":
        layer = own_tables(layer)
    lora = LoraLinear(layer, 3)
    nn.init.normal_(lora.lora_b)
    x = torch.randn(5, K)
    want, y = copied(lora.state_dict()), lora(x).detach()
    lora.eval()
    with torch.no_grad():
        lora(x)
    assert same_state(lora.state_dict(), want)
    lora.train()
    lora(x).sum().backward()
    assert same_state(lora.state_dict(), want)
    lora.bfloat16().float()  # lossy for the adapter, nothing for the base
    base = {key: value for key, value in want.items() if ".weight" in key}
    after = {key: value for key, value in lora.state_dict().items() if ".weight" in key}
    assert same_state(after, base)
    for mode in (True, False):
        fresh = LoraLinear(layer_of(9, double_quant=double_quant), 3).train(mode)
        fresh.load_state_dict(copied(want))
        assert same_state(fresh.state_dict(), want)
        assert same_bits(fresh(x).detach(), y)
        fresh.load_state_dict(fresh.state_dict())
        assert same_state(fresh.state_dict(), want)


def test_gradients_after_eval_are_those_before():
    lora = LoraLinear(layer_of(), 3)
    nn.init.normal_(lora.lora_b)
    x = torch.randn(5, K, requires_grad=True)

    def gradients():
        return torch.autograd.grad(lora(x).square().sum(), [x, lora.lora_a, lora.lora_b])

    before = gradients()
    lora.eval()
    with torch.inference_mode():
        lora(x.detach())
    lora.train()
    for got, want in zip(gradients(), before, strict=True):
        assert same_bits(got, want)


@pytest.mark.parametrize("source", [True, False], ids=["from-double", "from-single"])
@pytest.mark.parametrize("target", [True, False], ids=["to-double", "to-single"])
@pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
@pytest.mark.parametrize("tables", ["standard", "own"])
def test_a_load_takes_the_format_of_the_file(source, target, assign, tables):
    """Code book, block size, double quantization and tables all come from the state dict."""
    first = layer_of(1, codebook="fp4", block_size=32, double_quant=source)
    if tables == "own":
        first = own_tables(first)
    second = layer_of(2, block_size=64, double_quant=target)
    state = copied(first.state_dict())
    second.load_state_dict(state, assign=assign)
    assert same_state(second.state_dict(), first.state_dict())
    assert (second.codebook, second.block_size) == ("fp4", 32)
    x = torch.randn(3, K)
    assert same_bits(second(x), first(x))
    shared = second.weight.data_ptr() == state["weight"].data_ptr()
    assert shared == assign
    assert not second.weight.requires_grad and not second.absmax.requires_grad
    for key in state:
        if not assign and "quant_state" not in key:
            state[key].zero_()
    assert same_bits(second(x), first(x))


def test_a_load_in_place_keeps_the_parameters():
    """Same format: values are copied into the parameters that optimizers and hooks know."""
    first, second = layer_of(1), layer_of(2)
    parameters = dict(second.named_parameters())
    second.load_state_dict(first.state_dict())
    for name, parameter in second.named_parameters():
        assert parameter is parameters[name], name
    assert same_state(second.state_dict(), first.state_dict())


@pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
def test_a_meta_module_is_filled_by_a_load(assign):
    layer = own_tables(layer_of())
    empty = copy.deepcopy(layer).to("meta")
    assert empty.weight.is_meta and empty.bias.is_meta
    assert list(empty.state_dict()) == ["weight", "bias"]
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(layer.state_dict(), assign=assign)
    assert not any(p.is_meta for p in empty.parameters())
    x = torch.randn(3, K)
    assert same_bits(empty(x), layer(x))
    assert same_state(empty.state_dict(), layer.state_dict())


def _break(state: dict, key: str, how: str) -> None:
    if how == "missing":
        del state[key]
    elif how == "truncated":
        state[key] = state[key][:-1]
    elif how == "dtype":
        state[key] = state[key].to(torch.int64)


@pytest.mark.parametrize("how", ["missing", "truncated", "dtype"])
@pytest.mark.parametrize(
    "part",
    [
        "",
        ".absmax",
        ".quant_map",
        ".nested_absmax",
        ".nested_quant_map",
        ".quant_state.bitsandbytes__nf4",
    ],
)
def test_a_broken_entry_is_named(part, how):
    layer = layer_of()
    model = nn.ModuleDict({"P": layer})
    before = copied(model.state_dict())
    state = copied(before)
    key = f"P.weight{part}"
    _break(state, key, how)
    if how == "dtype" and "quant_state" in part:
        state[key] = state[key][:5]
    with pytest.raises(RuntimeError, match=key.replace(".", r"\.")):
        model.load_state_dict(state)
    assert same_state(model.state_dict(), before)


def test_strict_loading_lists_missing_and_unexpected_keys():
    model = nn.ModuleDict({"P": layer_of(), "Q": layer_of(bias=False)})
    state = copied(model.state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*P.bias"):
        model.load_state_dict({key: value for key, value in state.items() if key != "P.bias"})
    with pytest.raises(RuntimeError, match="Unexpected key.*Q.bias"):
        model.load_state_dict({**state, "Q.bias": torch.zeros(N)})
    with pytest.raises(RuntimeError, match="Unexpected key.*Q.scale"):
        model.load_state_dict({**state, "Q.scale": torch.zeros(N)})
    with pytest.raises(RuntimeError, match="Unexpected key.*Q.weight.extra"):
        model.load_state_dict({**state, "Q.weight.extra": torch.zeros(N)})
    without = {key: value for key, value in state.items() if not key.startswith("Q.")}
    with pytest.raises(RuntimeError, match="Missing key.*Q.weight"):
        model.load_state_dict(without)
    result = model.load_state_dict({**without, "Q.scale": torch.zeros(1)}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["Q.weight"], ["Q.scale"])


def test_a_dense_state_dict_is_an_error():
    with pytest.raises(RuntimeError, match="weight: expected an entry .*quant_state"):
        layer_of().load_state_dict(nn.Linear(K, N).state_dict())


def test_a_weight_of_another_shape_is_an_error():
    layer = layer_of()
    other = NF4Linear.from_linear(nn.Linear(N, K))  # as many elements, transposed
    with pytest.raises(
        RuntimeError, match=r"expected a packed weight of \[24, 50\], got \[50, 24\]"
    ):
        layer.load_state_dict(other.state_dict())
    state = copied(layer.state_dict())
    state["bias"] = torch.zeros(N + 1)
    with pytest.raises(RuntimeError, match=r"bias: expected shape \[24\], got \[25\]"):
        layer.load_state_dict(state)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [24]},
        {"shape": [24, "50"]},
        {"shape": None},
        {"blocksize": 48},
        {"blocksize": 64.0},
        {"dtype": "float8"},
        {"nested_blocksize": 128},
        {"nested_offset": "x"},
    ],
    ids=str,
)
def test_a_header_that_cannot_be_read_is_named(change):
    layer = layer_of()
    state = copied(layer.state_dict())
    key = "weight.quant_state.bitsandbytes__nf4"
    header = {**json.loads(bytes(state[key].tolist())), **change}
    state[key] = torch.tensor(list(json.dumps(header).encode()), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"cannot read|packed weight|uint8 \[12\]"):
        layer.load_state_dict(state)


@DOUBLE
def test_files_hold_the_same_bytes(tmp_path, double_quant):
    """Through torch.save with weights_only and through safetensors, several layers at once."""
    model = nn.Sequential(
        layer_of(1, double_quant=double_quant),
        layer_of(2, torch.bfloat16, double_quant=double_quant),
        LoraLinear(layer_of(3, double_quant=double_quant), 2),
    )
    state = model.state_dict()
    torch.save(state, tmp_path / "model.pt")
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    for loaded in (
        torch.load(tmp_path / "model.pt", weights_only=True),
        safetensors.torch.load_file(tmp_path / "model.safetensors"),
    ):
        fresh = nn.Sequential(layer_of(4), layer_of(5, torch.bfloat16), LoraLinear(layer_of(6), 2))
        fresh.load_state_dict(loaded)
        assert same_state(fresh.state_dict(), state)


def test_no_two_entries_share_memory():
    """Neither with each other nor with a table that other layers use."""
    state = nn.Sequential(layer_of(1), layer_of(2)).state_dict()
    addresses = [value.data_ptr() for value in state.values()]
    assert len(set(addresses)) == len(addresses)
    for key, value in state.items():
        if key.endswith("quant_map"):
            value.zero_()
    assert layer_of(3).state_dict()["weight.quant_map"].count_nonzero() == 15


# --- LoraLinear ----------------------------------------------------------------------------------


def test_lora_starts_from_the_base():
    layer = layer_of()
    lora = LoraLinear(layer, 4, alpha=8)
    x = torch.randn(3, K)
    assert lora.scaling == 2 and (lora.in_features, lora.out_features) == (K, N)
    assert same_bits(lora(x).detach(), layer(x).detach())
    assert lora.lora_a.abs().max() <= K**-0.5 and lora.lora_a.abs().max() > 0.5 * K**-0.5
    trainable = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert trainable == ["lora_a", "lora_b"]


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_lora_gradients(dtype):
    lora = LoraLinear(layer_of(dtype=dtype), 4, alpha=8)
    nn.init.normal_(lora.lora_b)
    x = torch.randn(6, K).to(dtype).requires_grad_()
    y = lora(x)
    y.float().square().sum().backward()
    precision = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    a, b, xd = (t.detach().double().requires_grad_() for t in (lora.lora_a, lora.lora_b, x))
    want = xd @ lora.base.dequantize(precision).double().T + lora.base.bias.double()
    want = want + 2 * (xd @ a.T) @ b.T
    want.backward((2 * y.detach().float()).to(dtype).double())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 2e-3}[dtype]
    for got, reference in (
        (y, want),
        (x.grad, xd.grad),
        (lora.lora_a.grad, a.grad),
        (lora.lora_b.grad, b.grad),
    ):
        assert relative_error(got.detach(), reference.detach()) <= tolerance
    assert lora.lora_a.grad.dtype == torch.float32


def test_dropout_only_in_training():
    lora = LoraLinear(layer_of(), 4, dropout=0.5)
    nn.init.normal_(lora.lora_b)
    x = torch.randn(6, K)
    assert not torch.equal(lora(x), lora(x))
    torch.manual_seed(1)
    first = lora(x)
    torch.manual_seed(1)
    assert same_bits(lora(x), first)
    lora.eval()
    state = torch.get_rng_state()
    assert same_bits(lora(x), lora(x))
    assert torch.equal(torch.get_rng_state(), state)
    mean = torch.stack([lora.train()(x) for _ in range(400)]).mean(0)
    assert relative_error(mean, lora.eval()(x)) < 0.2


def test_merge_is_the_sum():
    lora = LoraLinear(layer_of(), 4, alpha=12).eval()
    nn.init.normal_(lora.lora_b)
    x = torch.randn(6, K)
    merged = lora.merge()
    assert type(merged) is nn.Linear and merged.weight.dtype == torch.float32
    assert relative_error(merged(x), lora(x)) <= 1e-5
    assert lora.merge(torch.bfloat16).weight.dtype == torch.bfloat16
    assert LoraLinear(layer_of(dtype=torch.bfloat16), 2).merge().weight.dtype == torch.bfloat16


def test_lora_from_a_linear_or_a_packed_layer():
    linear = nn.Linear(K, N).eval()
    lora = LoraLinear.from_linear(linear, 4, 8, 0.1, 128, False, torch.bfloat16)
    assert lora.base.block_size == 128 and lora.base.nested_absmax is None
    assert lora.lora_a.dtype == lora.lora_b.dtype == torch.bfloat16 and not lora.training
    layer = layer_of()
    assert LoraLinear.from_linear(layer, 4).base is layer


def test_lora_mistakes():
    for r in (0, -1, 513):
        with pytest.raises(ValueError, match=f"r: expected a rank of 1 to 512, got {r}"):
            LoraLinear(layer_of(), r)
    for dropout in (-0.1, 1.0, 2.0):
        with pytest.raises(ValueError, match=f"dropout: expected 0 <= p < 1, got {dropout}"):
            LoraLinear(layer_of(), 4, dropout=dropout)


def test_training_a_lora_layer_lowers_the_loss():
    torch.manual_seed(0)
    lora = LoraLinear(layer_of(), 8)
    before = copied(lora.base.state_dict())
    x, target = torch.randn(64, K), torch.randn(64, N)
    optimizer = torch.optim.Adam([lora.lora_a, lora.lora_b], 1e-2)
    losses = []
    for _ in range(60):
        loss = (lora(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert same_state(lora.base.state_dict(), before)


# --- quantize_ -----------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, shared: nn.Linear) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.up_proj = nn.Linear(width, 2 * width, bias=False)
        self.down_proj = nn.Linear(2 * width, width, bias=False)
        self.shared = shared

    def forward(self, x):
        return x + self.shared(self.q_proj(x)) + self.down_proj(torch.relu(self.up_proj(x)))


class Tiny(nn.Module):
    """Embedding, two blocks that share a layer, a head tied to the embedding."""

    def __init__(self, width: int = 40, tie: bool = True, head: str = "lm_head") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(31, width)
        shared = nn.Linear(width, width)
        self.blocks = nn.ModuleList([Block(width, shared), Block(width, shared)])
        self.score = nn.Linear(width, 3)
        self.add_module(head, nn.Linear(width, 31, bias=False))
        self.head_name = head
        if tie:
            getattr(self, head).weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return getattr(self, self.head_name)(x)


def packed_names(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, NF4Linear)
    }


ALL = {
    f"blocks.{i}.{name}" for i in (0, 1) for name in ("q_proj", "up_proj", "down_proj", "shared")
} | {"score"}


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_quantize_skips_the_head_and_tied_weights(tie):
    model = Tiny(tie=tie)
    assert halfbyte.quantize_(model) is model
    assert packed_names(model) == ALL
    assert model.blocks[0].shared is model.blocks[1].shared
    assert type(model.lm_head) is nn.Linear
    assert (model.lm_head.weight is model.embed.weight) == tie
    assert model(torch.arange(8)[None]).isfinite().all()


def test_quantize_skips_tied_weights_under_any_name():
    model = Tiny(tie=True, head="readout")
    assert packed_names(halfbyte.quantize_(model)) == ALL
    model = Tiny(tie=False, head="readout")
    assert packed_names(halfbyte.quantize_(model)) == ALL | {"readout"}


def test_quantize_skips_the_output_embeddings():
    model = Tiny(tie=False, head="readout")
    model.get_output_embeddings = lambda: model.readout
    assert packed_names(halfbyte.quantize_(model)) == ALL


def test_quantize_skips_named_modules():
    model = halfbyte.quantize_(Tiny(), skip_modules=["lm_head", "score", "blocks.0.q_proj"])
    assert packed_names(model) == ALL - {"score", "blocks.0.q_proj"}
    model = halfbyte.quantize_(Tiny(), skip_modules=["down_proj"])
    assert packed_names(model) == ALL - {"blocks.0.down_proj", "blocks.1.down_proj"}


def test_a_name_to_skip_must_not_be_a_bare_string():
    """`set("score")` would be letters: nothing skipped, and no word about it."""
    with pytest.raises((TypeError, ValueError), match="skip_modules"):
        halfbyte.quantize_(Tiny(), skip_modules="score")


def test_quantize_of_a_bare_linear_says_that_it_cannot():
    """There is no parent to put the packed layer into; silence would leave it dense."""
    with pytest.raises((TypeError, ValueError), match="NF4Linear.from_linear"):
        halfbyte.quantize_(nn.Linear(8, 8))


def test_quantized_values_are_those_of_each_layer():
    dense, model = Tiny(), halfbyte.quantize_(Tiny(), block_size=32, double_quant=False)
    for name in ALL:
        weight = halfbyte.quantize_nf4(dense.get_submodule(name).weight, 32, False)
        assert torch.equal(model.get_submodule(name).weight.view(-1), weight.packed), name
    again = {name: model.get_submodule(name) for name in ALL}
    halfbyte.quantize_(model)
    assert all(model.get_submodule(name) is module for name, module in again.items())


def test_each_dense_weight_is_freed_before_the_next_is_quantized():
    model = Tiny()
    weights = {
        name: weakref.ref(module.weight)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name != "lm_head"
    }
    calls = []

    def progress(done, total, name):
        gc.collect()
        calls.append((done, total, name))
        alive = {other for other, weight in weights.items() if weight() is not None}
        assert name not in alive
        assert len(alive) == total - done

    halfbyte.quantize_(model, progress=progress)
    assert [done for done, _, _ in calls] == list(range(1, 9))
    assert {total for _, total, _ in calls} == {8}
    assert calls[0][2] == "score" or calls[0][2].startswith("blocks.0")
    assert {name for _, _, name in calls} == set(weights)


def test_an_error_names_the_layer():
    model = Tiny()
    with torch.no_grad():
        model.blocks[1].up_proj.weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.up_proj: weight: .*nan at flat index 83 of"):
        halfbyte.quantize_(model)
    model = Tiny()
    model.score = nn.Linear(4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="score: weight: expected float32.*float64"):
        halfbyte.quantize_(model)


def test_other_modules_and_modes_are_left_alone():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(
        nn.Linear(8, 8), Special(8, 8), nn.LayerNorm(8), nn.Conv1d(2, 2, 1)
    ).eval()
    kinds = [type(module) for module in halfbyte.quantize_(model)]
    assert kinds == [NF4Linear, Special, nn.LayerNorm, nn.Conv1d]
    assert not model[0].training


def test_a_quantized_model_saves_and_loads():
    model = halfbyte.quantize_(Tiny()).eval()
    tokens = torch.arange(12).view(2, 6)
    y = model(tokens)
    state = copied(model.state_dict())
    fresh = halfbyte.quantize_(Tiny())
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.eval().load_state_dict(state)
    assert same_bits(fresh(tokens), y)
    assert same_state(fresh.state_dict(), state)


def test_hooks_move_to_the_packed_layer():
    model, calls = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), []
    handles = [
        model[0].register_forward_hook(lambda *args: calls.append("after")),
        model[0].register_forward_pre_hook(
            lambda module, args, kwargs: calls.append("before"), with_kwargs=True
        ),
        model[0].register_full_backward_hook(lambda *args: calls.append("backward")),
    ]
    halfbyte.quantize_(model)
    x = torch.randn(2, 8, requires_grad=True)
    model(x).sum().backward()
    assert calls == ["before", "after", "backward"]
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert len(calls) == 3


def test_a_layer_whose_forward_was_replaced_is_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].forward = lambda x: x
    with pytest.raises(ValueError, match="0: forward: expected nn.Linear's own"):
        halfbyte.quantize_(model)


@pytest.mark.parametrize("names", [["down_prj"], ["lm_head", "blocks.2.q_proj", "score"]])
def test_a_name_to_skip_that_fits_nothing_is_an_error(names):
    model = Tiny()
    wrong = next(name for name in names if name not in ("lm_head", "score"))
    with pytest.raises(ValueError, match=f"skip_modules: .* of Tiny, got '{wrong}'"):
        halfbyte.quantize_(model, skip_modules=names)
    assert not packed_names(model)


@pytest.mark.parametrize("stack", [False, True], ids=["layer", "encoder"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer_encoder_layers_take_the_slow_path(activation, stack):
    """torch's fast path hands the layer's weights, as dense ones, to a kernel of its own."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 24, activation=activation, batch_first=True)
    if stack:
        model = nn.TransformerEncoder(model, 2)
    halfbyte.quantize_(model)
    x = torch.randn(2, 5, 16)
    model.eval()
    with torch.no_grad():
        y = model(x)
    with torch.enable_grad():  # a graph is wanted: the slow path in any case
        want = model(x.clone().requires_grad_())
    assert relative_error(y, want.detach()) <= 1e-5
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    with torch.no_grad():
        assert model(x, src_key_padding_mask=mask).isfinite().all()


def test_an_adapter_leaves_the_dense_layer_s_bias_alone():
    linear = nn.Linear(K, N)
    lora = LoraLinear.from_linear(linear, 4)
    assert linear.bias.requires_grad and not lora.base.bias.requires_grad
    assert torch.equal(lora.base.bias, linear.bias) and lora.base.bias is not linear.bias
    assert LoraLinear.from_linear(nn.Linear(K, N, bias=False), 4).base.bias is None


def test_compute_dtype_casts_there_and_back():
    plain = layer_of()
    layer = NF4Linear(plain.nf4_weight, plain.bias, compute_dtype=torch.bfloat16)
    x = torch.randn(3, K)
    assert same_bits(layer(x), plain(x.bfloat16()).float())
    lora, other = LoraLinear(layer, 3).eval(), LoraLinear(plain, 3).eval()
    other.load_state_dict(lora.state_dict())
    assert same_bits(lora(x), other(x.bfloat16()).float())
    for wrong in (torch.float64, torch.int8, "bfloat16"):
        with pytest.raises(ValueError, match=f"compute_dtype: .* got {wrong}"):
            NF4Linear(plain.nf4_weight, compute_dtype=wrong)
