"""Small models with PEFT adapters in pairs: on a packed base, and on stock PEFT over dense layers
with the dequantized weights."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import halfbyte

K, N = 40, 33


class Two(nn.Module):
    """Two linear layers, one with a bias; K = 40 is no multiple of the block size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(K, N)
        self.second = nn.Linear(N, K, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def lora_config(**changes) -> LoraConfig:
    settings = {"r": 6, "lora_alpha": 7, "target_modules": ["first", "second"]}
    return LoraConfig(**(settings | changes))


def packed_base(dtype: torch.dtype = torch.float32) -> nn.Module:
    return halfbyte.quantize_(Two().to(dtype))


def dense_base(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights as `packed_base`, in nn.Linear layers."""
    model, packed = Two(), packed_base(dtype)
    for name in ("first", "second"):
        setattr(model, name, getattr(packed, name).to_linear())
    return model


def randomize(model: nn.Module, seed: int = 1) -> None:
    """Draw every trainable parameter: adapters that start at zero or one hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.data = (parameter.data + noise).to(parameter.dtype)


def pair(config, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """(packed, dense) with the same random adapter of `config`."""
    dense = get_peft_model(dense_base(dtype), copy.deepcopy(config))
    randomize(dense)
    packed = get_peft_model(packed_base(dtype), copy.deepcopy(config))
    copy_adapters(dense, packed)
    return packed, dense


def copy_adapters(source: nn.Module, target: nn.Module) -> None:
    for name, parameter in source.named_parameters():
        if parameter.requires_grad:
            target.get_parameter(name).data = parameter.data.clone()


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    error = (actual - expected).norm() / expected.norm()
    assert error <= tolerance, f"relative error {error:.2e}, expected at most {tolerance:.0e}"


def same_step(packed: nn.Module, dense: nn.Module, x: torch.Tensor, tolerance=1e-5, **kwargs):
    """Outputs, the gradient of x and of every trainable parameter agree."""
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = []
    for model, i in zip((packed, dense), inputs, strict=True):
        torch.manual_seed(5)
        outputs.append(model(i, **kwargs))
    close(*outputs, tolerance)
    for output in outputs:
        output.square().sum().backward()
    close(inputs[0].grad, inputs[1].grad, tolerance)
    trained = {n: p.grad for n, p in dense.named_parameters() if p.grad is not None}
    assert trained
    for name, gradient in trained.items():
        close(packed.get_parameter(name).grad, gradient, tolerance)


def rows(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(seed))
