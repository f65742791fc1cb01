"""LoRA linear layers for the CUDA tests: their tensors, exact values and bounds, and the calls.

Held to float64 sums over the decoded weight. A bound is derived for every output from the sum of
the absolute products, the length of the sum and the rounding of each factor:

    u = 2^-8, 2^-11          half a unit of bf16, fp16
    t = 2^-11                half a unit of tf32: A, B, T, U in the LoRA products of 16-bit layers
    e = 2^-23                a rounding of an fp32 sum; tensor cores may cut instead of round
"""

import ctypes as C
import re

import numpy as np
import torch

import cuda_api as api
from formats import levels_of, signed_map

HALF_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}
TF32, SUM = 2.0**-11, 2.0**-23

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MMA, ANY = ("forward_sm80", "backward_sm80"), ("any_shape", "any_shape")
CASES = {
    # forward kernel, backward kernel, layer
    "mma": (*MMA, (17, 72, 128, 16, BF16), {"p": 0.5}),
    "mma, 128 rows, one and a half column tiles": (
        *MMA, (129, 136, 192, 3, FP16), {"double": False, "block": 128}),
    "mma, split forward": (
        *MMA, (65, 8, 640, 33, BF16), {"codebook": "int4", "bias": False, "lora_dtype": BF16}),
    "mma, split backward": (*MMA, (20, 520, 64, 1, FP16), {"codebook": "fp4", "p": 0.3}),
    "mma, no LoRA": (*MMA, (64, 64, 64, 0, BF16), {"block": 4096}),
    "one row": ("few_rows", "backward_sm80", (1, 24, 64, 1, BF16), {}),
    "8 rows": ("few_rows", "backward_sm80", (8, 40, 192, 16, FP16), {"p": 0.5, "block": 256}),
    "16 rows, split": (
        "few_rows", "backward_sm80", (16, 16, 4160, 3, BF16),
        {"double": False, "lora_dtype": FP16}),
    "9 rows, ragged N": ("few_rows", "any_shape", (9, 35, 128, 0, BF16), {"codebook": "int4"}),
    "few rows, odd K": ("few_rows_fma", "any_shape", (3, 7, 65, 3, BF16), {"p": 0.5}),
    "few rows, fp32": ("few_rows_fma", "fp32", (16, 9, 264, 16, FP32), {"block": 32}),
    "few rows, unaligned codes": ("few_rows_fma", "any_shape", (5, 8, 64, 1, FP16), {"offset": 1}),
    "own tables": ("few_rows", "backward_sm80", (2, 8, 64, 2, BF16), {"own_tables": True}),
    "1 x 1 x 1": ("few_rows_fma", "any_shape", (1, 1, 1, 1, FP16), {}),
    "any shape, odd K": (*ANY, (18, 67, 33, 16, FP16), {"p": 0.5}),
    "any shape, block - 1": (*ANY, (65, 9, 63, 1, BF16), {"double": False}),
    "any shape, block + 1": (*ANY, (70, 65, 65, 3, BF16), {"codebook": "fp4"}),
    "any shape, blocks of 32": (*ANY, (17, 16, 64, 16, BF16), {"block": 32, "p": 0.1}),
    "any shape, unaligned codes": (*ANY, (33, 8, 128, 0, FP16), {"offset": 3}),
    "any shape, unaligned activations": (*ANY, (17, 8, 64, 3, BF16), {"x_offset": 1}),
    "any shape, split": (*ANY, (17, 513, 520, 2, BF16), {"block": 4096}),
    "fp32": ("fp32", "fp32", (17, 65, 31, 1, FP32), {"p": 0.3}),
    "fp32, large rank": ("fp32", "fp32", (70, 66, 130, 70, FP32), {"double": False}),
    "fp32, split": ("fp32", "fp32", (18, 520, 600, 3, FP32), {"lora_dtype": BF16, "block": 128}),
    "mma, large rank": (*MMA, (17, 8, 64, 70, BF16), {"p": 0.5}),
}  # fmt: skip

# Ends of tiles, runs and sums, every residue that a kernel tells apart: (forced variant, layer).
RAGGED = [
    # Rows of an odd length end in the middle of a store; a short last chunk; several rank steps.
    (None, (63, 67, 128, 17, BF16), {}),
    (None, (33, 130, 640, 3, BF16), {}),
    (None, (16, 35, 192, 3, BF16), {}),
    (None, (61, 193, 192, 16, BF16), {}),
    (None, (30, 517, 65, 5, BF16), {}),
    (None, (30, 520, 64, 5, BF16), {}),
    (None, (15, 9, 333, 5, FP32), {}),
    (None, (16, 41, 1055, 35, FP32), {}),
    (None, (13, 70, 1052, 3, FP32), {}),
    (None, (6, 9, 261, 2, FP32), {}),
    # Sums in 2, 3, .. 9 parts.
    *((None, (17 + 6 * (parts - 2), 9 + parts % 4, 258 * parts, 0, BF16), {})
      for parts in range(2, 10)),
    # The same of the LoRA products, whose sums are over K and, with many rows, over M.
    *((None, (18, 5, 128 * parts + 5, 2, dtype), {})
      for parts, dtype in enumerate([BF16, FP32, BF16, FP32, BF16, FP32, FP32], 2)),
    *((None, (290, 12, 68 + i, 5, dtype), {"lora_dtype": lora_dtype})
      for i, (dtype, lora_dtype) in enumerate(
          [(BF16, BF16), (BF16, FP16), (FP32, BF16), (FP32, FP16)])),
    (None, (61, 9, 300, 61, FP32), {}),
    # Rows that are not aligned, for one reason or another.
    (None, (17, 8, 64, 3, FP32), {"x_offset": 1}),
    (None, (19, 11, 35, 9, FP32), {"lora_dtype": BF16}),
    (None, (19, 11, 34, 9, FP32), {"lora_dtype": FP16}),
    # A last chunk of one block, fetched before the loop and in it, in its even and its odd half.
    *((None, (m, 17 + m, k, 13, BF16), {})
      for m, k in ((3, 2112), (5, 3136), (8, 4288), (4, 1088))),
    # Few rows of each number, each with its own remainder of a row of W; types of A, B and bias.
    *((None, (m, 3 + m % 4, 256 + m, 33, BF16), {"lora_dtype": lora_dtype})
      for m, lora_dtype in enumerate([FP32, BF16, FP16, FP32] * 4, 1)),
    *((None, (m, 2, 270 + m, 5, dtype), {}) for m, dtype in enumerate([FP32, FP16] * 3, 3)),
    # Every part of a tile is the last one; activations, A and B of each type.
    *((variant, (1 + 9 * i, 63 - 9 * i, 41 + i, 11 + i, dtype), {"lora_dtype": lora_dtype})
      for variant, dtypes in (
          ("cuda_fma", [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, FP16), (BF16, FP32),
                        (FP16, BF16), (FP32, BF16)]),
          ("cuda_mma_any_shape", [(BF16, FP32), (FP16, BF16), (BF16, FP16), (FP16, FP32),
                                  (BF16, BF16), (FP16, FP16), (BF16, FP32)]))
      for i, (dtype, lora_dtype) in enumerate(dtypes)),
]  # fmt: skip


class Layer:
    """One call's tensors, made from a seed. `dtype`: of activations; A and B have `lora_dtype`."""

    def __init__(self, M, N, K, R=0, dtype=torch.bfloat16, *, codebook="nf4", block=64,
                 double=True, lora_dtype=torch.float32, bias=True, p=0.0, offset=0, x_offset=0,
                 own_tables=False, exact=False, scaling=0.5, seed=1):  # fmt: skip
        rng = torch.Generator().manual_seed(seed)
        self.M, self.N, self.K, self.R, self.dtype, self.scaling = M, N, K, R, dtype, scaling
        self.codebook, self.double = codebook, double
        self.shift = block.bit_length() - 1
        blocks = -(-N * K // block)
        # Codes at any address: a slice of something larger is still registered with exact bounds.
        self.packed = torch.randint(0, 256, (offset + -(-N * K // 2),), generator=rng,
                                    dtype=torch.uint8)[offset:]  # fmt: skip
        if double:
            self.absmax = None
            self.codes = torch.randint(100, 256, (blocks,), generator=rng, dtype=torch.uint8)
            self.nested = torch.rand(-(-blocks // 256), generator=rng) * 0.02 + 0.001
            self.offset = torch.tensor([0.03])
        else:
            self.absmax = torch.rand(blocks, generator=rng) * 0.05
        # A checkpoint's own tables are used as stored.
        self.levels = torch.randn(16, generator=rng) if own_tables else None
        self.map = torch.rand(256, generator=rng) if own_tables else None

        def shifted(rows, cols):
            flat = torch.randn(rows * cols + x_offset, generator=rng).to(dtype)
            return flat[x_offset:].view(rows, cols)

        self.x, self.dy = shifted(M, K), shifted(M, N)
        self.bias = torch.randn(N, generator=rng).to(lora_dtype) if bias else None
        self.a = (torch.randn(R, K, generator=rng) / K**0.5).to(lora_dtype) if R else None
        self.b = torch.randn(N, R, generator=rng).to(lora_dtype) if R else None
        if exact:
            self.make_exact(rng, lora_dtype)
        self.p = p if R else 0.0
        self.seed = torch.tensor([seed * 7919 - 3], dtype=torch.int64)

    def make_exact(self, rng: torch.Generator, lora_dtype: torch.dtype) -> None:
        """Small integers and halves: with p = 0 or 0.5 every factor fits bf16 and every sum fp32,
        so the results must be the exact values, rounded once."""

        def integers(low, high, *shape):
            return torch.randint(low, high + 1, shape, generator=rng).float()

        self.levels = (torch.randperm(16, generator=rng) - 8).float()
        if self.double:
            self.map, self.offset = integers(1, 3, 256), torch.tensor([1.0])
            self.nested = integers(1, 2, len(self.nested)) / 2
        else:
            self.absmax = integers(1, 3, len(self.absmax)) / 2
        M, N, K, R = self.M, self.N, self.K, self.R
        self.x, self.dy = integers(-2, 2, M, K).to(self.dtype), integers(-2, 2, M, N).to(self.dtype)
        if self.bias is not None:
            self.bias = integers(-9, 9, N).to(lora_dtype)
        if R:
            self.a = integers(-1, 1, R, K).to(lora_dtype)
            self.b = integers(-1, 1, N, R).to(lora_dtype)

    # Exact values, float64.

    def scales(self) -> torch.Tensor:
        if not self.double:
            return self.absmax
        nested = self.nested.repeat_interleave(256)[: len(self.codes)]
        table = signed_map() if self.map is None else self.map
        return table[self.codes.long()] * nested + self.offset

    def w(self) -> torch.Tensor:
        """[N, K], rounded as the kernels round: to the type of the activations."""
        flat = torch.stack([self.packed >> 4, self.packed & 15], 1).view(-1)[: self.N * self.K]
        scale = self.scales().repeat_interleave(1 << self.shift)[: self.N * self.K]
        levels = levels_of(self.codebook) if self.levels is None else self.levels
        w = levels[flat.long()] * scale
        return w.to(self.dtype).double().view(self.N, self.K)

    def threshold(self) -> int:
        return min(int(self.p * 2.0**32 + 0.5), 2**32 - 1)

    def keep_scale(self) -> float:
        return float(np.float32(1 / (1 - self.p))) if self.p < 1 else 0.0

    def hashes(self) -> np.ndarray:
        """[M, K] of uint32, from dropout_format.h's formula."""
        with np.errstate(over="ignore"):
            z = np.uint64(self.seed.item() % 2**64) + np.arange(1, self.M + 1, dtype=np.uint64) * (
                np.uint64(0x9E3779B97F4A7C15)
            )
            z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
            key = (z ^ z >> np.uint64(31))[:, None]
            h = np.arange(self.K, dtype=np.uint32) ^ key.astype(np.uint32)
            h = (h ^ h >> np.uint32(16)) * np.uint32(0x21F0AAAD)
            h = h ^ (key >> np.uint64(32)).astype(np.uint32)
            h = (h ^ h >> np.uint32(15)) * np.uint32(0x735A2D97)
            return h ^ h >> np.uint32(15)

    def mask(self) -> torch.Tensor:
        """[M, K] of 0 and 1 / (1 - p)."""
        if self.p == 0:
            return torch.ones(self.M, self.K, dtype=torch.float64)
        return torch.from_numpy((self.hashes() >= self.threshold()) * self.keep_scale())

    # Bounds: (exact value, largest error), float64.

    def rounding(self, tensor: torch.Tensor) -> float:
        """Of a LoRA factor: none in fp32 layers, and none when it already fits tf32."""
        return TF32 if self.dtype != torch.float32 and tensor.dtype == torch.float32 else 0.0

    def expect_t(self):
        x, a = self.x.double() * self.mask(), self.a.double()
        size = x.abs() @ a.abs().T
        return x @ a.T, size * ((self.K + 8) * SUM + self.rounding(self.a))

    def expect_y(self, t: torch.Tensor | None, rounded_levels: bool):
        x, w = self.x.double(), self.w()
        exact, size = x @ w.T, x.abs() @ w.abs().T
        error = size * 2 * HALF_UNIT[self.dtype] if rounded_levels else 0 * size
        if self.R:
            t, b = t.double(), self.b.double() * self.scaling
            lora = t.abs() @ b.abs().T
            exact, size = exact + t @ b.T, size + lora
            error = error + lora * (2 * TF32 if self.dtype != torch.float32 else 2 * SUM)
        if self.bias is not None:
            exact, size = exact + self.bias.double(), size + self.bias.double().abs()
        return rounded_to(self.dtype, exact, error + size * (self.K + self.R + 8) * SUM)

    def expect_gradients(self, t: torch.Tensor | None):
        dy, w = self.dy.double(), self.w()
        exact, size, error = dy @ w, dy.abs() @ w.abs(), 0.0
        sums = {"d_bias": (dy.sum(0), dy.abs().sum(0) * (self.M + 8) * SUM)}
        if self.R:
            half, a, b = self.dtype != torch.float32, self.a.double(), self.b.double()
            mask, u = self.mask(), self.scaling * dy @ b
            u_size = self.scaling * dy.abs() @ b.abs()
            lora = mask * (u_size @ a.abs())
            factors = half * (TF32 + self.rounding(self.a) + self.rounding(self.b))
            exact, size, error = exact + mask * (u @ a), size + lora, lora * factors
            x = mask * self.x.double()
            d_a = u_size.T @ x.abs()
            d_a_error = d_a * ((self.M + self.N + 16) * SUM + half * TF32 + self.rounding(self.b))
            sums["d_lora_a"] = rounded_to(self.a.dtype, u.T @ x, d_a_error)
            d_b = self.scaling * dy.abs().T @ t.double().abs()
            sums["d_lora_b"] = rounded_to(
                self.b.dtype, self.scaling * dy.T @ t.double(),
                d_b * ((self.M + 16) * SUM + half * TF32),
            )  # fmt: skip
        error = error + size * (2 * self.N + self.R + 8) * SUM
        sums["dx"] = rounded_to(self.dtype, exact, error)
        return sums


def rounded_to(dtype: torch.dtype, exact: torch.Tensor, error: torch.Tensor):
    """`error` and the rounding of the result to `dtype`."""
    return exact, error + HALF_UNIT[dtype] * (exact.abs() + error) + SMALLEST[dtype]


def assert_within(what: str, got: torch.Tensor, expected: tuple) -> None:
    exact, bound = expected
    difference = (got.double() - exact).abs()
    bad = ~(difference <= bound)  # a NaN is bad
    assert not bad.any(), (
        f"{what}: {int(bad.sum())} of {bad.numel()} beyond their bound, first at "
        f"{bad.nonzero()[0].tolist()}: got {got[bad][0]}, expected {exact[bad][0]} "
        f"within {bound[bad][0]}"
    )


def assert_exact(what: str, got: torch.Tensor, expected: tuple) -> None:
    exact = expected[0].to(got.dtype)
    assert torch.equal(got, exact), (
        f"{what}: {int((got != exact).sum())} of {got.numel()} differ, first at "
        f"{(got != exact).nonzero()[0].tolist()}"
    )


# --- the calls ------------------------------------------------------------------------------------


def weight_of(gpu, layer: Layer) -> api.Weight:
    put = {
        name: None if (part := getattr(layer, name, None)) is None else api.address(gpu.put(part))
        for name in ("packed", "absmax", "codes", "nested", "map", "offset", "levels")
    }
    bits = api.Nf4Bits(*put.values(), layer.N * layer.K, layer.shift)
    return api.Weight(bits, api.CODEBOOKS[layer.codebook])


def dropout_of(gpu, layer: Layer) -> tuple:
    if layer.p == 0:
        return None, 0, 1.0
    return api.address(gpu.put(layer.seed)), layer.threshold(), layer.keep_scale()


def run(gpu, name: str, launch, stream) -> None:
    """With a workspace of NaNs."""
    size = getattr(gpu.api, f"{name}_workspace")(C.byref(launch), api.Where(0, None))
    room = torch.full((size + 256,), 0xFF, dtype=torch.uint8)
    if hasattr(gpu, "runtime"):
        room = gpu.put(room[-room.data_ptr() % 256 :][:size])
    else:
        room = room.cuda()
    launch.workspace = api.address(room) if size else None
    gpu.call(name, launch, stream=stream)
    gpu.wait()


def forward(gpu, layer: Layer, stream=None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y, T); outputs start as NaN."""
    put = lambda tensor: None if tensor is None else gpu.put(tensor)  # noqa: E731
    x, bias, a, b = (put(part) for part in (layer.x, layer.bias, layer.a, layer.b))
    y = gpu.put(torch.full((layer.M, layer.N), torch.nan, dtype=layer.dtype))
    t = gpu.put(torch.full((layer.M, layer.R), torch.nan)) if layer.R else None
    launch = api.ForwardLaunch(
        layer.M, layer.N, layer.K, layer.R, api.operand(x), weight_of(gpu, layer),
        api.operand(bias), api.operand(a), api.operand(b), layer.scaling,
        *dropout_of(gpu, layer), api.operand(y), api.address(t), None,
    )  # fmt: skip
    run(gpu, "lora_linear_forward", launch, stream)
    return y.cpu(), None if t is None else t.cpu()


def gradients(gpu, layer: Layer, t=None, dx=True, stream=None) -> dict[str, torch.Tensor]:
    """By name, every one that the layer has."""
    shapes = {"d_bias": ((layer.N,), torch.float32)}
    if dx:
        shapes["dx"] = (layer.M, layer.K), layer.dtype
    if layer.R:
        shapes["d_lora_a"] = (layer.R, layer.K), layer.a.dtype
        shapes["d_lora_b"] = (layer.N, layer.R), layer.b.dtype
    out = {
        name: gpu.put(torch.full(shape, torch.nan, dtype=dtype))
        for name, (shape, dtype) in shapes.items()
    }
    put = lambda tensor: None if tensor is None else gpu.put(tensor)  # noqa: E731
    dy, x, a, b, t = (put(part) for part in (layer.dy, layer.x, layer.a, layer.b, t))
    launch = api.BackwardLaunch(
        layer.M, layer.N, layer.K, layer.R, api.operand(dy), api.operand(x),
        weight_of(gpu, layer), api.operand(a), api.operand(b), api.address(t), layer.scaling,
        *dropout_of(gpu, layer),
        *(api.operand(out.get(name)) for name in ("dx", "d_lora_a", "d_lora_b", "d_bias")), None,
    )  # fmt: skip
    run(gpu, "lora_linear_backward", launch, stream)
    return {name: tensor.cpu() for name, tensor in out.items()}


def kernels(gpu) -> list[str] | None:
    """Short names of what was launched since the last call of this; None on a card."""
    if not hasattr(gpu, "runtime"):
        return None
    pattern = re.compile(r"_cu_[0-9a-f]{8}\d+lora_linear_(\w+?)(I\w*)?E")
    found = [pattern.search(each.kernel) for each in gpu.runtime.launches]
    names = [match.group(1) for match in found if match]
    gpu.runtime.launches.clear()
    return names


def check_bounds(gpu, layer: Layer, rounded_levels: bool) -> list[str] | None:
    """Forward and backward within their bounds; the kernels that ran."""
    y, t = forward(gpu, layer)
    if layer.R:
        assert_within("T", t, layer.expect_t())
    assert_within("y", y, layer.expect_y(t, rounded_levels))
    got, expected = gradients(gpu, layer, t), layer.expect_gradients(t)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        assert_within(name, gradient, expected[name])
    return kernels(gpu)


def check_exact(gpu, layer: Layer, forwards=True, backwards=True) -> None:
    """For layers made `exact`."""
    t = (layer.mask() * layer.x.double() @ layer.a.double().T).float() if layer.R else None
    if forwards:
        y, got_t = forward(gpu, layer)
        if layer.R:
            assert_exact("T", got_t, (t.double(),))
        assert_exact("y", y, layer.expect_y(t, False))
    if backwards:
        expected = layer.expect_gradients(t)
        for name, got in gradients(gpu, layer, t).items():
            assert_exact(name, got, expected[name])
