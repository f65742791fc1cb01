"""The compiled module. It takes torch tensors as they are: contiguous, all of a call on one device.

torch is imported before `_C` so that both share torch's OpenMP runtime and its threads.
"""

from __future__ import annotations

import torch

from halfbyte import _C

__all__ = ["_C", "stream_of", "thread_count"]

# int32 comes last: statistics may be float32 bit patterns in int32.
_C.register_dtypes(
    (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.int32)
)


def thread_count() -> int:
    """Threads a kernel may use: torch's own setting."""
    return torch.get_num_threads()


def stream_of(tensor: torch.Tensor) -> int:
    """Where a call on `tensor` runs: the address of its device's current stream, 0 on the CPU."""
    return 0 if tensor.is_cpu else torch.cuda.current_stream(tensor.device).cuda_stream
