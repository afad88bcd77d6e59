"""`maskwire checkpoint`: save, list, restore, download and delete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from maskwire.cli.display import checkpoint_table, show
from maskwire.cli.options import Json, Server, with_server
from maskwire.progress import byte_progress
from maskwire.protocol.download import MANIFEST

checkpoint_app = typer.Typer(
    help="Save, list, restore, download and delete checkpoints.", no_args_is_help=True
)


@checkpoint_app.command()
@with_server(retry_for=60.0)
def save(
    server: Server,
    name: Annotated[
        str, typer.Argument(help="Lower-case letters, digits, - and _; by default the server's choice.")
    ] = "",
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE, kept with it; may be repeated.")] = None,
    score: Annotated[
        float | None, typer.Option(help="What the state is worth, lower is better; the best is kept.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Save the run's state."""
    labels = dict(text.partition("=")[::2] for text in label or [])
    with server.attach() as client:
        info = client.checkpoint(name, labels=labels, score=score)
    show(info, as_json, lambda: f"{info.name}  step {info.step}  {info.size_bytes / 1e6:.1f} MB")


@checkpoint_app.command(name="list")
@with_server(retry_for=60.0)
def list_checkpoints(server: Server, as_json: Json = False) -> None:
    """List the run's checkpoints, newest first."""
    with server.attach() as client:
        found = client.checkpoints()
    show(found, as_json, lambda: checkpoint_table(found))


@checkpoint_app.command()
@with_server(retry_for=60.0)
def delete(
    server: Server,
    name: Annotated[str, typer.Argument(help="The checkpoint to delete.")],
    as_json: Json = False,
) -> None:
    """Delete a checkpoint; refused while a start, a lineage or a download needs it."""
    with server.attach() as client:
        client.delete(name)
    show({"deleted": name}, as_json, lambda: f"{name} deleted")


@checkpoint_app.command()
@with_server(retry_for=60.0)
def restore(
    server: Server,
    name: Annotated[str, typer.Argument(help="The checkpoint to go back to.")],
    expected_step: Annotated[int | None, typer.Option(help="Refuse unless the run is at this step.")] = None,
    as_json: Json = False,
) -> None:
    """Go back to a checkpoint, on a new lineage; the run's writer must connect again."""
    with server.attach() as client:
        answer = client.restore(name, expected_step=expected_step)
    show(answer, as_json, lambda: f"lineage {answer.lineage} goes on from step {answer.step}")


@checkpoint_app.command()
@with_server(retry_for=300.0)
def download(
    server: Server,
    name: Annotated[str, typer.Argument(help="The checkpoint; empty: the newest.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="The folder it comes to; by default one of its name.")
    ] = None,
    weights: Annotated[
        bool,
        typer.Option("--weights", help="Only weights (and their moving average, if kept) and configuration."),
    ] = False,
    ema: Annotated[
        bool, typer.Option("--ema", help="Only the weights' moving average and the configuration.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fetch a checkpoint. Run again after an interruption, it goes on where it was.

    `maskwire_server.load(FOLDER)` makes a plain torch module of it.
    """
    with server.attach() as client:
        if not name:
            found = client.checkpoints()
            if not found:
                raise ValueError("the run has no checkpoint yet; `maskwire checkpoint save` makes one")
            name = found[0].name
        with byte_progress(f"checkpoint {name}", shown=not as_json) as tell:
            folder = client.download(name, out or Path(name), weights=weights, ema=ema, on_progress=tell)
    names = [*json.loads((folder / MANIFEST).read_bytes())["files"], MANIFEST]
    files = sorted(folder / name for name in names if (folder / name).exists())
    size = sum(path.stat().st_size for path in files)
    shown = {"name": name, "folder": folder, "files": [path.name for path in files], "size_bytes": size}
    show(shown, as_json, lambda: f"{folder}  {size / 1e6:.1f} MB: {', '.join(path.name for path in files)}")
