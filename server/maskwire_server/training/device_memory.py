"""The memory of the device, for metrics. Any thread may read it, without waiting for the device."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def device_memory() -> dict[str, int]:
    """Return numbers of bytes by kind of memory.

    If this process uses GPUs, the kinds are `allocated` (to tensors), `reserved` (by torch's allocator),
    `peak` (the most that was allocated at a time) and `total` (the memory of these GPUs). Otherwise the only
    kind is `resident`, the memory of this process. The result is empty if the system does not report it.
    """
    torch = sys.modules.get("torch")  # a server that has not imported torch yet has used no device
    if torch is not None and torch.cuda.is_initialized():
        devices = [each for each in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(each)]
        return {
            "allocated": sum(torch.cuda.memory_allocated(each) for each in devices),
            "reserved": sum(torch.cuda.memory_reserved(each) for each in devices),
            "peak": sum(torch.cuda.max_memory_allocated(each) for each in devices),
            "total": sum(torch.cuda.get_device_properties(each).total_memory for each in devices),
        }
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return {}
    return {"resident": pages * os.sysconf("SC_PAGE_SIZE")}
