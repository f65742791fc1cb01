"""A transformers model calibrated and packed to 4 bits, layer by layer.

    sample texts -> windows of tokens -> hidden states
    for each decoder layer: H = E[x x^T] of every linear layer's inputs, from the hidden states;
                            each weight packed for its H (`halfbyte.calibrate`);
                            on to the next layer with the hidden states that this one yields

`sequential` calibration shows each layer the inputs that it will get from the packed layers below
it, for one more pass through each.
Memory: the model, the windows' hidden states (windows x length x hidden size), and one decoder
layer's H and weights. Layers on the same input share one H and its factors. Layers run in bfloat16
where they are stored so and the processor computes in it, in float32 otherwise; sums are float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

import halfbyte
from halfbyte.calibrate import DAMPING, SWEEPS, InputMoments, quantize_calibrated
from halfbyte.integrations.transformers import NF4Config, NF4Quantizer
from halfbyte.nn import NF4Linear, _check_names, _linear_layers, _move_hooks

SAMPLES, LENGTH = 48, 512
_BANDS = 4  # of the upper triangle of H: the fewer entries are computed twice


def default_text() -> str:
    """Varied English for those who name no text of their own."""
    return resources.files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8")


def token_windows(
    texts: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int = SAMPLES,
    length: int = LENGTH,
) -> torch.Tensor:
    """int64 [at most samples, length]: windows spread evenly over the joined texts.

    The end-of-text token stands between texts. A text shorter than one window makes one shorter
    window. Raises ValueError for texts that yield fewer than two tokens.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = (
        (end if i else []) + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for i, text in enumerate(texts)
    )
    return row_windows(rows, samples, length)


def row_windows(
    rows: Iterable[Sequence[int]], samples: int = SAMPLES, length: int = LENGTH
) -> torch.Tensor:
    """`token_windows` of rows that are tokens already, such as those a model is trained on."""
    tokens = [token for row in rows for token in row]
    if len(tokens) < 2:
        raise ValueError(f"texts: expected text to calibrate with, got {len(tokens)} tokens")
    length = min(length, len(tokens))
    there = len(tokens) // length
    count = min(samples, there)
    starts = [i * there // count * length for i in range(count)]
    return torch.tensor([tokens[start : start + length] for start in starts])


def quantize_calibrated_(
    model: nn.Module,
    texts: str | Sequence[str] | torch.Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    codebook: str = "nf4",
    skip_modules: Sequence[str] = ("lm_head",),
    samples: int = SAMPLES,
    length: int = LENGTH,
    sequential: bool = False,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
    progress: Callable[[int, int, str], None] | None = None,
) -> nn.Module:
    """`halfbyte.quantize_`, codes and scales chosen for the inputs that `texts` give each layer.

    model      a causal language model of transformers, dense; changed in place and returned
    texts      text or texts like those that the model is for, with the model's `tokenizer`; or
               tokens, int64 [windows, length]; None: a short generic text
    samples    windows of `length` tokens at most
    sequential each layer sees what the packed layers below it yield; otherwise the dense ones

    Linear layers outside the decoder layers, and those that no sample reaches, are packed by
    absmax. `progress(done, total, name)` is called after each decoder layer.

    Raises ValueError for what `quantize_` refuses, for texts that yield nothing, and, naming the
    layer, for weights or activations that are not finite.
    """
    if isinstance(skip_modules, str):
        raise TypeError(f"skip_modules: expected names in a list, got the string {skip_modules!r}")
    _check_names(model, set(skip_modules) - {"lm_head"})
    if not isinstance(texts, torch.Tensor):
        if tokenizer is None:
            raise ValueError("tokenizer: expected the model's tokenizer with texts, got None")
        texts = token_windows(
            default_text() if texts is None else texts, tokenizer, samples, length
        )
    if texts.dim() != 2 or texts.dtype != torch.int64 or texts.numel() == 0:
        raise ValueError(
            f"texts: expected tokens int64 [windows, length], got {texts.dtype} {list(texts.shape)}"
        )
    options = {"block_size": block_size, "double_quant": double_quant, "codebook": codebook}
    names, layers = decoder_layers(model)
    targets = {
        id(getattr(*places[0])) for places in _linear_layers(model, set(skip_modules)).values()
    }
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            states = _LayerInputs.of(model, layers, texts)
            for done, (name, layer) in enumerate(zip(names, layers, strict=True), 1):
                _calibrate_layer(layer, name, targets, states, sequential, damping,
                                 {**options, "sweeps": sweeps})  # fmt: skip
                if progress is not None:
                    progress(done, len(layers), name)
    finally:
        model.train(training)
    return halfbyte.quantize_(model, skip_modules=skip_modules, **options)


def decoder_layers(model: nn.Module) -> tuple[list[str], list[nn.Module]]:
    """Names and modules of the decoder's layers: the module list that holds the most weights in
    linear layers. Raises ValueError where there is none."""
    best, most = None, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            linear = [m for m in module.modules() if type(m) is nn.Linear]
            if (weights := sum(m.weight.numel() for m in linear)) > most:
                best, most = (name, module), weights
    if best is None:
        raise ValueError(
            f"model: expected a list of layers with linear layers in {type(model).__name__}, "
            "got none"
        )
    return [f"{best[0]}.{i}" for i in range(len(best[1]))], list(best[1])


class _Enough(Exception):
    """The last layer's input is there; the rest of the model need not run."""


class _LayerInputs:
    """The hidden states of every window, and what else each layer is called with.

    `hidden`: [1, length, hidden size] a window, the next layer's input, in `dtype`. The other
    arguments (masks, positions) are the same for every window, as all have one length and no
    padding.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.hidden: list[torch.Tensor] = []
        self.arguments: dict[int, tuple[tuple, dict]] = {}

    @classmethod
    def of(cls, model: nn.Module, layers: list[nn.Module], windows: torch.Tensor) -> _LayerInputs:
        """What the first layer gets. Layers pass their input on meanwhile, without working."""
        states = cls(_compute_dtype(layers))
        device = model.get_input_embeddings().weight.device

        def record(layer, arguments, named):
            hidden, *rest = arguments
            states.arguments[id(layer)] = _cast((tuple(rest), named), states.dtype)
            if layer is layers[0]:
                states.hidden.append(hidden.to(states.dtype))
            if layer is layers[-1]:
                raise _Enough

        handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
        try:
            for layer in layers:
                layer.forward = lambda hidden, *arguments, **named: hidden
            for window in windows:
                with contextlib.suppress(_Enough):
                    model(window[None].to(device), use_cache=False)
        finally:
            for layer, handle in zip(layers, handles, strict=True):
                vars(layer).pop("forward", None)
                handle.remove()
        return states

    def run(self, layer: nn.Module) -> Iterator[torch.Tensor]:
        """The layer's output on each window."""
        arguments, named = self.arguments[id(layer)]
        for hidden in self.hidden:
            output = layer(hidden, *arguments, **named)
            yield output if isinstance(output, torch.Tensor) else output[0]


def _compute_dtype(layers: list[nn.Module]) -> torch.dtype:
    """bfloat16 where all weights are stored so and the processor computes in it."""
    stored = {p.dtype for layer in layers for p in layer.parameters() if p.is_floating_point()}
    device = next(layers[0].parameters()).device
    fast = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if stored == {torch.bfloat16} and fast else torch.float32


def _cast(value, dtype: torch.dtype):
    """`value` with its floating tensors, in tuples and dictionaries too, in `dtype`."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value


@contextlib.contextmanager
def _in_dtype(layer: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The layer's floating Parameters in `dtype`; afterwards, those that are left, as they were."""
    before = {id(p): p.dtype for p in layer.parameters() if p.is_floating_point()}
    for parameter in layer.parameters():
        if id(parameter) in before:
            parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter in layer.parameters():
            if id(parameter) in before:
                parameter.data = parameter.data.to(before[id(parameter)])


class _Moments:
    """Sums of x x^T of the linear layers of one decoder layer; one sum for those on one input."""

    def __init__(self, linear: dict[str, nn.Linear]) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.leader: dict[str, str] = {}  # of those on one input, the first that was called
        self._inputs: list[tuple[str, torch.Tensor]] = []
        self.handles = [
            layer.register_forward_pre_hook(self._hook(name)) for name, layer in linear.items()
        ]

    def _hook(self, name: str):
        def add(module, arguments):
            x = arguments[0]
            if name not in self.leader:
                same = (leader for leader, seen in self._inputs if seen is x)
                self.leader[name] = next(same, name)
            if self.leader[name] != name:
                return
            self._inputs.append((name, x))
            rows = x.reshape(-1, x.shape[-1]).float()
            k = rows.shape[1]
            if name not in self.sums:
                self.sums[name] = rows.new_zeros(k, k)
            step = -(-k // _BANDS)
            for first in range(0, k, step):  # the upper triangle, in bands
                band = rows[:, first : first + step].T
                self.sums[name][first : first + step, first:].addmm_(band, rows[:, first:])

        return add

    def pop(self, name: str) -> torch.Tensor:
        """The sum of one input, whole."""
        upper = self.sums.pop(name).triu_()
        return upper + upper.triu(1).T

    def next_window(self) -> None:
        self._inputs.clear()

    def close(self) -> None:
        self._inputs.clear()
        for handle in self.handles:
            handle.remove()


def _calibrate_layer(
    layer: nn.Module,
    name: str,
    targets: set[int],
    states: _LayerInputs,
    sequential: bool,
    damping: float,
    options: dict,
) -> None:
    """Packs the linear layers of one decoder layer and moves `states` past it."""
    linear = {n: m for n, m in layer.named_modules() if id(m) in targets}
    dtypes = {n: m.weight.dtype for n, m in linear.items()}
    moments = _Moments(linear)
    with _in_dtype(layer, states.dtype):
        outputs = []
        try:
            for output in states.run(layer):
                moments.next_window()
                outputs.append(None if sequential else output)
        finally:
            moments.close()
        followers: dict[str, list[str]] = {}
        for n, leader in moments.leader.items():
            followers.setdefault(leader, []).append(n)
        for leader, members in followers.items():
            try:
                shared = InputMoments.from_moments(moments.pop(leader), damping)
            except ValueError as error:
                raise ValueError(f"{name}.{leader}: inputs: {error}") from None
            for n in members:
                _pack(layer, n, linear[n], dtypes[n], f"{name}.{n}", shared, options)
        for i, output in enumerate(states.run(layer) if sequential else outputs):
            states.hidden[i] = output


def _pack(
    layer: nn.Module,
    name: str,
    linear: nn.Linear,
    dtype: torch.dtype,
    full_name: str,
    moments: InputMoments,
    options: dict,
) -> None:
    """Puts the packed layer in the place of `linear`."""
    try:
        weight = quantize_calibrated(linear.weight.to(dtype), moments, **options)
        packed = NF4Linear(weight, linear.bias).train(linear.training)
        _move_hooks(linear, packed)
    except ValueError as error:
        raise ValueError(f"{full_name}: {error}") from None
    for parent in layer.modules():
        for attribute, child in list(parent._modules.items()):
            if child is linear:
                setattr(parent, attribute, packed)


def calibrate_model(
    model: PreTrainedModel,
    texts: str | Sequence[str] | torch.Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: NF4Config | None = None,
    **options: object,
) -> PreTrainedModel:
    """A dense model as `from_pretrained(..., quantization_config=config)` gives it, calibrated.

    `texts`, `tokenizer` and `options` are those of `quantize_calibrated_`. `save_pretrained` then
    writes bitsandbytes' layout and config, which load everywhere as a plainly packed model does.
    (`from_pretrained` itself packs tensor by tensor and cannot run the model, so `NF4Config` has no
    setting for this.)

    Raises ValueError for what `quantize_calibrated_` refuses, and for layers that `config` would
    pack and that are not `nn.Linear`: GPT-2's Conv1D, fused experts.
    """
    quantizer = NF4Quantizer(config or NF4Config(), pre_quantized=False)
    settings = quantizer.quantization_config
    settings.left_dense = quantizer.modules_left_dense(model)
    dense = [*settings.left_dense, *(model._keep_in_fp32_modules or [])]
    skip = []
    for name, module in model.named_modules(remove_duplicate=False):
        to_pack = should_convert_module(name, dense)
        if to_pack and (isinstance(module, Conv1D) or quantizer.packs_experts(module)):
            raise ValueError(f"{name}: expected linear layers, got {type(module).__name__}")
        if type(module) is nn.Linear and not to_pack:
            skip.append(name)
    quantize_calibrated_(
        model,
        texts,
        tokenizer,
        block_size=settings.block_size,
        double_quant=settings.double_quant,
        codebook=settings.codebook,
        skip_modules=skip,
        **options,
    )
    for module in model.modules():
        if isinstance(module, NF4Linear):
            module.compute_dtype = settings.compute_dtype
    model.hf_quantizer = quantizer
    model.config.quantization_config = settings
    model.quantization_method = settings.quant_method
    model.is_quantized = True
    return model
