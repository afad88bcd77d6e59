"""Files with records are read in little memory, and one that is damaged or odd is named with what to do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from maskwire.data.file_data import open_data
from maskwire.data.prepare import prepare
from maskwire.data.record import Fields
from maskwire.data.text_sources import find_sources

OPTIONS: dict[str, Any] = {"length": 16, "batch_size": 2}
TEXTS = [f"text {number} {number * 7919 % 104729:x}" for number in range(5000)]


def table(rows: int = len(TEXTS)) -> Any:
    return pytest.importorskip("pyarrow").table({"text": TEXTS[:rows], "other": list(range(rows))})


def parquet(path: Path, rows: int = len(TEXTS), **options: Any) -> None:
    made = table(rows)
    from pyarrow import parquet as format_

    format_.write_table(made, path, **options)


def arrow(path: Path, rows: int = len(TEXTS)) -> None:
    made = table(rows)
    from pyarrow import ipc

    make = ipc.new_stream if path.name.startswith("stream") else ipc.new_file
    with make(str(path), made.schema) as writer:
        writer.write_table(made, max_chunksize=1000)


def damage(path: Path, start: int, stop: int, value: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[start:stop] = (bytes(each ^ 0x5A for each in content[start:stop]) if value is None
                           else bytes([value]) * (stop - start))  # fmt: skip
    path.write_bytes(content)


def corrupt_page(path: Path) -> None:
    parquet(path, compression="snappy")
    damage(path, 2000, 9000)


def cut_stream(path: Path) -> None:
    arrow(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def not_utf8(path: Path) -> None:
    arrow(path)
    content = path.read_bytes()
    place = content.index(b"text 3 ")
    damage(path, place, place + 40, 0xFF)


def wild_offsets(path: Path) -> None:
    arrow(path)
    content = path.read_bytes()
    place = content.index(len(TEXTS[0]).to_bytes(4, "little")
                          + len(TEXTS[0] + TEXTS[1]).to_bytes(4, "little"))  # fmt: skip
    damage(path, place, place + 40, 0x7F)


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "page.parquet": (corrupt_page, "cannot be read as Parquet: .*copy or write it again"),
    "stream.arrow": (cut_stream, "cannot be read as Arrow: .*copy or write it again"),
    "bytes.arrow": (not_utf8, "row 4: the field 'text' is not UTF-8; convert it to UTF-8"),
    "offsets.arrow": (wild_offsets, "cannot be read as Arrow: .*out of bounds.*copy or write it again"),
    "old.feather": (
        lambda path: (table(), path.write_bytes(b"FEA1" + bytes(90))),
        r"Feather version 1 .*pyarrow\.feather\.write_feather",
    ),
    "two.csv": (
        lambda path: path.write_text("text,text\na,b\n"),
        "2 columns are named 'text'; rename all but one",
    ),
    "wide.jsonl": (
        lambda path: path.write_bytes('{"text": "a"}\n{"text": "b"}\n'.encode("utf-16-le")),
        "UTF-16 text or a damaged file: convert it to UTF-8",
    ),
    "big-endian.csv": (
        lambda path: path.write_bytes("text\na\nb\n".encode("utf-16-be")),
        "UTF-16 text or a damaged file: convert it to UTF-8",
    ),
    "latin.jsonl": (
        lambda path: path.write_bytes('{"text": "é"}\n'.encode("latin-1")),
        "line 1: the line is not UTF-8 .*; convert the file to UTF-8",
    ),
    "latin.csv": (
        lambda path: path.write_bytes("text\né\n".encode("latin-1")),
        "row 1: not UTF-8; convert it to UTF-8",
    ),
    "blank.jsonl": (lambda path: path.write_text("\n \n\n"), "no record.*no records"),
    "header.csv": (lambda path: path.write_text("text\n"), "no record.*no records"),
    "rows.parquet": (lambda path: parquet(path, 0), "no record.*no records"),
    "rows.arrow": (lambda path: arrow(path, 0), "no record.*no records"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_named_with_what_to_do(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, words = ODD[name]
    path = tmp_path / name
    make(path)
    for read in (
        lambda: open_data(path, text_field="text", **OPTIONS),
        lambda: prepare(path, tmp_path / "out", text_field="text"),
    ):
        caplog.clear()
        with pytest.raises(ValueError, match=words) as error:
            read()
        assert str(path) in f"{error.value} {caplog.text}"


def test_a_file_without_records_among_others_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "blank.jsonl").write_text("\n")
    assert open_data(tmp_path, **OPTIONS).documents == 1
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path}/blank.jsonl: no records"]


@pytest.mark.parametrize("format_", ["arrow", "numpy", "pandas"])
@pytest.mark.parametrize("streamed", [False, True])
def test_the_format_of_a_data_set_does_not_matter(format_: str, streamed: bool) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"text": ["a", "bcd"]})
    dataset = (dataset.to_iterable_dataset() if streamed else dataset).with_format(format_)
    assert [row.tobytes() for row in open_data(dataset, **OPTIONS).whole()] == [b"a", b"bcd"]
    with pytest.raises(ValueError, match="no record in data set has text: there are no records"):
        open_data(datasets.Dataset.from_dict({"text": []}), **OPTIONS)


def test_a_byte_order_mark_is_no_text_for_a_tokenizer_and_stays_where_bytes_are_ids(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    mark = b"\xef\xbb\xbf"
    vocabulary = {"a": 0, "b": 1, "[UNK]": 2}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.save(str(tmp_path / "tokenizer.json"))
    with_mark, without = tmp_path / "with.txt", tmp_path / "without.txt"
    with_mark.write_bytes(mark + b"ab")
    without.write_bytes(b"ab")
    records = tmp_path / "records.jsonl"
    records.write_bytes(mark + b'{"text": "\xef\xbb\xbfab"}\n')
    found = []
    addresses = [f"file://{with_mark}"] if find_spec("fsspec") else []
    for number, path in enumerate([without, with_mark, records, *addresses]):
        prepare(path, tmp_path / str(number), tokenizer=tmp_path / "tokenizer.json", special_tokens=False)
        (row,) = open_data(tmp_path / str(number), **OPTIONS).whole()
        found.append(row.tolist())
    assert found == [[0, 1]] * len(found)
    for path in [with_mark, *addresses]:
        (row,) = open_data(path, **OPTIONS).whole()
        assert row.tobytes() == mark + b"ab", "each byte is an id"
        prepare(path, tmp_path / "bytes", force=True)
        (row,) = open_data(tmp_path / "bytes", **OPTIONS).whole()
        assert row.tobytes() == mark + b"ab"


MEASURE = """
import re, sys
from pathlib import Path
from maskwire.data.record import Fields
from maskwire.data.text_sources import find_sources
import pyarrow.ipc, pyarrow.parquet

def own():  # memory of the process without mapped files, which the system can drop
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

(source,) = find_sources(sys.argv[1], Fields())
before, most, records = own(), 0, 0
for item in source.read(0):
    records += 1
    if records % 1000 == 0:
        most = max(most, own() - before)
print(records, most)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux")
@pytest.mark.parametrize("name", ["large.arrow", "stream.arrow", "large.parquet"])
def test_a_file_in_one_batch_or_row_group_is_not_held_in_memory(tmp_path: Path, name: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as format_

    rows, path = 100_000, tmp_path / name
    made = pyarrow.table({"text": [f"{number} {'x' * 1000}" for number in range(rows)]})
    if name.endswith("parquet"):
        format_.write_table(made, path, row_group_size=rows, compression="none", use_dictionary=False)
    else:
        make = pyarrow.ipc.new_stream if name.startswith("stream") else pyarrow.ipc.new_file
        with make(str(path), made.schema) as writer:
            writer.write_table(made)
    size = path.stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True, timeout=300
    )
    records, most = map(int, done.stdout.split())
    assert records == rows
    assert size > 100e6
    assert most * 1024 < size / 3


def test_records_of_a_mapped_file_are_read_from_any_row(tmp_path: Path) -> None:
    for name in ("a.arrow", "stream.arrow", "a.parquet"):
        (parquet if name.endswith("parquet") else arrow)(tmp_path / name)
        (source,) = find_sources(tmp_path / name, Fields())
        items = list(source.read(0))
        assert [item.record.content().decode() for item in items if item.record] == TEXTS
        for start in (1, 999, 1000, 1001, 4999, 5000):
            assert list(source.read(start)) == items[start:]
        done = [item.done for item in items]
        assert done == sorted(done)
        assert 0 <= done[0] <= done[-1] <= source.size
