"""Copy tensors from the host to a device without synchronising."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on `device`.

    A copy to a GPU goes through page-locked memory, in stream order. From pageable memory the host would wait for all
    queued work, after which the GPU idles until the host has caught up. A tensor that is already page-locked is read
    when the stream reaches the copy: do not modify it before.
    """
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu" or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
