"""Steps that another NCCL trained count as those of another environment."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from maskwire_server.recovery.fingerprint import changed_fingerprints, fingerprint
from maskwire_server.training.sharding import ManyRanks


def versions(device: str) -> dict[str, Any]:
    ranks: Any = SimpleNamespace(replicate=1, size=2, device=torch.device(device))
    getter: Any = ManyRanks.versions.fget  # type: ignore[attr-defined]
    return fingerprint(getter(ranks))


def test_another_version_or_algorithm_of_nccl_is_another_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    monkeypatch.delenv("NCCL_PROTO", raising=False)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    layout = {"fingerprint.world_size": "1 x 2"}
    assert versions("cpu") == layout
    before = versions("cuda")
    assert before == {
        **layout, "fingerprint.nccl": "2.27.5", "fingerprint.nccl_algo": "", "fingerprint.nccl_proto": "",
    }  # fmt: skip
    assert changed_fingerprints(layout, before) == [], "recorded before NCCL was"
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    assert changed_fingerprints(before, versions("cuda")) == ["fingerprint.nccl_algo"]
    monkeypatch.setenv("NCCL_PROTO", "Simple")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 3))
    changed = ["fingerprint.nccl", "fingerprint.nccl_algo", "fingerprint.nccl_proto"]
    assert changed_fingerprints(before, versions("cuda")) == changed
