"""The Python layer on CUDA tensors: operators, optimizers, paged state.

Without a card `python_layer.py` runs in a process of its own, where `_C` opens the library that is
linked to the fake runtime: PTX executed by an interpreter; not run on a GPU.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

if torch.cuda.is_available():
    from python_layer import *  # noqa: F403
else:

    def test_python_layer_on_the_fake_runtime(fake_library, tmp_path):
        library = shutil.copy(fake_library, tmp_path / "libhalfbyte_cuda.so")
        command = [sys.executable, "-m", "pytest", "-x", "--durations=3"]
        done = subprocess.run(
            [*command, str(HERE / "python_layer.py")],
            env={**os.environ, "HALFBYTE_CUDA_LIBRARY": str(library)},
            capture_output=True,
            text=True,
            cwd=HERE.parents[2],
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert " passed" in done.stdout and "skipped" not in done.stdout

    def test_without_a_driver_or_library_a_call_says_so():
        """One sentence, the one that `halfbyte info` shows."""
        from fake_torch_cuda import on_device
        from halfbyte._native import _C

        tensors = [on_device(torch.zeros(n), 0) for n in (64, 1)]
        codes = on_device(torch.zeros(32, dtype=torch.uint8), 0)
        sentence = _C.cuda_why_not()
        assert sentence
        for call in (
            lambda: _C.quantize_4bit(tensors[0], "nf4", 64, codes, tensors[1], 1),
            lambda: _C.dequantize_4bit(
                (codes, tensors[1], None, None, "nf4", None, None, 64), tensors[0], 1
            ),
            lambda: _C.Arena(4096, 0),
        ):
            with pytest.raises(_C.Error) as raised:
                call()
            assert sentence in str(raised.value)
        assert _C.cuda_devices() == []
