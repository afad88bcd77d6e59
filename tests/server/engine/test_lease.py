"""The run's one writer, by a clock that the test sets."""

from __future__ import annotations

from maskwire_server.engine.lease import Lease


def writer() -> tuple[Lease, list[float]]:
    now = [0.0]
    found = Lease(60.0, lambda: now[0])
    found.open(1, "job")
    found.opened()
    return found, now


def test_a_session_that_was_idle_stays_ended_while_a_bare_step_runs() -> None:
    found, now = writer()
    now[0] = 59.0
    assert found.present(False) == "job"
    now[0] = 60.0
    assert found.present(False) == ""
    assert found.present(True) == "", "the step in flight is not the session's"


def test_steps_in_flight_keep_a_session_open() -> None:
    found, now = writer()
    now[0] = 100.0
    assert found.present(True) == "job"


def test_a_session_resumes_with_its_next_step() -> None:
    found, now = writer()
    now[0] = 60.0
    assert found.present(False) == ""
    found.touch()
    assert found.present(False) == "job"


def test_a_session_that_had_ended_is_not_superseded() -> None:
    found, now = writer()
    now[0] = 60.0
    found.open(2, "job", supersedes=bool(found.present(False)))
    assert found.superseded is None
    found.open(3, "other", supersedes=bool(found.present(False)))
    assert found.superseded is not None
    assert (found.superseded.client_name, found.superseded.epoch) == ("job", 2)
