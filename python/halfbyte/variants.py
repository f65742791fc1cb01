"""What this processor and this build can do, and which kernel variant each operation takes."""

from __future__ import annotations

from halfbyte._native import _C

_TABLES = {
    "quantize_4bit": lambda: _C.quantize_variants(),
    "dequantize_4bit": lambda: _C.dequantize_variants(),
    "lora_linear (bfloat16)": lambda: _C.lora_linear_variants(_C.DType.bfloat16),
    "lora_linear (float32)": lambda: _C.lora_linear_variants(_C.DType.float32),
    "lora_linear (float16)": lambda: _C.lora_linear_variants(_C.DType.float16),
    "adamw8": lambda: _C.adamw8_variants(),
}


_CUDA_OPS = ("quantize_4bit", "dequantize_4bit", "lora_linear", "adamw8")


def variants() -> dict[str, list[dict]]:
    """For each operation its variants, best first: `name`, `why_not` ("" when usable), `chosen`.

    Where a CUDA device can be used, its tables follow, for a typical call on device 0.
    """
    rows = {op: table() for op, table in _TABLES.items()}
    if _C.cuda_devices():
        rows |= {f"{op} (cuda)": _C.cuda_variants(op, 0) for op in _CUDA_OPS}
    return {
        op: [{"name": name, "why_not": why, "chosen": chosen} for name, why, chosen in table]
        for op, table in rows.items()
    }


def cpu_features() -> dict[str, bool]:
    """Instruction sets that this processor and operating system let us use."""
    return _C.cpu_features()


def cuda_devices() -> list[str]:
    """Name, compute capability and memory of each CUDA device; empty when none can be used."""
    return _C.cuda_devices()


def cuda_status() -> str:
    """The sentence that says why not, or "CUDA kernels available"."""
    return _C.cuda_why_not() or "CUDA kernels available"
