"""Pages of recorded steps. Pages are small, because the thread that commits steps reads them."""

from __future__ import annotations

import time

from maskwire_server.errors import Refused
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.records import StepRecord
from maskwire_server.step_listing import RecordedStep, StepsPage, StepsRequest


def page(journal: Journal, run_id: str, request: StepsRequest) -> StepsPage:
    """A page with the first steps of the requested range. Raises Refused for another run or lineage."""
    began = time.monotonic()
    lineages = journal.lineages()
    newest = max(lineages)
    lineage = lineages.get(newest if request.lineage is None else request.lineage)
    if lineage is None or request.run_id not in ("", run_id):
        asked = request.run_id or run_id, newest if request.lineage is None else request.lineage
        raise Refused(
            "WRONG_RUN",
            f"this server does not have run {asked[0]!r}, lineage {asked[1]}; it has run {run_id!r}, whose "
            f"newest lineage is {newest}",
            run_id=run_id,
            lineage=newest,
        )
    # One step more than requested shows whether another page follows.
    found = journal.steps_between(lineage.lineage, request.first_step, request.last_step, request.size + 1)
    return StepsPage(
        run_id, lineage.lineage, lineage.parent, lineage.step, lineage.checkpoint,
        steps=tuple(_recorded(record) for record in found[: request.size]),
        next_step=found[-1].step if len(found) > request.size else None,
        seconds=time.monotonic() - began,
    )  # fmt: skip


def _recorded(record: StepRecord) -> RecordedStep:
    return RecordedStep(record.step, record.outcome, record.losses, record.gradient_norm, record.digest)
