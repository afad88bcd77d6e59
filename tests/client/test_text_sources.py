"""The same texts give the same batches in every form; what cannot be read is named, and drops are counted."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import maskwire
from maskwire.data.file_data import open_data
from maskwire.data.prepare import prepare
from maskwire.data.prepared_folder import PreparedMetadata
from maskwire.data.record import Fields
from maskwire.data.text_sources import find_sources

TEXTS = [
    "the dog sat on the log\n",
    'a "quoted", text',
    "čeština, 日本語 " * 9,
    "line\nbreaks\r\nof two kinds",
]
OPTIONS: dict[str, Any] = {"length": 12, "batch_size": 5, "seed": 7}


def folder(path: Path) -> Path:
    path.mkdir()
    for number, text in enumerate(TEXTS):
        (path / f"{number}.txt").write_bytes(text.encode())
    return path


def json_lines(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    rows = [{"id": 1, "text": text} for text in TEXTS] if rows is None else rows
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def comma_separated(path: Path) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *([str(n), text] for n, text in enumerate(TEXTS))])
    return path


def parquet(path: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as format_

    format_.write_table(pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS}), path, row_group_size=2)
    return path


def arrow(path: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": TEXTS})
    make = pyarrow.ipc.new_stream if path.name.startswith("stream") else pyarrow.ipc.new_file
    with path.open("wb") as file, make(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path


def saved_dataset(path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(path)
    return path


FORMS: dict[str, Callable[[Path], Path]] = {
    "texts.jsonl": json_lines,
    "texts.parquet": parquet,
    "texts.arrow": arrow,
    "stream.arrow": arrow,
    "saved": saved_dataset,
}


def batches(data: Any) -> list[list[list[int]]]:
    return [[row.tolist() for row in data.batch(step)] for step in (1, 2, 9)]


@pytest.mark.parametrize("name", [*FORMS, "texts.csv", "prepared"])
def test_the_same_texts_give_the_same_batches_in_every_form(tmp_path: Path, name: str) -> None:
    expected = open_data(folder(tmp_path / "texts"), **OPTIONS)
    if name == "texts.csv":
        path = comma_separated(tmp_path / name)
        found = open_data(path, text_field="text", **OPTIONS)
        prepare(path, tmp_path / "out", text_field="text")
    else:
        path = tmp_path / "texts" if name == "prepared" else FORMS[name](tmp_path / name)
        found = open_data(path, **OPTIONS)
        prepare(path, tmp_path / "out")
    prepared = open_data(tmp_path / "out", **OPTIONS)
    assert found.fingerprint() == prepared.fingerprint() == expected.fingerprint()
    assert batches(found) == batches(prepared) == batches(expected)


@pytest.mark.parametrize("name", [*FORMS, "texts.csv"])
def test_the_same_texts_give_the_same_packed_rows_from_every_form(tmp_path: Path, name: str) -> None:
    prepare(folder(tmp_path / "texts"), tmp_path / "expected", pack=32)
    form = {**FORMS, "texts.csv": comma_separated}[name]
    prepare(form(tmp_path / name), tmp_path / "out", pack=32, text_field="text")
    expected, found = (open_data(tmp_path / out, batch_size=5, seed=7) for out in ("expected", "out"))
    assert isinstance(found, maskwire.PackedData)
    assert found.fingerprint() == expected.fingerprint()
    for step in (1, 2, 9):
        ours, theirs = found.batch(step), expected.batch(step)
        for name in ("tokens", "segment_ids"):
            rows = zip(getattr(ours, name), getattr(theirs, name), strict=True)
            assert all(row.tolist() == same.tolist() for row, same in rows)


@pytest.mark.parametrize("name", [*FORMS, "texts.csv"])
def test_reading_continues_at_every_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in ("record_files", "hugging_face"):
        monkeypatch.setattr(f"maskwire.data.{module}._ROWS", 2)
    path = {**FORMS, "texts.csv": comma_separated}[name](tmp_path / name)
    (source,) = find_sources(path, Fields(text="text"))
    items = list(source.read(0))
    assert [item.record.content().decode() for item in items if item.record] == TEXTS
    for number, item in enumerate(items):
        assert list(source.read(item.place)) == items[number + 1 :]


def test_a_data_set_is_taken_as_an_object_too(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    expected = batches(open_data(folder(tmp_path / "texts"), **OPTIONS))
    dataset = datasets.Dataset.from_dict({"body": TEXTS, "other": [1] * len(TEXTS)})
    assert batches(open_data(dataset, text_field="body", **OPTIONS)) == expected
    streamed = dataset.to_iterable_dataset()
    assert batches(open_data(streamed, text_field="body", **OPTIONS)) == expected
    with pytest.raises(
        ValueError, match="there is no field 'text'; the fields are 'body', 'other': select with --text-f"
    ):
        open_data(dataset, **OPTIONS)
    with pytest.raises(
        ValueError, match="has the splits train, test: give one of them, such as FOLDER/train"
    ):
        open_data(datasets.DatasetDict({"train": dataset, "test": dataset}), **OPTIONS)


def test_remote_addresses_are_read_as_streams(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    expected = open_data(folder(tmp_path / "texts"), **OPTIONS)
    for path in (tmp_path / "texts").iterdir():
        system.pipe(f"/texts/{path.name}", path.read_bytes())
    system.pipe("/one/a.jsonl", json_lines(tmp_path / "a.jsonl").read_bytes())
    for address in ("memory://texts", "memory://texts/*.txt", "memory://one/a.jsonl"):
        assert open_data(address, **OPTIONS).fingerprint() == expected.fingerprint(), address
        meta = prepare(address, tmp_path / "out", force=True)
        assert meta.tokens == expected.size
    for address, words in (
        ("memory://none/*.txt", "no matching file"),
        ("nonsense://a", "cannot be opened"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            open_data(address, **OPTIONS)
        assert address in str(error.value)


def test_texts_and_records_in_a_folder_are_read_together_unless_a_field_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = folder(tmp_path / "texts")
    json_lines(texts / "more.jsonl", [{"text": "x" * 40}])
    assert open_data(texts, **OPTIONS).documents == len(TEXTS) + 1
    assert "zero bytes" not in caplog.text
    assert open_data(texts, text_field="text", **OPTIONS).documents == 1
    assert "3.txt: no records" in caplog.text or "and 1 more: no records" in caplog.text
    with pytest.raises(ValueError, match=r"0\.txt.*no records with fields .*leave out the options that"):
        open_data(texts, text_field="text", pattern="*.txt", **OPTIONS)
    with pytest.raises(ValueError, match=r"--any-format\) reads files as bytes, without fields"):
        open_data(texts, text_field="text", any_format=True, **OPTIONS)
    assert open_data(texts / "more.jsonl", any_format=True, **OPTIONS).size == 54, "each byte a token"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            '{"text": "a"}\n{"body": "b"}\n',
            r"a\.jsonl, line 2: there is no field 'text'; the fields are 'body'",
        ),
        ('{"text": "a"}\n\n{"text": \n', r"a\.jsonl, line 3: the line is not valid JSON"),
        ('["a"]\n', r"a\.jsonl, line 1: the line must be a JSON object .*got list"),
        ('{"text": 7}\n', r"a\.jsonl, line 1: the field 'text' must hold text, got int \('7'\)"),
        ('{"text": ""}\n', r"no record .*has text"),
    ],
)
def test_a_record_that_cannot_be_read_is_named(tmp_path: Path, lines: str, words: str) -> None:
    (tmp_path / "a.jsonl").write_text(lines)
    for read in (lambda: open_data(tmp_path / "a.jsonl", **OPTIONS), lambda: prepare(
        tmp_path / "a.jsonl", tmp_path / "out"
    )):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            read()
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"], "no draft is left"


def test_a_table_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,other\na,b\nc\n")
    with pytest.raises(ValueError, match=r"a\.csv, row 2: the row has 1 fields, but the header"):
        open_data(tmp_path / "a.csv", text_field="text", **OPTIONS)
    with pytest.raises(ValueError, match=r"a\.csv: there is no field 'body'; the fields are 'text', 'other'"):
        open_data(tmp_path / "a.csv", text_field="body", **OPTIONS)
    pytest.importorskip("pyarrow")
    for name, head in (("a.parquet", b"PAR1"), ("a.arrow", b"ARROW1")):
        (tmp_path / name).write_bytes(head + bytes(90))
        with pytest.raises(ValueError, match=rf"{name}: cannot be read as "):
            open_data(tmp_path / name, **OPTIONS)


def test_what_is_dropped_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "a"}, {"text": ""}, {"text": None}, {"text": "\ud800"}, {"text": "b"}, {"text": None}]
    path = json_lines(tmp_path / "a.jsonl", rows)
    meta = prepare(path, tmp_path / "out")
    assert meta.dropped == {"empty": 1, "null": 2, "not valid Unicode": 1}
    assert PreparedMetadata.read(tmp_path / "out") == meta
    assert meta.documents == open_data(path, **OPTIONS).documents == 2
    assert "4 records without text are left out" in caplog.text


def test_names_of_fields_must_make_sense(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "a.jsonl")
    for options, words in (
        ({"prompt_field": "q"}, r"prompt_field \(--prompt-field\) needs response_field"),
        ({"response_field": "a"}, r"response_field \(--response-field\) needs prompt_field"),
        ({"text_field": "t", "prompt_field": "q", "response_field": "a"}, "exclude each other"),
        ({"prompt_field": "q", "response_field": "q"}, r"\(--response-field\) must differ, got 'q' for both"),
        ({"text_field": ""}, "must not be empty"),
    ):
        with pytest.raises(ValueError, match=words):
            maskwire.open_data(path, **OPTIONS, **options)  # type: ignore[arg-type]
    prepare(path, tmp_path / "out")
    with pytest.raises(ValueError, match="holds token ids, which have no fields"):
        open_data(tmp_path / "out", text_field="text", **OPTIONS)


def test_texts_that_are_too_large_for_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskwire.data.file_data._LARGEST_IN_MEMORY", 20)
    with pytest.raises(
        ValueError, match="more than 20 bytes, and records are held in memory; prepare the texts"
    ):
        open_data(json_lines(tmp_path / "a.jsonl"), **OPTIONS)


FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "prepared-format-1"
# What the version that wrote the folders computed for them.
OLD = {
    "bytes": (
        "sha256:6eaf7794e271a3f72fc383e1145d8bf14bfb9dd7e9dca7b4347745897935aad5",
        [103, 32, 115, 97, 116, 32, 111, 110],
    ),
    "tokenizer": (
        "sha256:5bdb258edd9ace1469d05164e76660a1e2bc217b8804ad3035e66170a4755391",
        [9, 2, 3, 5, 6, 2, 7, 10],
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_a_folder_that_the_first_format_wrote_gives_the_same_batches(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    content, row = OLD[name]
    data = open_data(FIXTURE / name, length=8, batch_size=4, seed=3)
    assert data.fingerprint()["content"] == content
    assert data.batch(5)[1].tolist() == row
    assert not caplog.records
    description = data.tokenizer_description
    assert description is not None
    assert (description.name, description.document_end) == (data.tokenizer, (10,) if name != "bytes" else ())


def test_a_folder_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    prepare(json_lines(tmp_path / "a.jsonl"), tmp_path / "out")
    path = tmp_path / "out" / "maskwire-data.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 4'))
    with pytest.raises(ValueError, match="the format is 4, expected 1 to 3"):
        open_data(tmp_path / "out", **OPTIONS)
    assert np.load(tmp_path / "out" / "documents.npy").dtype == np.int64
