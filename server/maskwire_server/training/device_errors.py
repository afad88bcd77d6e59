"""Which errors a device comes back from, and which it does not.

After an illegal memory access, a failed assertion in a kernel, or an uncorrectable memory error the process's
context on the device is lost: every later call fails with the same error, until the process ends. Running
out of memory, or a batch that a kernel refuses on the host, leaves the device as it was.

Source of the words: cudaGetErrorString, as torch puts them behind "CUDA error: " (CUDA runtime API, section
"Error handling": the codes whose description says that the process must be terminated).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_LOST = (
    "illegal memory access", "cudaErrorIllegalAddress",
    "device-side assert", "cudaErrorAssert",
    "unspecified launch failure", "cudaErrorLaunchFailure",
    "misaligned address", "cudaErrorMisalignedAddress",
    "illegal instruction", "cudaErrorIllegalInstruction",
    "operation not supported on global/shared address space", "cudaErrorInvalidAddressSpace",
    "invalid program counter", "cudaErrorInvalidPc",
    "hardware stack error", "cudaErrorHardwareStackError",
    "the launch timed out and was terminated", "cudaErrorLaunchTimeout",
    "uncorrectable ECC error", "cudaErrorECCUncorrectable",
    "uncorrectable NVLink error", "cudaErrorNvlinkUncorrectable",
    "context is destroyed", "cudaErrorContextIsDestroyed",
)  # fmt: skip


def usable_after(error: BaseException, device: torch.device) -> bool:
    """Whether the device still computes after an error; one that is not known is settled by a probe."""
    if device.type == "cpu":
        return True
    if any(words in str(each) for each in _chain(error) for words in _LOST):
        return False
    if isinstance(error, torch.OutOfMemoryError):
        return True
    try:
        probe(device)
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:  # torch.AcceleratorError is one
        return False
    return True


def probe(device: torch.device) -> None:
    """Compute something small on the device, and wait for the result."""
    if torch.ones(1, device=device).add_(1).item() != 2:
        raise RuntimeError(f"{device} computed 1 + 1 wrongly")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it was raised while handling: the cause is often the first of them."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
