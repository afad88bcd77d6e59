"""Applies the settings that a step was trained with before the step is computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from maskwire.v1.values import InexactReplay, Outcome
from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.records import StepRecord
from maskwire_server.recovery.fingerprint import (
    changed_fingerprints,
    numerics_version,
    reproducible,
    trainer_settings,
)
from maskwire_server.recovery.tolerance import TOLERANCES, Tolerance, measured_steps


class ReplaySettings:
    """Configures the trainer with each step's recorded settings before the step is recomputed.

    It also decides which results must equal the recorded bytes. A tolerance applies instead to a step, and to
    all steps after it, if (a) the step's or the current configuration is not reproducible, (b) the step used
    another numerics version, (c) the step was part of an inexact replay, or (d) a changed fingerprint was
    accepted for the step.
    """

    def __init__(
        self,
        journal: Journal,
        settings: dict[str, Any],
        configure: Callable[[dict[str, Any], int], None],
        *,
        strict: bool,
        inexact: Iterable[InexactReplay] = (),
    ) -> None:
        self._strict = strict
        self._inexact = tuple(inexact)
        self._close = self._drifted = False
        self._steps = 0.0  # steps since the first with a tolerance, in `measured_steps`
        self._rate = 0.0
        self._largest_scale = 1.0
        self._precision = "fp32"
        self._journal = journal
        self._settings = settings
        self._configure = configure
        self._in_use = trainer_settings(settings)
        self.accepted = False
        """Whether a changed fingerprint was accepted."""

    def apply(
        self, records: Iterator[tuple[StepRecord, bytes | None]]
    ) -> Iterator[tuple[StepRecord, bytes | None]]:
        """Yield each record after configuring the trainer for it. Raises RunDirectoryError if that fails."""
        for record, payload in records:
            if record.outcome is Outcome.APPLIED:
                self._configure_for(record, self._journal.event(record.configuration))
            yield record, payload

    def _configure_for(self, record: StepRecord, was: dict[str, Any]) -> None:
        self._drifted = self._drifted or any(
            replay.lineage == record.lineage and replay.first_step <= record.step for replay in self._inexact
        )
        self._close = (
            self._close
            or self._drifted
            or not (reproducible(was) and reproducible(self._settings))
            or numerics_version(was) != numerics_version(self._settings)
        )
        self._precision = was.get("fingerprint.precision", "fp32")
        changed = [f"{key} was {was[key]!r}" for key in changed_fingerprints(was, self._settings)]
        if changed and self._strict:
            raise RunDirectoryError(
                f"{_changed(record, ', '.join(changed))}. To accept that its result may differ, start once "
                "with --accept-inexact-replay"
            )
        self.accepted = self.accepted or bool(changed)
        self._close = self._close or self.accepted
        self._rate = float(was.get("optimizer.learning_rate", 0.0))
        scales = [float(group["lr_scale"]) for group in was.get("optimizer.groups", [])]
        self._largest_scale = max([1.0, *scales])
        try:
            self._use(trainer_settings(was))
        except ValueError as error:
            raise RunDirectoryError(_changed(record, str(error))) from error

    def tolerance(self, learning_rate: float | None) -> Tolerance | None:
        """The tolerance for the record that `apply` yielded last; None if its results must be equal.

        `learning_rate` is the rate in the step's request; None if the request had none. Call this once per
        step, because the drift grows with the number of calls.
        """
        if not self._close:
            return None
        whole = TOLERANCES.get(self._precision, TOLERANCES["fp32"])
        allowed = whole if self._drifted else whole.after(self._steps)
        rate = self._rate if learning_rate is None else learning_rate
        self._steps += measured_steps(rate * self._largest_scale)
        return allowed

    def restore(self) -> None:
        """Configure the trainer with the server's current settings again, after the replay."""
        self._use(trainer_settings(self._settings))

    def _use(self, wanted: tuple[dict[str, Any], int]) -> None:
        if wanted != self._in_use:
            self._configure(*wanted)
            self._in_use = wanted


def _changed(record: StepRecord, what: str) -> str:
    return (
        f"step {record.step} must be recomputed, but settings that its result depends on have changed since "
        f"it was trained ({what}): start once with the old settings, stop the server cleanly, then change "
        "them"
    )
