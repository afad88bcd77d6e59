"""Tokenize text once and store the ids, so that training only reads them (`maskwire data prepare`).

OUT/maskwire-data.json   metadata: tokenizer, vocabulary, sizes
OUT/tokens.bin           little-endian ids, one document after another
OUT/documents.npy        where each document ends
OUT/prompts.npy          how many of each document's first ids are its prompt (only with prompts)
OUT/rows.npy, pieces.npy which pieces of documents share a row (only with --pack)
OUT/tokenizer.json       a copy of the tokenizer file, if one was used
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

from maskwire.arguments import check_whole
from maskwire.data.draft_folder import DraftFolder, Progress
from maskwire.data.file_array import Ids
from maskwire.data.prepared_folder import BYTES, METADATA, PreparedMetadata
from maskwire.data.record import INVALID, Fields, InvalidRecordError, Item, Record
from maskwire.data.row_packing import OPEN_ROWS
from maskwire.data.text_sources import Paths, Source, find_sources, identity_of
from maskwire.data.tokenizer import (
    HAS_MASK,
    HAS_PAD,
    NOT_ENCODABLE,
    TOKENIZER_FILE,
    ByteTokenizer,
    Encoded,
    FileTokenizer,
)
from maskwire.signatures import refuse_unknown_keywords

log = logging.getLogger(__name__)

_VERSION = 2  # to be increased if the same sources and options give other output
_BATCH_BYTES, _BATCH_RECORDS = 2**20, 1024  # tokenized in parallel on all cores
_SAVE_BYTES, _SAVE_SECONDS = 2**26, 10.0  # of text, between two saves of the progress
_LONGEST_ROW = 2**20  # tokens; model.max_seq_len allows no more
NO_TOKENS = "no tokens"
_SKIPPED = frozenset({INVALID, NOT_ENCODABLE, HAS_MASK, HAS_PAD})  # dropped only with skip_invalid
_SKIP = "to drop and count such records instead, use --skip-invalid (skip_invalid=True)"


@refuse_unknown_keywords
def prepare(
    paths: Paths,
    out: str | Path,
    *,
    tokenizer: str | Path = BYTES,
    pattern: str = "*",
    any_format: bool = False,
    text_field: str | None = None,
    prompt_field: str | None = None,
    response_field: str | None = None,
    special_tokens: bool | None = None,
    parse_special_tokens: bool = False,
    pack: int | None = None,
    skip_invalid: bool = False,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> PreparedMetadata:
    """Tokenize texts and write the ids to the folder `out`. Each file or record becomes a document.

    paths: Files, folders, addresses of fsspec (s3://...), or a data set of the package `datasets`. A text
        file becomes one document. JSON Lines, Parquet and Arrow files give one document per record, and so
        do CSV files if a field is named. Files in folders are selected as in `ByteData`.
    tokenizer: "bytes", or the path of a tokenizer.json or of a folder with one, which needs the extra
        `maskwire[tokenizers]` and UTF-8 text. The mask id is the tokenizer's own, or follows its last id.
    text_field: The field of a record that holds its text; "text" by default.
    prompt_field, response_field: The fields of a prompt and of the response to train on. Prompts are given
        to the model and never masked.
    special_tokens: Whether documents get the tokens that the tokenizer adds around a text, such as BOS, and
        end with EOS, which maskwire adds if the tokenizer does not. By default yes for a tokenizer and for
        responses, and no for texts as bytes. `document_start` and `document_end` of the result list them.
    parse_special_tokens: Encode special tokens that a text spells out, such as "[MASK]", as these tokens
        and not as plain text.
    pack: Fill rows of this many tokens with several documents each. Longer documents are cut into pieces,
        and longer pairs are dropped. `rows` and `filled` of the result say how full the rows are.
    skip_invalid: Drop records that cannot be read or encoded, and count them in `dropped`. By default the
        first such record is an error. A source that cannot be read at all is always an error.
    on_progress: Called as `on_progress(done, total)`, with numbers of bytes of the sources.

    `out` is created only once it is complete; an existing prepared folder is replaced only with `force`. If
    the process is stopped, the same call resumes from `.NAME.part` beside `out`, and the result is the same
    to the byte. After an error for an invalid record, a call with `skip_invalid` resumes too. Records
    without text are dropped and counted in `dropped`. Raises ValueError for wrong arguments or data, and
    OSError for files that cannot be read or written.
    """
    if pack is not None:
        check_whole("pack (--pack), the number of tokens per row,", pack, 1, _LONGEST_ROW)
    out = Path(out)
    fields = Fields(text_field, prompt_field, response_field)
    _check_out(out, force)
    sources = find_sources(paths, fields, pattern=pattern, any_format=any_format)
    chosen = _tokenizer(tokenizer, fields, special_tokens, parse_special_tokens)
    options = {
        "version": _VERSION,
        "sources": identity_of(sources),
        "any_format": any_format,
        "fields": [fields.given, *fields.names],  # CSV without a named field is read as text
        "tokenizer": [chosen.name, chosen.num_tokens, chosen.mask_id, chosen.end_id, chosen.pad_id],
        "special_tokens": [special_tokens, parse_special_tokens],
        "pack": [pack, OPEN_ROWS],
    }
    identity = hashlib.sha256(json.dumps(options).encode()).hexdigest()
    dtype = _dtype(chosen)
    refused = frozenset() if skip_invalid else _SKIPPED
    with DraftFolder(out, identity, dtype, prompts=fields.prompt is not None, refused=refused) as draft:
        if draft.resumed:
            log.warning(
                "resuming after %s documents that an earlier call prepared", f"{draft.progress.documents:,}"
            )
        longest = pack if fields.prompt is not None else None
        _write(sources, draft, chosen, longest, skip_invalid, on_progress or (lambda *_: None))
        metadata = _metadata(draft.progress, chosen, fields, dtype, longest)
        if pack is not None:
            rows, cut = draft.pack(pack)
            metadata = dataclasses.replace(metadata, row_length=pack, rows=rows, cut=cut)
        copies = {TOKENIZER_FILE: chosen.file} if isinstance(chosen, FileTokenizer) else {}
        draft.complete(metadata, out, copies)
    return metadata


def _check_out(out: Path, force: bool) -> None:
    prepared = (out / METADATA).is_file()
    if out.exists() and not (force and prepared):
        advice = "choose another folder"
        if prepared:
            advice += ", or replace the prepared data in it with --force (force=True)"
        raise ValueError(f"{out} already exists; {advice}")


def _tokenizer(
    tokenizer: str | Path, fields: Fields, special_tokens: bool | None, parse: bool
) -> ByteTokenizer | FileTokenizer:
    if fields.prompt is not None and special_tokens is False:
        raise ValueError(
            "special_tokens=False (--no-special-tokens) cannot be used with prompts and responses: the model "
            "learns where a response ends from the end id after it; leave the option out"
        )
    if tokenizer != BYTES:
        return FileTokenizer(
            Path(tokenizer), special_tokens=special_tokens is not False, parse_special_tokens=parse
        )
    if parse:
        raise ValueError(
            "parse_special_tokens (--parse-special-tokens) needs a tokenizer file, got tokenizer='bytes', "
            "which has no named special tokens; give a tokenizer file, or leave the option out"
        )
    return ByteTokenizer(special_tokens=bool(special_tokens) or fields.prompt is not None)


def _dtype(tokenizer: ByteTokenizer | FileTokenizer) -> str:
    if tokenizer.name == BYTES and not tokenizer.end:
        return "uint8"
    return "uint16" if tokenizer.num_tokens - 1 < 2**16 else "int32"


def _write(
    sources: list[Source],
    draft: DraftFolder,
    tokenizer: ByteTokenizer | FileTokenizer,
    longest: int | None,
    skip_invalid: bool,
    report: Callable[[int, int], None],
) -> None:
    """Tokenize the sources and append their texts to the draft; drop texts of more than `longest` ids."""
    progress, total = draft.progress, sum(source.size for source in sources)
    if isinstance(tokenizer, FileTokenizer):
        tokenizer.resume(progress.start, progress.end)
    before = sum(source.size for source in sources[: progress.source])
    saved_bytes, saved = progress.text_bytes, time.monotonic()
    for source in sources[progress.source :]:
        for items in _batches(source.read(progress.place)):
            _add(items, draft, tokenizer, longest, skip_invalid)
            progress.place = items[-1].place
            report(before + min(items[-1].done, source.size), total)
            if progress.text_bytes - saved_bytes >= _SAVE_BYTES or time.monotonic() - saved >= _SAVE_SECONDS:
                draft.save()
                saved_bytes, saved = progress.text_bytes, time.monotonic()
        progress.source, progress.place = progress.source + 1, 0
        before += source.size
    report(total, total)


def _add(
    items: list[Item],
    draft: DraftFolder,
    tokenizer: ByteTokenizer | FileTokenizer,
    longest: int | None,
    skip_invalid: bool,
) -> None:
    progress = draft.progress
    records = [item.record for item in items if item.record is not None]
    for item in items:
        if item.error and not skip_invalid:
            raise ValueError(f"{item.error}; {_SKIP}")
        if item.record is None:
            progress.drop(item.dropped)
    for record, encoded in zip(records, _encode(records, tokenizer, skip_invalid), strict=True):
        if isinstance(encoded, str):
            progress.drop(encoded)
            continue
        progress.text_bytes += record.size
        if encoded is None:
            progress.drop(NO_TOKENS)
            continue
        parts: Iterable[Ids] = encoded.parts
        if longest is not None:
            parts = list(parts)
            if sum(part.size for part in parts) > longest:
                progress.drop(_too_long(longest))
                continue
        draft.add(parts, encoded.prompt)
    progress.start, progress.end = tokenizer.start, tokenizer.end


def _encode(
    records: list[Record], tokenizer: ByteTokenizer | FileTokenizer, skip_invalid: bool
) -> list[Encoded | str | None]:
    """Return what the tokenizer yields per record; with `skip_invalid`, a reason for each invalid record."""
    try:
        return list(tokenizer.encode(records))
    except InvalidRecordError as error:
        if not skip_invalid:
            raise ValueError(f"{error}; {_SKIP}") from error
        if len(records) == 1:
            return [error.reason]
        half = len(records) // 2
        return [
            found
            for part in (records[:half], records[half:])
            for found in _encode(part, tokenizer, skip_invalid)
        ]


def _metadata(
    progress: Progress,
    tokenizer: ByteTokenizer | FileTokenizer,
    fields: Fields,
    dtype: str,
    longest: int | None,
) -> PreparedMetadata:
    if not progress.documents:
        if longest is not None and _too_long(longest) in progress.dropped:
            raise ValueError(
                f"no pair fits into a row of {longest:,} tokens: {dropped_words(progress.dropped)}; pack "
                "into longer rows (--pack)"
            )
        raise ValueError(
            "the tokenizer produced no tokens from the text; check that the tokenizer suits the text"
            if progress.dropped.get(NO_TOKENS)
            else f"no record has text: {dropped_words(progress.dropped) or 'there are no records'}; "
            "check the name of the text's field"
        )
    return PreparedMetadata(
        tokenizer.name,
        tokenizer.num_tokens,
        tokenizer.mask_id,
        dtype,
        progress.tokens,
        progress.documents,
        progress.text_bytes,
        tokenizer.start,
        tokenizer.end,
        tokenizer.pad_id,
        tokenizer.end_id,
        fields.prompt is not None,
        progress.longest,
        progress.dropped,
    )


def _too_long(longest: int) -> str:
    return f"longer than a row of {longest:,} tokens"


def dropped_words(dropped: dict[str, int]) -> str:
    """Describe how many records were dropped, and why; empty if none was dropped."""
    return ", ".join(f"{count:,} dropped ({reason})" for reason, count in sorted(dropped.items()))


def _batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Yield groups of items that are tokenized together."""
    for first in items:
        batch, size = [first], _size(first.record)
        if size < _BATCH_BYTES:
            for item in chain(items):
                batch.append(item)
                size += _size(item.record)
                if size >= _BATCH_BYTES or len(batch) >= _BATCH_RECORDS:
                    break
        yield batch


def _size(record: Record | None) -> int:
    return 0 if record is None else record.size
