"""Calibrated 4-bit weights: the format of `halfbyte.nf4_weight`, chosen for a layer's inputs.

A linear layer y = W x whose inputs have second moments H = E[x x^T] is damaged by the quantized
weight Q as much as

    damage(Q) = tr (W - Q) H (W - Q)^T = E |W x - Q x|^2

Plain quantization looks at W - Q only. Here

    1. block scales   s[b] = argmin sum over the block of H[k, k] (w - s level)^2, signed
    2. double quantization of the scales; codes are chosen for the scales as they will be decoded
    3. codes          columns in order of falling H[k, k], each against what the errors of the
                      columns before it leave to be made good (GPTQ, with activation order)
    4. sweeps         each code again, with all others as they are; the damage never rises

with H + damping mean(diag H) I in place of H: the moments come from a sample. The bytes mean what
they always mean: `NF4Weight`, checkpoints and every reader stay as they are. Steps 1, 3 and 4 run
in the native kernels of `calibrate.h`, on the CPU; any number of threads makes the same bytes of
the same H. Blocks may straddle rows.
"""

from __future__ import annotations

import dataclasses

import torch

import halfbyte.ops.calibrate  # noqa: F401  (registers the operators)
from halfbyte._native import _C
from halfbyte.nf4_weight import CODEBOOKS, NF4Weight
from halfbyte.ops.nf4 import DOUBLE_QUANT_BLOCK

DAMPING = 0.3
SWEEPS = 2
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class InputMoments:
    """Second moments of a layer's inputs, factorised once for all weights that share them.

    ============  ======  ==========================================================================
    diagonal      [K]     float32: H[k, k], damped, as shares of the largest
    order         [K]     int64: columns by falling H[k, k]
    feedback      [K, K]  float32, in that order: unit lower triangular, V^T of H = V D V^T;
                          None where only the diagonal is known
    descent       [K, K]  float32, in that order: H[k, j] / H[k, k]
    ============  ======  ==========================================================================
    """

    diagonal: torch.Tensor
    order: torch.Tensor
    feedback: torch.Tensor | None = None
    descent: torch.Tensor | None = None

    @classmethod
    def from_moments(cls, moments: torch.Tensor, damping: float = DAMPING) -> InputMoments:
        """From H [K, K], or its diagonal [K] (scale search alone); factorised in float64.

        Raises ValueError for another shape, values that are not finite, a negative diagonal, and
        an H that is not positive semidefinite.
        """
        moments = moments.detach().cpu()
        if moments.dim() not in (1, 2) or moments.shape[0] != moments.shape[-1]:
            raise ValueError(f"moments: expected [K, K] or [K], got {list(moments.shape)}")
        if not damping > 0:
            raise ValueError(f"damping: expected a positive number, got {damping}")
        if not torch.isfinite(moments).all():
            bad = int((~torch.isfinite(moments)).flatten().nonzero()[0])
            value = moments.flatten()[bad].item()
            raise ValueError(f"moments: expected finite values, got {value} at index {bad}")
        diagonal = (moments.diagonal() if moments.dim() == 2 else moments).double()
        if (diagonal < 0).any():
            raise ValueError(
                f"moments: expected a diagonal of at least 0, got {diagonal.min().item()}"
            )
        added = damping * diagonal.mean() if diagonal.any() else 1.0  # an input that never came
        diagonal = diagonal + added
        order = torch.argsort(diagonal, descending=True, stable=True)
        shares = (diagonal / diagonal.max()).float()
        if moments.dim() == 1:
            return cls(shares, order)
        ordered = moments[order][:, order].double()
        ordered.diagonal().add_(added)
        descent = (ordered / ordered.diagonal()[:, None]).float()
        return cls(shares, order, _feedback(ordered), descent)


def _feedback(moments: torch.Tensor) -> torch.Tensor:
    """V^T of moments = V D V^T, V unit upper triangular, by the Cholesky factor from the other
    end: the last column first."""
    lower, failed = torch.linalg.cholesky_ex(moments.flip(0, 1))
    if failed:
        raise ValueError(
            f"moments: expected a positive semidefinite matrix, got one whose factorisation fails "
            f"at column {int(failed)}"
        )
    transposed = lower.flip(0, 1).T
    return (transposed / transposed.diagonal()[:, None]).float()


def quantize_calibrated(
    weight: torch.Tensor,
    moments: torch.Tensor | InputMoments,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    codebook: str = "nf4",
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
) -> NF4Weight:
    """Quantizes `weight` [N, K] (float32, bfloat16 or float16) for inputs with these `moments`.

    `moments`: E[x x^T] [K, K]; its diagonal [K], for scale search without error feedback; or an
    `InputMoments`, which weights on the same input share (`damping` is then its own). Any positive
    multiple does as well. `sweeps` of coordinate descent follow the error feedback. The result lies
    on the weight's device.

    Raises ValueError, before any work, for what does not fit or is not finite.
    """
    if codebook not in CODEBOOKS:
        raise ValueError(f"codebook: expected nf4, fp4 or int4, got {codebook!r}")
    if weight.dtype not in _FLOATS or weight.dim() != 2:
        raise ValueError(
            f"weight: expected float32, bfloat16 or float16 [N, K], got {weight.dtype} "
            f"{list(weight.shape)}"
        )
    if sweeps < 0:
        raise ValueError(f"sweeps: expected 0 or more, got {sweeps}")
    if not isinstance(moments, InputMoments):
        moments = InputMoments.from_moments(moments, damping)
    if moments.diagonal.numel() != weight.shape[1]:
        raise ValueError(
            f"moments: expected K = {weight.shape[1]} as the weight has, got "
            f"{moments.diagonal.numel()}"
        )
    dense = weight.detach().cpu().float().contiguous()
    scales = torch.ops.halfbyte.search_scales(dense, moments.diagonal, codebook, block_size)
    absmax, nested_absmax, offset = scales, None, None
    if double_quant:
        absmax, nested_absmax, offset, scales = _double_quantized(scales)
    codes = _codes(dense, scales, moments, codebook, block_size, sweeps)
    return NF4Weight(
        packed=_packed(codes, codebook).to(weight.device),
        absmax=absmax.to(weight.device),
        shape=weight.shape,
        dtype=weight.dtype,
        block_size=block_size,
        codebook=codebook,
        nested_absmax=None if nested_absmax is None else nested_absmax.to(weight.device),
        offset=None if offset is None else offset.to(weight.device),
    )


def _double_quantized(scales: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(codes, nested_absmax, offset, the scales that they decode to)."""
    offset = scales.mean().reshape(1) if scales.numel() else scales.new_zeros(1)
    if not torch.isfinite(offset):
        raise ValueError(
            f"weight: expected scales with a finite mean, got {offset.item()}; quantize with "
            "double_quant=False"
        )
    codes, nested = torch.ops.halfbyte.double_quantize(scales, offset)
    values = torch.tensor(_C.signed_dynamic_map(), dtype=torch.float32)
    per_block = nested.repeat_interleave(DOUBLE_QUANT_BLOCK)[: codes.numel()]
    return codes, nested, offset, values[codes.long()] * per_block + offset


def _codes(
    dense: torch.Tensor,
    scales: torch.Tensor,
    moments: InputMoments,
    codebook: str,
    block_size: int,
    sweeps: int,
) -> torch.Tensor:
    """uint8 [N, K]."""
    feedback, descent = moments.feedback, moments.descent
    if feedback is None:  # nothing to feed back: the nearest levels
        feedback = torch.eye(dense.shape[1])
    errors = torch.zeros_like(dense)
    code = torch.ops.halfbyte.feedback_codes
    codes = code(dense, scales, feedback, moments.order, True, codebook, block_size, errors)
    for _ in range(sweeps if descent is not None else 0):
        codes = code(dense, scales, descent, moments.order, False, codebook, block_size, errors)
    return codes


def _packed(codes: torch.Tensor, codebook: str) -> torch.Tensor:
    """Two codes a byte; the pad nibble of an odd count is the code of zero."""
    flat = codes.flatten()
    if flat.numel() % 2:
        zero = _C.codebook_levels(codebook).index(0.0)
        flat = torch.nn.functional.pad(flat, (0, 1), value=zero)
    return flat[0::2] << 4 | flat[1::2]
