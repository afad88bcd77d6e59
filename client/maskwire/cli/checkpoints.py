"""The commands `maskwire checkpoint`: save, list, restore, download and delete checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from maskwire.cli.display import checkpoint_table, show
from maskwire.cli.merge_adapters import merge
from maskwire.cli.options import Json, ServerConnection, with_server
from maskwire.progress_bar import byte_progress
from maskwire.protocol.download import MANIFEST

checkpoint_app = typer.Typer(
    help="Save, list, restore, download and delete checkpoints.", no_args_is_help=True
)


@checkpoint_app.command()
@with_server(retry_for=60.0)
def save(
    server: ServerConnection,
    name: Annotated[
        str,
        typer.Argument(
            show_default=False,
            help="Lower-case letters, digits, - and _. By default the server chooses a name.",
        ),
    ] = "",
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Label to store with the checkpoint; may be repeated."),
    ] = None,
    score: Annotated[
        float | None,
        typer.Option(
            help="Score of this state, lower is better. The server keeps the best-scored checkpoints."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Save the run as a checkpoint, at the current step."""
    labels = {}
    for text in label or []:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ValueError(f"--label must have the form KEY=VALUE, got {text}")
        labels[key] = value
    with server.attach() as client:
        info = client.checkpoint(name, labels=labels, score=score)
    show(info, as_json, lambda: f"{info.name}  step {info.step}  {info.size_bytes / 1e6:.1f} MB")


@checkpoint_app.command(name="list")
@with_server(retry_for=60.0)
def list_checkpoints(server: ServerConnection, as_json: Json = False) -> None:
    """List the run's checkpoints, newest first."""
    with server.attach() as client:
        found = client.checkpoints()
    show(found, as_json, lambda: checkpoint_table(found))


@checkpoint_app.command()
@with_server(retry_for=60.0)
def delete(
    server: ServerConnection,
    name: Annotated[str, typer.Argument(show_default=False, help="The checkpoint to delete.")],
    as_json: Json = False,
) -> None:
    """Delete a checkpoint. The server refuses while a restart, a lineage or a download needs it."""
    with server.attach() as client:
        client.delete(name)
    show({"deleted": name}, as_json, lambda: f"{name} deleted")


@checkpoint_app.command()
@with_server(retry_for=60.0)
def restore(
    server: ServerConnection,
    name: Annotated[str, typer.Argument(show_default=False, help="The checkpoint to restore.")],
    expected_step: Annotated[
        int | None, typer.Option(help="Restore only if the run is now at this step.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Restore the run to a checkpoint. Training resumes from its step, on a new lineage.

    A client that is training loses its session, and must connect again.
    """
    with server.attach() as client:
        answer = client.restore(name, expected_step=expected_step)
    show(
        answer,
        as_json,
        lambda: f"restored {name}: training resumes from step {answer.step}, on lineage {answer.lineage}",
    )


@checkpoint_app.command()
@with_server(retry_for=300.0)
def download(
    server: ServerConnection,
    name: Annotated[
        str, typer.Argument(show_default=False, help="The checkpoint. By default the newest.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="The folder to write. By default it has the checkpoint's name.")
    ] = None,
    weights: Annotated[
        bool,
        typer.Option(
            "--weights",
            help="Download only the weights, their moving average if there is one, and the configuration.",
        ),
    ] = False,
    ema: Annotated[
        bool,
        typer.Option("--ema", help="Download only the moving average of the weights and the configuration."),
    ] = False,
    merged: Annotated[
        bool,
        typer.Option(
            "--merged",
            help="Write a Hugging Face folder, with the adapters (\\[model.lora]) merged into the model. "
            "Needs maskwire\\[huggingface] on this machine.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Download a checkpoint. After an interruption, the same command resumes the download.

    In Python, `maskwire_server.load(FOLDER)` loads the checkpoint as a plain torch module. A folder that
    --merged wrote is loaded with `AutoModelForMaskedLM.from_pretrained(FOLDER)` instead.
    """
    with server.attach() as client:
        if not name:
            found = client.checkpoints()
            if not found:
                raise ValueError("the run has no checkpoint yet; save one with `maskwire checkpoint save`")
            name = found[0].name
        out = out or Path(name)
        if merged and out.exists():
            raise ValueError(f"{out} already exists; choose another folder with --out")
        folder = out.with_name(f"{out.name}.unmerged") if merged else out
        with byte_progress(f"checkpoint {name}", shown=not as_json) as report:
            weights = weights or (merged and not ema)
            client.download(name, folder, weights=weights, ema=ema, on_progress=report)
    if merged:
        merge(folder, out, ema=ema)
        shutil.rmtree(folder)
        files = sorted(out.iterdir())
    else:
        names = [*json.loads((folder / MANIFEST).read_bytes())["files"], MANIFEST]
        files = sorted(folder / name for name in names if (folder / name).exists())
    size = sum(path.stat().st_size for path in files)
    shown = {"name": name, "folder": out, "files": [path.name for path in files], "size_bytes": size}
    show(shown, as_json, lambda: f"{out}  {size / 1e6:.1f} MB: {', '.join(path.name for path in files)}")
