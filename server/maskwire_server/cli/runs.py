"""`maskwire-server verify`, `inspect` and `replay`: a run directory without a server."""

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
    of_run,
    start_log,
    stop,
)


def verify(run_dir: Run, as_json: Json = False) -> None:
    """Check a run directory: every record, digest, batch and checkpoint. Needs no device; no server
    may run on it."""
    check_extra()
    from maskwire_server.recovery.verify import verify as audit

    found = of_run(lambda: audit(run_dir, tell=lambda words: typer.echo(words, err=True)))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found)))
    else:
        typer.echo(
            f"run {found.run_id}, lineage {found.lineage}, step {found.step}, digest {found.digest}\n"
            f"{found.steps} steps in {found.lineages} lineages, {found.batches} with their batches; whole "
            f"checkpoints: {', '.join(found.checkpoints) or 'none'}"
        )
        for replay in found.inexact_replays:
            how = "accepted by an operator" if replay.accepted else "within the tolerance"
            typer.echo(
                f"replayed, not to the same bytes ({how}): steps {replay.first_step} to {replay.last_step} "
                f"of lineage {replay.lineage}"
            )
        for problem in found.problems:
            typer.echo(f"damaged: {problem}")
        typer.echo("nothing is damaged" if not found.problems else f"{len(found.problems)} problems")
    if found.problems:
        raise typer.Exit(1)


def inspect(
    step: Annotated[int, typer.Argument(min=0, max=2**63 - 1, help="The step.")],
    run_dir: Run,
    lineage: Annotated[
        int | None, typer.Option(min=1, max=2**63 - 1, help="The lineage; the current history by default.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the batch's ids there, a .npy file.")] = None,
    as_json: Json = False,
) -> None:
    """Show a recorded step: its batch, outcome, losses and gradient norm. The batch behind a spike."""
    check_extra()
    from maskwire_server.recovery.verify import inspect as look

    found = of_run(lambda: look(run_dir, step, lineage))
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
            "tokens": int(valid.sum()),
            "prompt_tokens": int(prompt.sum()),
        }
        if out is not None:
            import numpy as np

            try:
                np.save(out, ids)
            except OSError as error:
                stop(f"--out: {out} cannot be written ({error.strerror})")
    elif out is not None:
        stop(
            f"the batch of step {step} was dropped behind checkpoints; serve.keep_payloads = 'all' keeps them"
        )
    if as_json:
        typer.echo(
            json.dumps(
                {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in shown.items()}
            )
        )
        return
    for key, value in shown.items():
        if key == "batch" and value is None:
            value = "dropped behind checkpoints (serve.keep_payloads = 'all' keeps batches)"
        typer.echo(f"{key:15} {value}")
    if payload is not None:
        for number, row in enumerate(ids[:8]):
            text = " ".join(str(value) for value in row[:24])
            typer.echo(f"  row {number}: {text}{' …' if row.size > 24 else ''}")
        if ids.shape[0] > 8:
            typer.echo(f"  … {ids.shape[0] - 8} more rows (--out FILE.npy has all)")


def replay(
    to: Annotated[int, typer.Option("--to", min=0, max=2**63 - 1, help="The step.")],
    config: ConfigFile = None,
    run_dir: RunDir = None,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the state after that step there, a folder as a checkpoint's.")
    ] = None,
    accept_inexact_replay: Annotated[
        bool, typer.Option(help="Go on although recomputed steps differ from the recorded ones.")
    ] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Compute a run again up to a step; its losses must be the recorded ones. The run is not changed.

    Any step, with serve.keep_payloads = "all"; otherwise those behind the second-newest checkpoint.
    """
    chosen = loaded(config, run_dir, None, settings)
    start_log(log_level)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from maskwire_server.app import rewind

    raise typer.Exit(rewind(chosen, to, out, accept_inexact_replay=accept_inexact_replay))
