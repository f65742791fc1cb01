"""The one helper that bitsandbytes' optimizer tests import."""

import torch


def sync_gpu(tensor: torch.Tensor) -> None:
    """Waits for the tensor's device."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
