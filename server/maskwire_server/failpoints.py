"""Named places in the code where a test can stop, delay or fail the process; otherwise they do nothing.

The idea is from etcd's gofail. Only a test's own server process calls `install`; no setting does.
"""

from __future__ import annotations

from collections.abc import Callable

NAMES = (
    "journal.creating",
    "journal.created",
    "journal.begin",
    "journal.written",
    "journal.committed",
    "journal.tidying",
    "journal.tidied",
    "session.opening",
    "session.opened",
    "step.admitted",
    "step.computing",
    "step.computed",
    "step.consumed",
    "step.durable",
    "step.answered",
    "checkpoint.copying",
    "checkpoint.copied",
    "checkpoint.begun",
    "checkpoint.written",
    "checkpoint.flushed",
    "checkpoint.drafted",
    "checkpoint.renamed",
    "checkpoint.published",
    "checkpoint.collecting",
    "checkpoint.undone",
    "checkpoint.collected",
    "payloads.dropping",
    "restore.recorded",
    "restore.loaded",
    "recovery.chosen",
    "recovery.loaded",
    "recovery.replaying",
    "recovery.replayed",
    "drain.begun",
)

_act: Callable[[str], None] | None = None


def install(act: Callable[[str], None] | None) -> None:
    """Call `act` with the name of each failpoint that is passed; None: call nothing."""
    global _act
    _act = act


def passing(name: str) -> None:
    """Pass the failpoint of that name, one of NAMES."""
    if _act is not None:
        _act(name)
