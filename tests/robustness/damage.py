"""R4: bits flipped, files cut, deleted and swapped: found, or the state provably unchanged."""

from __future__ import annotations

import contextlib
import logging
import random
import shutil
import sqlite3
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counter import CounterTrainer
from rig import make_engine
from robustness.expected import batch

from maskwire_server import config
from maskwire_server.batch import Batch, Modes, Payload
from maskwire_server.errors import Refused, RunDirectoryError
from maskwire_server.position import HistoryPosition
from maskwire_server.requests import SaveRequest, SessionRef, SessionRequest, StepRequest

WAIT = 30
STEPS = 11
CONFIG = config.load(
    None, serve={"durability": "off", "reserve_bytes": 0}, checkpoints={"every_seconds": 1e9, "keep_last": 3}
)
HELD, CAUGHT, REFUSED, FOUND_LATER = (
    "state unchanged", "lost tail, found by the client", "refused at start", "refused when asked",
)  # fmt: skip


def payload(step: int) -> Payload:
    ids = batch(0, step)
    return Payload(Batch(ids.astype("int64"), *ids.shape), Modes())


class Run:
    """An engine on a run directory, in this process."""

    def __init__(self, run_dir: Path, trainer: type[CounterTrainer] = CounterTrainer) -> None:
        self.trainer = trainer()

        def build() -> CounterTrainer:
            return self.trainer

        self.fatal: list[BaseException] = []
        self.engine = make_engine(run_dir, CONFIG, build, on_fatal=self.fatal.append)

    def __enter__(self) -> Run:
        try:
            self.engine.wait_serving(WAIT)
        except BaseException:
            self.engine.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()


@dataclass
class Template:
    """A run that was killed, and what it had answered."""

    run_dir: Path
    history: HistoryPosition
    state: str
    answers: list[Any]
    epoch: int


def template(folder: Path, *, merged: bool) -> Template:
    """Eleven steps, checkpoints at 0, 4 and 8, a session; `merged` or with its log as after a kill."""
    run_dir = folder / ("merged" if merged else "killed")
    with Run(run_dir) as run:
        engine = run.engine
        engine.open_session(SessionRequest("me", "nonce")).result(WAIT)
        answers = []
        for step in range(1, STEPS + 1):
            session = engine.open_session(SessionRequest("me", "nonce")).result(WAIT)
            request = StepRequest(
                payload(step), SessionRef(session.run_id, 1, session.epoch), step, f"request-{step}"
            )
            answers.append(engine.train_step(request).result(WAIT))
            if step in (4, 8):
                engine.save(SaveRequest(f"at-{step}")).result(WAIT)
        status = engine.status()
        history = HistoryPosition(status.run_id, 1, STEPS, status.digest)
        state, epoch = run.trainer.state, status.epoch
        if not merged:
            copy = folder / "copied"
            shutil.copytree(run_dir, copy)
    if not merged:
        shutil.rmtree(run_dir)
        copy.rename(run_dir)
    return Template(run_dir, history, state, answers, epoch)


def judge(damaged: Path, whole: Template) -> str:
    """What a start makes of a damaged copy; AssertionError for anything wrong that is taken for right."""
    try:
        with Run(damaged) as run:
            return _judge_running(run, whole)
    except RunDirectoryError as error:
        assert str(error), "it says what is wrong"
        return REFUSED


def _judge_running(run: Run, whole: Template) -> str:
    engine, history = run.engine, whole.history
    status = engine.status()
    opening = engine.open_session(SessionRequest("me", "another", True, None, history))
    refusal = opening.exception(WAIT)
    same = (status.run_id, status.durable_step, status.digest) == (
        history.run_id, history.step, history.digest
    )  # fmt: skip
    if not same:
        assert isinstance(refusal, Refused), "a client that remembers is not told that steps were lost"
        assert refusal.reason in ("HISTORY_LOST", "WRONG_RUN"), refusal.reason
        return CAUGHT
    assert refusal is None, refusal
    assert run.trainer.state == whole.state, "the right history with other weights"
    epoch = opening.result().epoch
    assert epoch > whole.epoch, "an older writer is not fenced"
    for step, answer in enumerate(whole.answers, 1):
        session = SessionRef(history.run_id, 1, epoch)
        again = engine.train_step(StepRequest(payload(step), session, step, f"request-{step}"))
        error = again.exception(WAIT)
        if error is not None:
            assert isinstance(error, Refused)
            assert error.reason == "HISTORY_LOST", error.reason
            return FOUND_LATER
        found = again.result()
        assert found.replayed, f"step {step} was trained twice"
        assert (found.step, found.result.losses, found.digest) == (
            answer.step, answer.result.losses, answer.digest
        )  # fmt: skip
    assert not run.fatal
    return HELD


def campaign(folder: Path, seed: int, *, flips: int = 200, cuts: int = 50) -> dict[str, Any]:
    """Every file of a run in turn. How each ended, by file."""
    logging.getLogger("maskwire_server").setLevel(logging.CRITICAL + 1)
    draw = random.Random(seed)
    results: dict[str, Counter[str]] = {}
    other = template(folder / "other", merged=True)
    for whole in (template(folder, merged=False), template(folder, merged=True)):
        for file in sorted(path for path in whole.run_dir.rglob("*") if path.is_file()):
            name = file.relative_to(whole.run_dir)
            if name.name == "lock" or not file.stat().st_size:
                continue
            tally = results.setdefault(f"{whole.run_dir.name}: {name}", Counter())
            damages = ["delete", "swap", *["flip"] * flips, *["cut"] * cuts]
            for damage in damages:
                with tempfile.TemporaryDirectory(dir=_room()) as room:
                    copy = Path(room) / "run"
                    shutil.copytree(whole.run_dir, copy)
                    data = bytearray((copy / name).read_bytes())
                    where = draw.randrange(len(data))
                    if damage == "flip":
                        data[where] ^= 1 << draw.randrange(8)
                    elif damage == "cut":
                        del data[where:]
                    elif damage == "swap":
                        strange = other.run_dir / name
                        data = bytearray(strange.read_bytes()) if strange.exists() else bytearray()
                    if damage == "delete":
                        (copy / name).unlink()
                    else:
                        (copy / name).write_bytes(data)
                    try:
                        ended = judge(copy, whole)
                        assert ended == HELD or name.parts[0] != "checkpoints", (
                            f"{ended}, with two others whole"
                        )
                        tally[ended] += 1
                    except AssertionError as error:
                        raise AssertionError(f"{name}, {damage} at {where}: {error}") from error
    return {"files": {name: dict(tally) for name, tally in results.items()}, "damages": sum(
        sum(tally.values()) for tally in results.values())}  # fmt: skip


def _room() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def swap_of_checkpoints(folder: Path) -> str:
    """The files of two checkpoints of one run, exchanged."""
    whole = template(folder, merged=True)
    checkpoints = whole.run_dir / "checkpoints"
    one, two = checkpoints / "at-4" / "state.json", checkpoints / "at-8" / "state.json"
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    with contextlib.suppress(sqlite3.Error):
        return judge(whole.run_dir, whole)
    raise AssertionError("an error of SQLite came through")
