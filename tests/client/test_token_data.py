"""Batches depend on nothing but the data, the seed and the step."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskwire.data.file_data import ByteData, FileTokens, open_data
from maskwire.data.file_discovery import find_files
from maskwire.data.prepare import prepare
from maskwire.data.token_data import TokenData


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(30):
        path = tmp_path / f"{number % 3}" / f"{number:02d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(rng.integers(0, 256, 100 + number, dtype=np.uint8).tobytes())
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_bytes(b"secret")
    return tmp_path


def same(a: object, b: object) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))  # type: ignore[call-overload]


def test_a_batch_depends_only_on_data_seed_and_step(folder: Path) -> None:
    first = ByteData(folder, length=16, batch_size=8, seed=1)
    for _ in range(3):
        first.batch(9)
    again = ByteData(str(folder), length=16, batch_size=8, seed=1)
    assert same(first.batch(5), again.batch(5))
    assert not same(first.batch(5), first.batch(6))
    assert not same(first.batch(5), ByteData(folder, length=16, batch_size=8, seed=2).batch(5))


def test_rows_are_crops_of_the_files(folder: Path) -> None:
    data = ByteData(folder, length=16, batch_size=8)
    texts = [path.read_bytes() for path in data.files]
    batch = data.batch(1)
    assert isinstance(batch, np.ndarray)
    assert (batch.shape, batch.dtype) == ((8, 16), np.uint8)
    assert all(any(row.tobytes() in text for text in texts) for row in batch)


def test_a_file_shorter_than_a_row_is_a_row_by_itself(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(bytes(range(20)))
    data = ByteData(tmp_path, length=8, batch_size=64)
    sizes = {len(row) for row in data.batch(1)}
    assert sizes == {3, 8}


def test_every_position_is_sampled(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(10)))
    data = ByteData(tmp_path, length=4, batch_size=200)
    starts = {int(row[0]) for row in data.batch(1)}
    assert starts == set(range(7))


def test_split_is_disjoint_and_keeps_copies_together(folder: Path) -> None:
    copy = folder / "copy.txt"
    copy.write_bytes((folder / "0" / "00.txt").read_bytes())
    training, apart = ByteData(folder, length=16, batch_size=4).split(0.3)
    assert len(training.files) + len(apart.files) == 31
    assert not set(training.files) & set(apart.files)
    contents = [{path.read_bytes() for path in part.files} for part in (training, apart)]
    assert not contents[0] & contents[1], "copies stay together"
    again, _ = ByteData(folder, length=16, batch_size=4).split(0.3)
    assert again.files == training.files


def test_a_split_that_leaves_a_part_empty_names_the_smallest_share_that_works(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    data = ByteData(tmp_path, length=4, batch_size=1)
    with pytest.raises(ValueError, match=r"held_out=0\.001 selected none of the 3 documents") as refused:
        data.split(0.001)
    found = re.search(r"Set held_out=(\S+), which selects (\d), or", str(refused.value))
    assert found is not None
    training, apart = data.split(float(found[1]))
    assert (apart.documents, training.documents) == (int(found[2]), 3 - int(found[2]))


def test_evaluation_rows_are_the_same_on_every_call(folder: Path) -> None:
    data = ByteData(folder, length=16, batch_size=4)
    assert same(data.spread(12), data.spread(12))
    assert len(data.spread(12)) == 12


def test_unigram_entropy_is_computed_from_byte_frequencies(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"aabb" * 10)
    (tmp_path / "b").write_bytes(b"cccc" * 10)
    assert ByteData(tmp_path, length=4, batch_size=1).unigram_bits() == pytest.approx(1.5)


def test_hidden_and_empty_files_are_ignored_and_missing_ones_are_errors(folder: Path) -> None:
    assert len(find_files(folder)) == 30
    assert len(find_files([folder / "0", folder / "1" / "01.txt"])) == 11
    with pytest.raises(ValueError, match="nowhere: no such file"):
        find_files(folder / "nowhere")
    with pytest.raises(
        ValueError, match=r"no data found in .*\.hidden: hidden; no other file matches .\*\.csv."
    ):
        find_files(folder, "*.csv")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"length": 8.5}, "length must be a whole number of at least 1, got 8.5"),
        ({"batch_size": True}, "batch_size must be a whole number of at least 1, got True"),
        ({"seed": 0.5}, "seed must be a whole number of at least 0, got 0.5"),
    ],
)
def test_invalid_sizes_are_refused_with_their_value(
    folder: Path, options: dict[str, int], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        ByteData(folder, **{"length": 4, "batch_size": 4, **options})
    with pytest.raises(ValueError, match=r"held_out \(--held-out\) must be above 0 and below 1.*, got 1.5"):
        ByteData(folder, length=4, batch_size=4).split(1.5)


def variants(folder: Path) -> dict[str, TokenData]:
    """The same bytes as the same documents, in every storage format."""
    single = folder / "one.txt"
    ids = np.frombuffer(single.read_bytes(), dtype=np.uint8)
    np.save(folder / "ids.npy", ids)
    np.save(folder / "wide.npy", ids.astype(">i8"))
    ids.astype("<u2").tofile(folder / "ids.u16")
    ids.astype("<i4").tofile(folder / "ids.i32")
    ids.tofile(folder / "ids.u8")
    (folder / "alone").mkdir()
    (folder / "alone" / "one.txt").write_bytes(single.read_bytes())
    prepare(single, folder / "prepared")
    options: dict[str, Any] = {"length": 16, "batch_size": 8, "seed": 3}
    return {
        "file": open_data(single, **options),
        "folder": open_data(folder / "alone", **options),
        "npy": open_data(folder / "ids.npy", **options),
        "big-endian npy": open_data(folder / "wide.npy", **options),
        "uint16": open_data(folder / "ids.u16", dtype="uint16", **options),
        "int32": open_data(folder / "ids.i32", dtype="int32", **options),
        "uint8": open_data([folder / "ids.u8"], dtype="uint8", **options),
        "prepared": open_data(folder / "prepared", **options),
        "rows": TokenData([ids.tolist()], **options),
    }


def test_the_same_ids_give_the_same_batches_in_every_storage_format(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(np.random.default_rng(0).integers(0, 256, 999, dtype=np.uint8))
    found = variants(tmp_path)
    for step in (1, 2, 77):
        expected = found["file"].batch(step)
        for name, data in found.items():
            assert same(data.batch(step), expected), name
            assert same(data.spread(5), found["file"].spread(5)), name
    assert found["prepared"].tokenizer == found["file"].tokenizer == "bytes"
    assert found["npy"].tokenizer == "", "an array does not record its tokenizer"
    assert {data.size for data in found.values()} == {999}


def test_a_folder_and_its_prepared_data_split_alike(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("out") / "prepared"
    prepare(folder, out)
    options: dict[str, Any] = {"length": 16, "batch_size": 4}
    direct = ByteData(folder, **options).split(0.3)
    prepared = open_data(out, **options).split(0.3)
    for ours, theirs in zip(direct, prepared, strict=True):
        assert ours.documents == theirs.documents
        assert same(ours.batch(3), theirs.batch(3))
    assert direct[0].documents + direct[1].documents == 30


def test_each_row_is_a_document_and_ragged_rows_stay_ragged(tmp_path: Path) -> None:
    grid = np.arange(60, dtype=np.int32).reshape(6, 10)
    np.save(tmp_path / "grid.npy", grid)
    data = FileTokens(tmp_path / "grid.npy", length=10, batch_size=50)
    assert data.documents == 6
    assert all(any((row == line).all() for line in grid) for row in data.batch(1))
    ragged = TokenData([[1, 2, 3], np.array([4, 5], dtype=np.uint16), []], length=8, batch_size=40)
    assert (ragged.documents, ragged.size) == (2, 5)
    assert {tuple(row.tolist()) for row in ragged.batch(1)} == {(1, 2, 3), (4, 5)}
    assert ragged.unigram_bits() == pytest.approx(np.log2(5))


def test_invalid_token_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    options: dict[str, Any] = {"length": 4, "batch_size": 2}
    np.save(tmp_path / "float.npy", np.zeros(4))
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2), dtype=int))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(np.zeros((2, 3), dtype=int)))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    np.save(tmp_path / "empty.npy", np.zeros(0, dtype=int))
    (tmp_path / "odd.bin").write_bytes(b"123")
    (tmp_path / "text.npy").write_text("no array")
    for name, dtype, words in (
        ("float.npy", None, r"integers, of shape \[n\] or \[rows, n\], got float64 of shape \[4\]"),
        ("cube.npy", None, r"got int64 of shape \[2, 2, 2\]"),
        ("fortran.npy", None, "must be in C order"),
        ("objects.npy", None, "cannot be read as a .npy file"),
        ("empty.npy", None, r"got int64 of shape \[0\]"),
        ("text.npy", None, "cannot be read as a .npy file"),
        (
            "odd.bin",
            "uint16",
            r"has 3 bytes, which is not a whole number of uint16 ids of 2 bytes each; check dtype",
        ),
        ("odd.bin", "float32", "dtype must be one of uint8, uint16, int32, got 'float32'"),
        ("none.bin", "uint16", "none.bin: no such file or folder"),
    ):
        with pytest.raises(ValueError, match=words):
            open_data(tmp_path / name, dtype=dtype, **options)
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(ValueError, match=r"text\.txt holds no token ids: give a \.npy file"):
        FileTokens(tmp_path / "text.txt", **options)
    for paths in (["a.npy", "b.npy"], ["text.txt", "a.npy"]):
        with pytest.raises(ValueError, match="must be the only path, got 2 paths"):
            open_data([tmp_path / name for name in paths], **options)
    np.save(tmp_path / "good.npy", np.arange(4))
    with pytest.raises(
        ValueError, match=r"good\.npy records the type of its ids; leave out dtype .*got 'uint16'"
    ):
        open_data(tmp_path / "good.npy", dtype="uint16", **options)
    with pytest.raises(
        ValueError, match=r"documents\[0\] must be a one-dimensional array of integers, got float64"
    ):
        TokenData([[0.5]], **options)
    with pytest.raises(ValueError, match="the data is empty"):
        TokenData([[]], **options)
    with pytest.raises(ValueError, match="one document cannot be split"):
        TokenData([[1, 2, 3]], **options).split(0.5)


def test_a_truncated_or_changed_prepared_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(100)))
    prepare(tmp_path / "a.txt", tmp_path / "p")
    options: dict[str, Any] = {"length": 4, "batch_size": 2}
    with pytest.raises(ValueError, match="leave out dtype"):
        open_data(tmp_path / "p", dtype="uint8", **options)
    whole = (tmp_path / "p" / "tokens.bin").read_bytes()
    (tmp_path / "p" / "tokens.bin").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="has 99 bytes, but 100 uint8 tokens take 100"):
        open_data(tmp_path / "p", **options)
    (tmp_path / "p" / "tokens.bin").write_bytes(whole)
    np.save(tmp_path / "p" / "documents.npy", np.array([50]))
    with pytest.raises(ValueError, match="the ends of the documents do not match the 100 tokens"):
        open_data(tmp_path / "p", **options)
    (tmp_path / "p" / "maskwire-data.json").write_text("{}")
    with pytest.raises(ValueError, match="prepare the data again"):
        open_data(tmp_path / "p", **options)


def test_a_prepared_folder_among_the_texts_is_not_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    first = prepare(tmp_path, tmp_path / "out")
    assert prepare(tmp_path, tmp_path / "out", force=True) == first
    assert ByteData(tmp_path, length=4, batch_size=1).size == 9
    with pytest.raises(ValueError, match="must be the only path"):
        open_data([tmp_path / "a.txt", tmp_path / "out"], length=4, batch_size=1)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04"], ids=["empty", "another format"])
def test_a_npy_file_with_other_content_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read as a \.npy file"):
        open_data(tmp_path / "a.npy", length=4, batch_size=1)


def test_archives_damaged_metadata_and_excessive_sizes_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "several.npy").open("wb") as file:
        np.savez(file, a=np.arange(3))
    with pytest.raises(ValueError, match="npz archive of several arrays"):
        open_data(tmp_path / "several.npy", length=4, batch_size=1)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "maskwire-data.json").write_text("5")
    with pytest.raises(ValueError, match="prepare the data again"):
        open_data(tmp_path / "p", length=4, batch_size=1)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"length": 10**24}, "length must be at most"),
        ({"batch_size": 10**13}, "batch_size must be at most"),
        ({"seed": -1}, "seed must be at least 0"),
    ]
    for options, what in cases:
        with pytest.raises(ValueError, match=what):
            TokenData([[1, 2]], **{"length": 4, "batch_size": 1, **options})


def test_the_fingerprint_is_the_same_in_every_storage_format(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(np.random.default_rng(0).integers(0, 256, 999, dtype=np.uint8))
    found = variants(tmp_path)
    fingerprints = {name: data.fingerprint() for name, data in found.items()}
    assert all(each == fingerprints["file"] for each in fingerprints.values()), fingerprints
    content = fingerprints["file"].pop("content")
    assert content.startswith("sha256:")
    assert fingerprints["file"] == {
        "length": "16", "batch_size": "8", "seed": "3", "tokens": "999", "documents": "1"
    }  # fmt: skip


def test_the_fingerprint_changes_whenever_batches_change(folder: Path) -> None:
    options: dict[str, Any] = {"length": 16, "batch_size": 4, "seed": 1}

    def changed(data: TokenData) -> set[str]:
        now = data.fingerprint()
        return {part for part in {**before, **now} if before.get(part) != now.get(part)}

    before = ByteData(folder, **options).fingerprint()
    assert (
        changed(ByteData(folder, **options))
        == changed(pickle.loads(pickle.dumps(ByteData(folder, **options))))
        == set()
    )
    for part, value in (("length", 17), ("batch_size", 5), ("seed", 2)):
        assert changed(ByteData(folder, **{**options, part: value})) == {part}
    assert changed(ByteData(folder, **options).cropped(8)) == {"length"}
    training, _ = ByteData(folder, **options).split(0.3)
    assert changed(training) == {"held_out", "content", "tokens", "documents"}
    assert training.cropped(16).fingerprint() == training.fingerprint()
    moved = folder.with_name("moved")
    folder.rename(moved)
    assert changed(ByteData(moved, **options)) == set(), "the location does not matter"
    text = moved / "0" / "00.txt"
    content = text.read_bytes()
    text.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert changed(ByteData(moved, **options)) == {"content"}
    text.write_bytes(content)
    text.rename(moved / "2" / "zz.txt")
    assert changed(ByteData(moved, **options)) == {"content"}, "the order of documents determines the batches"
    (moved / "2" / "zz.txt").rename(text)
    (moved / "new.txt").write_text("more")
    assert changed(ByteData(moved, **options)) == {"content", "tokens", "documents"}


def test_the_fingerprint_of_large_data_hashes_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maskwire.data import fingerprint

    monkeypatch.setattr(fingerprint, "_MAX_HASHED", 1000)
    monkeypatch.setattr(fingerprint, "_BLOCKS", 10)
    monkeypatch.setattr(fingerprint, "_BLOCK", 20)
    ids = np.random.default_rng(0).integers(0, 256, 5000)
    np.save(tmp_path / "ids.npy", ids)
    ids.astype("<u2").tofile(tmp_path / "ids.u16")
    options: dict[str, Any] = {"length": 16, "batch_size": 4}
    packed = open_data(tmp_path / "ids.u16", dtype="uint16", **options)
    assert packed.fingerprint() == open_data(tmp_path / "ids.npy", **options).fingerprint()
    for place, seen in ((0, True), (4999, True), (-20, True), (300, False)):
        other = ids.copy()
        other[place] ^= 1
        differs = TokenData([other], **options).fingerprint() != packed.fingerprint()
        assert differs == seen, f"place {place}"
    lengths = [2000, 2990, 10]
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    assert TokenData(parts, **options).fingerprint()["content"] != packed.fingerprint()["content"]
