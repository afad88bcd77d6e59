"""`maskwire data`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from maskwire.cli import exit_codes
from maskwire.cli.display import show
from maskwire.cli.options import AnyFormat, Json, Pattern
from maskwire.data.prepare import prepare as prepare_data
from maskwire.data.prepared_folder import BYTES, PreparedMetadata
from maskwire.progress import byte_progress

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
    any_format: AnyFormat = False,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens/--no-special-tokens",
            help="Put the tokenizer's own special tokens, such as BOS and EOS, around each document.",
        ),
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier preparation.")] = False,
    as_json: Json = False,
) -> None:
    """Tokenize text once, into packed ids that training maps; says which model they need."""
    with exit_codes.errors(as_json):
        with byte_progress("preparing", shown=not as_json) as tell:
            meta = prepare_data(
                paths, out, tokenizer=tokenizer, pattern=pattern, any_format=any_format,
                special_tokens=special_tokens, force=force, on_progress=tell,
            )  # fmt: skip
        show(
            {"folder": out, **dataclasses.asdict(meta)},
            as_json,
            lambda: (
                f"{out}: {meta.tokens:,} tokens ({meta.dtype}) of {meta.documents:,} documents, "
                f"{meta.text_bytes / meta.tokens:.2f} bytes a token\n{_special_tokens(meta, special_tokens)}"
                f"num_tokens = {meta.num_tokens}\nmask_id = {meta.mask_id}\n"
                "Serve a model with these two in [model], then: maskwire train "
                f"{out} --until-step N"
            ),
        )


def _special_tokens(meta: PreparedMetadata, wanted: bool) -> str:
    """A line about the special tokens around each document; none for bytes."""
    if meta.tokenizer == BYTES:
        return ""
    if not wanted:
        return "special tokens around each document: none (--no-special-tokens)\n"
    parts = [
        f"{where} {', '.join(map(str, ids))}"
        for where, ids in (("starts with id", meta.document_start), ("ends with id", meta.document_end))
        if ids
    ]
    if not parts:
        return "special tokens around each document: none, the tokenizer adds no BOS or EOS\n"
    words = " and ".join(parts)
    return f"each document {words}, as the tokenizer adds them (--no-special-tokens leaves them out)\n"
