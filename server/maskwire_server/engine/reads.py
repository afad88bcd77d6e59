"""What callers ask the journal through the committer, while the run serves."""

from __future__ import annotations

from dataclasses import dataclass

from maskwire_server.checkpoints.catalogue import Catalogue
from maskwire_server.errors import Refused
from maskwire_server.history import StepsPage, StepsRequest
from maskwire_server.journal import listing
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.lineage import ancestry
from maskwire_server.journal.records import Lineage, StepRecord
from maskwire_server.journal.reserve import Reserve, make_room


@dataclass(frozen=True)
class StepOfRequest:
    """The record of a request id."""

    request_id: str

    def read(self, journal: Journal) -> StepRecord | None:
        """Look it up in the index."""
        return journal.step_of_request(self.request_id)


@dataclass(frozen=True)
class StepOfNumber:
    """The record of a step."""

    lineage: int
    step: int

    def read(self, journal: Journal) -> StepRecord | None:
        """Look it up."""
        return journal.step(self.lineage, self.step)


@dataclass(frozen=True)
class StepsRead:
    """A page of recorded steps."""

    run_id: str
    request: StepsRequest

    def read(self, journal: Journal) -> StepsPage:
        """Read the page; raises Refused (WRONG_RUN)."""
        return listing.page(journal, self.run_id, self.request)


@dataclass(frozen=True)
class Recognition:
    """Whether checkpoints that appeared in the folder are of this run's history."""

    catalogue: Catalogue

    def read(self, journal: Journal) -> None:
        """Look up those that the journal was not asked about yet."""
        self.catalogue.look_up(journal)


@dataclass(frozen=True)
class Room:
    """Room on the journal's disk, made by folding its log."""

    disk: Reserve

    def read(self, journal: Journal) -> bool:
        """Fold the log if that frees room."""
        return make_room(journal, self.disk)


def require_in_history(record: StepRecord, lineages: dict[int, Lineage], lineage: int) -> None:
    """Raise WRONG_RUN for a step that a restore went back behind: OK means that it is in the history."""
    through = {segment.lineage: segment.through for segment in ancestry(lineages, lineage)}
    last = through.get(record.lineage, -1)
    if last is not None and record.step > last:
        raise Refused(
            "WRONG_RUN",
            f"this request id was step {record.step} of lineage {record.lineage}, which a restore went "
            "back behind; make a new id to train the batch again",
            step=record.step,
            lineage=lineage,
        )
