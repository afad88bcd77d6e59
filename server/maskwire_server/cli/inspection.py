"""`maskwire-server verify`, `inspect` and `replay`: commands that read a run directory without a server."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from maskwire_server.cli.options import (
    ConfigFile,
    Json,
    Run,
    RunDir,
    Settings,
    check_extra,
    loaded,
    read_run,
    start_log,
    stop,
)


def verify(run_dir: Run, as_json: Json = False) -> None:
    """Check all records, digests, batches and checkpoints of a run directory.

    Stop the server of the run first. The check needs no GPU.
    """
    check_extra()
    from maskwire_server.recovery.verify import verify as audit

    found = read_run(lambda: audit(run_dir, tell=lambda words: typer.echo(words, err=True)))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found)))
    else:
        lineages = "lineage" if found.lineages == 1 else "lineages"
        typer.echo(
            f"run {found.run_id}, lineage {found.lineage}, step {found.step}, digest {found.digest}\n"
            f"{found.steps} steps in {found.lineages} {lineages}, {found.batches} with their batches; "
            f"complete checkpoints: {', '.join(found.checkpoints) or 'none'}"
        )
        for replay in found.inexact_replays:
            how = "accepted by an operator" if replay.accepted else "within the tolerance"
            typer.echo(
                f"replay gave different results ({how}): steps {replay.first_step} to {replay.last_step} "
                f"of lineage {replay.lineage}"
            )
        for problem in found.problems:
            typer.echo(f"damaged: {problem}")
        typer.echo("nothing is damaged" if not found.problems else f"{len(found.problems)} problems")
    if found.problems:
        raise typer.Exit(1)


def inspect(
    step: Annotated[int, typer.Argument(min=0, max=2**63 - 1, help="Number of the step.")],
    run_dir: Run,
    lineage: Annotated[
        int | None, typer.Option(min=1, max=2**63 - 1, help="Lineage of the step. Default: the current one.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the ids of the batch to this .npy file.")] = None,
    as_json: Json = False,
) -> None:
    """Show a recorded step: batch, outcome, losses and gradient norm. Stop the server of the run first."""
    check_extra()
    from maskwire_server.recovery.verify import inspect as look

    found = read_run(lambda: look(run_dir, step, lineage))
    record, payload = found.record, found.payload
    shown: dict[str, Any] = {
        "step": record.step,
        "lineage": record.lineage,
        "outcome": record.outcome.name,
        "loss": record.losses.loss,
        "generator_loss": record.losses.generator_loss,
        "critic_loss": record.losses.critic_loss,
        "gradient_norm": record.gradient_norm,
        "request_id": record.request_id,
        "payload_hash": record.payload_hash.hex(),
        "digest": record.digest.hex(),
        "settings": found.settings,
        "batch": None,
    }
    if payload is not None:
        ids, valid, prompt = payload.batch.dense(None)
        shown["modes"] = dataclasses.asdict(payload.modes)
        shown["batch"] = {
            "rows": payload.batch.rows,
            "columns": payload.batch.columns,
            "segments": None if payload.batch.segment_ids is None else payload.batch.sequences,
            "tokens": int(valid.sum()),
            "prompt_tokens": int(prompt.sum()),
        }
        if out is not None:
            import numpy as np

            try:
                np.save(out, ids)
            except OSError as error:
                stop(f"--out: {out} cannot be written ({error.strerror}); choose another file")
    elif out is not None:
        stop(f"step {step}'s batch was deleted after a checkpoint; serve.keep_payloads = 'all' keeps batches")
    if as_json:
        typer.echo(
            json.dumps(
                {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in shown.items()}
            )
        )
        return
    for key, value in shown.items():
        if key == "batch" and value is None:
            value = "deleted after a checkpoint (serve.keep_payloads = 'all' keeps batches)"
        typer.echo(f"{key:15} {value}")
    if payload is not None:
        for number, row in enumerate(ids[:8]):
            text = " ".join(str(value) for value in row[:24])
            typer.echo(f"  row {number}: {text}{' …' if row.size > 24 else ''}")
        if ids.shape[0] > 8:
            typer.echo(f"  … {ids.shape[0] - 8} more rows (write all with --out FILE.npy)")


def replay(
    to: Annotated[int, typer.Option("--to", min=0, max=2**63 - 1, help="Last step to compute.")],
    config: ConfigFile = None,
    run_dir: RunDir = None,
    settings: Settings = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the state after that step to this folder, as a checkpoint."),
    ] = None,
    accept_inexact_replay: Annotated[
        bool, typer.Option(help="Continue even if recomputed steps differ from the recorded ones.")
    ] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Recompute a run up to a step and compare its losses with the recorded ones. Changes nothing.

    With serve.keep_payloads = "all", any step can be recomputed; otherwise, only steps after the
    second-newest checkpoint.
    """
    chosen = loaded(config, run_dir, None, settings)
    start_log(log_level)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from maskwire_server.app import rewind

    raise typer.Exit(rewind(chosen, to, out, accept_inexact_replay=accept_inexact_replay))
