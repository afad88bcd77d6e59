"""The command `maskwire-server`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

_NEEDS = ("torch", "einops", "safetensors", "pydantic_settings", "grpc_health", "grpc_reflection")

T = TypeVar("T")

app = typer.Typer(
    name="maskwire-server",
    help="Serve one masked-prediction training run over gRPC.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file; `maskwire-server init` writes one.")
]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Folder of the run, in place of run.dir.")]
Address = Annotated[str | None, typer.Option("--address", help="HOST:PORT, in place of serve.address.")]
Run = Annotated[Path, typer.Option("--run-dir", help="Folder of the run.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any setting; may be repeated."),
]


@app.command()
def serve(
    config: ConfigFile = None,
    run_dir: RunDir = None,
    address: Address = None,
    settings: Settings = None,
    accept_inexact_replay: Annotated[
        bool, typer.Option(help="Go on once although recomputed steps differ from the recorded ones.")
    ] = False,
    accept_lost_history: Annotated[
        int | None,
        typer.Option(help="Go on from this step, the last that is left, on a new lineage."),
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve a run, until SIGTERM or Ctrl-C. Started again on the same folder, it goes on."""
    loaded = _load(config, run_dir, address, settings)
    _log(log_level)
    # Read when grpc is imported: its core logs every connection that fails to speak TLS.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from maskwire_server.app import serve as run

    raise typer.Exit(
        run(loaded, accept_inexact_replay=accept_inexact_replay, accept_lost_history=accept_lost_history)
    )


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("maskwire.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a commented configuration with every setting and its default."""
    _check_extra()
    from maskwire_server.template import template

    if path.exists() and not force:
        _stop(f"{path} exists; choose another name, or --force to overwrite it")
    path.write_text(template())
    typer.echo(f"wrote {path}; next: maskwire-server check --config {path}")


@app.command()
def check(
    config: ConfigFile = None,
    run_dir: RunDir = None,
    address: Address = None,
    settings: Settings = None,
) -> None:
    """Check a configuration: parameters, memory, and the batch that fits. Exit 1 when it does not fit."""
    loaded = _load(config, run_dir, address, settings)
    from maskwire_server.training.footprint import footprint

    report = footprint(loaded.model, loaded.objective, loaded.optimizer, loaded.serve)
    for line in report.lines:
        typer.echo(line)
    if not report.fits:
        raise typer.Exit(1)


@app.command()
def verify(run_dir: Run, as_json: Json = False) -> None:
    """Check a run directory: every record, digest, batch and checkpoint. Needs no device; no server
    may run on it."""
    _check_extra()
    from maskwire_server.run.audit import verify as audit

    found = _of_run(lambda: audit(run_dir, tell=lambda words: typer.echo(words, err=True)))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found)))
    else:
        typer.echo(
            f"run {found.run_id}, lineage {found.lineage}, step {found.step}, digest {found.digest}\n"
            f"{found.steps} steps in {found.lineages} lineages, {found.batches} with their batches; whole "
            f"checkpoints: {', '.join(found.checkpoints) or 'none'}"
        )
        for problem in found.problems:
            typer.echo(f"damaged: {problem}")
        typer.echo("nothing is damaged" if not found.problems else f"{len(found.problems)} problems")
    if found.problems:
        raise typer.Exit(1)


@app.command()
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
    _check_extra()
    from maskwire_server.run.audit import inspect as look

    found = _of_run(lambda: look(run_dir, step, lineage))
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
                _stop(f"--out: {out} cannot be written ({error.strerror})")
    elif out is not None:
        _stop(
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


@app.command()
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
    loaded = _load(config, run_dir, None, settings)
    _log(log_level)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from maskwire_server.app import rewind

    raise typer.Exit(rewind(loaded, to, out, accept_inexact_replay=accept_inexact_replay))


@app.command("import-x-transformers")
def import_x_transformers(
    state_dict: Annotated[
        Path, typer.Argument(help="A .safetensors file, or what torch.save(model.state_dict(), …) wrote.")
    ],
    config: ConfigFile = None,
    run_dir: RunDir = None,
    settings: Settings = None,
    gains: Annotated[
        Literal["auto", "offset", "plain"],
        typer.Option(
            help="The norms' gains are gamma + 1 (offset, x-transformers' default) or gamma (plain, "
            "norm_add_unit_offset=False); auto: offset, refused where it looks wrong."
        ),
    ] = "auto",
) -> None:
    """Begin a run at the weights of x-transformers' NonAutoregressiveWrapper or TransformerWrapper(Encoder).

    The configuration needs model.mask_id; sizes, critic and self-conditioning come from the weights. The
    run directory gets a maskwire.toml to serve it with.
    """
    loaded = _load(config, run_dir, None, settings)
    from maskwire_server.exchange import import_x_transformers as run

    raise typer.Exit(run(loaded, state_dict, gains=gains))


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="Where to write: a folder, or for x-transformers a file.")],
    run_dir: Run,
    checkpoint: Annotated[str | None, typer.Option(help="Its name; the newest by default.")] = None,
    to: Annotated[
        Literal["maskwire", "x-transformers"],
        typer.Option(
            help="maskwire: a folder for maskwire_server.load; x-transformers: a NonAutoregressiveWrapper's "
            "state dict (.safetensors), where the model is its default encoder."
        ),
    ] = "maskwire",
    weights: Annotated[
        Literal["auto", "ema", "raw"],
        typer.Option(help="For x-transformers: the moving average, the trained ones, or what is evaluated."),
    ] = "auto",
) -> None:
    """Write a checkpoint's weights for use without the server."""
    _check_extra()
    from maskwire_server.exchange import export as run

    raise typer.Exit(run(run_dir, checkpoint, out, to=to, weights=weights))


def _of_run(look: Callable[[], T]) -> T:
    from maskwire_server.errors import RunDirectoryError

    try:
        return look()
    except RunDirectoryError as error:
        for line in str(error).splitlines():
            typer.echo(f"maskwire-server: {line}", err=True)
        raise typer.Exit(3) from None


def _log(level_name: str) -> None:
    level = logging.getLevelNamesMapping().get(level_name.upper())
    if level is None:
        _stop(f"--log-level must be debug, info, warning or error, got {level_name!r}")
    logging.basicConfig(
        level=level, stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"
    )


def _load(config: Path | None, run_dir: Path | None, address: str | None, settings: list[str] | None) -> Any:
    _check_extra()
    from maskwire_server.config import load
    from maskwire_server.errors import ConfigError

    flags: dict[str, dict[str, Any]] = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        section, dot, name = key.partition(".")
        if not equals or not dot:
            _stop(f"--set must be SECTION.KEY=VALUE, got {setting!r}")
        flags.setdefault(section, {})[name] = _list(value) if value.startswith("[") else value
    if run_dir is not None:
        flags.setdefault("run", {})["dir"] = run_dir
    if address is not None:
        flags.setdefault("serve", {})["address"] = address
    try:
        return load(config, **flags)
    except ConfigError as error:
        _stop(*str(error).splitlines())


def _list(value: str) -> Any:
    """A list as TOML writes it; what is none is left to the setting's own check."""
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


def _check_extra() -> None:
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        _stop(f'the server needs {", ".join(missing)}: pip install "maskwire[server]"')


def _stop(*lines: str) -> Any:
    for line in lines:
        typer.echo(f"maskwire-server: {line}", err=True)
    raise typer.Exit(2)


def main() -> None:
    """Entry point."""
    app()
