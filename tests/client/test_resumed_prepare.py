"""Preparing that is stopped anywhere continues, and writes the bytes of one that was never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from preparations import FIELDS, contents, stop, tokenizer_folder

from maskwire.data import prepare as preparing
from maskwire.data.draft_folder import DraftFolder
from maskwire.data.prepare import prepare
from maskwire.data.prepared_folder import PreparedMetadata
from maskwire.data.record import Item
from maskwire.data.record_files import read_json_lines
from maskwire.data.row_packing import RowPacker


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a", "b"):
        rows = [
            {"q": f"{name}{n}" * (n % 7), "a": None if n % 11 == 3 else str(n) * (n % 5)} for n in range(60)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("pack", [None, 20])
@pytest.mark.parametrize("after", [1, 7, 8, 40, 61, 100, 119])
@pytest.mark.usefixtures("small_parts")
def test_stopped_anywhere_it_continues_with_the_same_bytes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, pack: int | None, caplog: Any
) -> None:
    options: Any = {**FIELDS, "pack": pack}
    expected = prepare(corpus, tmp_path / "whole", **options)
    left, read = after, []

    def stopping(*arguments: Any) -> Iterator[Item]:
        nonlocal left
        for item in read_json_lines(*arguments):
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            read.append(item)
            yield item

    monkeypatch.setattr("maskwire.data.record_files._READERS", {".jsonl": stopping})
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    left = 1000
    read.clear()
    assert prepare(corpus, tmp_path / "out", **options) == expected
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(read) <= 120 - after + 7, "only the last group is read again"
    assert ("resuming after" in caplog.text) == (after >= 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out", "whole"]


@pytest.mark.parametrize("after", [0, 1, 5])
def test_stopped_while_rows_are_packed_it_packs_them_again_and_reads_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    options: Any = {**FIELDS, "pack": 20}
    expected = prepare(corpus, tmp_path / "whole", **options)
    assert expected.rows > 5
    rows = RowPacker.rows

    def unread(*_: Any) -> Iterator[Item]:
        raise AssertionError("the sources are read again")

    def stopping(packer: RowPacker, sizes: Any) -> Iterator[list[int]]:
        for number, row in enumerate(rows(packer, sizes)):
            if number == after:
                raise KeyboardInterrupt
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(RowPacker, "rows", stopping)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, tmp_path / "out", **options)
    with monkeypatch.context() as patch:
        patch.setattr("maskwire.data.record_files._READERS", {".jsonl": unread})
        assert prepare(corpus, tmp_path / "out", **options) == expected
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_draft_with_other_options_leaves_no_files(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Any = {**FIELDS, "pack": 20}
    with monkeypatch.context() as patch:
        patch.setattr(DraftFolder, "complete", stop)
        with pytest.raises(OSError, match="No space left"):
            prepare(corpus, tmp_path / "out", **options)
    assert (tmp_path / ".out.part" / "rows.npy").exists()
    prepare(corpus, tmp_path / "out", text_field="q")
    assert sorted(contents(tmp_path / "out")) == ["documents.npy", "maskwire-data.json", "tokens.bin"]


@pytest.mark.usefixtures("small_parts")
def test_other_sources_or_options_start_from_scratch(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(DraftFolder, "complete", stop)
        with pytest.raises(OSError, match="No space left"):
            prepare(corpus, tmp_path / "out", **FIELDS)  # type: ignore[arg-type]
    assert (tmp_path / ".out.part" / "progress.json").is_file(), "a full disk can be given room"
    (corpus / "b.jsonl").write_text('{"q": "new", "a": "file"}\n')
    prepare(corpus, tmp_path / "out", **FIELDS)  # type: ignore[arg-type]
    assert "resuming" not in caplog.text
    prepare(corpus, tmp_path / "again", **FIELDS)  # type: ignore[arg-type]
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"text_field": "q"}),
        ({}, {"text_field": "text"}),
        ({"text_field": "q"}, {"text_field": "a"}),
        ({}, {"any_format": True}),
        ({"text_field": "q"}, FIELDS),
        (FIELDS, {"prompt_field": "a", "response_field": "q"}),
        ({}, {"special_tokens": True}),
        ({}, {"special_tokens": False}),
        ({}, {"parse_special_tokens": True}),
        ({}, {"pack": 8}),
        ({"pack": 8}, {"pack": 9}),
        ({}, {"tokenizer": "bytes"}),
        ({}, {"tokenizer": "other"}),
        ({}, {"tokenizer": "mask"}),
        ({}, {"tokenizer": "eos"}),
        ({}, {"tokenizer": "pad"}),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("small_parts")
def test_any_other_option_starts_from_scratch(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    before: dict[str, Any],
    after: dict[str, Any],
) -> None:
    tokenizers = {
        "one": tokenizer_folder(tmp_path, "one"),
        "other": tokenizer_folder(tmp_path, "other", "[MASK] <m> </s> <e> <pad> <p> y x"),
        "mask": tokenizer_folder(tmp_path, "mask", mask="<m>"),
        "eos": tokenizer_folder(tmp_path, "eos", eos="<e>"),
        "pad": tokenizer_folder(tmp_path, "pad", pad="<p>"),
        "bytes": "bytes",
    }
    path = tmp_path / "texts.csv"
    path.write_text("q,a,text\nx,y <e>,y\ny x,x,x y\n")

    def prepared(out: str, options: dict[str, Any]) -> PreparedMetadata:
        options = {"tokenizer": "one", **options}
        return prepare(path, tmp_path / out, **options | {"tokenizer": tokenizers[options["tokenizer"]]})

    with monkeypatch.context() as patch:
        patch.setattr(DraftFolder, "complete", stop)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                prepared("out", before)
        assert caplog.text.count("resuming") == 1, "the same options resume"
    prepared("out", after)
    assert caplog.text.count("resuming") == 1
    prepared("fresh", after)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_two_processes_do_not_write_the_same_folder(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with DraftFolder(tmp_path / "out", "one", "uint8", prompts=False):
        with pytest.raises(ValueError, match="another process is preparing the same folder"):
            prepare(corpus, tmp_path / "out", **FIELDS)  # type: ignore[arg-type]
        assert (tmp_path / ".out.part").exists(), "the other's draft is left alone"


KILLED = textwrap.dedent(
    """
    import os, signal, sys
    from maskwire.data import prepare as preparing
    from maskwire.data.draft_folder import DraftFolder

    preparing._BATCH_RECORDS, preparing._SAVE_BYTES = 7, 0
    add, count = DraftFolder.add, 0

    def killed(draft, parts, prompt=0):
        global count
        add(draft, parts, prompt)
        draft._files["tokens.bin"].flush()  # ids beyond those that count
        count += 1
        if count == 50:
            os.kill(os.getpid(), signal.SIGKILL)

    DraftFolder.add = killed
    preparing.prepare(sys.argv[1], sys.argv[2], prompt_field="q", response_field="a")
    """
)


@pytest.mark.usefixtures("small_parts")
def test_after_kill_9_the_same_bytes_come_out(corpus: Path, tmp_path: Path, caplog: Any) -> None:
    command = [sys.executable, "-c", KILLED, str(corpus), str(tmp_path / "out")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    draft = tmp_path / ".out.part"
    saved = json.loads((draft / "progress.json").read_text())
    assert 0 < saved["tokens"] < (draft / "tokens.bin").stat().st_size / 2
    expected = prepare(corpus, tmp_path / "whole", **FIELDS)  # type: ignore[arg-type]
    assert prepare(corpus, tmp_path / "out", **FIELDS) == expected  # type: ignore[arg-type]
    assert f"resuming after {saved['documents']} documents" in caplog.text
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("saved", [False, True])
def test_the_interrupted_command_says_what_the_same_command_will_do(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: bool, as_json: bool
) -> None:
    from typer.testing import CliRunner

    from maskwire.cli import app

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preparing, "_BATCH_RECORDS", 7)
    monkeypatch.setattr(preparing, "_SAVE_BYTES", 0 if saved else 2**40)
    monkeypatch.setattr(DraftFolder, "complete", interrupt)
    command = ["data", "prepare", str(corpus), "--out", str(tmp_path / "out"), "--text-field", "q"]
    said = CliRunner().invoke(app, [*command, *(["--json"] if as_json else [])])
    assert said.exit_code == 130
    words = (
        f"interrupted; the progress is saved in {tmp_path / '.out.part'}: the same command resumes"
        if saved
        else "interrupted; no progress was saved yet: the same command starts from the beginning"
    )
    if as_json:
        expected = {"error": words, "reason": "", "exit_code": 130, "retryable": True}
        assert json.loads(said.stderr) == expected
    else:
        assert f"maskwire: {words}\n" in said.stderr


@pytest.mark.parametrize("left", [False, True])
def test_force_replaces_what_a_killed_replacement_left(corpus: Path, tmp_path: Path, left: bool) -> None:
    prepare(corpus, tmp_path / "out", text_field="q")
    if left:  # killed between the renaming and the deletion of the old folder
        (tmp_path / ".out.old").mkdir()
        (tmp_path / ".out.old" / "tokens.bin").write_bytes(b"old")
    prepare(corpus, tmp_path / "out", text_field="a", force=True)
    prepare(corpus, tmp_path / "fresh", text_field="a")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "fresh", "out"]


@pytest.mark.parametrize("pack", [None, 20])
@pytest.mark.parametrize("failing", ["_to_array", "rename", "to_json"])
def test_an_error_while_a_finished_draft_is_completed_keeps_it(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, pack: int | None
) -> None:
    options: Any = {**FIELDS, "pack": pack}
    prepare(corpus, tmp_path / "whole", **options)
    prepare(corpus, tmp_path / "out", text_field="q")
    before = contents(tmp_path / "out")
    owner: Any = {"_to_array": DraftFolder, "rename": Path, "to_json": PreparedMetadata}[failing]
    with monkeypatch.context() as patch:
        patch.setattr(owner, failing, stop)
        with pytest.raises(OSError, match="No space left"):
            prepare(corpus, tmp_path / "out", force=True, **options)
    assert contents(tmp_path / "out") == before

    def unread(*_: Any) -> Iterator[Item]:
        raise AssertionError("the sources are read again")

    with monkeypatch.context() as patch:
        patch.setattr("maskwire.data.record_files._READERS", {".jsonl": unread})
        prepare(corpus, tmp_path / "out", force=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
@pytest.mark.usefixtures("small_parts")
def test_a_name_that_is_not_utf8_is_read_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / os.fsdecode(b"caf\xe9.txt")).write_text("hello")
    with monkeypatch.context() as patch:
        patch.setattr(DraftFolder, "complete", stop)
        with pytest.raises(OSError, match="No space left"):
            prepare(texts, tmp_path / "out")
    assert prepare(texts, tmp_path / "out").documents == 1
    assert "resuming after 1 documents" in caplog.text
    assert (tmp_path / "out" / "tokens.bin").read_bytes() == b"hello"
