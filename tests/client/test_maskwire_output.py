"""Files that maskwire itself wrote are never data, under whatever name."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskwire.data.file_data import open_data
from maskwire.data.file_discovery import find_files
from maskwire.data.maskwire_output import SETTINGS
from maskwire.data.prepare import prepare
from maskwire.loggers.csv_file import COLUMNS

TEXT = "some text about nothing in particular\n" * 40
OPTIONS: dict[str, Any] = {"length": 16, "batch_size": 2}


STEP: dict[str, Any] = {
    "step": 1, "loss": 1.0, "generator_loss": 1.0, "critic_loss": None, "gradient_norm": 0.5, "tokens": 10,
    "outcome": "APPLIED", "digest": "64" * 32, "time": 0.0,
}  # fmt: skip
RUN = {"run_id": "r-1", "lineage": 2}


def metrics_lines(**run: Any) -> list[str]:
    """Lines of metrics as each version writes them, with or without the run."""
    lines = [json.dumps({**run, **STEP, "step": step}) for step in range(1, 9)]
    return [*lines, json.dumps({**run, "step": 8, "eval_bits_per_token": 2.0, "time": 0.0})]


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(metrics_lines()) + "\n",
        metrics_lines()[-1] + "\n",  # an evaluation first
        metrics_lines()[0][30:]
        + "\n"
        + "\n".join(metrics_lines()[1:]),  # log rotation in the middle of a line
        metrics_lines()[0][:40],  # truncated by a full disk
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
    assert f"{name}: written by maskwire itself" in caplog.text
    with pytest.raises(ValueError, match=r"no data found .*: written by maskwire itself"):
        find_files(tmp_path / "sub" / name)


def test_the_known_settings_are_those_of_the_server() -> None:
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
def test_a_server_configuration_is_never_data(tmp_path: Path, name: str, case: str) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / name).write_text(configurations()[case])
    assert find_files(tmp_path, any_format=True) == [tmp_path / "a.txt"]


DIGEST = "8b9e856df9975629"
PRINTED = {
    "the server's log": "12:00:00 INFO    imported torch in 2.2 s\n12:00:01 INFO    state SERVING\n",
    "a rotated log": "cut off\n12:00:00 INFO    checkpoint step-000000010 saved: 0.4 MB in 0.0 s\n",
    "the ready line of the server": "maskwire-server listening on 127.0.0.1:50051\n",
    "train": f"step 10/10  loss 5.5329  4,858 tokens/s  0 s left\nstep 10  loss 5.5329  4,858 tokens/s  "
    f"digest {DIGEST}\n",
    "train, nothing to do": f"step 10  0 tokens/s  digest {DIGEST}\n",
    "train with evaluations": "step 10: held out 8.255 ± 0.023 bits per token\n",
    "checkpoint restore": "restored first: training resumes from step 10, on lineage 2\n",
    "a notice of skipped files": "skipped a.toml: written by maskwire itself (run directory, metrics)\n",
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
def test_the_saved_output_of_a_command_is_never_data(
    tmp_path: Path, name: str, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / name).write_text(PRINTED[case])
    with caplog.at_level(logging.WARNING):
        assert find_files(tmp_path) == [tmp_path / "a.txt"]
    assert f"{name}: written by maskwire itself" in caplog.text


def test_an_interrupted_download_is_never_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    got = tmp_path / "got"
    got.mkdir()
    (got / "optimizer.safetensors.0123456789ab.part").write_bytes(np.arange(1, 4000, dtype="<u2").tobytes())
    (got / "model.safetensors").write_bytes(b"tensors")  # the file before it, complete
    assert find_files(tmp_path) == [tmp_path / "a.txt"]
    (got / "optimizer.safetensors.0123456789ab.part").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is a safetensors file"):
        find_files(tmp_path)


def run_folder(folder: Path) -> None:
    """A run directory as a server leaves it."""
    checkpoint = folder / "checkpoints" / "step-000000010"
    checkpoint.mkdir(parents=True)
    (folder / "journal.sqlite").write_bytes(b"SQLite format 3\0")
    for name in ("journal.sqlite-wal", "journal.sqlite-shm", "journal.sqlite.backup", "lock", "computing"):
        (folder / name).write_bytes(b"123\n")
    (folder / "maskwire.toml").write_text("[run]\n")
    (folder / "server.log").write_text("12:00:00 INFO listening\n")
    (checkpoint / "manifest.json").write_text('{"format": 2, "manifest_sha256": "00"}')
    (checkpoint / "model.safetensors").write_bytes(b"tensors")
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
        with pytest.raises(ValueError, match="written by maskwire itself"):
            find_files(path, any_format=True)
    prepared = tmp_path / "texts" / "prepared"
    for name in ("tokens.bin", "documents.npy", "maskwire-data.json"):
        with pytest.raises(
            ValueError, match=r"is part of prepared data; give the whole folder instead: .*prepared"
        ):
            open_data(prepared / name, **OPTIONS)


def test_a_file_that_this_process_prints_to_is_not_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    code = (
        "import sys; from maskwire.data.file_discovery import find_files\n"
        "print('something'); sys.stdout.flush(); print('else', file=sys.stderr, flush=True)\n"
        "names = [path.name for path in find_files('.')]\n"
        "assert names == ['a.txt'], names"
    )
    with (tmp_path / "nohup.out").open("w") as out, (tmp_path / "errors.txt").open("w") as err:
        done = subprocess.run([sys.executable, "-c", code], stdout=out, stderr=err, cwd=tmp_path, check=False)
    assert done.returncode == 0, (tmp_path / "errors.txt").read_text()


@pytest.mark.parametrize(
    "name",
    [
        "events.out.tfevents.1795821454.maskwire.lineage-1",
        "wandb/offline-run-20261127_234145-0123/run-0123.wandb",
        "wandb/run-20261127_234145-0123/files/output.log",
        "metrics.csv",
    ],
)
def test_what_loggers_write_is_no_data(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    header = ",".join(COLUMNS) if name == "metrics.csv" else "words of a log"
    path.write_text(f"{header}\n" * 4)
    assert [found.name for found in open_data(tmp_path, **OPTIONS).files] == ["a.txt"]
