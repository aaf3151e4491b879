"""Tensors from the host to a device, without a wait."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`.

    To a GPU it goes from page-locked memory, in the order of the stream. From ordinary memory the host waits until all
    that is queued there is done, and the GPU then has nothing to do until the host has caught up. A tensor that is in
    page-locked memory already is read when the stream comes to it: leave it is until then.
    """
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu" or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
