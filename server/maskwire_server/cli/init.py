"""`maskwire-server init`: write a configuration file, optionally one that fits a folder of prepared data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from maskwire_server.cli.options import check_extra, stop

RECIPE: dict[str, dict[str, Any]] = {
    "model": {"positions": "rotary", "norm": "rmsnorm", "qk_norm": True},
    "objective": {"schedule": "quadratic"},
    "optimizer": {"name": "muon"},
}
"""The settings with which the built-in encoder learned fastest in the measurements of docs/recipe.md."""
_METADATA = "maskwire-data.json"  # in each folder that `maskwire data prepare` writes


def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("maskwire.toml"),
    data: Annotated[
        Path | None,
        typer.Option(
            show_default=False,
            help="A folder written by `maskwire data prepare`, whose vocabulary, special ids and "
            "row length go into \\[model].",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a commented configuration file with every setting.

    Settings have their default values, except those that make the built-in encoder learn faster: positions,
    norm and qk_norm in \\[model], schedule in \\[objective], and name in \\[optimizer] (Muon).
    """
    check_extra()
    from maskwire_server.config.model import ModelConfig
    from maskwire_server.config.template import template

    if path.exists() and not force:
        stop(f"{path} exists; choose another name, or overwrite it with --force")
    longest_row = ModelConfig.model_fields["max_seq_len"].default
    fitting = {} if data is None else _model_settings(data, longest_row)
    path.write_text(template({**RECIPE, "model": {**RECIPE["model"], **fitting}}), encoding="utf-8")
    for name, value in fitting.items():
        typer.echo(f"model.{name} = {value}")
    typer.echo(f"wrote {path}; next: maskwire-server check --config {path}")


def _model_settings(folder: Path, longest_row: int) -> dict[str, int]:
    """Return the settings of [model] that fit a folder of prepared data."""
    path = folder / _METADATA
    if not path.is_file():
        stop(f"--data must be a folder written by `maskwire data prepare`, but there is no file {path}")
    try:
        fields: dict[str, Any] = json.loads(path.read_bytes())
        settings = {"num_tokens": int(fields["num_tokens"]), "mask_id": int(fields["mask_id"])}
        if fields.get("pad_id") is not None:
            settings["pad_id"] = int(fields["pad_id"])
        if fields.get("row_length"):  # packed rows are never cropped
            settings["max_seq_len"] = int(fields["row_length"])
        # Rows of prompt-response pairs are padded to the row length, so a needlessly large one costs time.
        elif fields.get("prompts") and fields.get("longest"):
            settings["max_seq_len"] = min(longest_row, int(fields["longest"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        stop(f"{path}: cannot be read ({error}); prepare the data again")
    return settings
