"""Named places where a test can stop, delay or fail the process. Nothing happens at them otherwise.

Idea: etcd's gofail. A test's own server process calls `install`; no setting and no environment does.
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
    """Call `act` with the name of every place that is passed; None: no longer."""
    global _act
    _act = act


def passing(name: str) -> None:
    """The process is at a place of NAMES."""
    if _act is not None:
        _act(name)
