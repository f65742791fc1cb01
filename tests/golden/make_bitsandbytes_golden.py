"""Writes bitsandbytes.safetensors beside this file: layers quantized by bitsandbytes 0.50.2.

    python tests/golden/make_bitsandbytes_golden.py

For each case of CASES: `<case>.dense`, the entries of its state dict under `<case>.weight`, and
`<case>.dequantized`, all made by bitsandbytes on the CPU.
"""

from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes import functional
from safetensors.torch import save_file

# name: (codebook, block size, double quantization, dtype, [N, K]); K is a multiple of the block
# size, or not of 16: there bitsandbytes takes the right scales.
CASES = {
    "nf4_double": ("nf4", 64, True, torch.bfloat16, (5, 128)),
    "nf4_single": ("nf4", 64, False, torch.float32, (3, 64)),
    "nf4_straddling": ("nf4", 32, True, torch.float16, (7, 50)),
    "fp4_single": ("fp4", 64, False, torch.bfloat16, (4, 64)),
}


def main() -> None:
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for name, (codebook, block, double_quant, dtype, shape) in CASES.items():
        dense = torch.randn(shape, generator=generator).to(dtype)
        packed, state = functional.quantize_4bit(
            dense, blocksize=block, quant_type=codebook, compress_statistics=double_quant
        )
        tensors[f"{name}.dense"] = dense
        tensors[f"{name}.weight"] = packed
        for key, value in state.as_dict(packed=True).items():
            tensors[f"{name}.weight.{key}"] = value.clone()
        tensors[f"{name}.dequantized"] = functional.dequantize_4bit(packed, state)
    folder = Path(__file__).parent
    made_by = {"made_by": f"bitsandbytes {bitsandbytes.__version__}, CPU"}
    save_file(tensors, folder / "bitsandbytes.safetensors", made_by)


if __name__ == "__main__":
    main()
