"""Parameters, gradients and comparisons that the optimizer's test files share."""

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def parameters(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def set_gradients(params, seed, sigma=2.0, dtype=None):
    """Normal gradients with a log-normal scale a coordinate, the same for the same seed."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for param in params:
        scale = torch.exp(sigma * torch.randn(param.shape, generator=generator))
        gradient = (scale * torch.randn(param.shape, generator=generator)).to(dtype or param.dtype)
        param.grad = gradient.clamp(-6e4, 6e4)


def train(optimizer, params, steps, first=0):
    for t in range(first, first + steps):
        set_gradients(params, t)
        optimizer.step()


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].keys() == b[key].keys()
        for name, value in a[key].items():
            assert value.dtype == b[key][name].dtype, name
            assert torch.equal(value, b[key][name]), name
