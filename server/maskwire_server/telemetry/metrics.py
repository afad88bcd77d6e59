"""The metrics, with the name, unit and source of each. Names and units follow Prometheus's conventions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.values import MirrorStatus, Outcome, RunState
from maskwire_server.events import OTHER_METHOD
from maskwire_server.run_figures import HistogramFigures
from maskwire_server.run_status import RunStatus

Kind = Literal["counter", "gauge", "histogram"]
Sample = tuple[tuple[str, ...], float | HistogramFigures]
"""The label values, in the order of Metric.labels, and the value: HistogramFigures for a histogram."""


@dataclass(frozen=True)
class Reading:
    """The data that one scrape of the metrics reads."""

    status: RunStatus
    journal_bytes: int | None = None
    """None: the directory cannot be read."""
    disk_free_bytes: int | None = None
    device_memory: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A metric: its name, type and help text, and how its samples are read."""

    name: str
    """The full name, with prefix, unit and, for a counter, the suffix _total."""
    kind: Kind
    help: str
    read: Callable[[Reading], Iterable[Sample]]
    labels: tuple[str, ...] = ()


def _one(value: float | None) -> list[Sample]:
    return [] if value is None else [((), value)]


def _each(values: Mapping[str, float] | Mapping[str, int]) -> list[Sample]:
    return [((name,), value) for name, value in sorted(values.items())]


def _histogram(value: HistogramFigures | None) -> list[Sample]:
    return [] if value is None else [((), value)]


def _steps(reading: Reading) -> list[Sample]:
    steps = reading.status.figures.steps
    return [((each.name.lower(),), steps.get(each, 0)) for each in Outcome if each is not Outcome.UNKNOWN]


def _phases(reading: Reading) -> list[Sample]:
    return [((phase,), histogram) for phase, histogram in reading.status.figures.step_seconds.items()]


def _losses(reading: Reading) -> list[Sample]:
    step = reading.status.figures.newest_step
    if step is None:
        return []
    kinds = {
        "total": step.losses.loss,
        "generator": step.losses.generator_loss,
        "critic": step.losses.critic_loss,
    }
    return [((kind,), value) for kind, value in kinds.items() if value is not None]


def _gradient_norm(reading: Reading) -> list[Sample]:
    step = reading.status.figures.newest_step
    return _one(None if step is None else step.gradient_norm)


def _learning_rate(reading: Reading) -> list[Sample]:
    step = reading.status.figures.newest_step
    return _one(None if step is None else step.learning_rate)


def _states(reading: Reading) -> list[Sample]:
    state = reading.status.state
    return [((each.name.lower(),), each is state) for each in RunState if each is not RunState.UNKNOWN]


def _checkpoint_bytes(reading: Reading) -> list[Sample]:
    newest = reading.status.newest_checkpoint
    return _one(None if newest is None else newest.size_bytes)


def _checkpoint_step(reading: Reading) -> list[Sample]:
    newest = reading.status.newest_checkpoint
    return _one(None if newest is None else newest.step)


def _build(reading: Reading) -> list[Sample]:
    versions = reading.status.versions
    return [(tuple(versions.get(name, "") for name in ("maskwire", "python", "torch", "device")), 1)]


def _requests(reading: Reading) -> list[Sample]:
    """The number of ended calls by method, status code and reason.

    Counts that alerts use start at 0, so that the first call of their kind appears as an increase.
    """
    methods = [method.name for method in pb.DESCRIPTOR.services_by_name["TrainingService"].methods]
    zeros = {(name, *end): 0 for name in methods for end in (("OK", ""), ("INTERNAL", "INTERNAL"))}
    zeros |= {(name, denied, denied): 0 for name in (*methods, OTHER_METHOD) for denied in _DENIED}
    return [(labels, count) for labels, count in sorted({**zeros, **reading.status.figures.calls}.items())]


_DENIED = ("UNAUTHENTICATED", "PERMISSION_DENIED")


def _device_seconds(reading: Reading) -> list[Sample]:
    share = reading.status.device_share
    return [(("read",), share.read_seconds), (("step",), share.step_seconds)]


def _reads_not_answered(reading: Reading) -> list[Sample]:
    share = reading.status.device_share
    return [(("queue_full",), share.refused_reads), (("too_long",), share.ended_reads)]


def _of_mirror(read: Callable[[MirrorStatus], float]) -> Callable[[Reading], list[Sample]]:
    """Return a function that reads one value of the mirror's status. It gives no sample without a mirror."""

    def sample(reading: Reading) -> list[Sample]:
        mirror = reading.status.mirror
        return _one(None if mirror is None else read(mirror))

    return sample


METRICS = (
    Metric(
        "maskwire_steps_total",
        "counter",
        "Durable steps since the process started.",
        _steps,
        ("outcome",),
    ),
    Metric(
        "maskwire_tokens_total",
        "counter",
        "Maskable and prompt tokens of the durable steps since the process started.",
        lambda reading: _one(reading.status.figures.tokens),
    ),
    Metric(
        "maskwire_step_seconds",
        "histogram",
        "Seconds that a step waited in the queue, was computed, and took to become durable.",
        _phases,
        ("phase",),
    ),
    Metric("maskwire_step", "gauge", "The last durable step.", lambda r: _one(r.status.durable_step)),
    Metric("maskwire_loss", "gauge", "Losses of the newest step, in nats.", _losses, ("kind",)),
    Metric(
        "maskwire_gradient_norm",
        "gauge",
        "Norm of the newest step's gradient, before clipping.",
        _gradient_norm,
    ),
    Metric("maskwire_learning_rate", "gauge", "Learning rate of the newest step.", _learning_rate),
    Metric(
        "maskwire_queue_length",
        "gauge",
        "Requests that wait for the device.",
        lambda reading: _one(reading.status.queue_length),
    ),
    Metric(
        "maskwire_computing_seconds",
        "gauge",
        "Seconds for which a step, or a part of an evaluation or generation, has been computed; 0 if none.",
        lambda reading: _one(reading.status.computing_seconds),
    ),
    Metric("maskwire_state", "gauge", "1 for the run's state, 0 for each other.", _states, ("state",)),
    Metric(
        "maskwire_journal_bytes",
        "gauge",
        "Size of the journal's files.",
        lambda reading: _one(reading.journal_bytes),
    ),
    Metric(
        "maskwire_disk_free_bytes",
        "gauge",
        "Bytes that the server can still write to the disk of the run directory.",
        lambda reading: _one(reading.disk_free_bytes),
    ),
    Metric(
        "maskwire_commit_seconds",
        "histogram",
        "Seconds of a transaction of the journal, which makes one or more steps durable.",
        lambda reading: _histogram(reading.status.figures.commit_seconds),
    ),
    Metric(
        "maskwire_checkpoint_seconds",
        "histogram",
        "Seconds to write and verify a checkpoint, while training continues.",
        lambda reading: _histogram(reading.status.figures.checkpoint_seconds),
    ),
    Metric(
        "maskwire_checkpoint_bytes", "gauge", "Size of the newest complete checkpoint.", _checkpoint_bytes
    ),
    Metric(
        "maskwire_last_checkpoint_step",
        "gauge",
        "The step of the newest complete checkpoint.",
        _checkpoint_step,
    ),
    Metric(
        "maskwire_recovery_seconds",
        "gauge",
        "Seconds of each phase of this process's start.",
        lambda reading: _each(reading.status.figures.recovery_seconds),
        ("phase",),
    ),
    Metric(
        "maskwire_requests_total",
        "counter",
        "Calls that ended, by status code, and by reason if they were refused.",
        _requests,
        ("method", "code", "reason"),
    ),
    Metric(
        "maskwire_device_memory_bytes",
        "gauge",
        "Memory of the device: allocated, reserved, peak and total of the GPUs, or resident of the process.",
        lambda reading: _each(reading.device_memory),
        ("kind",),
    ),
    Metric(
        "maskwire_device_seconds_total",
        "counter",
        "Seconds of the device spent on training steps, and on evaluations and generations.",
        _device_seconds,
        ("use",),
    ),
    Metric(
        "maskwire_waiting_reads",
        "gauge",
        "Evaluations and generations that wait for the device.",
        lambda reading: _one(reading.status.device_share.waiting_reads),
    ),
    Metric(
        "maskwire_reads_refused_total",
        "counter",
        "Evaluations and generations refused because too many waited, or ended to let a step run.",
        _reads_not_answered,
        ("reason",),
    ),
    Metric(
        "maskwire_mirror_step",
        "gauge",
        "The newest step in the object store.",
        _of_mirror(lambda mirror: mirror.step),
    ),
    Metric(
        "maskwire_mirror_age_seconds",
        "gauge",
        "Seconds since records were last written to the object store.",
        _of_mirror(lambda mirror: mirror.seconds_since_segment),
    ),
    Metric(
        "maskwire_mirror_failing",
        "gauge",
        "1 while nothing can be uploaded to the object store, else 0.",
        _of_mirror(lambda mirror: bool(mirror.problem)),
    ),
    Metric(
        "maskwire_mirror_failures_total",
        "counter",
        "Uploads to the object store that failed; each is tried again.",
        _of_mirror(lambda mirror: mirror.failures),
    ),
    Metric(
        "maskwire_mirror_uploaded_bytes_total",
        "counter",
        "Size of the batches uploaded to the object store.",
        _of_mirror(lambda mirror: mirror.uploaded_bytes),
    ),
    Metric(
        "maskwire_events_dropped_total",
        "counter",
        "Events that a subscriber of telemetry lost because it was slow or failed.",
        lambda reading: _each(reading.status.figures.events_dropped),
        ("subscriber",),
    ),
    Metric(
        "maskwire_build_info",
        "gauge",
        "Always 1; the labels are the versions and the device.",
        _build,
        ("version", "python", "torch", "device"),
    ),
)
