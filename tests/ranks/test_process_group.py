"""Which ranks form a group, and on which devices; the late ones."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import fork_server
import pytest
import torch

from maskwire_server.config import DistributedConfig, ServeConfig
from maskwire_server.errors import ConfigError
from maskwire_server.ranks.process_group import Place, Terms, agreed, own_terms, rank_device

PLACE = Place(1, 4, 1, 2, 2)


def terms(*, leads: bool = False) -> Terms:
    found = own_terms(PLACE, DistributedConfig(), ServeConfig(device="cpu"))
    return replace(found, host="b", may_lead=leads)


def test_the_rank_that_may_lead_does() -> None:
    assert agreed([terms(), terms(leads=True)], DistributedConfig()) == 1


@pytest.mark.parametrize("name", ["distributed.replicate", "distributed.shard", "serve.device"])
def test_a_setting_that_differs_is_named_with_both_ranks(name: str) -> None:
    other = terms()
    other.settings[name] = "other"
    of_first = replace(terms(), host="a")
    with pytest.raises(ConfigError) as raised:
        agreed([of_first, terms(), other], DistributedConfig(replicate=2))
    assert str(raised.value) == (
        f"{name}: must be the same on all ranks, got {of_first.settings[name]} on rank 0 (a) and other on "
        "rank 2 (b)"
    )


@pytest.mark.parametrize("leaders", [0, 2])
def test_one_host_has_the_run_directory(leaders: int) -> None:
    group = [terms(leads=rank < leaders) for rank in range(4)]
    with pytest.raises(ConfigError, match=f"exactly one host must have the run directory, got {leaders}"):
        agreed(group, DistributedConfig())


@pytest.mark.parametrize(
    ("wish", "gpus", "expected"),
    [
        ("cpu", 0, "cpu"),
        ("auto", 2, "cuda:1"),
        ("cuda", 2, "cuda:1"),
        ("auto", 1, "--ranks: must be at most the number of CUDA devices, 1, got 2; start fewer ranks, or "
         "set serve.device=cpu"),
        ("cuda", 1, "--ranks: must be at most the number of CUDA devices, 1, got 2; start fewer ranks, or "
         "set serve.device=cpu"),
        ("cuda:1", 2, "serve.device: with several ranks must be auto, cpu or cuda, got 'cuda:1'"),
    ],
)  # fmt: skip
def test_each_rank_of_a_host_has_a_gpu_of_its_own(
    wish: str, gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    own = own_terms(PLACE, DistributedConfig(), ServeConfig(device=wish))
    if own.problem:
        assert own.problem == expected
        with pytest.raises(ConfigError, match="rank 1 on b: "):
            agreed([terms(), replace(own, host="b")], DistributedConfig())
    else:
        assert str(rank_device(wish, PLACE)) == expected


def test_a_rank_that_no_other_joins_exits_and_says_so(tmp_path: Path) -> None:
    """Another rank froze while it started."""
    code = (
        "from maskwire_server.ranks import process_group as group; group._FORM_SECONDS = 0.5\n"
        "from maskwire_server.config import DistributedConfig, ServeConfig\n"
        "group.join(DistributedConfig(), ServeConfig(device='cpu'))"
    )
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASKWIRE_LAUNCH_DIR": str(tmp_path)}
    done = fork_server.run(["-c", code], env={**os.environ, **place}, text=True)
    assert done.returncode == 75, done.stderr
    assert (tmp_path / "loss").read_text() == "the ranks did not meet within 0.5 s"
