"""The properties of a trainer, which it knows without asking the server."""

from __future__ import annotations

from maskwire import results
from maskwire.protocol.session import Session


class TrainerProperties:
    """Properties of the blocking and the asyncio trainer, as of the server's last answer."""

    _writer: Session

    @property
    def name(self) -> str:
        """The name of this client, under which it holds its session."""
        return self._writer.name

    @property
    def model(self) -> results.ModelInfo:
        """The description of the model that the server trains."""
        return self._writer.model

    @property
    def inexact_replays(self) -> tuple[results.InexactReplay, ...]:
        """Ranges of steps that recovery recomputed with results that were close but not equal."""
        return self._writer.inexact_replays

    @property
    def limits(self) -> results.Limits:
        """The server's limits on one request."""
        return self._writer.limits

    @property
    def run_id(self) -> str:
        """The id of the run."""
        return self._writer.acknowledged.session.run_id

    @property
    def lineage(self) -> int:
        """The number of the current lineage, from 1. Each restore starts the next lineage."""
        return self._writer.acknowledged.session.lineage

    @property
    def step(self) -> int:
        """The number of the last step that the server acknowledged; 0 if there is none."""
        return self._writer.acknowledged.step

    @property
    def data(self) -> dict[str, str]:
        """The recorded fingerprint of the run's training data, in named parts; empty if none is recorded."""
        return self._writer.data

    @property
    def seconds_waited(self) -> float:
        """Seconds for which this client has waited until the server answered or accepted calls again."""
        return self._writer.seconds_waited

    @property
    def evaluated(self) -> tuple[int, int]:
        """The lineage and number of the step that was last marked as evaluated; (0, 0) if there is none."""
        return self._writer.evaluated

    @property
    def digest(self) -> bytes:
        """The history digest after the last acknowledged step, 32 bytes. The server has the same digest."""
        return self._writer.acknowledged.digest
