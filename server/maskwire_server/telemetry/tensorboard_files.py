"""Event files for TensorBoard: curves, evaluations and samples, in the folder `tensorboard` of the run.

Each start of the server, and each restore, marks the step from which the history continues. TensorBoard then
drops the points after that step in earlier files, so that every step has one point.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event as FileEvent
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.record_writer import RecordWriter

from maskwire_server.events import Evaluated, Event, Generated, LineageOpened, StepCommitted
from maskwire_server.telemetry.sample_text import as_markdown

FOLDER = "tensorboard"
_FLUSH_SECONDS = 1.0
_EVALUATION_SECONDS = 5.0
_RETRY_SECONDS = 60.0
_SPEED_STEPS = 20
_files = itertools.count()


@dataclass
class _Evaluation:
    """Sums over the calls that evaluated one step; a client may split one evaluation into several calls."""

    lineage: int
    step: int
    chain_rule: bool
    time: float
    tokens: int = 0
    nats: float = 0.0
    correct: float = 0.0

    def includes(self, event: Evaluated) -> bool:
        return (self.lineage, self.step, self.chain_rule) == (event.lineage, event.step, event.chain_rule)

    def add(self, event: Evaluated) -> None:
        self.time = event.time
        self.tokens += event.tokens
        self.nats += event.nats_per_token * event.tokens
        self.correct += event.accuracy * event.tokens


class TensorBoardFiles:
    """Subscribes to the server's events and writes them to event files for TensorBoard."""

    name = "tensorboard"
    kinds: frozenset[type[Event]] = frozenset({StepCommitted, LineageOpened, Evaluated, Generated})

    def __init__(self, run_dir: Path, decoder: Callable[[], Callable[[Sequence[int]], str]]) -> None:
        """`decoder` returns a function from ids to text. It is called when there are samples to decode."""
        self._folder = run_dir / FOLDER
        self._decoder = decoder
        self._file: _File | None = None
        self._flushed = time.monotonic()
        self._retry_at = 0.0
        self._evaluation: _Evaluation | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=_SPEED_STEPS + 1)

    def receive(self, event: Event) -> None:
        """Write the data points of an event to the event file."""
        if isinstance(event, LineageOpened):
            self._open(event)
        elif isinstance(event, StepCommitted):
            self._write_step(event)
        elif isinstance(event, Evaluated):
            self._add_evaluation(event)
        elif isinstance(event, Generated):
            self._write_samples(event)
        self.idle()

    def idle(self) -> bool:
        """Write the evaluation if it is complete, and flush the file. Returns whether data is pending."""
        evaluation = self._evaluation
        if evaluation is not None and time.time() - evaluation.time >= _EVALUATION_SECONDS:
            self._write_evaluation(evaluation)
        if self._file is not None and self._file.dirty and time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self._flushed = time.monotonic()
            self._file.flush()
        return self._evaluation is not None or (self._file is not None and self._file.dirty)

    def close(self) -> None:
        """Write the pending evaluation, and close the event file."""
        if self._evaluation is not None:
            self._write_evaluation(self._evaluation)
        if self._file is not None:
            self._file.close()

    def _open(self, event: LineageOpened) -> None:
        """Mark the step from which the curves continue. TensorBoard drops later points of earlier files."""
        self._recent.clear()
        mark = SessionLog(status=SessionLog.START)
        self._write(FileEvent(wall_time=event.time, step=event.step + 1, session_log=mark))

    def _write_step(self, event: StepCommitted) -> None:
        losses = event.losses
        points = {
            "loss/total": losses.loss,
            "loss/generator": losses.generator_loss,
            "loss/critic": losses.critic_loss,
            "optimizer/gradient_norm": event.gradient_norm,
            "optimizer/learning_rate": event.learning_rate,
            "speed/compute_seconds": event.compute_seconds,
            "speed/tokens_per_second": self._speed(event),
        }
        self._write_points(event.time, event.step, points)

    def _speed(self, event: StepCommitted) -> float | None:
        """Tokens per second over several steps, as steps may be committed at once; None if no time passed."""
        self._recent.append((event.time, event.tokens))
        (began, first), (ended, _) = self._recent[0], self._recent[-1]
        if ended <= began:
            return None
        return (sum(tokens for _, tokens in self._recent) - first) / (ended - began)

    def _add_evaluation(self, event: Evaluated) -> None:
        found = self._evaluation
        if found is not None and not found.includes(event):
            self._write_evaluation(found)
        if self._evaluation is None:
            self._evaluation = _Evaluation(event.lineage, event.step, event.chain_rule, event.time)
        self._evaluation.add(event)

    def _write_evaluation(self, found: _Evaluation) -> None:
        self._evaluation = None
        if not found.tokens:
            return
        nats = found.nats / found.tokens
        group = "evaluation_chain_rule" if found.chain_rule else "evaluation"
        points = {
            f"{group}/nats_per_token": nats,
            f"{group}/bits_per_token": nats / math.log(2),
            f"{group}/accuracy": found.correct / found.tokens,
        }
        self._write_points(found.time, found.step, points)

    def _write_points(self, wall_time: float, step: int, points: Mapping[str, float | None]) -> None:
        values = [
            Summary.Value(tag=tag, simple_value=value) for tag, value in points.items() if value is not None
        ]
        self._write(FileEvent(wall_time=wall_time, step=step, summary=Summary(value=values)))

    def _write_samples(self, event: Generated) -> None:
        decode = self._decoder()
        texts = [as_markdown(decode(ids.tolist())).encode() for ids in event.samples]
        value = Summary.Value(
            tag="samples",
            metadata=SummaryMetadata(
                plugin_data=SummaryMetadata.PluginData(plugin_name="text"), data_class=DATA_CLASS_TENSOR
            ),
            tensor=TensorProto(
                dtype=DT_STRING,
                tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=len(texts))]),
                string_val=texts,
            ),
        )
        self._write(FileEvent(wall_time=event.time, step=event.step, summary=Summary(value=[value])))

    def _write(self, event: FileEvent) -> None:
        if time.monotonic() < self._retry_at:
            raise OSError(
                "the event file could not be written; check the disk: a new file is tried within a minute"
            )
        try:
            if self._file is None:
                self._file = _File(self._folder)
            self._file.write(event)
        except OSError:  # such as a full disk: the last record is incomplete, so a new file is needed
            torn, self._file = self._file, None
            self._retry_at = time.monotonic() + _RETRY_SECONDS  # not one file per event
            if torn is not None:
                torn.close()
            raise


class _File:
    """One event file, in TensorBoard's format."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads a folder's files in the order of their names.
        name = (
            f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_files)}"
        )
        self._file = (folder / name).open("wb")
        self._records = RecordWriter(self._file)
        self.dirty = False
        self.write(FileEvent(wall_time=time.time(), file_version="brain.Event:2"))

    def write(self, event: FileEvent) -> None:
        self._records.write(event.SerializeToString())
        self.dirty = True

    def flush(self) -> None:
        self._file.flush()
        self.dirty = False

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
