"""Decodes the answer to GetStatus."""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC

from maskwire import results
from maskwire.protocol import codec, run_figures
from maskwire.v1 import training_service_pb2 as pb


def _read_device_share(share: pb.DeviceShare) -> results.DeviceShare:
    """Decode how the device was divided between training and reads. All zeros for an older server."""
    return results.DeviceShare(**{each.name: getattr(share, each.name) for each in share.DESCRIPTOR.fields})


def read_status(status: pb.GetStatusResponse) -> results.Status:
    """Decode a status report: the run's state, its progress and what it is waiting for."""
    newest = status.newest_checkpoint if status.HasField("newest_checkpoint") else None
    return results.Status(
        state=results.RunState(status.state),
        state_since=status.state_time.ToDatetime(tzinfo=UTC),
        waiting_for=status.waiting_for,
        run_id=status.run_id,
        lineage=status.lineage,
        step=status.step,
        durable_step=status.durable_step,
        digest=status.digest,
        queue_length=status.queue_length,
        queue_limit=status.queue_limit,
        steps_per_second=status.steps_per_second,
        tokens_per_second=status.tokens_per_second,
        last_error=status.last_error,
        writer=status.writer,
        epoch=status.epoch,
        model=codec.read_model(status.model) if status.HasField("model") else None,
        newest_checkpoint=None if newest is None else codec.read_checkpoint(newest),
        versions=dict(status.versions),
        uptime_seconds=status.uptime.ToTimedelta().total_seconds(),
        tokenizer=status.tokenizer,
        limits=codec.read_limits(status.limits),
        data=dict(status.data),
        inexact_replays=codec.read_inexact_replays(status.inexact_replays),
        digest_version=status.digest_version,
        figures=run_figures.read(status),
        device_share=_read_device_share(status.device_share),
        step_timeout_seconds=status.step_timeout_seconds,
        mirror=_read_mirror(status.mirror) if status.HasField("mirror") else None,
    )


def _read_mirror(mirror: pb.MirrorStatus) -> results.MirrorStatus:
    names = (each.name for each in fields(results.MirrorStatus))
    return results.MirrorStatus(**{name: getattr(mirror, name) for name in names})
