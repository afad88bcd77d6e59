"""Takeovers that wait together: each epoch is recorded before the epochs that supersede it."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from rig import WAIT, Rig, bare, reason

from maskwire_server import failpoints
from maskwire_server.requests import SessionRequest


def test_a_superseded_nonce_is_recorded_before_the_session_that_superseded_it_is_answered(
    rig: Rig, tmp_path: Path
) -> None:
    """The machine is lost at the answer. The first client tries again, and must not fence the second one."""
    copy = tmp_path / "copy"
    engine = rig.start()
    rig.trainer.gate.clear()
    engine.train_step(bare(1))
    assert rig.trainer.entered.acquire(timeout=WAIT)
    first = engine.open_session(SessionRequest("job", "n1"))
    second = engine.open_session(SessionRequest("job", "n2"))
    second.add_done_callback(lambda _: shutil.copytree(rig.folder, copy))
    answered = threading.Event()
    second.add_done_callback(lambda _: answered.set())
    openings: list[str] = []

    def pause_at_the_last_opening(place: str) -> None:
        if place == "session.opening":
            openings.append(place)
            if len(openings) == 2:
                answered.wait(0.5)  # times out if this opening is the second client's

    failpoints.install(pause_at_the_last_opening)
    try:
        rig.trainer.gate.set()
        assert second.result(WAIT).epoch == 2
        assert answered.wait(WAIT)
        assert reason(first) == "FENCED"
    finally:
        failpoints.install(None)
    restarted = Rig(copy).start()
    try:
        assert reason(restarted.open_session(SessionRequest("job", "n1"))) == "FENCED"
        assert restarted.open_session(SessionRequest("job", "n2")).result(WAIT).epoch == 2
    finally:
        restarted.close()
