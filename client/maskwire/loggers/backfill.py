"""Fetch from the server the steps of a run that a log lacks, and write them to the log.

When a job is killed, its log can lack steps: those whose answers the job never received, and those that its
loggers had not written yet. The next job adds them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import Any, TypeVar

from maskwire.errors import UnimplementedError
from maskwire.loggers.log_thread import LogThread
from maskwire.loggers.records import Place, filled_in_record, restored_record, started_record
from maskwire.protocol.effects import Work
from maskwire.results import StepsPage

T = TypeVar("T")

_PAGE = 250  # the most steps that a server returns in one page

Asking = Generator[Callable[[], Any] | Work, Any, T]
"""A generator that yields calls of the trainer. Its caller, such as `fit`, performs them."""


def catch_up(trainer: Any, last: Place | None, here: Place, log: LogThread) -> Asking[None]:
    """Write to a log the records that it lacks: those after its `last` place, up to the run's place `here`.

    Fetches the steps from the server one page at a time. Instead, writes one "started" record, which marks
    a beginning or a gap, if the log has nothing of this run, if the log is ahead of the run, or if the server
    is too old to list its steps.
    """
    try:
        if last is not None and last.digest:
            last = yield from _of_this_run(trainer, last)
        if last is not None and last.run_id == here.run_id and last.order <= here.order:
            yield from _fill(trainer, last, here, log)
            return
    except UnimplementedError:
        pass  # an older server does not list steps
    log.write(started_record(here, trainer.digest))


def _of_this_run(trainer: Any, last: Place) -> Asking[Place | None]:
    """Return the place `last` with its run, for an old log that does not name the run.

    Returns None if the server has another digest at that step: the log is of another run.
    """
    page = yield partial(trainer.steps_page, first_step=last.step, last_step=last.step)
    known = [recorded.digest.hex() for recorded in page.steps]
    return Place(page.run_id, page.lineage, last.step) if known == [last.digest] else None


def _fill(trainer: Any, last: Place, here: Place, log: LogThread) -> Asking[None]:
    if last.order == here.order:
        return
    for lineage in range(last.lineage, here.lineage + 1):
        first = last.step + 1 if lineage == last.lineage else 0
        through = here.step if lineage == here.lineage else 0
        token = ""
        while True:
            page: StepsPage = yield partial(
                trainer.steps_page, page_size=_PAGE, page_token=token, run_id=here.run_id,
                lineage=lineage, first_step=first, last_step=through,
            )  # fmt: skip
            if lineage > last.lineage and not token:
                log.write(restored_record(page))
            for step in page.steps:
                log.write(filled_in_record(here.run_id, step))
            yield Work(log.flush)  # so that the queue does not overflow
            token = page.next_page_token
            if not token or log.failure:
                break
