"""Copies between host memory and the device that do not wait for the device's other work."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from host memory to `device`. Returns before the device has finished its earlier work.

    CUDA copies only pinned memory in this way. A copy from other memory waits for the device.
    """
    if device.type != "cuda":
        return tensor.to(device)
    try:
        pinned = tensor.pin_memory()
    except RuntimeError:  # the host has no more memory that can be pinned
        return tensor.to(device)
    return pinned.to(device, non_blocking=True)


class Download:
    """A copy to host memory. It waits for the work that the device has got so far, and for no later work."""

    def __init__(self, tensor: Tensor) -> None:
        """Begin to copy."""
        self._copy, self._event = tensor, None
        if tensor.device.type == "cuda":
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.current_stream(tensor.device).record_event()

    def wait(self) -> Tensor:
        """Wait until the copy is complete, and return it."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy
