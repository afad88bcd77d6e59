"""Errors of the leader's trainer: what all ranks refuse is a refusal, everything else ends the processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from maskwire_server.batch import Batch, Modes, Payload, Prompts
from maskwire_server.config import load
from maskwire_server.errors import ConfigError, StateLost
from maskwire_server.ranks import build, launcher, leader
from maskwire_server.ranks.follower import call
from maskwire_server.ranks.leader import LeaderTrainer, carried_out
from maskwire_server.ranks.orders import Order
from maskwire_server.ranks.shared_folder import SavePlace
from maskwire_server.results import EvalOptions, GenerateOptions


@pytest.fixture(autouse=True)
def _no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "GRACE_SECONDS", 0.0)


def leading(fake: Any) -> LeaderTrainer:
    """A leader of the fake, which saves for all ranks."""
    return LeaderTrainer(fake, fake, fake, SavePlace(Path("x"), "leader"))


BATCH = Batch(np.zeros((1, 2), dtype=np.int64), 1, 2)


class Fake:
    """A trainer and its group, of which one call fails."""

    def __init__(self, failing: str, error: Exception) -> None:
        self._failing, self._error = failing, error
        self.agreed: list[str] = []
        self.place = SimpleNamespace(rank=0, size=2)
        self.ranks: Any = SimpleNamespace(agree=self._agree)

    def reads_average(self, *, raw: bool) -> bool:
        return not raw

    def order(self, _: object) -> None:
        self._pass("order")

    def _agree(self, facts: str) -> None:
        self._pass("agree")
        self.agreed.append(facts)

    def _pass(self, name: str) -> None:
        if name == self._failing:
            raise self._error

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self._pass(name)


CALLS: dict[str, Callable[[LeaderTrainer], Any]] = {
    "train_step": lambda trainer: trainer.train_step(1, 1, BATCH, Modes()),
    "gather": lambda trainer: trainer.eval_loss(BATCH, EvalOptions((0,))),
    "snapshot": lambda trainer: trainer.snapshot(),
    "configure": lambda trainer: trainer.configure({}, 2),
    "receive": lambda trainer: trainer.load(Path("x")),
    "warm_up": lambda trainer: trainer.warm_up(),
}


@pytest.mark.parametrize("place", ["order", "agree", "the call"])
@pytest.mark.parametrize("name", CALLS)
def test_a_connection_that_is_lost_ends_the_process(name: str, place: str) -> None:
    """Not a refused step that changed nothing: the others may have trained on it."""
    if (name, place) == ("train_step", "agree"):
        pytest.skip("its ranks agree within the call")
    fake: Any = Fake(name if place == "the call" else place, RuntimeError("Connection closed by peer"))
    with pytest.raises(StateLost, match=r"rank 0 failed in .*: Connection closed by peer"):
        CALLS[name](leading(fake))


@pytest.mark.parametrize("name", [name for name in CALLS if name != "configure"])
def test_a_value_error_of_one_rank_ends_the_process(name: str) -> None:
    """It does not ask the others whether they raised it too: they may wait for this rank elsewhere."""
    fake: Any = Fake(name, ValueError("id 7 is not supported"))
    with pytest.raises(StateLost, match=rf"rank 0 failed in {name}: id 7 is not supported"):
        CALLS[name](leading(fake))
    assert fake.agreed == []


def test_a_step_that_a_follower_cannot_decode_or_compute_ends_its_process() -> None:
    fake: Any = Fake("train_step", ValueError("id 7 is not supported"))
    payloads = Payload(BATCH, Modes()).encode(), b"nothing"
    for payload, words in zip(payloads, ("id 7 is not supported", ""), strict=True):
        order = Order("train_step", {"lineage": 1, "step": 1}, payload)
        with pytest.raises(StateLost, match=rf"rank 0 failed in train_step: {words}"):
            carried_out(fake, order, call(fake, fake, fake, order))
    assert fake.agreed == []


def test_a_model_that_one_rank_refuses_in_a_step_ends_the_launcher(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(launcher.FOLDER, str(tmp_path))
    fake: Any = Fake("train_step", RuntimeError("Connection closed by peer"))
    with pytest.raises(StateLost):
        CALLS["train_step"](leading(fake))
    assert not (tmp_path / "exit-code").exists(), "a restart may help"
    fake = Fake("train_step", ConfigError("a pass called block 2 instead of block 1"))
    with pytest.raises(StateLost, match="block 2 instead of block 1"):
        CALLS["train_step"](leading(fake))
    assert (tmp_path / "exit-code").read_text() == "2"


ERRORS: dict[str, tuple[Exception, type[Exception]]] = {
    "of torch": (ValueError("fully_shard does not support containers"), ConfigError),
    "of the memory": (MemoryError("none left"), ConfigError),
    "of maskwire": (StateLost("half-way"), StateLost),
    "of the device": (RuntimeError("the device is lost"), RuntimeError),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_in_building_a_trainer_is_retried_only_if_that_may_help(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, expected = ERRORS[name]

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(build, "TorchTrainer", fails)
    monkeypatch.setattr(build, "time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr(build.device_errors, "usable_after", lambda error, _: "device" not in str(error))
    member: Any = SimpleNamespace(ranks=SimpleNamespace(use_device=lambda: None, device=None, rank=1))
    with pytest.raises(expected, match=str(error)):
        build.build(member, load(None))


def test_a_refusal_of_all_ranks_is_a_refusal() -> None:
    fake: Any = Fake("configure", ValueError("another optimizer"))
    with pytest.raises(ValueError, match="another optimizer"):
        leading(fake).configure({}, 2)
    assert fake.agreed == ["configure refused: another optimizer"]


def test_what_the_leader_does_alone_fails_alone() -> None:
    fake: Any = Fake("generate", RuntimeError("no memory for this"))
    with pytest.raises(RuntimeError, match="no memory for this"):
        list(leading(fake).generate(Prompts.nothing(1, 2), GenerateOptions((0,))))
    fake = Fake("read", ValueError("a file is missing"))
    with pytest.raises(ValueError, match="a file is missing"):
        leading(fake).load(Path("x"))
    assert fake.agreed == [], "the others were not asked"
