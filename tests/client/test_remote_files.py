"""Files at addresses are selected and read like local files, and errors of a backend name the address."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from maskwire.data.file_data import open_data
from maskwire.data.prepare import prepare
from maskwire.data.record import Fields
from maskwire.data.text_sources import find_sources

fsspec = pytest.importorskip("fsspec")

TEXT = b"some text about nothing in particular\n" * 40
LINES = b'{"text": "some"}\n' * 9
OPTIONS: dict[str, Any] = {"length": 16, "batch_size": 2}
REFUSED = {
    "a.jsonl.gz": (gzip.compress(LINES), "is an archive or a compressed file: unpack it"),
    "a.jsonl": (gzip.compress(LINES), "is an archive or a compressed file: unpack it"),
    "ids.bin": (b"some ids", "is a file of packed ids: give it alone"),
    "wide.txt": (TEXT.decode().encode("utf-16"), "is UTF-16 text: convert it to UTF-8"),
}


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_a_remote_file_that_is_not_text_is_refused_like_a_local_one(
    tmp_path: Path, memory: Any, name: str, protocol: str
) -> None:
    content, words = REFUSED[name]
    (tmp_path / "in").mkdir()
    for each, data in ((name, content), ("b.txt", TEXT)):
        (tmp_path / "in" / each).write_bytes(data)
        memory.pipe(f"/in/{each}", data)
    folder = f"file://{tmp_path}/in" if protocol == "file" else "memory://in"
    for address in (f"{folder}/{name}", folder, f"{folder}/*"):
        for read in (lambda path: open_data(path, **OPTIONS), lambda path: prepare(path, tmp_path / "out")):
            with pytest.raises(ValueError, match=words) as error:
                read(address)
            assert f"{protocol}://" in str(error.value)
            assert name in str(error.value)
    assert open_data(f"{folder}/{name}", any_format=True, **OPTIONS).size == len(content), "as bytes"
    assert open_data(folder, pattern="b.*", **OPTIONS).size == len(TEXT)


def test_only_records_of_a_remote_folder_are_read_if_a_field_is_named(
    memory: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for name, content in (("a.jsonl", LINES), ("b.txt", TEXT), ("c.gz", gzip.compress(TEXT))):
        memory.pipe(f"/in/{name}", content)
    assert open_data("memory://in", text_field="text", **OPTIONS).documents == 9
    assert "skipped memory:///in/b.txt, memory:///in/c.gz: no records with fields" in _one_line(caplog)
    with pytest.raises(
        ValueError, match=r"memory:///in/b\.txt: no records with fields .*leave out the options"
    ):
        open_data("memory://in/b.txt", text_field="text", **OPTIONS)


def test_what_is_no_data_in_a_remote_folder_is_skipped_with_a_message(
    memory: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT)
    prepare(tmp_path / "a.txt", tmp_path / "prepared")
    for path in (tmp_path / "prepared").iterdir():
        memory.pipe(f"/in/prepared/{path.name}", path.read_bytes())
    metrics = json.dumps({"run_id": "00", "lineage": 0, "step": 1}).encode() + b"\n"
    for name, content in (
        ("a.txt", TEXT),
        ("empty.txt", b""),
        (".git/head.txt", b"ref"),
        ("m.jsonl", metrics),
        ("run/journal.sqlite-wal", b"pages"),
    ):
        memory.pipe(f"/in/{name}", content)
    with caplog.at_level(logging.WARNING):
        (source,) = find_sources("memory://in", Fields())
    assert source.name == "memory:///in/a.txt"
    said = _one_line(caplog)
    for words in (
        "skipped memory:///in/empty.txt: empty",
        "skipped memory:///in/.git/head.txt: hidden",
        "skipped memory:///in/prepared: prepared data",
        "m.jsonl, memory:///in/run/journal.sqlite-wal: written by maskwire itself",
    ):
        assert said.count(words) == 1, words
    with pytest.raises(ValueError, match=r"no matching file has content; .*/in/empty\.txt: empty"):
        find_sources("memory://in/empty.tx*", Fields())


def test_empty_files_among_others_are_no_documents(memory: Any) -> None:
    for name, content in (("a.txt", TEXT), ("b.txt", b""), ("c.jsonl", b"")):
        memory.pipe(f"/in/{name}", content)
    for address in ("memory://in", "memory://in/*"):
        assert [source.name for source in find_sources(address, Fields())] == ["memory:///in/a.txt"]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow", "a.csv"])
def test_records_of_every_format_are_read_from_an_address_from_any_place(
    tmp_path: Path, memory: Any, name: str
) -> None:
    texts = [f"text {number}" for number in range(3000)]
    path = tmp_path / name
    if name == "a.csv":
        path.write_text("text\n" + "\n".join(texts) + "\n")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = pyarrow.table({"text": texts})
        if name == "a.parquet":
            parquet.write_table(table, path, row_group_size=1100)
        else:
            make = pyarrow.ipc.new_stream if name == "stream.arrow" else pyarrow.ipc.new_file
            with make(str(path), table.schema) as writer:
                writer.write_table(table, max_chunksize=1100)
    memory.pipe(f"/in/{name}", path.read_bytes())
    (source,) = find_sources(f"memory://in/{name}", Fields(text="text"))
    items = list(source.read(0))
    assert [item.record.content().decode() for item in items if item.record is not None] == texts
    for start in (1, 1100, 2999, 3000):
        assert list(source.read(start)) == items[start:]


def test_a_remote_data_set_is_refused_by_name(memory: Any) -> None:
    for name in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
        memory.pipe(f"/in/saved/{name}", b"{}")
    with pytest.raises(ValueError, match=r"contains a saved data set \(.*/in/saved\): copy it"):
        open_data("memory://in", **OPTIONS)


class BackendError(Exception):
    """An error that is no OSError, as those of botocore."""


class Failing(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A file system in which one operation fails."""

    protocol = "failing"
    cachable = False
    fails = ""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._check("connect")

    def _check(self, operation: str) -> None:
        if operation == type(self).fails:
            raise BackendError("no credentials")

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        self._check("info")
        kind = "file" if path.endswith(".jsonl") else "directory"
        return {"name": path, "size": len(LINES), "type": kind}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        self._check("list")
        found = [self.info(f"{path.rstrip('/')}/a.jsonl")]
        return found if detail else [each["name"] for each in found]

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **_: Any) -> Any:
        self._check("head" if block_size == 4096 else "open")
        return FailingFile(self, "head" if block_size == 4096 else "read")


class FailingFile:
    def __init__(self, system: Failing, operation: str) -> None:
        self._system, self._operation, self._place = system, operation, 0

    def read(self, size: int) -> bytes:
        self._system._check(self._operation)
        part = LINES[self._place : self._place + size]
        self._place += len(part)
        return part

    def seek(self, offset: int, whence: int = 0) -> None:
        self._place = offset + (0, self._place, len(LINES))[whence]

    def tell(self) -> int:
        return self._place

    def close(self) -> None:
        pass

    def __enter__(self) -> FailingFile:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("address", "operation"),
    [
        (address, operation)
        for address in ("failing://in", "failing://in/*.jsonl", "failing://in/a.jsonl")
        for operation in ("connect", "info", "list", "head", "open", "read")
        if (address, operation) != ("failing://in/a.jsonl", "list")  # the folder of a file is not listed
    ],
)
def test_every_error_of_a_backend_names_the_address_and_what_to_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, operation: str
) -> None:
    fsspec.register_implementation("failing", Failing, clobber=True)
    assert open_data(address, **OPTIONS).documents == 9
    monkeypatch.setattr(Failing, "fails", operation)
    for read in (lambda: open_data(address, **OPTIONS), lambda: prepare(address, tmp_path / "out")):
        with pytest.raises(
            (ValueError, OSError), match="no credentials; check the address, the net"
        ) as error:
            read()
        assert str(error.value).startswith("failing://in"), "the address or the file"
        assert "BackendError" in str(error.value)


def _one_line(caplog: pytest.LogCaptureFixture) -> str:
    return " | ".join(record.getMessage() for record in caplog.records)
