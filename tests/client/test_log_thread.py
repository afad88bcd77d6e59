"""A logger that raises, blocks or falls behind costs no step, and is reported."""

from __future__ import annotations

import errno
import logging
import os
import queue
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from counting_trainer import Counting, Numbered, evaluation, fit

from maskwire.loggers import log_thread
from maskwire.loggers.csv_file import CsvFile
from maskwire.loggers.json_lines import JsonLines
from maskwire.loggers.log_thread import LogThread
from maskwire.loggers.logger import Logger
from maskwire.loggers.records import Place, Record
from maskwire.loggers.tensorboard import TensorBoard

PLACE = Place("run", 1, 0)


class Faulty(Logger):
    """Raises or blocks in one of its methods, at a step."""

    label = "faulty"

    def __init__(self, method: str = "", error: BaseException | None = None, step: int = 0) -> None:
        self.fault = (method, error, step)
        short = error is None and method != ""
        self.open_seconds = 0.2 if short and method == "open" else 60.0
        self.close_seconds = 0.2 if short and method != "open" else 60.0
        self.written: list[int] = []
        self.closed = False
        self.gate = threading.Event()
        """Ends a block."""

    def _fail(self, method: str, step: int = 0) -> None:
        name, error, at = self.fault
        if (name, at) == (method, step):
            if error is not None:
                raise error
            self.gate.wait(60)

    def open(self, place: Place) -> Place | None:
        self._fail("open")
        return place

    def write(self, record: Record) -> None:
        self._fail("write", record["step"])
        self.written.append(record["step"])

    def flush(self) -> None:
        self._fail("flush")

    def close(self) -> None:
        self._fail("close")
        self.closed = True


@pytest.fixture
def release() -> Iterator[list[Faulty]]:
    """Ends the threads of the loggers that a test puts here."""
    made: list[Faulty] = []
    yield made
    for one in made:
        one.gate.set()


@pytest.mark.parametrize(
    ("method", "step", "error", "words"),
    [
        ("open", 0, RuntimeError("no network"), "RuntimeError: no network"),
        ("write", 3, RuntimeError("gone"), "RuntimeError: gone"),
        ("write", 3, OSError(errno.ENOSPC, "No space left on device"), "(No space left on device)"),
        ("flush", 0, ValueError("bad"), "ValueError: bad"),
        ("close", 0, OSError("late"), "OSError: late"),
        ("open", 0, None, "it did not open within 0.2 s"),
        ("write", 3, None, "it did not finish within 0.2 s, and"),
        ("flush", 0, None, "it did not finish within 0.2 s"),
        ("close", 0, None, "it did not finish within 0.2 s"),
    ],
)
def test_a_logger_that_fails_or_blocks_costs_no_step(
    method: str, step: int, error: Exception | None, words: str, release: list[Faulty], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    faulty, trainer = Faulty(method, error, step), Counting()
    release.append(faulty)
    intact = JsonLines(tmp_path / "m.jsonl")
    result = fit(
        trainer, Numbered(), until_step=8, evaluate=evaluation, eval_every=4, callbacks=[faulty, intact]
    )
    assert (result.step, trainer.step, trainer.marked) == (8, 8, [4, 8])
    (failure,) = result.failures
    assert failure.startswith("faulty: no more records are written (")
    assert failure.endswith("; training is not affected")
    assert words in failure
    assert failure in capsys.readouterr().err
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 10, "another logger is not affected"
    if method == "write":
        assert faulty.written == [1, 2], "nothing is written behind the gap"
    assert faulty.closed is (error is not None and method != "close")


def not_found(file: str) -> OSError:
    return FileNotFoundError(errno.ENOENT, "No such file or directory", file)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("not mine"), "not mine"),
        (TypeError("no argument 'taggs'"), "no argument 'taggs'"),
        (ImportError("pip"), "pip"),
        (not_found("faulty"), r"the log faulty cannot be opened \(No such file or directory\); create the"),
        (not_found("/nope/a"), r"the log faulty cannot be opened \(No such file or directory: /nope/a\); cr"),
        (PermissionError(errno.EACCES, "Permission denied"), r"\(Permission denied\); choose a place that"),
        (IsADirectoryError(errno.EISDIR, "Is a directory"), r"\(Is a directory\); it is a folder: name a"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), r"\(Not a directory\); a part of the path"),
    ],
)
def test_a_log_that_can_never_work_is_refused_before_any_step_in_one_message(
    error: Exception, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, faulty, other = Counting(), Faulty("open", error), Faulty("open", error)
    with pytest.raises(type(error), match=words) as raised:
        fit(trainer, Numbered(), until_step=8, callbacks=[faulty, other])
    assert "Errno" not in str(raised.value)
    assert (trainer.batches, faulty.closed, other.closed) == ([], True, True)
    assert capsys.readouterr().err == "", "nothing says that training is not affected"


class UnreachableError(requests.ConnectionError, ValueError):
    """Some packages derive their network errors from ValueError too."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "(Connection refused)"),
        (TimeoutError("timed out"), "TimeoutError: timed out"),
        (socket.gaierror(-2, "Name or service not known"), "(Name or service not known)"),
        (requests.ConnectionError("no route"), "ConnectionError: no route"),
        (UnreachableError("no route"), "UnreachableError: no route"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "(Network is unreachable)"),
        (SystemExit("not logged in"), "SystemExit: not logged in"),
        (KeyError("entity"), "KeyError: 'entity'"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_a_log_that_cannot_be_reached_is_reported_and_training_starts(
    error: BaseException, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, faulty = Counting(), Faulty("open", error)
    result = fit(trainer, Numbered(), until_step=3, callbacks=[faulty])
    assert result.failures == [
        f"faulty: no more records are written ({words.strip('()')}); training is not affected"
    ]
    assert (result.step, faulty.written, faulty.closed) == (3, [], True)
    assert capsys.readouterr().err.count("faulty") == 1


@pytest.mark.parametrize("method", ["write", "flush", "close"])
def test_a_logger_that_exits_is_reported_at_once(method: str) -> None:
    faulty = Faulty(method, SystemExit(3), step=2 if method == "write" else 0)
    result = fit(
        Counting(), Numbered(), until_step=4, evaluate=evaluation, eval_every=2, callbacks=[faulty],
        progress=False,
    )  # fmt: skip
    assert result.failures == [
        "faulty: no more records are written (SystemExit: 3); training is not affected"
    ]
    assert (result.step, faulty.closed) == (4, method != "close")


@pytest.mark.parametrize("moment", ["before a step", "before an evaluation ends", "before the end"])
@pytest.mark.parametrize("how", ["deleted", "moved", "replaced", "its folder deleted"])
@pytest.mark.parametrize("kind", [JsonLines, CsvFile, TensorBoard])
def test_a_log_file_that_is_no_longer_in_its_place_is_reported(
    kind: Any, how: str, moment: str, tmp_path: Path
) -> None:
    logger = kind(tmp_path / "logs" / "a")
    (tmp_path / "logs").mkdir()

    def remove() -> None:
        (file,) = [path for path in (tmp_path / "logs").rglob("*") if path.is_file()]
        if how == "its folder deleted":
            shutil.rmtree(tmp_path / "logs")
        elif how == "deleted":
            file.unlink()
        else:
            file.rename(tmp_path / "moved")
        if how == "replaced":
            file.write_bytes((tmp_path / "moved").read_bytes())

    class Removing:
        def on_step(self, result: Any) -> None:
            if (moment, result.step) == ("before a step", 2):
                remove()

        def on_evaluate(self, result: Any) -> None:
            if moment == "before an evaluation ends":
                remove()

        def on_checkpoint(self, info: Any) -> None:
            if moment == "before the end":
                remove()

    result = fit(
        Counting(), Numbered(), until_step=4, evaluate=evaluation, eval_every=4, checkpoint_every=4,
        callbacks=[logger, Removing()], progress=False,
    )  # fmt: skip
    assert result.failures == [
        f"{logger.label}: no more records are written (the file was deleted, moved or replaced while it was "
        "in use); training is not affected"
    ]
    assert result.step == 4


@pytest.mark.parametrize("kind", [JsonLines, CsvFile, TensorBoard])
def test_a_log_with_a_relative_path_stays_in_its_place_when_the_program_changes_its_folder(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Moving:
        def on_step(self, result: Any) -> None:
            monkeypatch.chdir("/")

    monkeypatch.chdir(tmp_path)
    result = fit(Counting(), Numbered(), until_step=3, callbacks=[kind("a"), Moving()], progress=False)
    assert result.failures == []
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]


def test_records_that_a_slow_logger_has_no_room_for_are_dropped_from_there_on(
    monkeypatch: pytest.MonkeyPatch, release: list[Faulty], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log_thread, "QUEUE_RECORDS", 5)
    slow = Faulty("write", None, 2)
    release.append(slow)
    thread = LogThread(slow, PLACE)
    thread.opened()
    for step in range(1, 5):
        thread.write({"step": step})
    deadline = time.monotonic() + 60
    while slow.written != [1] and time.monotonic() < deadline:
        time.sleep(0.001)
    for step in range(5, 20):
        thread.write({"step": step})
    assert "5 records are waiting already" in thread.failure
    slow.gate.set()
    thread.close(60)
    assert slow.written == [*range(1, len(slow.written) + 1)]
    assert 5 <= len(slow.written) <= 8


def test_what_a_failed_call_did_not_log_the_next_one_fills_in(tmp_path: Path) -> None:
    class Broken(JsonLines):
        def write(self, record: Record) -> None:
            if record["step"] == 4:
                raise OSError("disk")
            super().write(record)

    trainer, path = Counting(), tmp_path / "m.jsonl"
    assert fit(trainer, Numbered(), until_step=6, callbacks=[Broken(path)], progress=False).failures
    assert fit(trainer, Numbered(), until_step=8, callbacks=[JsonLines(path)], progress=False).failures == []
    text = path.read_text().splitlines()
    assert [f'"step": {step}' in line for step, line in enumerate(text, 1)] == [True] * 8


def test_a_failure_without_progress_goes_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fit(
            Counting(),
            Numbered(),
            until_step=2,
            callbacks=[Faulty("open", RuntimeError("x"))],
            progress=False,
        )
    assert [record.getMessage()[:6] for record in caplog.records] == ["faulty"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C works also where the suite runs in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_wait_for_a_logger() -> None:
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        threading.Timer(0.1, os.kill, (os.getpid(), 2)).start()
        log_thread._wait(waiting, 60)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_a_log_opens_returns_interrupted(release: list[Faulty]) -> None:
    class Interrupting(Faulty):
        def open(self, place: Place) -> Place | None:
            os.kill(os.getpid(), 2)
            return super().open(place)

    opening = Interrupting("open")
    opening.open_seconds = 60.0
    release.append(opening)
    result = fit(Counting(), Numbered(), until_step=8, callbacks=[opening], progress=False)
    assert (result.interrupted, result.step) == (True, 0)


def test_a_forked_child_does_not_wait_for_the_parents_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = Faulty()
    thread = LogThread(logger, PLACE)
    thread.opened()
    with monkeypatch.context() as patch:
        patch.setattr(log_thread.os, "getpid", lambda: -1)
        thread.flush()
        thread.close()
        assert thread._queue.qsize() == 0
    assert not logger.closed
    thread.close()
    assert logger.closed


def test_two_logs_in_one_place_are_refused(tmp_path: Path) -> None:
    path: Any = tmp_path / "m.jsonl"
    with pytest.raises(ValueError, match=r"two loggers write to .*m\.jsonl"):
        fit(Counting(), Numbered(), until_step=1, metrics=path, callbacks=[JsonLines(path)], progress=False)
