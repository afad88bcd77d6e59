"""What a folder, a glob or a name selects; nothing in a folder is left out without a message."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from maskwire.data.file_data import ByteData, open_data
from maskwire.data.file_discovery import find_files
from maskwire.data.maskwire_output import MaskwireOutput
from maskwire.data.prepare import prepare
from maskwire.data.record import Fields
from maskwire.data.text_sources import find_sources

OPTIONS: dict[str, Any] = {"length": 16, "batch_size": 2}
TEXT = "some text about nothing in particular\n" * 40


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_everything_that_is_skipped_in_a_folder_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "b.txt").write_text(TEXT)
    root = tmp_path / "texts"
    (root / "inner").mkdir(parents=True)
    for name in ("a.txt", "inner/c.txt", "inner/.hidden.txt"):
        (root / name).write_text(TEXT)
    (root / ".git").mkdir()
    (root / ".git" / "d.txt").write_text(TEXT)
    for number in range(5):
        (root / f"empty{number}.txt").touch()
    (root / "broken.txt").symlink_to("nowhere.txt")
    (root / "linked").symlink_to(elsewhere)
    (root / "inner" / "loop").symlink_to(root)
    os.mkfifo(root / "pipe.txt")
    (root / "run.log").write_text("step 1/9  loss 2.0  1,000 tokens/s  8 s left\n")
    prepare(root / "a.txt", root / "prepared")
    expected = {
        f"skipped {root}/.git, {root}/inner/.hidden.txt: hidden",
        f"skipped {root}/linked, {root}/inner/loop: a link to a folder, which is not followed; give the "
        "folder as a path of its own",
        f"skipped {root}/prepared: prepared data; open a prepared folder alone",
        f"skipped {root}/broken.txt: a link to nothing",
        f"skipped {root}/empty0.txt, {root}/empty1.txt, {root}/empty2.txt and 2 more: empty",
        f"skipped {root}/pipe.txt: not a regular file",
        f"skipped {root}/run.log: written by maskwire itself (run directory, metrics, configuration, log or "
        "printed result)",
    }
    for read in (open_data, ByteData):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert read(root, **OPTIONS).files == [root / "a.txt", root / "inner" / "c.txt"]
        assert len(said(caplog)) == len(expected), "each once"
        assert set(said(caplog)) == expected
    assert open_data([root, root / "linked"], **OPTIONS).documents == 3, "a link that is named is followed"


def test_the_messages_about_skipped_files_are_no_data_themselves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "a.csv").write_text("text\nb\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "broken.txt").symlink_to("nowhere.txt")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / ".hidden").touch()
    os.mkfifo(tmp_path / "pipe.txt")
    prepare(tmp_path / "a.txt", tmp_path / "prepared")
    with caplog.at_level(logging.WARNING):
        open_data(tmp_path, **OPTIONS)
        open_data(tmp_path, text_field="text", **OPTIONS)
    lines = {line.split(": ", 1)[1]: line for line in said(caplog)}
    assert len(lines) == 8
    for number, line in enumerate(lines.values()):
        path = tmp_path / f"log{number}"
        path.write_text(line + "\n")
        assert MaskwireOutput().includes(path, path.read_bytes()), line


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text(TEXT)
    listed = os.scandir

    def scandir(path: Any = ".") -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="closed"):
        find_files(tmp_path)


def test_a_local_glob_selects_what_it_matches_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md", "sub/d.txt", "sub/deep/e.txt", "other/f.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TEXT)

    def found(paths: Any) -> list[str]:
        data = open_data(paths, **OPTIONS)
        assert data.fingerprint() == ByteData(paths, **OPTIONS).fingerprint()
        return [str(path.relative_to(tmp_path)) for path in data.files]

    assert found(f"{tmp_path}/*.txt") == ["a.txt", "b.txt"]
    assert found(tmp_path / "[bc].*") == ["b.txt", "c.md"]
    assert found(f"{tmp_path}/**/*.txt") == ["a.txt", "b.txt", "other/f.txt", "sub/d.txt", "sub/deep/e.txt"]
    assert found(f"{tmp_path}/s*") == ["sub/d.txt", "sub/deep/e.txt"], "a folder stands for its files"
    assert found([f"{tmp_path}/*.md", f"{tmp_path}/o*/*"]) == ["c.md", "other/f.txt"]
    assert prepare(f"{tmp_path}/*.txt", tmp_path / "out").documents == 2
    (tmp_path / "[b].txt").write_text(TEXT)
    assert found(f"{tmp_path}/[b].txt") == ["[b].txt"], "a path that exists is no glob"
    with pytest.raises(ValueError, match=r"\*\.rst: no file or folder matches"):
        found(f"{tmp_path}/*.rst")


def test_a_recursive_glob_follows_no_link_to_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two links that lead back to a folder above them would give 2^40 paths."""
    (tmp_path / "texts" / "deep" / ".hidden").mkdir(parents=True)
    for name in ("a.txt", "deep/b.txt", "deep/.hidden/c.txt"):
        (tmp_path / "texts" / name).write_text(TEXT)
    for name, place in (("texts/link", "deep"), ("texts/deep/loop", ".."), ("outer", "texts")):
        (tmp_path / name).symlink_to(place)
    monkeypatch.chdir(tmp_path)
    for glob in ("texts/**/*.txt", "texts/**/*", "texts/**", "**/texts/**/*.txt", f"{tmp_path}/texts/**/*"):
        caplog.clear()
        files = find_files(glob)
        assert [str(path.relative_to(files[0].parent)) for path in files] == ["a.txt", "deep/b.txt"], glob
        assert caplog.messages
        for each in ("deep/loop", "link"):
            assert sum(message.count(f"{files[0].parent}/{each}") for message in caplog.messages) == 1, glob
    assert [str(path) for path in find_files("outer/*.txt")] == ["outer/a.txt"], "a link that is named"
    (tmp_path / "text.txt").write_text(TEXT)
    found = [str(path) for path in find_files("text*/**/*.txt")]
    assert found == ["texts/a.txt", "texts/deep/b.txt"], "a file has no files in it"


def test_a_broken_link_that_is_named_or_matched_by_a_glob_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "broken.txt").symlink_to("nowhere.txt")
    for path in (tmp_path / "broken.txt", tmp_path / "*.txt", [tmp_path / "a.txt", tmp_path / "broken.txt"]):
        with pytest.raises(ValueError, match=r"broken\.txt is a link to nowhere\.txt, which does not"):
            open_data(path, **OPTIONS)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: not a regular file"):
        open_data(tmp_path / "pipe", **OPTIONS)


def test_data_sets_in_a_folder_are_read_in_order_with_its_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    root = tmp_path / "texts"
    (root / "deep").mkdir(parents=True)
    (root / "a.txt").write_text("first")
    (root / "z.txt").write_text("last")
    for name, texts in (("m", ["second", "third"]), ("deep/n", ["zero"])):
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(root / name)

    def texts_of(path: Any, **options: Any) -> list[str]:
        sources = find_sources(path, Fields(), **options)
        items = [item.record for source in sources for item in source.read(0)]
        return [record.content().decode() for record in items if record is not None]

    assert texts_of(root) == ["first", "zero", "second", "third", "last"]
    assert texts_of(f"{root}/[mz]*") == ["second", "third", "last"]
    assert texts_of(root, pattern="*.txt") == ["first", "last"]
    both = datasets.Dataset.from_dict({"text": ["x"]})
    datasets.DatasetDict({"train": both, "test": both}).save_to_disk(root / "splits")
    with pytest.raises(ValueError, match=r"texts/splits has the splits train, test: give one of them, such"):
        texts_of(root)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json"])
def test_a_table_that_is_read_as_one_text_is_named(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    content = '{"text": "a"}\n' if name == "a.json" else "text\na\n"
    (tmp_path / name).write_text(content)
    (tmp_path / "b.txt").write_text(TEXT)
    with caplog.at_level(logging.WARNING):
        assert open_data(tmp_path, **OPTIONS).size == len(content) + len(TEXT)
    assert said(caplog) == [
        f"{tmp_path}/{name}: read as one text, with any header and field names in it; to read the records, "
        "name their field with --text-field (text_field=)"
    ]
    caplog.clear()
    assert open_data(tmp_path / name, text_field="text", **OPTIONS).size == 1
    assert open_data(tmp_path, any_format=True, **OPTIONS).documents == 2
    assert said(caplog) == []
