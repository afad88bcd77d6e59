"""Data is text: other formats are refused with the way out, and what maskwire writes is never data."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import pickle
import sqlite3
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskwire.data.artifacts import SETTINGS
from maskwire.data.prepare import prepare
from maskwire.data.sources import find_files
from maskwire.data.token_data import ByteData, open_data

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
    "a.jsonl": (lambda path: path.write_text('{"text": "some"}\n' * 9), "data prepare"),
    "a.parquet": (lambda path: path.write_bytes(b"PAR1" + bytes(90)), "data prepare"),
    "a.arrow": (lambda path: path.write_bytes(b"ARROW1" + bytes(90)), "data prepare"),
    "a.zip": (archive, "unpack it"),
    "a.tar": (archive, "unpack it"),
    "a.txt.gz": (lambda path: path.write_bytes(gzip.compress(TEXT.encode())), "unpack it"),
    "a.zst": (lambda path: path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(90)), "unpack it"),
    "a.pkl": (lambda path: path.write_bytes(pickle.dumps(IDS)), r"np\.save"),
    # Under names that say nothing, by their content.
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
    "windows.txt": (lambda path: path.write_bytes(TEXT.encode("utf-16")), "convert it to UTF-8"),
    "plain16.txt": (lambda path: path.write_bytes(TEXT.encode("utf-16-le")), "UTF-16 text to UTF-8"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_are_refused_alone_and_among_texts(tmp_path: Path, name: str) -> None:
    make, cure = FORMATS[name]
    path = tmp_path / name
    make(path)
    with pytest.raises(ValueError, match=cure) as alone:
        ByteData(path, **OPTIONS)
    assert str(path) in str(alone.value)
    assert "--any-format" in str(alone.value)
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(ValueError, match=cure):
        open_data(tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match=cure):
        prepare(tmp_path, tmp_path / "out")
    whole = open_data(tmp_path, any_format=True, **OPTIONS)
    assert whole.size == path.stat().st_size + len(TEXT), "every byte on demand"
    if not name.endswith(".txt"):
        assert open_data(tmp_path, pattern="*.txt", **OPTIONS).documents == 1


def test_many_files_of_other_formats_are_counted(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"2\.jsonl is JSON lines.*; and 2 more\. Data is text here"):
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
def test_text_is_neither_refused_nor_left_out(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert find_files(tmp_path) == find_files(tmp_path / name) == [tmp_path / name]


def test_bytes_that_are_no_text_are_taken_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.dat").write_bytes(IDS.astype("<u2").tobytes() + b"\0" * 8)
    (tmp_path / "a.dat").write_bytes(b"\0" + IDS.astype("<u2").tobytes())
    with caplog.at_level(logging.WARNING):
        assert len(find_files(tmp_path)) == 1
    assert "a.dat: not text (zero bytes); each byte is taken as a token" in caplog.text


STEP: dict[str, Any] = {
    "step": 1, "loss": 1.0, "generator_loss": 1.0, "critic_loss": None, "gradient_norm": 0.5, "tokens": 10,
    "outcome": "APPLIED", "digest": "64" * 32, "time": 0.0,
}  # fmt: skip
RUN = {"run_id": "r-1", "lineage": 2}


def metrics_lines(**run: Any) -> list[str]:
    """Lines of metrics as every version writes them, with the run in them or not."""
    lines = [json.dumps({**run, **STEP, "step": step}) for step in range(1, 9)]
    return [*lines, json.dumps({**run, "step": 8, "eval_bits_per_token": 2.0, "time": 0.0})]


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(metrics_lines()) + "\n",
        metrics_lines()[-1] + "\n",  # an evaluation first
        metrics_lines()[0][30:] + "\n" + "\n".join(metrics_lines()[1:]),  # rotated in the middle of a line
        metrics_lines()[0][:40],  # the disk was full
        json.dumps(dict(reversed(json.loads(metrics_lines()[0]).items()))) + "\n",
        "\n".join(metrics_lines(**RUN)),
        metrics_lines(**RUN)[0][:60],
        json.dumps({**RUN, "step": 3, "event": "restored"}) + "\n",
    ],
    ids=[
        "whole",
        "evaluation",
        "rotated",
        "cut",
        "other order",
        "with the run",
        "with the run, cut",
        "event",
    ],
)
@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.jsonl.1", "old.txt", "notes"])
def test_metrics_are_never_data_under_any_name(
    tmp_path: Path, name: str, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / name).write_text(content)
    for any_format in (False, True):
        with caplog.at_level(logging.WARNING):
            assert find_files(tmp_path, any_format=any_format) == [tmp_path / "a.txt"]
    assert f"{name}, which maskwire wrote" in caplog.text
    with pytest.raises(ValueError, match=r"no file with anything in it.*which maskwire wrote"):
        find_files(tmp_path / "sub" / name)


def test_the_settings_that_a_configuration_is_known_by_are_the_servers() -> None:
    from maskwire_server.config import Config

    sections = {name: list(type(field.default).model_fields) for name, field in Config.model_fields.items()}
    assert {name: keys.split() for name, keys in SETTINGS.items()} == sections


def configurations() -> dict[str, str]:
    from maskwire_server.config import Config
    from maskwire_server.config.template import template, written

    title, _, bare = template().partition("[run]")
    assert "configuration" in title
    return {
        "the template": template(),
        "without its title": f"[run]{bare}",
        "edited": f"[run]{bare}".replace("# dim = ", "dim = "),
        "of a run": written(Config()),
        "a short one": '[model]\nmax_seq_len = 64\n\n[serve]\naddress = "0.0.0.0:50051"  # everywhere\n',
    }


@pytest.mark.parametrize("case", configurations())
@pytest.mark.parametrize("name", ["maskwire.toml", "my.txt"])
def test_a_configuration_of_the_server_is_never_data(tmp_path: Path, name: str, case: str) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / name).write_text(configurations()[case])
    assert find_files(tmp_path, any_format=True) == [tmp_path / "a.txt"]


DIGEST = "8b9e856df9975629"
PRINTED = {
    "the server's log": "12:00:00 INFO    imported torch in 2.2 s\n12:00:01 INFO    state SERVING\n",
    "a rotated log": "cut off\n12:00:00 INFO    checkpoint step-000000010 saved: 0.4 MB in 0.0 s\n",
    "train": f"step 10/10  loss 5.5329  4,858 tokens/s  0 s left\nstep 10  loss 5.5329  4,858 tokens/s  "
    f"digest {DIGEST}\n",
    "train, nothing to do": f"step 10  0 tokens/s  digest {DIGEST}\n",
    "train with evaluations": "step 10: held out 8.255 ± 0.023 bits per token\n",
    "a wait and an error": "maskwire: 127.0.0.1:1 did not answer for 1 s\n",
    "a wait": '{"waiting": "waiting for 127.0.0.1:1: UNAVAILABLE: failed"}\n{"error": "no", "reason": ""}\n',
    "train --json": json.dumps(
        {"step": 2, "digest": DIGEST, "loss": 1.0, "steps": 2, "seconds": 1.0, "tokens_per_second": 2.0,
         "interrupted": False}
    ),
    "eval --json": json.dumps(
        {"losses": {"loss": 5.4}, "nats_per_token": 5.4, "by_masked_fraction": [], "rows": [[1.0, 2]] * 900}
    ),
    "generate --json": json.dumps({"tokens": [[91] * 4000], "unmasking_step": 16, "still_masked": [0]}),
    "status --json": json.dumps({"state": "SERVING", "run_id": "a", "durable_step": 2, "digest": DIGEST}),
    "checkpoint list --json": json.dumps(
        [{"name": "a", "lineage": 1, "step": 2, "digest": DIGEST, "size_bytes": 1, "files": {}}]
    ),
    "checkpoint restore --json": json.dumps({"lineage": 2, "step": 22, "digest": DIGEST}),
}  # fmt: skip


@pytest.mark.parametrize("case", PRINTED)
@pytest.mark.parametrize("name", ["eval.json", "out.txt", "log"])
def test_what_a_command_printed_into_a_file_is_never_data(
    tmp_path: Path, name: str, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / name).write_text(PRINTED[case])
    with caplog.at_level(logging.WARNING):
        assert find_files(tmp_path) == [tmp_path / "a.txt"]
    assert f"{name}, which maskwire wrote" in caplog.text


def test_a_download_that_was_broken_off_is_never_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    got = tmp_path / "got"
    got.mkdir()
    (got / "optimizer.safetensors.0123456789ab.part").write_bytes(IDS.astype("<u2").tobytes())
    tensors(got / "model.safetensors")  # the file before it, whole
    assert find_files(tmp_path) == [tmp_path / "a.txt"]
    (got / "optimizer.safetensors.0123456789ab.part").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is a safetensors file"):
        find_files(tmp_path)


def run_folder(folder: Path) -> None:
    """A run directory as a server leaves it, with a text that somebody put there."""
    checkpoint = folder / "checkpoints" / "step-000000010"
    checkpoint.mkdir(parents=True)
    database(folder / "journal.sqlite")
    for name in ("journal.sqlite-wal", "journal.sqlite-shm", "journal.sqlite.backup", "lock", "computing"):
        (folder / name).write_bytes(b"123\n")
    (folder / "maskwire.toml").write_text("[run]\n")
    (folder / "server.log").write_text("12:00:00 INFO listening\n")
    (checkpoint / "manifest.json").write_text('{"format": 2, "manifest_sha256": "00"}')
    tensors(checkpoint / "model.safetensors")
    (folder / "checkpoints" / "half.draft").write_text("unfinished")


def test_run_directories_and_checkpoints_are_never_data(tmp_path: Path) -> None:
    run_folder(tmp_path / "texts" / "run")
    texts = [tmp_path / "texts" / name for name in ("a.txt", "run/notes.txt")]
    for path in texts:
        path.write_text(TEXT)
    (tmp_path / "texts" / "got").mkdir()  # a checkpoint that was downloaded
    (tmp_path / "texts" / "got" / "manifest.json").write_text('{"manifest_sha256": "00"}')
    (tmp_path / "texts" / "got" / "configuration.json").write_text("{}")
    prepare(texts[0], tmp_path / "texts" / "prepared")
    for any_format in (False, True):
        assert find_files(tmp_path / "texts", any_format=any_format) == texts
    run = tmp_path / "texts" / "run"
    assert find_files(run) == [run / "notes.txt"]
    for path in (run / "checkpoints", run / "checkpoints" / "step-000000010", run / "journal.sqlite",
                 run / "lock", run / "maskwire.toml", tmp_path / "texts" / "got"):  # fmt: skip
        with pytest.raises(ValueError, match="which maskwire wrote"):
            find_files(path, any_format=True)
    prepared = tmp_path / "texts" / "prepared"
    for name in ("tokens.bin", "documents.npy", "maskwire-data.json"):
        with pytest.raises(ValueError, match=r"belongs to prepared data: give its folder, .*prepared"):
            open_data(prepared / name, **OPTIONS)


def test_what_a_job_prints_into_its_data_folder_is_not_its_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    code = (
        "import sys; from maskwire.data.sources import find_files\n"
        "print('something'); sys.stdout.flush(); print('else', file=sys.stderr, flush=True)\n"
        "names = [path.name for path in find_files('.')]\n"
        "assert names == ['a.txt'], names"
    )
    with (tmp_path / "nohup.out").open("w") as out, (tmp_path / "errors.txt").open("w") as err:
        done = subprocess.run([sys.executable, "-c", code], stdout=out, stderr=err, cwd=tmp_path, check=False)
    assert done.returncode == 0, (tmp_path / "errors.txt").read_text()


@pytest.mark.parametrize(
    ("dtype", "cure"),
    [
        ("uint32", "--dtype int32"),
        ("int64", r"np\.save"),
        ("uint64", r"np\.save"),
        ("int16", "--dtype uint16"),
    ],
)
def test_integer_types_that_are_not_read_are_refused_with_the_one_to_use(
    tmp_path: Path, dtype: str, cure: str
) -> None:
    packed(tmp_path / "ids.bin", dtype)
    with pytest.raises(ValueError, match=f"dtype is '{dtype}'.*{cure}"):
        open_data(tmp_path / "ids.bin", dtype=dtype, **OPTIONS)
    if dtype == "uint32":
        data = open_data(tmp_path / "ids.bin", dtype="int32", **OPTIONS)
        assert np.array_equal(np.concatenate(list(data.whole())), IDS)


def test_a_type_for_a_file_that_holds_no_packed_ids_is_refused(tmp_path: Path) -> None:
    for name in ("ids.npz", "a.jsonl", "a.txt.gz"):
        FORMATS[name][0](tmp_path / name)
        with pytest.raises(ValueError, match="not packed ids, and cannot have a dtype"):
            open_data(tmp_path / name, dtype="uint16", **OPTIONS)
