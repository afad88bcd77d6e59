"""The device, its precision and kernels, and how many positions are computed together."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from maskwire_server.config import ServeConfig
from maskwire_server.errors import ConfigError
from maskwire_server.training import cgroup

NUMERICS_VERSION = 3
"""Version of the numerics. It is increased whenever the same settings compute other results, even if only
by rounding. A step trained by another version is replayed within a tolerance.

2: `only_train_critic` minimises the critic's loss without its weight; every linear map has weight decay.
3: micro-batches have sequences of similar length.
"""


def cores() -> int:
    """The number of CPU cores that this process may use, within the quota of its container."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cgroup.allowed_cores(affinity)


def processor() -> str:
    """The CPU's model name. Another CPU model may round results differently."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def processor_of(device: torch.device) -> str:
    """The model name of a device, which is a GPU or the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def choose_device(wish: str) -> torch.device:
    """The torch device for `wish`, the value of serve.device. Raises ConfigError if it does not exist."""
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
    """Set precision and kernels in torch for the process. Returns the settings that results depend on."""
    tf32 = serve.precision == "tf32" and device.type == "cuda"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    deterministic = device.type == "cpu" or serve.deterministic
    if device.type == "cuda":
        if deterministic:  # cuBLAS reads this on its first use
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(deterministic)
    return {
        "precision": "bf16" if bf16 else "tf32" if tf32 else "fp32",
        "numerics": str(NUMERICS_VERSION),
        "compile": serve.compile,
        "deterministic": "yes" if deterministic else "no",
    }


def choose_bf16(precision: str, device: torch.device) -> bool:
    """Whether to autocast to bfloat16. With precision "auto", only on GPUs that support bfloat16."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"


def default_budget(device: torch.device) -> int:
    """The default limit of positions per micro-batch. Larger micro-batches are not faster."""
    return 2**17 if device.type == "cuda" else 2**14


def smallest_part(device: torch.device) -> int:
    """The number of positions that a micro-batch needs to be computed efficiently."""
    return 2**14 if device.type == "cuda" else 2**11


def read_tokens(device: torch.device) -> int:
    """The default of serve.max_read_tokens: a few minutes of work, on a GPU or on two CPU cores."""
    return 2**22 if device.type == "cpu" else 2**26


def sampled_budget(device: torch.device, num_tokens: int, sorts: bool) -> int:
    """How many positions a generation computes together, so that their logits fit in memory.

    In the first pass, all positions may be masked and need logits: 5 copies of 4 bytes per id, or 10 copies
    if top_p sorts the logits. Together, they may take 512 MiB on a CPU and 8 GiB on a GPU.
    """
    logits_bytes = 2**33 if device.type == "cuda" else 2**29
    return int(max(1, logits_bytes // (4 * (10 if sorts else 5) * num_tokens)))
