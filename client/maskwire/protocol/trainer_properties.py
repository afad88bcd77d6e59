"""What a trainer knows about its run without asking the server."""

from __future__ import annotations

from maskwire import results
from maskwire.protocol.session import Session


class TrainerProperties:
    """Properties of both trainers, as of the last answer."""

    _writer: Session

    @property
    def name(self) -> str:
        """Name of this job."""
        return self._writer.name

    @property
    def model(self) -> results.ModelInfo:
        """The served model."""
        return self._writer.model

    @property
    def inexact_replays(self) -> tuple[results.InexactReplay, ...]:
        """Steps that recovery recomputed with results that were close but not equal."""
        return self._writer.inexact_replays

    @property
    def limits(self) -> results.Limits:
        """The server's limits on one request."""
        return self._writer.limits

    @property
    def run_id(self) -> str:
        """Id of the run."""
        return self._writer.acknowledged.session.run_id

    @property
    def lineage(self) -> int:
        """Number of the current lineage; each restore starts the next one."""
        return self._writer.acknowledged.session.lineage

    @property
    def step(self) -> int:
        """The last acknowledged step."""
        return self._writer.acknowledged.step

    @property
    def data(self) -> dict[str, str]:
        """The recorded fingerprint of the run's training data; empty: not recorded."""
        return self._writer.data

    @property
    def seconds_waited(self) -> float:
        """Seconds for which this client has waited for the server to answer again."""
        return self._writer.seconds_waited

    @property
    def evaluated(self) -> tuple[int, int]:
        """Lineage and number of the step last marked as evaluated; (0, 0) if none is."""
        return self._writer.evaluated

    @property
    def digest(self) -> bytes:
        """The digest after the last acknowledged step; the server has the same."""
        return self._writer.acknowledged.digest
