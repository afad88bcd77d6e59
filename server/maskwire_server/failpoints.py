"""Failpoints: named places at which a test can stop, delay or fail the process.

The idea comes from etcd's gofail. Only the server process of a test calls `install`: no setting or
environment variable does, so failpoints do nothing in production.
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

RANK_NAMES = ("rank.ordering", "rank.ordered", "rank.carried_out")
"""Where the leader sends an order, where a rank has received it, and where the rank has carried it out."""

SHARD_NAMES = (
    "shard.ordered",
    "shard.writing",
    "shard.written",
    "shard.flushed",
    "shard.gathered",
    "shard.placed",
)
"""Where a follower has received the order to write its parts of a checkpoint; where a rank writes a file, has
written all of its own, and has made them durable; where the leader knows all files, and has moved them."""

MIRROR_NAMES = (
    "mirror.claiming",
    "mirror.claimed",
    "mirror.uploading",
    "mirror.batches_uploaded",
    "mirror.segment_uploaded",
    "mirror.acknowledging",
    "mirror.files_uploaded",
    "mirror.checkpoint_uploaded",
    "mirror.deleting",
    "mirror.restoring",
    "mirror.restored",
    "mirror.fetching",
    "mirror.fetched",
)
"""The failpoints of a server that has a mirror."""

_action: Callable[[str], None] | None = None


def install(action: Callable[[str], None] | None) -> None:
    """From now on, call `action` with the name of each failpoint passed; None removes the action."""
    global _action
    _action = action


def passing(name: str) -> None:
    """Call the installed action, if any, with the name of a failpoint."""
    if _action is not None:
        _action(name)
