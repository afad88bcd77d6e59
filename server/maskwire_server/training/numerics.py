"""Where and how to compute: the device, its precision and kernels, and how much at once."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from maskwire_server.config import ServeConfig
from maskwire_server.errors import ConfigError
from maskwire_server.training import cgroup

NUMERICS_VERSION = 2
"""Counts changes of what the same settings compute, beyond rounding or not. A step that another version
trained is computed again within a tolerance.

2: `only_train_critic` minimises the critic's loss itself; weight decay reaches every linear map.
"""


def cores() -> int:
    """The CPU cores that this process may use, a container's quota counted."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cgroup.allowed_cores(affinity)


def processor() -> str:
    """The CPU's model: another one may round differently."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def choose_device(wish: str) -> torch.device:
    """The device of `serve.device`. Raises ConfigError when this machine does not have it."""
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wish)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"serve.device: must be a device of this machine, which has {torch.cuda.device_count()} CUDA "
            f"devices, got {wish!r}; use auto or cpu"
        )
    return device


def set_numerics(serve: ServeConfig, device: torch.device, *, bf16: bool) -> dict[str, str]:
    """Say to torch how to compute, for the whole process; what a result depends on, in words."""
    tf32 = serve.precision == "tf32" and device.type == "cuda"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    deterministic = device.type == "cpu" or serve.deterministic
    if device.type == "cuda":
        if deterministic:  # cuBLAS reads it when it is first used
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(deterministic)
    return {
        "precision": "bf16" if bf16 else "tf32" if tf32 else "fp32",
        "numerics": str(NUMERICS_VERSION),
        "compile": serve.compile,
        "deterministic": "yes" if deterministic else "no",
    }


def choose_bf16(precision: str, device: torch.device) -> bool:
    """Whether to autocast to bfloat16: by itself only on a GPU that computes with it."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"


def default_budget(device: torch.device) -> int:
    """Positions a part: where larger parts gain nothing."""
    return 2**17 if device.type == "cuda" else 2**14


def read_tokens(device: torch.device) -> int:
    """Positions of one evaluation or generation: minutes of work on a GPU, and on two cores of a CPU."""
    return 2**22 if device.type == "cpu" else 2**26


def sampled_budget(device: torch.device, num_tokens: int, sorts: bool) -> int:
    """Positions of a generation computed at once: all may be masked at first, and have logits then.

    5 copies of 4 bytes over the vocabulary, 10 if top_p sorts them, within 512 MiB on a CPU and 8 GiB on
    a GPU.
    """
    logits_bytes = 2**33 if device.type == "cuda" else 2**29
    return int(max(1, logits_bytes // (4 * (10 if sorts else 5) * num_tokens)))
