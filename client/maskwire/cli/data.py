"""`maskwire data`: prepare text for training, and download a run's tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from maskwire.cli import exit_codes
from maskwire.cli.display import show
from maskwire.cli.options import (
    AnyFormat,
    Json,
    Pattern,
    PromptField,
    ResponseField,
    ServerConnection,
    TextField,
    with_server,
)
from maskwire.data.draft_folder import draft_path
from maskwire.data.prepare import dropped_words
from maskwire.data.prepare import prepare as prepare_data
from maskwire.data.prepared_folder import BYTES, PreparedMetadata
from maskwire.data.tokenizer import TOKENIZER_FILE
from maskwire.progress_bar import byte_progress

data_app = typer.Typer(no_args_is_help=True)


@data_app.callback()
def root() -> None:
    """Prepare data for training, or download the tokenizer of a run."""


@data_app.command()
def prepare(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH",
            show_default=False,
            help="Text files, JSON Lines, CSV, Parquet or Arrow files, folders of them, addresses such as "
            "s3://BUCKET/FOLDER, or a folder that `datasets` saved.",
        ),
    ],
    out: Annotated[Path, typer.Option(show_default=False, help="The folder to create.")],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="'bytes', or the path of a tokenizer.json or of a Hugging Face tokenizer's folder, which "
            "needs maskwire's extra `tokenizers`."
        ),
    ] = "bytes",
    pattern: Pattern = "*",
    any_format: AnyFormat = False,
    text_field: TextField = None,
    prompt_field: PromptField = None,
    response_field: ResponseField = None,
    special_tokens: Annotated[
        bool | None,
        typer.Option(
            "--special-tokens/--no-special-tokens",
            help="Add the special tokens that the tokenizer puts around a text, such as BOS, and end each "
            "text with EOS. By default yes for a tokenizer file and for responses, no for texts as bytes.",
            show_default=False,
        ),
    ] = None,
    parse_special_tokens: Annotated[
        bool,
        typer.Option(
            "--parse-special-tokens",
            help="Encode special tokens that a text spells out, such as '[MASK]', as special tokens, not as "
            "text.",
        ),
    ] = False,
    pack: Annotated[
        int | None,
        typer.Option(
            metavar="LENGTH",
            show_default=False,
            help="Fill rows of this many tokens with several documents each; attention stays inside a "
            "document. Longer documents are cut into pieces. No more than the model's max_seq_len.",
        ),
    ] = None,
    skip_invalid: Annotated[
        bool,
        typer.Option(
            "--skip-invalid",
            help="Drop records that cannot be read or encoded, and count them. By default the first one is "
            "an error.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace data prepared earlier in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Tokenize text once, and print the matching settings for a model.

    A model of bytes does not need this command: `maskwire train` reads text files directly.

    The texts are read as a stream. If the command is stopped, run it again:
    it resumes where it stopped.
    """
    with exit_codes.errors(as_json):
        with _interruption(out, as_json), byte_progress("preparing", shown=not as_json) as report:
            metadata = prepare_data(
                paths, out, tokenizer=tokenizer, pattern=pattern, any_format=any_format,
                text_field=text_field, prompt_field=prompt_field, response_field=response_field,
                special_tokens=special_tokens, parse_special_tokens=parse_special_tokens, pack=pack,
                skip_invalid=skip_invalid, force=force, on_progress=report,
            )  # fmt: skip
        show(
            {"folder": out, **dataclasses.asdict(metadata), "filled": metadata.filled},
            as_json,
            lambda: (
                f"{out}: {metadata.tokens:,} tokens ({metadata.dtype}) in {metadata.documents:,} documents, "
                f"{metadata.text_bytes / metadata.tokens:.2f} bytes per token\n"
                f"{_packed(metadata)}{_dropped(metadata)}{_special_tokens(metadata)}"
                f"num_tokens = {metadata.num_tokens}\nmask_id = {metadata.mask_id}\n"
                + ("" if metadata.pad_id is None else f"pad_id = {metadata.pad_id}\n")
                + (f"max_seq_len = {metadata.row_length}\n" if metadata.row_length else "")
                + "Put these settings into [model] of the server's configuration, as `maskwire-server init "
                f"--data {out}` does, unless the model comes from Hugging Face and has its own; start a new "
                f"run, then: maskwire train {out} --until-step N"
            ),
        )


@data_app.command()
@with_server(retry_for=60.0)
def tokenizer(
    server: ServerConnection,
    out: Annotated[Path, typer.Option(show_default=False, help="The folder to write tokenizer.json to.")],
    as_json: Json = False,
) -> None:
    """Download the tokenizer of the data that the run was trained on."""
    with server.attach() as client:
        found = client.tokenizer_of_run()
    if found is None or not found.file:
        raise ValueError(
            "the run keeps no tokenizer file: it was trained on bytes, which need none, or on ids of an "
            "unknown tokenizer; for such ids, use the tokenizer that encoded the training data"
        )
    out.mkdir(parents=True, exist_ok=True)
    path = out / TOKENIZER_FILE
    path.write_bytes(found.file)
    result = {
        "file": path,
        "tokenizer": found.name,
        "document_start": found.document_start,
        "document_end": found.document_end,
    }
    show(result, as_json, lambda: f"wrote {path} ({found.name})")


@contextmanager
def _interruption(out: Path, as_json: bool) -> Iterator[None]:
    """After Ctrl-C or SIGTERM, report whether the same command will resume or start from the beginning."""
    try:
        yield
    except KeyboardInterrupt:
        draft = draft_path(out)
        found = f"the progress is saved in {draft}" if draft.exists() else "no progress was saved yet"
        again = "resumes" if draft.exists() else "starts from the beginning"
        code = exit_codes.interrupted().exit_code
        exit_codes.show_error(f"interrupted; {found}: the same command {again}", code, as_json=as_json)
        raise


def _packed(metadata: PreparedMetadata) -> str:
    """The lines of the output about packed rows; empty if the data is not packed."""
    if metadata.filled is None:
        return ""
    words = (
        f"packed into {metadata.rows:,} rows of {metadata.row_length:,} tokens: {metadata.filled:.1%} of "
        "their positions hold tokens\n"
    )
    if metadata.cut:
        words += f"documents longer than a row, which were cut into pieces: {metadata.cut:,}\n"
    if metadata.prompts:
        words += (
            "a packed pair ends with one end id and is not filled up to the length of a row, so the model "
            "does not learn where a response ends in a longer row\n"
        )
    return words


def _dropped(metadata: PreparedMetadata) -> str:
    return f"{dropped_words(metadata.dropped)}\n" if metadata.dropped else ""


def _special_tokens(metadata: PreparedMetadata) -> str:
    """The line of the output about special tokens around each document; empty for bytes without them."""
    parts = [
        f"{where} {', '.join(map(str, ids))}"
        for where, ids in (
            ("starts with id", metadata.document_start),
            ("ends with id", metadata.document_end),
        )
        if ids
    ]
    if parts:
        leave = "" if metadata.prompts else " (--no-special-tokens leaves special tokens out)"
        return f"each document {' and '.join(parts)}{leave}\n"
    if metadata.tokenizer == BYTES:
        return ""
    return "special tokens around each document: none (--no-special-tokens)\n"
