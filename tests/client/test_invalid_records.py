"""A record that cannot be used is named, keeps the draft, and can be skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preparations import FIELDS, contents, stop, tokenizer_folder

from maskwire.data.draft_folder import DraftFolder
from maskwire.data.prepare import prepare


def invalid_forms(folder: Path, name: str) -> tuple[Path, str]:
    """A file of 60 pairs whose record 50 cannot be read, and the words of the error about it."""
    rows = [(f"question {n}", f"answer {n}") for n in range(60)]
    path = folder / f"late.{name.split()[0]}"
    if name.startswith("jsonl"):
        lines = [json.dumps({"q": q, "a": a}).encode() for q, a in rows]
        lines[49], words = {
            "jsonl syntax": (b'{"q": "x",', "line 50: the line is not valid JSON"),
            "jsonl type": (b'{"q": "x", "a": 7}', "line 50: the field 'a' must hold text, got int"),
            "jsonl field": (b'{"q": "x"}', "line 50: there is no field 'a'"),
            "jsonl codec": (b'{"q": "x", "a": "\xff"}', "line 50: the line is not UTF-8 ('utf-8' codec"),
        }[name]
        path.write_bytes(b"\n".join(lines) + b"\n")
    elif name.startswith("csv"):
        lines = [f"{q},{a}".encode() for q, a in [("q", "a"), *rows]]
        lines[50], words = {
            "csv fields": (b"x", "row 50: the row has 1 fields, but the header has 2"),
            "csv codec": (b"x,\xff", "row 50: not UTF-8"),
        }[name]
        path.write_bytes(b"\n".join(lines) + b"\n")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        values = [a.encode() for _, a in rows]
        values[49] = b"\xff"
        column = pyarrow.array(values).cast(pyarrow.large_binary()).view(pyarrow.large_string())
        table = pyarrow.table({"q": [q for q, _ in rows], "a": column})
        words = "row 50: the field 'a' is not UTF-8"
        if path.suffix == ".parquet":
            parquet.write_table(table, path)
        else:
            with pyarrow.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table)
    return path, f"{path}, {words}"


INVALID_FORMS = (
    "jsonl syntax", "jsonl type", "jsonl field", "jsonl codec", "csv fields", "csv codec", "parquet", "arrow"
)  # fmt: skip


@pytest.mark.parametrize("name", INVALID_FORMS)
@pytest.mark.usefixtures("small_parts")
def test_an_invalid_record_keeps_the_draft_and_can_be_skipped(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, words = invalid_forms(tmp_path, name)
    options: Any = FIELDS
    with pytest.raises(ValueError, match=r"to drop and count such records instead, use --skip") as error:
        prepare(path, tmp_path / "out", **options)
    assert str(error.value).startswith(words)
    with pytest.raises(ValueError, match="--skip-invalid") as again:
        prepare(path, tmp_path / "out", **options)
    assert "resuming after 49 documents" in caplog.text
    assert str(again.value) == str(error.value), "the record is named in the same way"
    caplog.clear()
    meta = prepare(path, tmp_path / "out", skip_invalid=True, **options)
    assert "resuming after 49 documents" in caplog.text
    assert (meta.documents, meta.dropped) == (59, {"cannot be read": 1})
    assert prepare(path, tmp_path / "whole", skip_invalid=True, **options) == meta
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_parts")
def test_a_draft_that_skipped_a_record_does_not_resume_without_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = invalid_forms(tmp_path, "jsonl syntax")
    with monkeypatch.context() as patch:
        patch.setattr(DraftFolder, "complete", stop)
        with pytest.raises(OSError, match="No space left"):
            prepare(path, tmp_path / "out", skip_invalid=True, **FIELDS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="line 50: the line is not valid JSON"):
        prepare(path, tmp_path / "out", **FIELDS)  # type: ignore[arg-type]
    assert "resuming" not in caplog.text


@pytest.mark.parametrize("skip_invalid", [False, True])
def test_a_source_that_cannot_be_read_at_all_is_always_an_error(tmp_path: Path, skip_invalid: bool) -> None:
    for name, content, words in (
        ("a.csv", b'text,other\na,b\n\'c"d","e"f,g\n', "after row 1: cannot be read as CSV"),
        ("b.csv", b"text,\xe4\na,b\n", "the header is not UTF-8; convert the file"),
        ("c.csv", b"body\na\n", "there is no field 'text'"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            prepare(tmp_path / name, tmp_path / "out", text_field="text", skip_invalid=skip_invalid)


MASKED = (
    "{place}: it contains the {role} token '[MASK]' (id 0), and training refuses rows with this id; "
    "{advice}remove the token from the text; to drop and count such records instead, use --skip-invalid "
    "(skip_invalid=True)"
)
PARSED = "leave out --parse-special-tokens to encode it as plain text, or "


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("field", ["q", "a"])
@pytest.mark.parametrize("role", ["mask", "pad"])
def test_a_document_with_the_mask_or_the_pad_token_is_refused_or_dropped(
    tmp_path: Path, special: bool, field: str, role: str
) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"q": "x </s>", "a": "y"} for _ in range(20)]
    rows[12] = {"q": "x", "a": "y"} | {field: "x [MASK] y"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizer_folder(tmp_path, "tokenizer", special=special, **{"mask": "<m>", role: "[MASK]"})
    options: Any = {**FIELDS, "tokenizer": tokenizer, "parse_special_tokens": special}
    with pytest.raises(ValueError, match="--skip-invalid") as error:
        prepare(path, tmp_path / "out", **options)
    place = f"{path}, line 13"
    assert str(error.value) == MASKED.format(place=place, role=role, advice=PARSED if special else "")
    meta = prepare(path, tmp_path / "out", skip_invalid=True, **options)
    assert (meta.documents, meta.dropped) == (19, {f"contains the {role} token": 1})
    assert (meta.mask_id if role == "mask" else meta.pad_id) == 0
    ids = np.fromfile(tmp_path / "out" / "tokens.bin", dtype="<u2")
    assert ids.tolist() == [6, 2, 7, 2] * 19, "the other special tokens are encoded as themselves"


def test_the_mask_token_must_not_be_an_ordinary_token(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x y")
    with pytest.raises(ValueError, match=r"must be a special token of the tokenizer, got 'y', an ordinary"):
        prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer=tokenizer_folder(tmp_path, "y", mask="y"))
    absent = tokenizer_folder(tmp_path, "absent", mask="<absent>")
    assert prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer=absent).mask_id == 0, "the usual name"


@pytest.mark.parametrize(("content", "reason"), [(b"\xff", "cannot be read"), (b"z", "cannot be encoded")])
@pytest.mark.parametrize("name", ["0.txt", "3.txt", "7.txt"])
def test_texts_that_cannot_be_encoded_are_dropped_one_by_one(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(8):
        (texts / f"{number}.txt").write_text("x y")
    (texts / name).write_bytes(content)
    tokenizer = tokenizer_folder(tmp_path, "tokenizer", unknown="<none>")
    with pytest.raises(ValueError, match=rf"{name}: .*; to drop and count such records instead, use --"):
        prepare(texts, tmp_path / "out", tokenizer=tokenizer)
    meta = prepare(texts, tmp_path / "out", tokenizer=tokenizer, skip_invalid=True)
    assert (meta.dropped, meta.documents, meta.text_bytes) == ({reason: 1}, 7, 21)
    ids = np.fromfile(tmp_path / "out" / "tokens.bin", dtype="<u2")
    assert ids.tolist() == [6, 7, 2] * 7


def test_a_tokenizer_without_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x y")
    tokenizer = tokenizer_folder(tmp_path, "empty", words="")
    words = rf"{tokenizer / 'tokenizer.json'}: the vocabulary of the tokenizer is empty"
    with pytest.raises(ValueError, match=words):
        prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer=tokenizer)
