"""The version of a run's digest: the first step fixes it, and nothing changes it afterwards."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from counter import FAIL_ID, NAN_ID
from rig import WAIT, Rig, bare, open_session, payload, reason, reason_of

from maskwire.v1.digest import DigestVersion, step_digest
from maskwire_server.batch import Prompts
from maskwire_server.engine.engine import Engine
from maskwire_server.errors import Refused
from maskwire_server.recovery import verify
from maskwire_server.requests import GenerateRequest, RestoreRequest, SessionRef, SessionRequest, StepRequest
from maskwire_server.results import GenerateOptions, SessionAnswer

OLD, BOTH = (1,), (1, 2)


def answer_to(
    engine: Engine, name: str, offered: tuple[int, ...], *, takeover: bool = False
) -> SessionAnswer:
    request = SessionRequest(name, f"{name}'s", digest_versions=offered, takeover=takeover)
    return engine.open_session(request).result(WAIT)


def train(engine: Engine, seed: int, session: SessionRef | None = None) -> bytes:
    return engine.train_step(StepRequest(payload(seed), session)).result(WAIT).digest


def chained(before: bytes, step: int, seed: int, version: int, lineage: int = 1) -> bytes:
    return step_digest(before, lineage, step, payload(seed).hash(DigestVersion(version, 257)), 1)


@pytest.mark.parametrize(("offered", "version"), [(OLD, 1), (BOTH, 2), ((2,), 2), ((1, 2, 3), 2)])
def test_a_session_s_first_step_fixes_the_newest_version_that_both_sides_compute(
    rig: Rig, offered: tuple[int, ...], version: int
) -> None:
    engine = rig.start()
    opened = answer_to(engine, "a", offered)
    assert opened.digest_version == version
    assert engine.status().digest_version == 0, "no step has fixed it yet"
    session = SessionRef(opened.run_id, opened.lineage, opened.epoch)
    first = train(engine, 1, session)
    assert first == chained(opened.digest, 1, 1, version)
    assert train(engine, 2, session) == chained(first, 2, 2, version)
    assert engine.status().digest_version == version


def test_a_bare_call_fixes_the_newest_version(rig: Rig) -> None:
    engine = rig.start()
    before = engine.status().digest
    assert train(engine, 1) == chained(before, 1, 1, 2)
    assert engine.status().digest_version == 2


@pytest.mark.parametrize(("fixed", "offered"), [(1, (2,)), (2, OLD), (2, (3,))])
def test_a_client_that_lacks_the_run_s_version_is_refused(
    rig: Rig, fixed: int, offered: tuple[int, ...]
) -> None:
    engine = rig.start()
    session = open_session(engine, digest_versions=(fixed,))
    train(engine, 1, session)
    for takeover in (False, True):
        asked = SessionRequest("b", "n2", digest_versions=offered, takeover=takeover)
        assert reason(engine.open_session(asked)) == "DIGEST_VERSION"
    train(engine, 2, session)  # which was not taken over
    assert answer_to(engine, "b", BOTH, takeover=True).digest_version == fixed


def test_a_client_that_shares_no_version_with_the_server_is_refused_before_the_first_step(rig: Rig) -> None:
    engine = rig.start()
    future = engine.open_session(SessionRequest("a", "n", digest_versions=(3,)))
    assert reason(future) == "DIGEST_VERSION"
    assert "uses digest version 1 or 2, which this client does not support" in str(future.exception())


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize(("first", "second", "version"), [(OLD, BOTH, 2), (BOTH, OLD, 1)])
def test_a_takeover_before_the_first_step_decides_again(
    rig: Rig, first: tuple[int, ...], second: tuple[int, ...], version: int, restarted: bool
) -> None:
    engine = rig.start()
    answer_to(engine, "a", first)
    opened = answer_to(engine, "b", second, takeover=True)
    if restarted:
        rig.engines.pop().close()
        engine = rig.start()
    session = SessionRef(opened.run_id, opened.lineage, opened.epoch)
    assert opened.digest_version == version
    assert train(engine, 1, session) == chained(opened.digest, 1, 1, version)


@pytest.mark.parametrize("version", [1, 2])
def test_a_session_keeps_its_version_over_a_restart_before_the_first_step(rig: Rig, version: int) -> None:
    engine = rig.start()
    offered = tuple(range(1, version + 1))
    opened = answer_to(engine, "a", offered)
    rig.engines.pop().close()
    engine = rig.start()
    assert engine.status().digest_version == 0
    assert answer_to(engine, "a", offered) == opened, "the same nonce"
    session = SessionRef(opened.run_id, opened.lineage, opened.epoch)
    assert train(engine, 1, session) == chained(opened.digest, 1, 1, version)


@pytest.mark.parametrize("version", [1, 2])
def test_recovery_replay_verify_and_inspect_read_both_versions(
    rig: Rig, tmp_path: Path, version: int
) -> None:
    engine = rig.start(checkpoints={"every_seconds": 1e9})
    session = open_session(engine, digest_versions=(version,))
    digest = b""
    for seed in range(1, 4):
        digest = train(engine, seed, session)
    copy = Rig(tmp_path / "copy")
    shutil.copytree(rig.folder, copy.folder)  # as a kill would leave it
    recovered = copy.start()
    assert (recovered.status().digest, recovered.status().digest_version) == (digest, version)
    assert len(copy.trainer.trained) == 3
    assert train(recovered, 4, session) == chained(digest, 4, 4, version)
    copy.engines.pop().close()
    assert verify.verify(copy.folder).problems == []
    found = verify.inspect(copy.folder, 2)
    assert found.record.payload_hash == payload(2).hash(DigestVersion(version, 257))
    assert found.payload is not None


def test_a_restore_to_the_initial_state_keeps_the_version(rig: Rig) -> None:
    engine = rig.start()
    train(engine, 1, open_session(engine, digest_versions=OLD))
    restored = engine.restore(RestoreRequest("step-000000000")).result(WAIT)
    assert engine.status().digest_version == 1
    assert train(engine, 1) == chained(restored.digest, 1, 1, 1, lineage=2), "a bare call too"
    assert reason(engine.open_session(SessionRequest("b", "n2", digest_versions=(2,)))) == "DIGEST_VERSION"


def test_a_first_step_that_is_being_computed_counts(rig: Rig) -> None:
    engine = rig.start()
    rig.trainer.gate.clear()
    first = engine.train_step(bare(1))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    assert reason(engine.open_session(SessionRequest("a", "n", digest_versions=OLD))) == "DIGEST_VERSION"
    rig.trainer.gate.set()
    assert first.result(WAIT).step == 1


def test_a_client_is_asked_to_retry_while_the_first_step_may_still_fail(rig: Rig) -> None:
    engine = rig.start()
    old = SessionRequest("a", "n", digest_versions=OLD)
    rig.trainer.gate.clear()
    failing = engine.train_step(bare(1, first=FAIL_ID))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    refusal = engine.open_session(old).exception(WAIT)
    assert isinstance(refusal, Refused)
    assert (refusal.reason, refusal.retry_after_seconds) == ("DIGEST_VERSION", 0.5)
    rig.trainer.gate.set()
    assert reason(failing) == "INTERNAL"
    assert engine.open_session(old).result(WAIT).digest_version == 1


def test_a_client_is_not_asked_to_retry_once_a_first_step_that_is_not_finite_is_computed(rig: Rig) -> None:
    engine = rig.start()
    engine.train_step(bare(1, first=NAN_ID)).result(WAIT)
    refusal = engine.open_session(SessionRequest("a", "n", digest_versions=OLD)).exception(WAIT)
    assert isinstance(refusal, Refused)
    assert (refusal.reason, refusal.retry_after_seconds) == ("DIGEST_VERSION", None)


def test_a_takeover_during_the_first_step_is_told_the_version_that_the_step_fixed(rig: Rig) -> None:
    engine = rig.start()
    session = open_session(engine, digest_versions=OLD)
    rig.trainer.gate.clear()
    first = engine.train_step(StepRequest(payload(1), session))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    opening = engine.open_session(SessionRequest("b", "n2", takeover=True, digest_versions=BOTH))
    rig.trainer.gate.set()
    assert first.result(WAIT).step == 1
    assert opening.result(WAIT).digest_version == 1


def test_a_first_step_that_fails_fixes_nothing(rig: Rig) -> None:
    engine = rig.start()
    assert reason(engine.train_step(bare(1, first=FAIL_ID))) == "INTERNAL"
    assert engine.status().digest_version == 0
    train(engine, 2, open_session(engine, digest_versions=OLD))
    assert engine.status().digest_version == 1


def test_an_idle_session_cannot_continue_a_version_that_its_client_lacks(rig: Rig) -> None:
    now = 0.0
    engine = rig.start(clock=lambda: now, serve={"session_idle_seconds": 10})
    session = open_session(engine, digest_versions=OLD)
    now = 11.0
    rig.trainer.gate.clear()
    first = engine.train_step(bare(1))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    assert reason_of(lambda: engine.train_step(StepRequest(payload(2), session))) == "DIGEST_VERSION"
    rig.trainer.gate.set()
    assert first.result(WAIT).step == 1
    assert reason_of(lambda: engine.train_step(StepRequest(payload(2), session))) == "DIGEST_VERSION"


def test_an_idle_session_s_step_behind_a_bare_first_step_is_refused_when_its_turn_comes(rig: Rig) -> None:
    now = 0.0
    engine = rig.start(clock=lambda: now, serve={"session_idle_seconds": 10})
    session = open_session(engine, digest_versions=OLD)
    now = 11.0
    rig.trainer.gate.clear()
    generation = engine.generate(GenerateRequest(Prompts.nothing(1, 2), GenerateOptions(row_seeds=(0,))))
    assert rig.trainer.entered.acquire(timeout=WAIT), "the executor is busy"
    first = engine.train_step(bare(1))
    second = engine.train_step(StepRequest(payload(2), session))
    rig.trainer.gate.set()
    assert first.result(WAIT).step == 1
    assert reason(second) == "DIGEST_VERSION"
    assert len(list(generation)) == 1
    now = 30.0
    assert engine.train_step(bare(3)).result(WAIT).step == 2
