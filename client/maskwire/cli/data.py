"""`maskwire data`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from maskwire.cli import exits
from maskwire.cli.options import Json, Pattern
from maskwire.prepare import prepare as prepare_data
from maskwire.progress import byte_progress
from maskwire.show import show

data_app = typer.Typer(help="Prepare data for training.", no_args_is_help=True)


@data_app.callback()
def root() -> None:
    """Prepare data for training."""


@data_app.command()
def prepare(
    paths: Annotated[list[Path], typer.Argument(help="Files or folders of text.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    tokenizer: Annotated[
        str, typer.Option(help="'bytes', or a tokenizers file (tokenizer.json; extra maskwire[tokenizers]).")
    ] = "bytes",
    pattern: Pattern = "*",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier preparation.")] = False,
    as_json: Json = False,
) -> None:
    """Tokenize text once, into packed ids that training maps; says which model they need."""
    with exits.errors(as_json):
        with byte_progress("preparing", shown=not as_json) as tell:
            meta = prepare_data(
                paths, out, tokenizer=tokenizer, pattern=pattern, force=force, on_progress=tell
            )
        show(
            {"folder": out, **dataclasses.asdict(meta)},
            as_json,
            lambda: (
                f"{out}: {meta.tokens:,} tokens ({meta.dtype}) of {meta.documents:,} documents, "
                f"{meta.text_bytes / meta.tokens:.2f} bytes a token\n"
                f"num_tokens = {meta.num_tokens}\nmask_id = {meta.mask_id}\n"
                "Serve a model with these two in [model], then: maskwire train "
                f"{out} --until-step N"
            ),
        )
