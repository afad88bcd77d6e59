"""Decides whether an error leaves the device usable.

After an illegal memory access, a failed assertion in a kernel, or an uncorrectable memory error, the process
has lost its context on the device: every later call fails with the same error until the process ends.
Running out of memory, or a batch that a kernel rejects on the host, leaves the device usable.

The texts in `_LOST` come from cudaGetErrorString, which torch prints after "CUDA error: ". They belong to
the error codes for which the CUDA runtime API ("Error Handling") says that the process must be terminated.
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
    """Whether the device can still compute after an error. An unknown error is tested by a computation."""
    errors = list(_chain(error)) if device.type != "cpu" else _of_accelerator(error)
    if any(words in str(each) for each in errors for words in _LOST):
        return False
    if device.type == "cpu":
        return True
    if isinstance(error, torch.OutOfMemoryError):
        return True
    try:
        probe(device)
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:  # torch.AcceleratorError is one
        return False
    return True


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the device or, on the CPU, of the host is exhausted."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def probe(device: torch.device) -> None:
    """Compute 1 + 1 on the device and wait for the result. Raises RuntimeError if this fails."""
    if torch.ones(1, device=device).add_(1).item() != 2:
        raise RuntimeError(f"{device} gave a wrong result for 1 + 1; use another device")


def _of_accelerator(error: BaseException) -> list[BaseException]:
    """The accelerator's errors in the chain of an error. A model on the CPU may still use an accelerator."""
    return [each for each in _chain(error) if isinstance(each, torch.AcceleratorError)]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and the errors that led to it, because torch's error is often not the last raised."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
