"""Files that are not text are refused with a remedy."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskwire.data.file_data import ByteData, open_data
from maskwire.data.file_discovery import find_files
from maskwire.data.prepare import prepare

IDS = np.random.default_rng(0).integers(1, 50257, 4000)
TEXT = "some text about nothing in particular\n" * 40
OPTIONS: dict[str, Any] = {"length": 16, "batch_size": 2}


def archive(path: Path) -> None:
    inner = path.with_name("inner.txt")
    inner.write_text(TEXT)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as out:
            out.write(inner, "inner.txt")
    else:
        with tarfile.open(path, "w") as out_tar:
            out_tar.add(inner, "inner.txt")
    inner.unlink()


def database(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t (a)")
    connection.commit()
    connection.close()


def tensors(path: Path) -> None:
    header = json.dumps({"a": {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def saved(path: Path, array: Any) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def packed(path: Path, dtype: str) -> None:
    path.write_bytes(IDS.astype(dtype).tobytes())


def zipped(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, IDS)


FORMATS: dict[str, tuple[Callable[[Path], object], str]] = {
    "train.bin": (lambda path: packed(path, "<u2"), "--dtype uint16"),
    "ids.npz": (zipped, r"np\.save"),
    "model.pt": (zipped, r"PyTorch file.*np\.save"),
    "a.safetensors": (tensors, r"np\.save"),
    "a.jsonl": (lambda path: path.write_text('{"text": "some"}\n' * 9), r"maskwire\.open_data"),
    "a.parquet": (lambda path: path.write_bytes(b"PAR1" + bytes(90)), r"maskwire\.open_data"),
    "a.arrow": (lambda path: path.write_bytes(b"ARROW1" + bytes(90)), r"maskwire\.open_data"),
    "a.zip": (archive, "unpack it"),
    "a.tar": (archive, "unpack it"),
    "a.txt.gz": (lambda path: path.write_bytes(gzip.compress(TEXT.encode())), "unpack it"),
    "a.zst": (lambda path: path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(90)), "unpack it"),
    "a.pkl": (lambda path: path.write_bytes(pickle.dumps(IDS)), r"np\.save"),
    "a.pdf": (
        lambda path: path.write_bytes(b"%PDF-1.7\n" + TEXT.encode()),
        "PDF document: convert it to text",
    ),
    "a.jpg": (lambda path: path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(90)), "an image: .*--pattern"),
    # Detected by their content, under names that do not tell.
    "tensors.txt": (tensors, r"np\.save"),
    "archive.txt": (zipped, "unpack it, or save the ids"),
    "compressed": (lambda path: path.write_bytes(gzip.compress(TEXT.encode())), "unpack it"),
    "compressed.xz.txt": (lambda path: path.write_bytes(lzma.compress(TEXT.encode())), "unpack it"),
    "compressed.bz": (lambda path: path.write_bytes(bz2.compress(TEXT.encode())), "unpack it"),
    "tar.txt": (archive, "unpack it"),
    "array.txt": (lambda path: saved(path, IDS), r"\.npy"),
    "database.db": (database, "--pattern"),
    "pickled.dat": (lambda path: path.write_bytes(pickle.dumps({"a": IDS})), r"np\.save"),
    "train.u32": (lambda path: packed(path, "<u4"), "--dtype int32"),
    "train.i64": (lambda path: packed(path, "<i8"), r"np\.save"),
    "bytes.u16": (lambda path: path.write_bytes((IDS % 256).astype("<u2").tobytes()), "--dtype uint16"),
    "document.txt": (lambda path: path.write_bytes(b"%PDF-1.7\n" + TEXT.encode()), "convert it to text"),
    "photo": (lambda path: path.write_bytes(b"\xff\xd8\xff\xdb" + TEXT.encode()), "an image"),
    "picture.dat": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + TEXT.encode()), "an image"),
    "old-moving.txt": (lambda path: path.write_bytes(b"GIF87a" + TEXT.encode()), "an image"),
    "moving.txt": (lambda path: path.write_bytes(b"GIF89a" + TEXT.encode()), "an image"),
    "windows.txt": (lambda path: path.write_bytes(TEXT.encode("utf-16")), "convert it to UTF-8"),
    "plain16.txt": (lambda path: path.write_bytes(TEXT.encode("utf-16-le")), "UTF-16 text to UTF-8"),
}


RECORDS = ("a.jsonl", "a.parquet", "a.arrow")
"""Only `ByteData` refuses them; test_text_sources.py reads them."""


@pytest.mark.parametrize("name", FORMATS)
def test_other_file_types_are_refused_alone_and_among_texts(tmp_path: Path, name: str) -> None:
    make, remedy = FORMATS[name]
    path = tmp_path / name
    make(path)
    with pytest.raises(ValueError, match=remedy) as alone:
        ByteData(path, **OPTIONS)
    assert str(path) in str(alone.value)
    assert "--any-format" in str(alone.value)
    (tmp_path / "a.txt").write_text(TEXT)
    if name not in RECORDS:
        with pytest.raises(ValueError, match=remedy):
            open_data(tmp_path, **OPTIONS)
        with pytest.raises(ValueError, match=remedy):
            prepare(tmp_path, tmp_path / "out")
    whole = open_data(tmp_path, any_format=True, **OPTIONS)
    assert whole.size == path.stat().st_size + len(TEXT), "every byte is read"
    if not name.endswith(".txt"):
        assert open_data(tmp_path, pattern="*.txt", **OPTIONS).documents == 1


def test_the_error_counts_the_files_it_does_not_name(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.jsonl").write_text("{}\n")
    with pytest.raises(
        ValueError, match=r"2\.jsonl is a JSON Lines file.*; and 2 more\. Only text can be read here"
    ):
        find_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", TEXT.encode()),
        ("b.md", "# čeština 日本語\n".encode()),
        ("c.json", b'{"step": 1, "loss": 2.0, "digest": "no outcome"}'),
        ("long.json", b'{"step": 1, "loss": [' + b"2.0, " * 2000),
        ("d.csv", b"step,outcome,digest\n1,APPLIED,00\n"),
        ("latin1", "é à ü\n".encode("latin-1") * 30),
        ("README", b"PARAGRAPH 1\nBZh is how bzip2 files begin\n"),
        ("journal.txt", b"SQLite is a database\n"),
        (
            "about.md",
            b"A line of metrics looks like this:\n\n\n" + b'{"step": 1, "loss": 1.0, "outcome": ""}\n',
        ),
        ("short", b"\0\0"),
        ("lock", b"a text about locks"),
        ("maskwire.toml", b"[run]\n"),
        ("other.toml", b"[model]\ndim = 3\nheads = 2\n[training]\nsteps = 9\n"),
        ("settings.toml", b"[model]\ndim = 3\nwidth = 2\n"),
        ("prose.md", b"# About\n\n[model]\ndim = 3\n\nThese settings are the defaults.\n"),
        ("app.log", b"12:00:00 INFO    listening\n12:00:01 INFO    a request\n"),
        ("steps.txt", b"step 1: buy flour\nstep 2: bake it\n"),
        ("rows.json", b'[{"tokens": [[1, 2]], "step": 3}]\n'),
        ("chain.json", b'{"lineage": 1, "step": 3, "digest": "00", "name": "mine"}\n'),
        ("news.txt", b"maskwire: a new tool\n\nIt trains models.\n"),
        ("chapter.part", b"Part one\n"),
        ("empty-run.log", b"text"),
    ],
)
def test_text_is_neither_refused_nor_skipped(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert find_files(tmp_path) == find_files(tmp_path / name) == [tmp_path / name]


def test_binary_files_of_unknown_type_are_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.dat").write_bytes(IDS.astype("<u2").tobytes() + b"\0" * 8)
    (tmp_path / "a.dat").write_bytes(b"\0" + IDS.astype("<u2").tobytes())
    with caplog.at_level(logging.WARNING):
        assert len(find_files(tmp_path)) == 1
    assert "a.dat: not text (it contains zero bytes); each byte becomes a token" in caplog.text


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [
        ("uint32", "--dtype int32"),
        ("int64", r"np\.save"),
        ("uint64", r"np\.save"),
        ("int16", "--dtype uint16"),
    ],
)
def test_an_unsupported_dtype_is_refused_with_the_one_to_use(tmp_path: Path, dtype: str, remedy: str) -> None:
    packed(tmp_path / "ids.bin", dtype)
    with pytest.raises(ValueError, match=f"got '{dtype}'; .*{remedy}"):
        open_data(tmp_path / "ids.bin", dtype=dtype, **OPTIONS)
    if dtype == "uint32":
        data = open_data(tmp_path / "ids.bin", dtype="int32", **OPTIONS)
        assert np.array_equal(np.concatenate(list(data.whole())), IDS)


def test_dtype_is_refused_for_files_without_packed_ids(tmp_path: Path) -> None:
    for name in ("ids.npz", "a.jsonl", "a.txt.gz"):
        FORMATS[name][0](tmp_path / name)
        with pytest.raises(ValueError, match="not packed ids, so dtype does not apply"):
            open_data(tmp_path / name, dtype="uint16", **OPTIONS)
