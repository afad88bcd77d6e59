"""Arrays in files: read in part, pickled by their path, and refused once the file has changed."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskwire.data.file_array import DataChangedError
from maskwire.data.file_data import ByteData, open_data
from maskwire.data.prepare import prepare
from maskwire.data.token_data import TokenData


def same(a: object, b: object) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))  # type: ignore[call-overload]


def file_backed(folder: Path) -> dict[str, tuple[TokenData, Path]]:
    """Data of every kind that stays in files, each with the file that it reads."""
    rng = np.random.default_rng(1)
    text = folder / "texts" / "a.txt"
    text.parent.mkdir()
    text.write_bytes(rng.integers(32, 127, 5000, dtype=np.uint8).tobytes())
    np.save(folder / "ids.npy", rng.integers(0, 500, (20, 90)))
    rng.integers(0, 500, 3000).astype("<u2").tofile(folder / "ids.u16")
    prepare(text, folder / "prepared")
    options: dict[str, Any] = {"length": 16, "batch_size": 4}
    return {
        "folder": (open_data(text.parent, **options), text),
        "npy": (open_data(folder / "ids.npy", **options), folder / "ids.npy"),
        "packed": (open_data(folder / "ids.u16", dtype="uint16", **options), folder / "ids.u16"),
        "prepared": (open_data(folder / "prepared", **options), folder / "prepared" / "tokens.bin"),
    }


def cut(path: Path) -> None:
    os.truncate(path, 200)


def rewrite(path: Path) -> None:
    content, modified = path.read_bytes(), path.stat().st_mtime_ns
    path.write_bytes(content[::-1])
    os.utime(path, ns=(modified, modified + 10**9))


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-8])
    other.replace(path)


@pytest.mark.parametrize("change", [cut, rewrite, replace, Path.unlink], ids=lambda change: change.__name__)
@pytest.mark.parametrize("read", [True, False], ids=["in use", "opened"])
def test_a_file_that_changes_in_use_is_an_error_that_names_it(
    tmp_path: Path, change: Callable[[Path], None], read: bool
) -> None:
    for name, (data, path) in file_backed(tmp_path).items():
        before = data.batch(1) if read else None
        change(path)
        if read and change in (replace, Path.unlink):
            assert same(data.batch(1), before), f"{name}: the open file is still readable"
            continue
        with pytest.raises(DataChangedError, match="changed while it was in use as data") as raised:
            data.batch(2)
        assert str(path) in str(raised.value), name
        with pytest.raises(DataChangedError):
            data.whole()[3]


def test_data_is_pickled_without_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = {name: data for name, (data, _) in file_backed(Path()).items()}
    found["files"] = ByteData("texts/a.txt", length=16, batch_size=4)
    for name, data in found.items():
        expected = data.batch(7)
        pickled = pickle.dumps((data, data.whole()))
        assert len(pickled) < 3000, name
        (tmp_path / f"{name}.pickle").write_bytes(pickled)
        np.save(tmp_path / f"{name}.expected.npy", np.stack(expected))
    (tmp_path / "elsewhere").mkdir()
    code = (
        "import pathlib, pickle, numpy as np\n"
        f"for name in {list(found)}:\n"
        f"    folder = pathlib.Path({str(tmp_path)!r})\n"
        "    data, whole = pickle.loads((folder / f'{name}.pickle').read_bytes())\n"
        "    assert (data.batch(7) == np.load(folder / f'{name}.expected.npy')).all(), name\n"
        "    assert sum(map(len, whole)) == data.size\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path / "elsewhere")


def test_unpickled_data_is_refused_if_its_file_has_another_size(tmp_path: Path) -> None:
    for name, (data, path) in file_backed(tmp_path).items():
        pickled, expected = pickle.dumps(data), data.batch(1)
        os.utime(path, ns=(1, 1))  # like a copy on another machine
        assert same(pickle.loads(pickled).batch(1), expected), name
        with path.open("ab") as file:
            file.write(b"more")
        with pytest.raises(DataChangedError, match="bytes and now has"):
            pickle.loads(pickled).batch(1)


def test_more_files_can_be_read_than_may_be_open_at_once(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import resource

    for number in range(400):
        (tmp_path / f"{number:03d}").write_bytes(bytes([number % 256]) * (40 + number))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    data = ByteData(tmp_path, length=8, batch_size=64)
    resource.setrlimit(resource.RLIMIT_NOFILE, (330, hard))
    try:
        for step in range(1, 21):
            data.batch(step)
        training, apart = data.split(0.5)
        assert training.documents + apart.documents == 400
        prepare(tmp_path, tmp_path_factory.mktemp("many") / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
