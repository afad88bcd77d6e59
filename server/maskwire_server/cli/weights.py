"""`maskwire-server import-x-transformers` and `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from maskwire_server.cli.options import (
    ConfigFile,
    Run,
    RunDir,
    Settings,
    check_extra,
    loaded,
)


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
    chosen = loaded(config, run_dir, None, settings)
    from maskwire_server.import_export import import_x_transformers as run

    raise typer.Exit(run(chosen, state_dict, gains=gains))


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
    check_extra()
    from maskwire_server.import_export import export as run

    raise typer.Exit(run(run_dir, checkpoint, out, to=to, weights=weights))
