"""A run as its server has recorded it, and a call of `fit` as its loggers see it."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace
from typing import Any

from maskwire.errors import UnimplementedError
from maskwire.loggers.backfill import catch_up
from maskwire.loggers.log_thread import LogThread
from maskwire.loggers.logger import Logger
from maskwire.loggers.records import Place, evaluation_record, step_record
from maskwire.protocol.effects import Work
from maskwire.results import Losses, Outcome, RecordedStep, StepMetrics, StepResult, StepsPage


class Server:
    """A trainer's place and its server's records: lineage -> (parent, start, last step)."""

    def __init__(self, *lineages: tuple[int, int, int], run_id: str = "run") -> None:
        self.run_id = run_id
        self.lineages = dict(enumerate(lineages, 1))
        self.lineage = len(lineages)
        self.step = lineages[-1][2]
        self.digest = self.digest_of(self.lineage, self.step)
        self.asked = 0

    @staticmethod
    def digest_of(lineage: int, step: int) -> bytes:
        return bytes([lineage, step]) * 16

    def steps_page(
        self, *, lineage: int = 0, first_step: int = 0, last_step: int = 0, run_id: str = "",
        page_size: int = 0, page_token: str = "",
    ) -> StepsPage:  # fmt: skip
        self.asked += 1
        assert run_id in ("", self.run_id)
        lineage = lineage or self.lineage
        parent, start, last = self.lineages[lineage]
        first = int(page_token) if page_token else max(first_step, start + 1)
        through = min(last, last_step or last, first + 2)  # pages of three
        more = through < min(last, last_step or last)
        steps = tuple(
            RecordedStep(
                lineage, step, Outcome.APPLIED, Losses(float("inf"), 1.0, None), 0.5,
                self.digest_of(lineage, step),
            )
            for step in range(first, through + 1)
        )  # fmt: skip
        token = str(through + 1) if more else ""
        return StepsPage(self.run_id, lineage, parent, start, f"from-{start}", steps, token)


def log_steps(logger: Logger, server: Server, seen: range = range(0), evaluated: int = 0) -> None:
    """Open a log, fill it in, write the steps that a call sees, and then its evaluation of a step."""
    here = Place(server.run_id, server.lineage, server.step)
    thread = LogThread(logger, here)
    asking = catch_up(server, thread.opened(), here, thread)
    reply, raised = None, None
    with contextlib.suppress(StopIteration):
        while True:
            wish = asking.send(reply) if raised is None else asking.throw(raised)
            reply = raised = None
            try:
                reply = wish.function() if isinstance(wish, Work) else wish()
            except UnimplementedError as error:
                raised = error
    for step in seen:
        result = StepResult(
            step, Losses(1.0, 1.0, None), Outcome.APPLIED, False, server.digest_of(server.lineage, step),
            StepMetrics(None, 1e-3, 0, 0, 0, 0, 0),
        )  # fmt: skip
        thread.write(step_record(server.run_id, server.lineage, result, 8))
    if evaluated:
        found: Any = SimpleNamespace(step=evaluated, bits_per_token=2.5, standard_error=math.log(2))
        thread.write(evaluation_record(server.run_id, server.lineage, found))
    thread.close()
    assert thread.failure == ""
