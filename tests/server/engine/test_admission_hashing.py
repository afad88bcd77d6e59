"""Payload hashes are computed without the run's mutex, for which every other request waits."""

from __future__ import annotations

import pytest
from rig import WAIT, Rig, open_session, payload, reason_of

from maskwire_server.batch import Payload
from maskwire_server.requests import StepRequest


def test_the_hash_of_a_step_that_was_exchanged_meanwhile_is_computed_without_the_mutex(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 2 is withdrawn and sent with another payload while a third request for it is being hashed."""
    engine = rig.start()
    session = open_session(engine)
    rig.trainer.gate.clear()
    engine.train_step(StepRequest(payload(1), session, 1))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    withdrawn, exchanged, third = payload(2), payload(3), payload(4)
    waiting = engine.train_step(StepRequest(withdrawn, session, 2, "withdrawn"))
    hash_of, owned = Payload.hash, []

    def hashed(self: Payload, version: object) -> bytes:
        owned.append(engine._run.mutex._is_owned())
        if self is third:
            assert waiting.cancel()
            engine.train_step(StepRequest(withdrawn, session, 3, "withdrawn"))
            engine.train_step(StepRequest(exchanged, session, 2, "exchanged"))
        if self is exchanged and len(owned) < 4:
            raise MemoryError
        return hash_of(self, version)  # type: ignore[arg-type]

    monkeypatch.setattr(Payload, "hash", hashed)
    assert reason_of(lambda: engine.train_step(StepRequest(third, session, 2, "third"))) == "STEP_TAKEN"
    assert owned == [False] * len(owned)
    assert len(owned) >= 4, "the exchanged payload was hashed again"
    rig.trainer.gate.set()
