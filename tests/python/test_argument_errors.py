"""Arguments that do not fit are named, with what was expected and what came."""

import pytest
import torch

import halfbyte
from halfbyte.nn import LoraLinear, NF4Linear

WEIGHT = halfbyte.quantize_nf4(torch.ones(8, 64))
A, B = torch.ones(4, 64), torch.ones(8, 4)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor(1.0), r"x: expected a last dimension of 64 .*got \[\]"),
        (torch.ones(3, 63), r"x: expected a last dimension of 64 .*got \[3, 63\]"),
        (torch.ones(3, 64).double(), "x: expected float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_x(x, message):
    with pytest.raises(ValueError, match=message):
        halfbyte.nf4_linear(x, WEIGHT)


def test_a_dense_weight():
    with pytest.raises(TypeError, match="weight: expected an NF4Weight, got Tensor"):
        halfbyte.nf4_linear(torch.ones(3, 64), torch.ones(8, 64))


@pytest.mark.parametrize("seed", [2**64, 2**63, -(2**63)])
def test_a_seed_beyond_64_bits(seed):
    with pytest.raises(ValueError, match=f"seed: expected .*got {seed}"):
        halfbyte.lora_linear(torch.ones(3, 64), WEIGHT, A, B, dropout=0.5, seed=seed)
    halfbyte.lora_linear(torch.ones(3, 64), WEIGHT, A, B, dropout=0.5, seed=2**63 - 1)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number(alpha):
    with pytest.raises(ValueError, match=f"alpha: expected a finite number, got {alpha}"):
        LoraLinear(NF4Linear(WEIGHT), 4, alpha)
