"""Errors that leave a device usable, and errors that do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from maskwire_server.training import device_errors
from maskwire_server.training.device_errors import probe, usable_after

CUDA = torch.device("cuda")


def passes(_: torch.device) -> None:
    pass


def fails(_: torch.device) -> None:
    raise RuntimeError("CUDA error: unknown error")


def is_full(_: torch.device) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def never(_: torch.device) -> None:
    raise AssertionError("the words are enough")


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later",
        "CUDA error: device-side assert triggered",
        "CUDA error: unspecified launch failure",
        "CUDA error: misaligned address",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA driver error: cudaErrorIllegalAddress",
        "NCCL error: unhandled cuda error: the launch timed out and was terminated",
    ],
)
def test_a_lost_context_is_recognised_by_its_message(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_errors, "probe", never)
    assert not usable_after(RuntimeError(text), CUDA)


def test_the_original_error_counts_if_another_one_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_errors, "probe", never)
    try:
        try:
            raise RuntimeError("CUDA error: device-side assert triggered")
        finally:
            raise ValueError("the state of the generator could not be put back")
    except ValueError as error:
        assert not usable_after(error, CUDA)


@pytest.mark.parametrize(
    ("error", "after", "usable"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), never, True),
        (RuntimeError("CUDA error: out of memory"), passes, True),
        (RuntimeError("CUDA error: out of memory"), is_full, True),
        (ValueError("a bad batch"), passes, True),
        (IndexError("index out of range"), fails, False),
        (RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm"), fails, False),
        (RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED"), passes, True),
    ],
)
def test_an_unknown_error_is_decided_by_a_probe(
    error: Exception,
    after: Callable[[torch.device], None],
    usable: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_errors, "probe", after)
    assert usable_after(error, CUDA) is usable


def test_a_cpu_is_always_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_errors, "probe", never)
    assert usable_after(RuntimeError("an illegal memory access"), torch.device("cpu"))


def test_the_probe_computes_on_the_device_and_reads_the_result() -> None:
    probe(torch.device("cpu"))
    assert not usable_after(ValueError("anything"), torch.device("meta")), "it has no result to read"
