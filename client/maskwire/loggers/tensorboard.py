"""Logger that writes TensorBoard's event files, without TensorFlow. Needs the package `tensorboard`.

Each run has its own folder, named by the run's id. Each call of `fit` starts a new file there, with a
"START" event. This event makes TensorBoard discard the later steps of earlier files, so that a run that
was restored to an earlier step is shown as one curve.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from maskwire.loggers.logger import Logger, needs
from maskwire.loggers.records import Place, Record, is_evaluation, scalars
from maskwire.nonfatal_output import check_in_place
from maskwire.signatures import refuse_unknown_keywords

_NAME = "events.out.tfevents.{:010d}.maskwire.lineage-{}"
_HEADER = struct.Struct("<QI")  # a record is its length, a checksum, the data and a second checksum
_CHECKSUM = 4  # bytes
_FLUSH_SECONDS = 5.0


@refuse_unknown_keywords
class TensorBoard(Logger):
    """Logger that writes a run's curves to `folder`/RUN_ID. `tensorboard --logdir folder` shows them."""

    def __init__(self, folder: str | Path) -> None:
        """Log to a folder. Raises ImportError if the package tensorboard is not installed.

        folder: The folder, in which each run gets a folder of its own.
        """
        needs("tensorboard", "tensorboard")
        self.path: Path = Path(folder)
        self._run = self.path
        self._begun = self._evaluated = (0, 0)  # lineage and step
        self._file: IO[bytes] | None = None
        self._writer: Any = None
        self._flushed = 0.0

    @property
    def label(self) -> str:
        """The name of this log in messages."""
        return f"tensorboard {self.path}"

    def open(self, place: Place) -> Place | None:
        """Start a new event file, and return the place of the last step in the run's earlier event files.

        Returns None if there are none. Raises OSError if the file cannot be written.
        """
        self._run = self.path.absolute() / place.run_id
        self._run.mkdir(parents=True, exist_ok=True)
        last = self._last_place(place.run_id)
        self._begin(last or place)
        return last

    def write(self, record: Record) -> None:
        """Write the numbers of a step's or an evaluation's record. Other records start a new event file."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        place = Place(record["run_id"], record["lineage"], record["step"])
        if "event" in record:
            if place.order != self._begun:
                self._begin(place)
            return
        numbers = scalars(record)
        repeated = is_evaluation(record) and self._evaluated == place.order
        if not numbers or repeated:
            return
        if is_evaluation(record):
            self._evaluated = place.order
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()]
        self._write(
            Event(wall_time=record["time"] or time.time(), step=place.step, summary=Summary(value=values))
        )
        if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write buffered events to the file. Raises OSError if the file was deleted, moved or replaced."""
        if self._file is not None:
            self._file.flush()
            check_in_place(Path(self._file.name), self._file.fileno())
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Close the event file. Raises OSError if the file was deleted, moved or replaced."""
        if self._file is not None:
            file, self._file = self._file, None
            with file:
                file.flush()
                check_in_place(Path(file.name), file.fileno())

    def _begin(self, place: Place) -> None:
        """Start a new event file for the steps after `place`."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.close()
        self._begun = place.order
        # TensorBoard reads the files of a folder in the order of their names.
        newest = max([_time_of(path) for path in self._files()], default=0)
        moment = max(int(time.time()), newest + 1)
        self._file = (self._run / _NAME.format(moment, place.lineage)).open("xb")
        self._writer = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=place.step + 1, session_log=start))
        self.flush()

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())

    def _files(self) -> list[Path]:
        return sorted(self._run.glob("events.out.tfevents.*.maskwire.lineage-*"))

    def _last_place(self, run_id: str) -> Place | None:
        """Return the place of the last step in the newest event file, or None if there is no event file.

        For a file without steps, returns the place after which the file starts.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        for path in reversed(self._files()):
            lineage = int(path.name.rpartition("-")[2])
            for data in _backwards(path):
                event = Event.FromString(data)
                if event.HasField("summary"):
                    if any(value.tag.startswith("eval/") for value in event.summary.value):
                        self._evaluated = (lineage, event.step)
                    return Place(run_id, lineage, event.step)
                if event.session_log.status == SessionLog.START:
                    return Place(run_id, lineage, event.step - 1)
        return None


def _time_of(path: Path) -> int:
    return int(path.name.split(".")[3])


def _backwards(path: Path) -> Iterator[bytes]:
    """Yield the complete records of an event file, the last record first."""
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        starts, position = [], 0
        while position + _HEADER.size <= len(content):
            length, _ = _HEADER.unpack_from(content, position)
            end = position + _HEADER.size + length + _CHECKSUM
            if end > len(content):
                break
            starts.append((position + _HEADER.size, length))
            position = end
        for start, length in reversed(starts):
            yield content[start : start + length]
