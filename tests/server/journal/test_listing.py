"""Recorded steps, a page at a time, beside steps that run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rig import WAIT, Rig, bare, reason, wait_for

from maskwire_server.requests import RestoreRequest, SaveRequest, SessionRequest
from maskwire_server.step_listing import StepsRequest


def test_each_page_goes_on_where_the_one_before_ended(rig: Rig) -> None:
    engine = rig.start()
    answers = [engine.train_step(bare(n, first=7 if n == 3 else None)).result(WAIT) for n in range(1, 8)]
    request = StepsRequest(size=3)
    seen = []
    for expected in (4, 7, None):
        page = engine.list_steps(request).result(WAIT)
        assert (page.lineage, page.parent, page.start_step, page.checkpoint) == (1, None, 0, None)
        assert page.next_step == expected
        seen += page.steps
        request = replace(request, first_step=page.next_step or 0)
    assert [(step.step, step.digest, step.outcome, step.gradient_norm) for step in seen] == [
        (a.step, a.digest, a.result.outcome, a.result.gradient_norm) for a in answers
    ]
    assert repr([step.losses for step in seen]) == repr([a.result.losses for a in answers])


@pytest.mark.parametrize(
    ("first", "last", "steps"),
    [(0, None, [1, 2, 3, 4]), (2, 3, [2, 3]), (4, None, [4]), (5, None, []), (1, 1, [1]), (9, 12, [])],
)
def test_a_range_may_go_beyond_what_there_is(
    rig: Rig, first: int, last: int | None, steps: list[int]
) -> None:
    engine = rig.start()
    for n in range(1, 5):
        engine.train_step(bare(n)).result(WAIT)
    page = engine.list_steps(StepsRequest(10, first, last)).result(WAIT)
    assert page.seconds > 0
    assert ([step.step for step in page.steps], page.next_step) == (steps, None)


def test_each_lineage_has_its_own_steps_and_tells_where_it_began(rig: Rig) -> None:
    engine = rig.start()
    for n in range(1, 6):
        engine.train_step(bare(n)).result(WAIT)
        if n == 3:
            engine.save(SaveRequest("three")).result(WAIT)
    engine.restore(RestoreRequest("three")).result(WAIT)
    assert engine.list_steps(StepsRequest(10)).result(WAIT).steps == ()
    engine.train_step(bare(9)).result(WAIT)
    newest = engine.list_steps(StepsRequest(10, run_id=engine.status().run_id)).result(WAIT)
    assert (newest.lineage, newest.parent, newest.start_step, newest.checkpoint) == (2, 1, 3, "three")
    assert [step.step for step in newest.steps] == [4]
    first = engine.list_steps(StepsRequest(10, lineage=1)).result(WAIT)
    assert [step.step for step in first.steps] == [1, 2, 3, 4, 5]
    for wrong in (StepsRequest(10, lineage=3), StepsRequest(10, run_id="other")):
        assert reason(engine.list_steps(wrong)) == "WRONG_RUN"


def test_a_list_is_answered_while_a_step_runs_and_has_no_step_that_is_not_durable(rig: Rig) -> None:
    engine = rig.start()
    engine.train_step(bare(1)).result(WAIT)
    rig.trainer.gate.clear()
    running = engine.train_step(bare(2))
    wait_for(lambda: rig.trainer.entered.acquire(blocking=False))
    page = engine.list_steps(StepsRequest(10)).result(WAIT)
    assert not running.done()
    assert [step.step for step in page.steps] == [1]
    rig.trainer.gate.set()
    running.result(WAIT)


def test_what_was_evaluated_stays_with_the_run(rig: Rig) -> None:
    engine = rig.start()
    for n in (1, 2):
        engine.train_step(bare(n)).result(WAIT)

    def said(nonce: str, step: int = 0) -> tuple[int, int]:
        answer = rig.engines[-1].open_session(SessionRequest("job", nonce, evaluated_step=step)).result(WAIT)
        return answer.evaluated_lineage, answer.evaluated_step

    assert said("a") == (0, 0)
    assert said("a", 2) == said("a") == said("b") == (1, 2)
    assert reason(engine.open_session(SessionRequest("job", "b", evaluated_step=3))) == "INVALID_FIELD"
    engine.close()
    rig.start()
    assert said("c") == (1, 2)
