"""The run's status report."""

from __future__ import annotations

from dataclasses import replace

from maskwire.v1.values import DeviceShare, Limits, ModelInfo
from maskwire_server.config import ServeConfig
from maskwire_server.engine.mirror import Mirror
from maskwire_server.engine.shared_state import Run
from maskwire_server.results import CheckpointInfo
from maskwire_server.run_status import RunStatus


def limits(serve: ServeConfig, default_read_tokens: int | None) -> Limits:
    """The limits on one request; `default_read_tokens` applies if `serve.max_read_tokens` is not set."""
    configured = Limits(
        serve.max_batch_tokens,
        serve.max_message_bytes,
        serve.window,
        serve.max_draws,
        serve.max_generation_steps,
    )
    read_tokens = serve.max_read_tokens or default_read_tokens
    return configured if read_tokens is None else replace(configured, max_read_tokens=read_tokens)


def report(
    run: Run,
    serve: ServeConfig,
    model: ModelInfo | None,
    newest_here: CheckpointInfo | None,
    versions: dict[str, str],
    mirror: Mirror | None,
) -> RunStatus:
    """Report the run's state, its progress and what it waits for, even if one of its threads hangs."""
    head, durable = run.head, run.head.durable
    figures = run.aggregates.figures(run.events.dropped)
    waiting_reads = run.queue.reads()
    return RunStatus(
        state=run.conditions.state,
        state_since=run.conditions.since,
        waiting_for=run.conditions.waiting_for,
        run_id=durable.run_id,
        lineage=durable.lineage,
        step=head.computed.step,
        durable_step=durable.step,
        digest=durable.digest,
        queue_length=run.queue.without_reads + waiting_reads,  # an alert subtracts the reads again
        queue_limit=serve.queue_limit,
        steps_per_second=figures.recent.steps_per_second,
        tokens_per_second=figures.recent.tokens_per_second,
        last_error=run.conditions.last_error,
        writer=run.lease.present(run.queue.busy),
        epoch=run.lease.epoch,
        model=model,
        newest_checkpoint=newest_here if mirror is None else mirror.newest_shown(newest_here),
        versions=versions,
        tokenizer=head.tokenizer,
        data=head.data,
        inexact_replays=head.inexact_replays,
        digest_version=head.digest_version.number if head.digest_version else 0,
        figures=figures,
        device_share=DeviceShare(
            run.share.step_seconds,
            run.share.read_seconds,
            run.share.owed_seconds,
            waiting_reads,
            run.share.refused_reads,
            run.share.ended_reads,
        ),
        computing_seconds=run.computing.seconds_without,
        step_timeout_seconds=run.step_timeout.seconds,
        mirror=None if mirror is None else mirror.status(),
    )
