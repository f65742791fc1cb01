"""Mixture-of-experts weights that transformers keeps in one tensor, packed expert by expert.

    h = gate(x W1[e]^T)          W1 = gate_up_proj [E, 2I, H]
    y = sum over the experts e of a token of p(e) * h W2[e]^T      W2 = down_proj [E, H, I]

Each expert's matrix is a packed weight of its own: no block of weights and no block of scales
straddles two experts. Parameters, for each of the two (X = `gate_up_proj`, `down_proj`), which are
also the keys of the state dict:

    X                 uint8 [E, ceil(N K / 2)]
    X_absmax          uint8 [E, blocks], or int32 bit patterns of float32
    X_nested_absmax   int32 [E, ceil(blocks / 256)]     double-quantized only
    X_nested_offset   int32 [E, 1]                      double-quantized only

The code book is the standard one; block size and code book are not in the state dict. LoRA through
PEFT's `target_parameters` runs fused, one expert at a time: no dense copy of the experts is made.
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from halfbyte import checkpoint
from halfbyte.autograd import lora_linear
from halfbyte.nf4_weight import NF4Weight, quantize_4bit

PARAMETERS = ("gate_up_proj", "down_proj")
# Field of an NF4Weight -> what its Parameter's name adds.
_SUFFIXES = {
    "packed": "",
    "absmax": "_absmax",
    "nested_absmax": "_nested_absmax",
    "offset": "_nested_offset",
}


def why_not_packed(module: nn.Module) -> str:
    """ "" where `module` holds fused experts that `NF4Experts` can pack, else a reason."""
    tensors = [getattr(module, name, None) for name in PARAMETERS]
    if not all(isinstance(t, nn.Parameter) and t.dim() == 3 for t in tensors):
        return "expected Parameters gate_up_proj [E, 2I, H] and down_proj [E, H, I]"
    traits = {"has_gate": True, "has_bias": False, "is_transposed": False}
    for trait, wanted in traits.items():
        if getattr(module, trait, None) is not wanted:
            return f"expected {trait}={wanted}, got {getattr(module, trait, None)}"
    if getattr(module, "has_post_expert_norm", False):
        return "expected experts without a norm behind each"
    extra = {n for n, _ in module.named_parameters()} - set(PARAMETERS)
    return f"expected no other parameters, got {sorted(extra)}" if extra else ""


class NF4Experts(nn.Module):
    """Fused experts with packed, frozen weights, in the place of a transformers experts module.

    x [T, H] float32, bfloat16 or float16; top_k_index int64 [T, top_k]; top_k_weights [T, top_k];
    y [T, H] in x's dtype. Differentiable in x, in `top_k_weights` and in adapters. A token's sum is
    taken in x's dtype, in the order of the experts.

    `NF4Experts(experts)` takes the weights of `experts`; on the meta device it keeps them dense
    until `pack` brings each, or until `allocate` makes room for packed ones. ValueError where
    `why_not_packed` gives a reason.
    """

    def __init__(
        self,
        experts: nn.Module,
        block_size: int = 64,
        double_quant: bool = True,
        codebook: str = "nf4",
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if reason := why_not_packed(experts):
            raise ValueError(f"experts: {reason}")
        # Settings of the dense module, such as `config` or a gate's limit, and its activation.
        own = vars(self)
        own.update({k: v for k, v in vars(experts).items() if k not in own})
        self._modules.update(experts._modules)
        self.dense_class = type(experts)
        self.block_size, self.double_quant, self.codebook = block_size, double_quant, codebook
        self.compute_dtype = compute_dtype
        self.weight_dtype = experts.gate_up_proj.dtype
        self.shapes = {name: getattr(experts, name).shape for name in PARAMETERS}
        self.num_experts = self.shapes["gate_up_proj"][0]
        self.adapters: dict[str, tuple[torch.Tensor, torch.Tensor, float]] = {}
        for name in PARAMETERS:
            dense = getattr(experts, name)
            self.register_parameter(name, nn.Parameter(dense.detach(), requires_grad=False))
            if not dense.is_meta:
                self.pack(name, dense)
        self.train(experts.training)

    def is_packed(self, name: str) -> bool:
        """Whether weight `name` is packed by now."""
        return not getattr(self, name).is_floating_point()

    @torch.no_grad()
    def pack(self, name: str, dense: torch.Tensor) -> None:
        """Packs `dense` [E, N, K] as weight `name`; ValueError names the expert that cannot be."""
        if dense.shape != self.shapes[name]:
            raise ValueError(f"expected {list(self.shapes[name])}, got {list(dense.shape)}")
        self.weight_dtype = dense.dtype
        stacked: dict[str, torch.Tensor] = {}
        for expert, matrix in enumerate(dense):
            try:
                weight = quantize_4bit(matrix, self.codebook, self.block_size, self.double_quant)
            except ValueError as error:
                raise ValueError(f"expert {expert}: {error}") from None
            for field, tensor in weight.tensors().items():
                if expert == 0:
                    stacked[field] = tensor.new_empty(len(dense), tensor.numel())
                stacked[field][expert] = tensor
        self._register(name, stacked)

    def allocate(self) -> None:
        """Makes room on the meta device for packed weights."""
        for name, (count, *shape) in self.shapes.items():
            weight = checkpoint.empty_weight(
                torch.Size(shape),
                self.weight_dtype,
                self.block_size,
                self.double_quant,
                self.codebook,
            )
            fields = weight.tensors().items()
            self._register(name, {k: t.new_empty(count, t.numel()) for k, t in fields})

    def _register(self, name: str, fields: dict[str, torch.Tensor]) -> None:
        for field, tensor in fields.items():
            bits = tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor
            parameter = nn.Parameter(bits, requires_grad=False)
            self.register_parameter(name + _SUFFIXES[field], parameter)

    def nf4_weight(self, name: str, expert: int) -> NF4Weight:
        """The packed matrix [N, K] of one expert; shares this module's memory."""
        parts = {f: self._parameters.get(name + suffix) for f, suffix in _SUFFIXES.items()}
        return NF4Weight(
            **{field: None if p is None else p[expert] for field, p in parts.items()},
            shape=torch.Size(self.shapes[name][1:]),
            dtype=self.weight_dtype,
            block_size=self.block_size,
            codebook=self.codebook,
        )

    def dequantize(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight `name` [E, N, K], in `dtype` or in the dtype it was packed from."""
        dense = torch.empty(
            self.shapes[name], dtype=dtype or self.weight_dtype, device=getattr(self, name).device
        )
        for expert, matrix in enumerate(dense):
            self.nf4_weight(name, expert).dequantize(out=matrix)
        return dense

    def to_experts(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The dense experts module that this one stands for, with dequantized weights."""
        with torch.device("meta"):
            experts = self.dense_class(self.config)
        for name in PARAMETERS:
            setattr(experts, name, nn.Parameter(self.dequantize(name, dtype)))
        return experts.train(self.training)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # a token's place without an expert
                continue
            token, place = torch.where(top_k_index == expert)
            gated = self._linear("gate_up_proj", expert, hidden_states[token])
            y = self._linear("down_proj", expert, self.dense_class._apply_gate(self, gated))
            y = y * top_k_weights[token, place, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def _linear(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        inner = x if self.compute_dtype is None else x.to(self.compute_dtype)
        lora_a, lora_b, scaling = self.adapters.get(name, (None, None, 1.0))
        if lora_a is not None:
            lora_a, lora_b = lora_a[expert], lora_b[expert]
        y = lora_linear(inner, self.nf4_weight(name, expert), lora_a, lora_b, scaling)
        return y if self.compute_dtype is None else y.to(x.dtype)

    def extra_repr(self) -> str:
        kind = f"{self.codebook}, block_size={self.block_size}"
        kind += ", double_quant=True" if self.double_quant else ""
        shapes = ", ".join(f"{name}={list(shape)}" for name, shape in self.shapes.items())
        return f"{shapes}, {kind}"


def _adopt(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Registration hook: a PEFT ParamWrapper over packed experts becomes the one of halfbyte."""
    if name != "base_layer":
        return
    layers = sys.modules.get("peft.tuners.lora.layer")
    if layers is None or type(module) is not layers.ParamWrapper:
        return
    if isinstance(getattr(submodule, "get_base_layer", lambda: submodule)(), NF4Experts):
        from halfbyte.integrations.experts_lora import ParamWrapper

        module.__class__ = ParamWrapper


register_module_module_registration_hook(_adopt)
