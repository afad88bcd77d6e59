"""Data is a function of the seed and the step, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from maskwire.data import ByteData, find_files


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


def test_a_batch_depends_on_the_seed_and_the_step_alone(folder: Path) -> None:
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


def test_every_place_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(10)))
    data = ByteData(tmp_path, length=4, batch_size=200)
    starts = {int(row[0]) for row in data.batch(1)}
    assert starts == set(range(7))


def test_the_split_goes_by_content_and_is_disjoint(folder: Path) -> None:
    copy = folder / "copy.txt"
    copy.write_bytes((folder / "0" / "00.txt").read_bytes())
    training, apart = ByteData(folder, length=16, batch_size=4).split(0.3)
    assert len(training.files) + len(apart.files) == 31
    assert not set(training.files) & set(apart.files)
    contents = [{path.read_bytes() for path in part.files} for part in (training, apart)]
    assert not contents[0] & contents[1], "a copy goes where its twin goes"
    again, _ = ByteData(folder, length=16, batch_size=4).split(0.3)
    assert again.files == training.files


def test_evaluation_rows_are_spread_and_always_the_same(folder: Path) -> None:
    data = ByteData(folder, length=16, batch_size=4)
    assert same(data.spread(12), data.spread(12))
    assert len(data.spread(12)) == 12


def test_unigram_entropy_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"aabb" * 10)
    (tmp_path / "b").write_bytes(b"cccc" * 10)
    assert ByteData(tmp_path, length=4, batch_size=1).unigram_bits() == pytest.approx(1.5)


def test_hidden_and_empty_files_are_left_out_and_missing_ones_named(folder: Path) -> None:
    assert len(find_files(folder)) == 30
    assert len(find_files([folder / "0", folder / "1" / "01.txt"])) == 11
    with pytest.raises(ValueError, match="nowhere: no such file"):
        find_files(folder / "nowhere")
    with pytest.raises(ValueError, match="no file with anything"):
        find_files(folder, "*.csv")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
    ],
)
def test_sizes_that_make_no_sense_are_named(folder: Path, options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ByteData(folder, **{"length": 4, "batch_size": 4, **options})
    with pytest.raises(ValueError, match="between 0 and 1"):
        ByteData(folder, length=4, batch_size=4).split(1.5)
