"""Copies of tensors to the device that do not wait for it."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from host memory to `device`. Returns before the device has finished its earlier work.

    CUDA copies only pinned memory in this way. A copy from other memory waits for the device.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
