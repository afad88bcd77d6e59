"""Encodes answers: from the engine's values to the proto's messages."""

from __future__ import annotations

import time
import zlib

from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.values import (
    InexactReplay,
    Limits,
    Losses,
    MirrorStatus,
    ModelInfo,
    RestoreResult,
    TokenizerDescription,
)
from maskwire_server.results import CheckpointInfo, Chunk, EvalAnswer, FileInfo, SessionAnswer, StepAnswer
from maskwire_server.rpc import run_figures
from maskwire_server.run_status import RunStatus
from maskwire_server.session_holder import Holder


def losses(value: Losses) -> pb.Losses:
    """Encode losses. The field of a loss that is None stays unset."""
    return pb.Losses(loss=value.loss, generator_loss=value.generator_loss, critic_loss=value.critic_loss)


def step(value: StepAnswer) -> pb.TrainStepResponse:
    """Encode the answer to TrainStep."""
    result = value.result
    return pb.TrainStepResponse(
        step=value.step,
        losses=losses(result.losses),
        replayed=value.replayed,
        outcome=pb.StepOutcome.Name(result.outcome),
        digest=value.digest,
        metrics=pb.StepMetrics(
            gradient_norm=result.gradient_norm,
            learning_rate=result.learning_rate,
            masked_tokens=result.masked_tokens,
            maskable_tokens=result.maskable_tokens,
            queue_seconds=value.queue_seconds,
            compute_seconds=value.compute_seconds,
            commit_seconds=value.commit_seconds,
        ),
    )


def evaluation(value: EvalAnswer) -> pb.EvalLossResponse:
    """Encode the answer to EvalLoss."""
    result = value.result
    return pb.EvalLossResponse(
        losses=losses(result.losses),
        nats_per_token=result.nats_per_token,
        bits_per_token=result.bits_per_token,
        perplexity=result.perplexity,
        standard_error=result.standard_error,
        monte_carlo_error=result.monte_carlo_error,
        accuracy=result.accuracy,
        critic_accuracy=result.critic_accuracy,
        by_masked_fraction=[
            pb.FractionResult(
                masked_fraction_min=part.low,
                masked_fraction_max=part.high,
                nats_per_masked_token=part.nats_per_masked_token,
                accuracy=part.accuracy,
                masked_tokens=part.masked_tokens,
            )
            for part in result.by_masked_fraction
        ],
        rows=[
            pb.RowResult(
                row_id=row.row_id,
                nats=row.nats,
                tokens=row.tokens,
                half_difference_nats=row.half_difference,
            )
            for row in result.rows
        ],
        bits_per_byte=result.bits_per_byte,
        tokens=result.tokens,
        step=value.step,
        digest=value.digest,
        ema_weights=result.ema_weights,
        draws=result.draws,
        sums=pb.EvalSums(**vars(result.sums)),
    )


def tokenizer(value: TokenizerDescription | None) -> pb.GetTokenizerResponse:
    """Encode the tokenizer stored with the run as the answer to GetTokenizer; empty for None."""
    if value is None:
        return pb.GetTokenizerResponse()
    return pb.GetTokenizerResponse(tokenizer=pb.Tokenizer(**vars(value)))


def session(
    value: SessionAnswer, info: ModelInfo, bounds: Limits, kept_tokenizer_digest: str
) -> pb.OpenSessionResponse:
    """Encode the answer to OpenSession."""
    return pb.OpenSessionResponse(
        session=pb.SessionRef(run_id=value.run_id, lineage=value.lineage, epoch=value.epoch),
        step=value.step,
        durable_step=value.durable_step,
        digest=value.digest,
        model=model(info),
        limits=limits(bounds),
        tokenizer=value.tokenizer,
        data=value.data,
        superseded=None if value.superseded is None else _holder(value.superseded),
        evaluated_lineage=value.evaluated_lineage,
        evaluated_step=value.evaluated_step,
        inexact_replays=[_inexact_replay(replay) for replay in value.inexact_replays],
        digest_version=value.digest_version,
        kept_tokenizer_digest=kept_tokenizer_digest,
    )


def _mirror(value: MirrorStatus | None) -> pb.MirrorStatus | None:
    return None if value is None else pb.MirrorStatus(**vars(value))


def _holder(value: Holder) -> pb.SessionHolder:
    process = None if value.process is None else pb.ClientProcess(**vars(value.process))
    return pb.SessionHolder(client_name=value.client_name, epoch=value.epoch, process=process)


def _inexact_replay(replay: InexactReplay) -> pb.InexactReplay:
    return pb.InexactReplay(**vars(replay))


def model(info: ModelInfo) -> pb.ModelInfo:
    """Encode the description of the served model."""
    return pb.ModelInfo(**vars(info))


def limits(bounds: Limits) -> pb.Limits:
    """Encode the limits on one request."""
    return pb.Limits(**vars(bounds))


def checkpoint(info: CheckpointInfo) -> pb.CheckpointInfo:
    """Encode the description of a complete checkpoint."""
    answer = pb.CheckpointInfo(
        name=info.name,
        lineage=info.lineage,
        step=info.step,
        digest=info.digest,
        size_bytes=info.size_bytes,
        files=[_file(file) for file in info.files],
        labels=info.labels,
        score=info.score,
    )
    answer.create_time.FromNanoseconds(int(info.created * 1e9))
    return answer


def _file(info: FileInfo) -> pb.CheckpointFile:
    return pb.CheckpointFile(name=info.name, size_bytes=info.size_bytes, sha256=info.sha256)


def chunk(value: Chunk) -> pb.DownloadCheckpointResponse:
    """Encode a part of a checkpoint's file, with its CRC-32, as an answer to DownloadCheckpoint."""
    return pb.DownloadCheckpointResponse(
        file=_file(value.file), offset_bytes=value.offset, data=value.data, crc32=zlib.crc32(value.data)
    )


def restore(value: RestoreResult) -> pb.RestoreCheckpointResponse:
    """Encode the run's position after a restore as the answer to RestoreCheckpoint."""
    return pb.RestoreCheckpointResponse(lineage=value.lineage, step=value.step, digest=value.digest)


def status(value: RunStatus, bounds: Limits, started: float) -> pb.GetStatusResponse:
    """Encode the answer to GetStatus. `started` is the server's start time, from time.monotonic()."""
    answer = pb.GetStatusResponse(
        state=pb.RunState.Name(value.state),
        waiting_for=value.waiting_for,
        run_id=value.run_id,
        lineage=value.lineage,
        step=value.step,
        durable_step=value.durable_step,
        digest=value.digest,
        queue_length=value.queue_length,
        queue_limit=value.queue_limit,
        steps_per_second=value.steps_per_second,
        tokens_per_second=value.tokens_per_second,
        last_error=value.last_error,
        writer=value.writer,
        epoch=value.epoch,
        model=None if value.model is None else model(value.model),
        limits=limits(bounds),
        newest_checkpoint=None if value.newest_checkpoint is None else checkpoint(value.newest_checkpoint),
        versions=value.versions,
        tokenizer=value.tokenizer,
        data=value.data,
        inexact_replays=[_inexact_replay(replay) for replay in value.inexact_replays],
        digest_version=value.digest_version,
        **run_figures.fields(value.figures),
        device_share=pb.DeviceShare(**vars(value.device_share)),
        step_timeout_seconds=value.step_timeout_seconds,
        mirror=_mirror(value.mirror),
    )
    answer.state_time.FromNanoseconds(int(value.state_since * 1e9))
    answer.uptime.FromNanoseconds(int((time.monotonic() - started) * 1e9))
    return answer
