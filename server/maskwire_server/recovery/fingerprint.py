"""What a step's result depends on: recorded with the run, and put in force again for its replay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.records import StepRecord
from maskwire_server.recovery.tolerance import TOLERANCES, Tolerance, measured_steps
from maskwire_server.results import InexactReplay, Outcome

FINGERPRINT = (
    "torch", "device", "threads", "precision", "compile", "deterministic", "micro_batch_tokens", "world_size",
)  # fmt: skip
NUMERICS = "fingerprint.numerics"
"""The version of this software's own mathematics; another one is replayed within the tolerance."""


def fingerprint(versions: dict[str, str]) -> dict[str, Any]:
    """What a step's result depends on beside the configuration: software, hardware, threads."""
    return {f"fingerprint.{name}": versions[name] for name in (*FINGERPRINT, "numerics") if name in versions}


def reproducible(settings: dict[str, Any]) -> bool:
    """Whether the same steps give the same bytes again; what does not say is."""
    deterministic = settings.get("fingerprint.deterministic", "yes") == "yes"
    return bool(deterministic and settings.get("fingerprint.compile", "off") == "off")


def _numerics_version(settings: dict[str, Any]) -> int:
    return int(settings.get(NUMERICS, 1))  # the first version recorded none


def numerics(configuration: dict[str, Any], versions: dict[str, str]) -> dict[str, Any]:
    """What a step's result depends on beside model, objective and seed: as it is, not as it was asked for."""
    optimizer = {f"optimizer.{key}": value for key, value in configuration.get("optimizer", {}).items()}
    return optimizer | fingerprint(versions)


def pinned_threads(journal: Journal) -> int | None:
    """The thread count that the run was last computed with; None when nobody wrote it down."""
    last = journal.last_event("configuration")
    threads = None if last is None else last[1].get("fingerprint.threads")
    return None if threads is None else int(threads)


def record_start(journal: Journal, versions: dict[str, str], settings: dict[str, Any]) -> int:
    """Record that a server instance takes the run over, and return its configuration's id."""
    last = journal.last_event("configuration")
    unchanged = last[0] if last is not None and last[1] == settings else None
    started: list[int] = []

    def write() -> None:
        journal.add_event("instance", {"versions": versions})
        started.append(unchanged or journal.add_event("configuration", settings))

    journal.transaction(write)
    return started[0]


def replayable(
    journal: Journal, settings: dict[str, Any], configure: Callable[[dict[str, Any], int], None]
) -> bool:
    """Whether this server could compute again what the one before it trained."""
    last = journal.last_event("configuration")
    if last is None:
        return True
    before, now = _to_configure(last[1]), _to_configure(settings)
    try:
        if before != now:
            configure(*before)
            configure(*now)
    except ValueError:
        return False
    return not _changed_fingerprints(last[1], settings)


def _changed_fingerprints(was: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    return [
        key
        for key in sorted(was.keys() & settings.keys())  # an older version recorded less
        if key.startswith("fingerprint.") and key != NUMERICS and was[key] != settings[key]
    ]


class Following:
    """Puts each record's own [optimizer] section and numerics version in force before it is computed again.

    It tells too which records must give the same bytes, and which only close results: those of a
    configuration that is not reproducible or of another numerics version, those from an inexact replay
    in the history on, and whatever follows any of them.
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
        self._steps = 0.0  # `measured_steps`, computed since results need only be close
        self._rate = 0.0
        self._precision = "fp32"
        self._journal = journal
        self._settings = settings
        self._configure = configure
        self._in_force = _to_configure(settings)
        self.accepted = False
        """Something else than a step was trained with was let pass."""

    def follow(
        self, records: Iterator[tuple[StepRecord, bytes | None]]
    ) -> Iterator[tuple[StepRecord, bytes | None]]:
        """Pass the records on; RunDirectoryError at one whose settings cannot be followed."""
        for record, payload in records:
            if record.outcome is Outcome.APPLIED:
                self._follow(record, self._journal.event(record.configuration))
            yield record, payload

    def _follow(self, record: StepRecord, was: dict[str, Any]) -> None:
        self._drifted = self._drifted or any(
            replay.lineage == record.lineage and replay.first_step <= record.step for replay in self._inexact
        )
        self._close = (
            self._close
            or self._drifted
            or not (reproducible(was) and reproducible(self._settings))
            or _numerics_version(was) != _numerics_version(self._settings)
        )
        self._precision = was.get("fingerprint.precision", "fp32")
        changed = [f"{key} was {was[key]!r}" for key in _changed_fingerprints(was, self._settings)]
        if changed and self._strict:
            raise RunDirectoryError(
                f"{_again(record, ', '.join(changed))}; or accept a result that may differ, once, with "
                "--accept-inexact-replay"
            )
        self.accepted = self.accepted or bool(changed)
        self._close = self._close or self.accepted
        self._rate = float(was.get("optimizer.learning_rate", 0.0))
        try:
            self._put_in_force(_to_configure(was))
        except ValueError as error:
            raise RunDirectoryError(_again(record, str(error))) from error

    def tolerance(self, learning_rate: float | None) -> Tolerance | None:
        """How far the record that was passed on last may be from its result; None: it must be the same.

        `learning_rate` is the step's own, if its batch came with one. Asked once for each step.
        """
        if not self._close:
            return None
        whole = TOLERANCES.get(self._precision, TOLERANCES["fp32"])
        allowed = whole if self._drifted else whole.after(self._steps)
        rate = self._rate if learning_rate is None else learning_rate
        self._steps += measured_steps(rate)
        return allowed

    def end(self) -> None:
        """Go on under the configuration of now."""
        self._put_in_force(_to_configure(self._settings))

    def _put_in_force(self, wanted: tuple[dict[str, Any], int]) -> None:
        if wanted != self._in_force:
            self._configure(*wanted)
            self._in_force = wanted


def optimizer_section(settings: dict[str, Any]) -> dict[str, Any]:
    """The [optimizer] section within `numerics`."""
    prefix = "optimizer."
    return {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}


def _to_configure(settings: dict[str, Any]) -> tuple[dict[str, Any], int]:
    return optimizer_section(settings), _numerics_version(settings)


def _again(record: StepRecord, what: str) -> str:
    return (
        f"step {record.step} must be computed again, and what its result depends on changed since it was "
        f"trained ({what}): start once with it as it was, stop the server cleanly, then change it"
    )
