"""The memory of the device in the metrics: of the GPUs that are in use, or of the process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from maskwire_server.training.device_memory import device_memory


def torch_with(gpus: list[tuple[int, int, int, int]], *, used: bool = True) -> Any:
    """torch on a machine whose GPUs have these bytes allocated, reserved, at the peak, and in total."""
    cuda = SimpleNamespace(
        is_initialized=lambda: used,
        device_count=lambda: len(gpus),
        memory_allocated=lambda number: gpus[number][0],
        memory_reserved=lambda number: gpus[number][1],
        max_memory_allocated=lambda number: gpus[number][2],
        get_device_properties=lambda number: SimpleNamespace(total_memory=gpus[number][3]),
    )
    return SimpleNamespace(cuda=cuda)


def test_only_gpus_of_this_process_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch_with([(1, 2, 3, 100), (0, 0, 0, 100), (10, 20, 30, 200)]))
    assert device_memory() == {"allocated": 11, "reserved": 22, "peak": 33, "total": 300}


@pytest.mark.parametrize("torch", [None, torch_with([(1, 2, 3, 100)], used=False)], ids=["absent", "unused"])
def test_without_a_gpu_in_use_it_is_the_memory_of_the_process(
    monkeypatch: pytest.MonkeyPatch, torch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(
        Path, "read_text", lambda path: {"/proc/self/statm": "900 250 30 1 0 80 0"}[str(path)]
    )
    assert device_memory() == {"resident": 250 * os.sysconf("SC_PAGE_SIZE")}


def test_a_system_that_does_not_say_gives_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(Path, "read_text", missing)
    assert device_memory() == {}
