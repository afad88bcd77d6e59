"""Records in the journal that a segment is in the mirror."""

from __future__ import annotations

from dataclasses import dataclass, replace

from maskwire_server.journal.journal import Journal
from maskwire_server.journal.mirror_segment_writer import SegmentWriter


@dataclass(eq=False)
class UploadedCommit:
    """Records the newest uploaded segment, and deletes its changes from the outbox."""

    writer: SegmentWriter
    last: int
    """The mark after the segment's changes."""

    def __post_init__(self) -> None:
        self._number, self._hash = self.writer.number, self.writer.hash

    def write(self, journal: Journal) -> None:
        """Delete the segment's changes from the outbox, and record the segment."""
        state = journal.outbox.state()
        assert state is not None
        state = replace(state, number=self._number, hash=self._hash, instances=(self.writer.instance,))
        journal.outbox.uploaded(self.last, state)

    def committed(self) -> None:
        """Do nothing, because no caller waits for this commit."""
