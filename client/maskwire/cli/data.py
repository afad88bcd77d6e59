"""`maskwire data`: prepare text for training."""

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
from maskwire.progress_bar import byte_progress

data_app = typer.Typer(no_args_is_help=True)


@data_app.callback()
def root() -> None:
    """Prepare data for training."""  # without this callback, typer drops `prepare` from the command line


@data_app.command()
def prepare(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH", show_default=False, help="Text files, or folders of them."),
    ],
    out: Annotated[Path, typer.Option(show_default=False, help="The folder to create.")],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="'bytes', or the path of a tokenizer.json, which needs maskwire's extra `tokenizers`."
        ),
    ] = "bytes",
    pattern: Pattern = "*",
    any_format: AnyFormat = False,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens/--no-special-tokens",
            help="Add the special tokens that the tokenizer puts around a text, such as BOS and EOS.",
        ),
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace data prepared earlier in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Tokenize text once, and print the model settings for it.

    Not needed for a model of bytes: `maskwire train` reads text files directly.
    """
    with exit_codes.errors(as_json):
        with byte_progress("preparing", shown=not as_json) as report:
            metadata = prepare_data(
                paths, out, tokenizer=tokenizer, pattern=pattern, any_format=any_format,
                special_tokens=special_tokens, force=force, on_progress=report,
            )  # fmt: skip
        show(
            {"folder": out, **dataclasses.asdict(metadata)},
            as_json,
            lambda: (
                f"{out}: {metadata.tokens:,} tokens ({metadata.dtype}) in {metadata.documents:,} documents, "
                f"{metadata.text_bytes / metadata.tokens:.2f} bytes per token\n"
                f"{_special_tokens(metadata, special_tokens)}"
                f"num_tokens = {metadata.num_tokens}\nmask_id = {metadata.mask_id}\n"
                "Put these two settings into [model] of the server's configuration, unless the model comes "
                "from Hugging Face and has its own; start a new run, then: "
                f"maskwire train {out} --until-step N"
            ),
        )


def _special_tokens(metadata: PreparedMetadata, wanted: bool) -> str:
    """A line about the special tokens around each document; empty for bytes."""
    if metadata.tokenizer == BYTES:
        return ""
    if not wanted:
        return "special tokens around each document: none (--no-special-tokens)\n"
    parts = [
        f"{where} {', '.join(map(str, ids))}"
        for where, ids in (
            ("starts with id", metadata.document_start),
            ("ends with id", metadata.document_end),
        )
        if ids
    ]
    if not parts:
        return "special tokens around each document: none, because the tokenizer adds none\n"
    words = " and ".join(parts)
    return f"each document {words}, added by the tokenizer (--no-special-tokens leaves them out)\n"
