"""Rows packed with several documents: the placement, what a batch holds, splits, and refusals."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import maskwire
from maskwire.cli import app
from maskwire.cli.options import row_length
from maskwire.data.file_data import FileTokens, open_data
from maskwire.data.prepare import prepare
from maskwire.data.prepared_folder import PreparedMetadata
from maskwire.data.row_packing import RowPacker
from maskwire.protocol.token_batch import encode_batch
from maskwire.results import ModelInfo

TEXTS = ["aaa", "bbbbbb", "ccccc", "dd", "eeeeeeeee", "ffffffff"]
PAIRS = [("1+1=", "2"), ("12+34=", "46"), ("9+99=", "108"), ("", "no"), ("é", "e"), ("1+2=", "3" * 20)]
FIELDS = {"prompt_field": "q", "response_field": "a"}
END = 257


def text_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    prepare(text_lines(tmp_path / "a.jsonl", TEXTS), tmp_path / "packed", pack=8)
    return tmp_path / "packed"


def segments(batch: maskwire.Batch) -> list[list[list[int]]]:
    """The segments of each row of a batch."""
    rows = []
    for ids, numbers in zip(batch.tokens, batch.segment_ids, strict=True):
        cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1), len(ids)]
        rows.append([ids[start:end].tolist() for start, end in pairwise(cuts)])
    return rows


@pytest.mark.parametrize(
    ("sizes", "most", "rows"),
    [
        ([3, 6, 5, 2, 9, 8], 9, [[0, 2], [1, 3], [4], [6], [5]]),  # 9 is cut into pieces 4 and 5
        ([4, 6, 2], 9, [[1, 2], [0]]),  # the fullest row with room, not the first
        ([4, 4, 4], 9, [[0, 1], [2]]),
        ([5, 5, 3, 3], 9, [[0, 2], [1, 3]]),  # of equally full rows the oldest
        ([4, 6, 2], 1, [[0], [1, 2]]),
        ([4, 6, 3, 5], 2, [[0, 2], [1], [3]]),  # the fullest of two open rows is closed for a third
        ([24], 1, [[0], [1], [2]]),
    ],
)
def test_a_piece_goes_into_the_fullest_open_row_with_room(
    sizes: list[int], most: int, rows: list[list[int]]
) -> None:
    packer = RowPacker(8, most)
    assert list(packer.rows(sizes)) == rows
    assert packer.cut == sum(size > 8 for size in sizes)


@pytest.mark.parametrize("sampling", ["crops", "epochs"])
def test_a_tiny_corpus_is_packed_as_computed_by_hand(packed: Path, sampling: str) -> None:
    meta = PreparedMetadata.read(packed)
    assert (meta.row_length, meta.rows, meta.cut, meta.documents, meta.tokens) == (8, 5, 1, 6, 33)
    assert meta.filled == 33 / 40
    assert np.load(packed / "pieces.npy").tolist() == [0, 2, 1, 3, 4, 6, 5]
    assert np.load(packed / "rows.npy").tolist() == [2, 4, 5, 6, 7]
    data = open_data(packed, batch_size=5, sampling=sampling)
    assert (data.length, data.rows, data.documents, data.size) == (8, 5, 6, 33)
    words = [["aaa", "ccccc"], ["bbbbbb", "dd"], ["eeeeeeee"], ["ffffffff"], ["e"]]
    expected = [[list(word.encode()) for word in row] for row in words]
    found = [segments(data.batch(step)) for step in (1, 2, 3)]  # type: ignore[arg-type]
    assert all(row in expected for batch in found for row in batch)
    if sampling == "epochs":
        assert [sorted(batch) for batch in found] == [sorted(expected)] * 3
    else:
        assert any(len({str(row) for row in batch}) < 5 for batch in found), "drawn with replacement"
    assert found == [segments(data.batch(step)) for step in (1, 2, 3)]  # type: ignore[arg-type]
    whole = data.evaluation_rows(None)
    cut = ["aaa", "bbbbbb", "ccccc", "dd", "eeeeeeee", "e", "ffffffff"]
    assert whole.segment_ids is None
    assert [bytes(row).decode() for row in whole.tokens] == cut
    assert [bytes(row).decode() for row in data.evaluation_rows(3).tokens] == ["bbbbbb", "dd", "e"]


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=14),
    length=st.integers(1, 16),
    most=st.integers(1, 4),
)
def test_every_token_is_in_one_segment_of_one_row(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], length: int, most: int
) -> None:
    folder = tmp_path_factory.mktemp("packed")
    texts = [
        "".join(chr(33 + (7 * number + place) % 90) for place in range(size))
        for number, size in enumerate(sizes)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maskwire.data.draft_folder.OPEN_ROWS", most)
        meta = prepare(text_lines(folder / "a.jsonl", texts), folder / "out", pack=length)
    data = open_data(folder / "out", batch_size=meta.rows, sampling="epochs")
    rows = segments(data.batch(1))  # type: ignore[arg-type]
    assert all(sum(map(len, row)) <= length for row in rows)
    cut = [text[start : start + length] for text in texts for start in range(0, len(text), length)]
    assert sorted(bytes(part).decode() for row in rows for part in row) == sorted(cut)
    assert meta.cut == sum(size > length for size in sizes)


def test_the_prompts_of_packed_pairs_are_given(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in PAIRS))
    meta = prepare(path, tmp_path / "out", pack=12, **FIELDS)  # type: ignore[arg-type]
    assert meta.dropped == {"longer than a row of 12 tokens": 1}
    assert (meta.documents, meta.cut, meta.longest) == (5, 0, 9)
    data = open_data(tmp_path / "out", batch_size=meta.rows, sampling="epochs")
    expected = {(*q.encode(), *a.encode(), END): len(q.encode()) for q, a in PAIRS[:-1]}

    def check(batch: maskwire.Batch) -> int:
        found = 0
        for row, mask in zip(segments(batch), batch.prompt_mask, strict=True):
            start = 0
            for part in row:
                given = mask[start : start + len(part)].tolist()
                assert given == [place < expected[tuple(part)] for place in range(len(part))]
                start, found = start + len(part), found + 1
        return found

    batch: Any = data.batch(1)
    assert check(batch) == 5
    sent = encode_batch(batch.tokens, prompt_mask=batch.prompt_mask, segment_ids=batch.segment_ids)
    assert len(sent.segment_ids) == meta.tokens
    whole = data.evaluation_rows(None)
    assert [tuple(row.tolist()) for row in whole.tokens] == list(expected)
    assert [int(mask.sum()) for mask in whole.prompt_mask] == list(expected.values())
    assert [len(mask) for mask in data.evaluation_rows(2).prompt_mask] == [9, 3]
    for part in data.split(0.5):
        assert check(part.batch(1)) > 0  # type: ignore[arg-type]
    assert sum(part.documents for part in data.split(0.5)) == 5


def test_a_split_keeps_rows_and_documents_together(tmp_path: Path) -> None:
    texts = [chr(33 + number % 90) * (number * 7 % 19 + 1) for number in range(80)]
    meta = prepare(text_lines(tmp_path / "a.jsonl", texts), tmp_path / "out", pack=8)
    data = open_data(tmp_path / "out", batch_size=meta.rows, sampling="epochs")

    for share in (0.2, 0.5):
        sides = [segments(in_one_batch(part)) for part in data.split(share)]
        assert sorted([*sides[0], *sides[1]]) == sorted(segments(data.batch(1)))  # type: ignore[arg-type]
        letters = [{part[0] for row in side for part in row} for side in sides]
        assert not letters[0] & letters[1], "no document has pieces on both sides"
        assert all(letters)
    training, held_out = data.split(0.2)
    assert training.fingerprint()["held_out"] == "0.2"
    assert training.size + held_out.size == data.size
    assert data.split(0.2)[0].fingerprint() == training.fingerprint()


def in_one_batch(data: Any) -> maskwire.Batch:
    """Every row once."""
    data.batch_size = data.rows
    batch: maskwire.Batch = data.batch(1)
    return batch


def test_where_documents_are_placed_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = text_lines(tmp_path / "a.jsonl", ["a" * 4, "b" * 6, "c" * 2])
    found = []
    for most in (1, 9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("maskwire.data.draft_folder.OPEN_ROWS", most)
            prepare(path, tmp_path / str(most), pack=8)
        found.append(open_data(tmp_path / str(most), batch_size=2).fingerprint())
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"packing"}
    prepare(path, tmp_path / "plain")
    plain = open_data(tmp_path / "plain", length=8, batch_size=2).fingerprint()
    assert found[0] == plain | {"packing": found[0]["packing"]}, "the documents are the same"


def test_data_that_is_not_packed_is_written_as_before(tmp_path: Path) -> None:
    prepare(text_lines(tmp_path / "a.jsonl", TEXTS), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "documents.npy", "maskwire-data.json", "tokens.bin"
    ]  # fmt: skip
    fields = json.loads((tmp_path / "out" / "maskwire-data.json").read_text())
    assert fields["format"] == 2
    assert "row_length" not in fields
    prepare(tmp_path / "a.jsonl", tmp_path / "packed", pack=8)
    for name in ("tokens.bin", "documents.npy"):
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert json.loads((tmp_path / "packed" / "maskwire-data.json").read_text())["format"] == 3


def test_what_does_not_go_together_is_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be 8, or left out, .* got 4; .* again with --pack 4"):
        open_data(packed, length=4, batch_size=1)
    data = open_data(packed, length=8, batch_size=1)
    with pytest.raises(ValueError, match=r"must be 8, or left out, .* got 16"):
        data.cropped(16)
    assert data.cropped(8).fingerprint() == data.fingerprint()
    with pytest.raises(ValueError, match="length is missing: give the number of tokens per row"):
        open_data(tmp_path / "a.jsonl", batch_size=1)
    with pytest.raises(ValueError, match=r"holds packed rows; open it with maskwire\.open_data"):
        FileTokens(packed, length=8, batch_size=1)
    for name in ("rows.npy", "pieces.npy"):
        with pytest.raises(ValueError, match="is part of prepared data; give the whole folder"):
            open_data(packed / name, length=8, batch_size=1)
    for pack, words in ((0, r"\(--pack\).* must be at least 1, got 0"), (2**21, "at most 1,048,576, got")):
        with pytest.raises(ValueError, match=words):
            prepare(tmp_path / "a.jsonl", tmp_path / "other", pack=pack)
    (tmp_path / "b.jsonl").write_text('{"q": "12", "a": "3"}\n')
    with pytest.raises(ValueError, match=r"no pair fits into a row of 3 tokens: 1 dropped .*\(--pack\)"):
        prepare(tmp_path / "b.jsonl", tmp_path / "other", pack=3, **FIELDS)  # type: ignore[arg-type]
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("rows", [2, 4, 5, 6]),
        ("rows", [2, 2, 5, 6, 7]),
        ("rows", [3, 4, 5, 6, 7]),  # 14 tokens in a row
        ("pieces", [0, 2, 1, 3, 4, 6, 6]),
        ("pieces", [0, 2, 1, 3, 4, 6, 7]),
    ],
)
def test_rows_that_do_not_fit_the_documents_are_refused(packed: Path, name: str, numbers: list[int]) -> None:
    np.save(packed / f"{name}.npy", np.array(numbers))
    with pytest.raises(ValueError, match="the packed rows do not match the documents; prepare"):
        open_data(packed, batch_size=1)


def test_a_model_with_shorter_rows_is_named(packed: Path) -> None:
    data = open_data(packed, batch_size=1)
    model = ModelInfo(**{**dict.fromkeys(ModelInfo.__dataclass_fields__), "max_seq_len": 6})  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"packed into rows of 8 tokens, .* has 6 \(max_seq_len\): .* again with --pack 6"
    ):
        row_length(None, model, data)


def test_the_command_says_how_full_the_rows_are(tmp_path: Path) -> None:
    path = text_lines(tmp_path / "a.jsonl", [*TEXTS, ""])
    command = ["data", "prepare", str(path), "--pack", "8", "--out"]
    said = CliRunner().invoke(app, [*command, str(tmp_path / "out")])
    assert "packed into 5 rows of 8 tokens: 82.5% of their positions hold tokens\n" in said.stdout
    assert "documents longer than a row, which were cut into pieces: 1\n" in said.stdout
    assert "1 dropped (empty)\n" in said.stdout
    assert "max_seq_len = 8\n" in said.stdout
    told = json.loads(CliRunner().invoke(app, [*command, str(tmp_path / "b"), "--json"]).stdout)
    assert (told["rows"], told["row_length"], told["cut"], told["filled"]) == (5, 8, 1, 0.825)
