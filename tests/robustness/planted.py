"""R9: faults planted on purpose, one at a time; a test must fail with each of them.

A bug takes one mechanism out. `caught_by` runs a test that passes without the bug and must not with it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import FlakyStrategyDefinition
from hypothesis.stateful import run_state_machine_as_test
from robustness import planted_mirror, planted_pipeline

from maskwire.loggers import backfill
from maskwire.protocol import fit_milestones
from maskwire.v1.values import InexactReplay, Losses, Outcome
from maskwire_server.checkpoints import files as checkpoint_files
from maskwire_server.checkpoints import provenance, retention, saver, store
from maskwire_server.engine import (
    admission,
    admission_rules,
    committer,
    executor,
    sessions,
    startup,
)
from maskwire_server.errors import Refused, RunDirectoryError
from maskwire_server.journal import database, fsync, inexact_replays, journal, reserve
from maskwire_server.recovery import boot, rebuild, replay, replay_settings
from maskwire_server.requests import SaveRequest, SessionRef, SessionRequest, StepRequest
from maskwire_server.results import StepResult

Patch = tuple[Any, str, Any]


@dataclass(frozen=True)
class Bug:
    """One mechanism that is taken out."""

    what: str
    patches: Callable[[], list[Patch]]
    caught_by: Callable[[Path], None]

    def plant(self) -> list[Patch]:
        """Take it out, for good; what was there before."""
        was = []
        for owner, name, new in self.patches():
            was.append(
                (owner, name, owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name))
            )
            setattr(owner, name, new)
        return was

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        """Take it out for a while."""
        was = self.plant()
        try:
            yield
        finally:
            for owner, name, old in was:
                setattr(owner, name, old)


# What catches them.


def the_model(_: Path) -> None:
    """Engine and journal against the model that counts (R5)."""
    from robustness.test_writer_model import WriterModel

    failures: list[BaseException] = []

    class Watched(WriterModel):
        def teardown(self) -> None:
            error = sys.exc_info()[1]
            if isinstance(error, _CAUGHT):
                failures.append(error)
            super().teardown()

    try:
        run_state_machine_as_test(
            Watched,
            settings=settings(
                max_examples=150, stateful_step_count=40, deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck), phases=[Phase.generate], report_multiple_bugs=False,
            ),
        )  # fmt: skip
    except FlakyStrategyDefinition:
        # Threads have their own mind about when a bug shows: an example that begins like another ends
        # elsewhere, and Hypothesis speaks of that in place of the failure that there was.
        if failures:
            raise failures[0] from None
        raise


def a_power_loss(folder: Path, bug: str = "") -> None:
    """The recorded writes with unflushed ones missing (R2, R3)."""
    from robustness import power_loss

    power_loss.campaign(folder, 0, bug=bug, every=2, singles=3)


def damage_to_files(folder: Path) -> None:
    """Flips, cuts, deletions and swaps (R4)."""
    from robustness import damage

    damage.campaign(folder, 0, flips=60, cuts=10)


def every_row(folder: Path) -> None:
    """Each column of each kind of row changed on its own; each change is found."""
    import sqlite3

    from robustness import damage

    whole = damage.template(folder, merged=True)
    for number, statement in enumerate(
        (
            "UPDATE steps SET numbers = zeroblob(33) WHERE step = 10",
            "UPDATE steps SET request_id = 'another' WHERE step = 3",
            "UPDATE sessions SET epoch = 0",
            "UPDATE lineages SET digest = zeroblob(32)",
            "UPDATE payloads SET payload = zeroblob(length(payload)) WHERE step = 11",
        )
    ):
        copy = folder / str(number)
        shutil.copytree(whole.run_dir, copy)
        with contextlib.closing(sqlite3.connect(copy / "journal.sqlite")) as database:
            database.execute(statement)
            database.commit()
        assert damage.judge(copy, whole) != damage.HELD, statement


def the_newest_checkpoint_gone(folder: Path) -> None:
    """The newest checkpoint damaged: the one before it, and the batches behind that, count."""
    from robustness import damage

    whole = damage.template(folder, merged=True)
    path = whole.run_dir / "checkpoints" / "at-8" / "state.json"
    path.write_bytes(path.read_bytes()[:-1])
    assert damage.judge(whole.run_dir, whole) == damage.HELD


def checkpoints_beside_fast_steps(folder: Path) -> None:
    """Each checkpoint holds the step that it says, however far the device is by then."""

    from counter import CounterTrainer
    from robustness import damage

    from maskwire_server import failpoints

    with damage.Run(folder / "run") as run:
        failpoints.install(lambda name: time.sleep(0.005) if name == "journal.begin" else None)
        try:
            futures: list[Any] = []
            for step in range(1, 61):
                futures.append(run.engine.train_step(StepRequest(damage.payload(step))))
                if step % 6 == 0:
                    futures.append(run.engine.save(SaveRequest(f"after-{step}")))
                if step % 24 == 0:
                    futures[-1].result(damage.WAIT)
            for future in futures:
                future.result(damage.WAIT)
        finally:
            failpoints.install(None)
        names = [info for info in run.engine.checkpoints() if info.name.startswith("after-")]
    states, trainer = {}, CounterTrainer()
    for step in range(1, 61):
        sent = damage.payload(step)
        trainer.train_step(1, step, sent.batch, sent.modes)
        states[step] = trainer.state
    for info in names:
        loaded = CounterTrainer()
        loaded.load(folder / "run" / "checkpoints" / info.name)
        assert loaded.state == states[info.step], f"{info.name} holds another step than {info.step}"


def a_changed_batch(folder: Path) -> None:
    """A batch that changed on the disk, where the losses do not show it: they come before the update."""
    import sqlite3

    from counter import CounterTrainer
    from robustness import damage

    class LossFirst(CounterTrainer):
        def train_step(self, *arguments: Any) -> Any:
            before = int(self.state[:12], 16) / 2**48
            super().train_step(*arguments)
            return StepResult(Outcome.APPLIED, Losses(before, before), before)

    with damage.Run(folder / "run", LossFirst) as run:
        for step in (1, 2, 3):
            run.engine.train_step(StepRequest(damage.payload(step))).result(damage.WAIT)
    with contextlib.closing(sqlite3.connect(folder / "run" / "journal.sqlite")) as database:
        kept = database.execute("SELECT payload FROM payloads WHERE step = 3").fetchone()[0]
        database.execute("UPDATE payloads SET payload = ? WHERE step = 3", (kept[:-1] + b"\x0b",))
        database.commit()
    with contextlib.suppress(RunDirectoryError), damage.Run(folder / "run", LossFirst):
        raise AssertionError("it goes on from weights that it never had")


def a_takeover_of_a_queue(folder: Path) -> None:
    """Whoever is taken over has nothing trained after it."""
    from robustness import damage

    with damage.Run(folder / "run") as run:
        engine = run.engine
        first = engine.open_session(SessionRequest("first", "1")).result(damage.WAIT)
        session = SessionRef(first.run_id, 1, first.epoch)
        run.trainer.gate.clear()
        futures = [engine.train_step(StepRequest(damage.payload(n), session, n)) for n in range(1, 6)]
        second = engine.open_session(SessionRequest("second", "2", takeover=True))
        run.trainer.gate.set()
        second.result(damage.WAIT)
        trained = [future for future in futures if future.exception(damage.WAIT) is None]
        assert len(trained) <= 1, "a step that waited behind the one at the device was trained"


def two_servers_on_one_directory(folder: Path) -> None:
    """The second is refused."""
    from robustness import damage

    with damage.Run(folder / "run"):
        try:
            with damage.Run(folder / "run"):
                raise AssertionError("a second server runs on the directory")
        except RunDirectoryError:
            pass


def checkpoints_of_another_run(folder: Path) -> None:
    """Two checkpoints of another run copied in, a save, and the save damaged: the run starts all the same."""
    from robustness import damage

    with damage.Run(folder / "other") as run:
        for step in range(1, 21):
            run.engine.train_step(StepRequest(damage.payload(step))).result(damage.WAIT)
            if step in (10, 20):
                run.engine.save(SaveRequest(f"other-{step}")).result(damage.WAIT)
    checkpoints = folder / "run" / "checkpoints"
    with damage.Run(folder / "run") as run:
        for step in range(1, 5):
            run.engine.train_step(StepRequest(damage.payload(step))).result(damage.WAIT)
            if step == 2:
                for name in ("other-10", "other-20"):
                    shutil.copytree(folder / "other" / "checkpoints" / name, checkpoints / name)
                run.engine.checkpoints()  # a listing notices them
        run.engine.save(SaveRequest("own")).result(damage.WAIT)
        digest = run.engine.status().digest
    path = checkpoints / "own" / "state.json"
    path.write_bytes(path.read_bytes()[:-1])
    with damage.Run(folder / "run") as run:
        assert run.engine.status().digest == digest


def a_checkpoint_damaged_between_saves(folder: Path) -> None:
    """The checkpoint before the last is damaged on the disk, then the last: the run starts all the same."""
    from robustness import damage

    checkpoints = folder / "run" / "checkpoints"

    def shorten(name: str) -> None:
        path = checkpoints / name / "state.json"
        path.write_bytes(path.read_bytes()[:-1])

    with damage.Run(folder / "run") as run:
        for step in range(1, 5):
            run.engine.train_step(StepRequest(damage.payload(step))).result(damage.WAIT)
            if step == 2:
                run.engine.save(SaveRequest("second")).result(damage.WAIT)
                shorten("second")
        run.engine.save(SaveRequest("fourth")).result(damage.WAIT)
        digest = run.engine.status().digest
    shorten("fourth")
    with damage.Run(folder / "run") as run:
        assert run.engine.status().digest == digest


def a_full_disk_and_a_long_log(folder: Path) -> None:
    """Training that waits for disk space resumes once the log is merged, although no file is deleted."""
    from robustness import damage

    with damage.Run(folder / "run") as run:
        run.engine.train_step(StepRequest(damage.payload(1))).result(damage.WAIT)
        log = folder / "run" / "journal.sqlite-wal"
        free, reserve.free_bytes = reserve.free_bytes, lambda _: 2**20 - log.stat().st_size
        try:
            for step in range(2, 60):
                run.engine.train_step(StepRequest(damage.payload(step))).result(damage.WAIT)
        finally:
            reserve.free_bytes = free


def a_job_that_was_stopped(folder: Path) -> None:
    """The next call makes up for its evaluation and the lines of its metrics, once."""
    import json

    import numpy as np
    from robustness import damage

    import maskwire
    from maskwire_server.config import ServeConfig
    from maskwire_server.rpc.server import Server

    class Stopped(BaseException):
        pass

    class Rows:
        def batch(self, step: int) -> Any:
            return np.full((1, 4), step + 10)

    metrics = folder / "metrics.jsonl"

    def call(stop_at: int = 0) -> list[int]:
        with damage.Run(folder / "run") as run:
            server = Server(run.engine, ServeConfig(address="127.0.0.1:0"))
            address = server.start()

            def evaluate(trainer: Any) -> Any:
                if trainer.step == stop_at:
                    raise Stopped
                return trainer.eval_loss(np.full((1, 4), 20))

            try:
                with maskwire.connect(address, name="job") as trainer:
                    done = trainer.fit(
                        Rows(), until_step=8, evaluate=evaluate, eval_every=4, metrics=metrics, progress=False
                    )
                    return [found.step for found in done.evaluations]
            finally:
                server.stop(0)

    with contextlib.suppress(Stopped):
        call(stop_at=4)
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(lines[:-2]) + lines[-2][:20])  # of two steps the answer was not seen
    assert call() == [4, 8], "the evaluation that was broken off"
    assert call() == [], "each once"
    written = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in written if "loss" in line] == list(range(1, 9))


def a_critic_of_weight_0(_: Path) -> None:
    """A critic that trains alone learns, whatever its weight beside the generator is."""
    import numpy as np

    from maskwire_server import config
    from maskwire_server.batch import Batch, Modes
    from maskwire_server.training.trainer import TorchTrainer

    whole = config.load(
        None,
        model={"num_tokens": 9, "mask_id": 8, "max_seq_len": 6, "dim": 16, "depth": 1, "heads": 1},
        objective={"critic": "token", "critic_loss_weight": 0},
        optimizer={"learning_rate": 1e-2, "warmup_steps": 0},
        serve={"device": "cpu", "threads": 1},
    )
    trainer = TorchTrainer(whole.model, whole.objective, whole.optimizer, whole.serve, seed=0)
    batch = Batch(np.random.default_rng(0).integers(0, 8, (16, 6)), 16, 6)
    modes = Modes(only_train_critic=True, generator_sample_temperature=1.0)
    losses = [trainer.train_step(1, step, batch, modes).losses.loss for step in range(1, 41)]
    assert np.mean(losses[-8:]) < 0.95 * losses[0], "the critic's loss does not fall"


def an_inexact_replay(folder: Path) -> None:
    """Where results are not reproducible close ones come back and are saved; wrong ones never do."""
    from counter import CounterTrainer
    from robustness import damage

    def rounding(error: float, outcome: Outcome = Outcome.APPLIED) -> type[CounterTrainer]:
        class Rounding(CounterTrainer):
            versions = {"device": "counter", "threads": "1", "deterministic": "no"}  # noqa: RUF012

            def train_step(self, *arguments: Any) -> Any:
                loss = super().train_step(*arguments).losses.loss * (1 + error)
                return StepResult(outcome, Losses(loss, loss), loss)

        return Rounding

    with damage.Run(folder / "run", rounding(0)) as run:
        for step in (1, 2, 3):
            run.engine.train_step(StepRequest(damage.payload(step))).result(damage.WAIT)
    for wrong in (rounding(0.1), rounding(0, Outcome.SKIPPED_NON_FINITE)):
        with contextlib.suppress(RunDirectoryError), damage.Run(folder / "run", wrong):
            raise AssertionError("a wrong result is accepted")
    with damage.Run(folder / "run", rounding(1e-6)) as run:
        saved = run.engine.checkpoints()[0]
        assert saved.step == 3, "steps can follow from a state that is not saved"
        assert run.engine.status().inexact_replays == (InexactReplay(1, 1, 3, False),)
    manifest = json.loads((folder / "run" / "checkpoints" / saved.name / "manifest.json").read_text())
    assert len(manifest["inexact_replays"]) == 1, "a checkpoint does not tell what led to its weights"


# What is taken out.


def _no_epoch_check() -> list[Patch]:
    check = admission_rules.check_session

    def lenient(session: Any, at: Any) -> None:
        with contextlib.suppress(Refused):
            check(session, at)

    return [(admission_rules, "check_session", lenient)]


def _journal_without_flushes() -> list[Patch]:
    made = database.Database.__init__

    def unflushed(self: Any, run_dir: Path, *, durable: bool = True) -> None:
        made(self, run_dir, durable=durable)
        self._db.execute("PRAGMA synchronous=OFF")

    return [(database.Database, "__init__", unflushed)]


def _checkpoint_files_not_flushed() -> list[Patch]:
    return [(checkpoint_files, "flush", store.describe)]


def _checkpoint_folder_not_flushed() -> list[Patch]:
    return [(store, "flush_folder", lambda _: None)]


def _run_folder_not_flushed() -> list[Patch]:
    return [(fsync, "flush_folder", lambda _: None), (journal, "flush_folder", lambda _: None)]


def _payloads_dropped_too_early() -> list[Patch]:
    return [(retention, "FALLBACKS", 1)]


def _request_ids_not_recorded() -> list[Patch]:
    add = journal.Journal.add_step

    def anonymous(self: Any, record: Any, payload: bytes) -> None:
        add(self, type(record)(**{**vars(record), "request_id": None}), payload)

    return [(journal.Journal, "add_step", anonymous)]


def _digest_not_chained() -> list[Patch]:
    chained = executor.step_digest
    return [(executor, "step_digest", lambda _, *rest: chained(bytes(32), *rest))]


def _replay_leaves_the_first_step_out() -> list[Patch]:
    steps = rebuild.steps_to_replay

    def shorter(*arguments: Any) -> Iterator[Any]:
        records = steps(*arguments)
        next(records, None)
        yield from records

    return [(rebuild, "steps_to_replay", shorter)]


def _rows_not_held_against_their_hashes() -> list[Patch]:
    def lenient(row: tuple[Any, ...]) -> Any:
        return journal.SessionRecord(*row[:3], bool(row[3]), *row[4:6], bool(row[6]))

    return [(journal.SessionRecord, "read", staticmethod(lenient))]


def _batches_not_held_against_their_hashes() -> list[Patch]:
    from maskwire_server.batch import Payload

    return [(replay, "read_payload", lambda _, encoded, __: Payload.decode(encoded))]


def _checkpoint_files_not_verified() -> list[Patch]:
    return [(store.Checkpoints, "damage", lambda *_: None)]


def _another_payload_under_one_id() -> list[Patch]:
    return [(admission_rules, "repeats", lambda request, _, known: request.request_id == known.request_id)]


def _non_finite_steps_forgotten() -> list[Patch]:
    return [(boot, "_non_finite", lambda *_: 0)]


def _checkpoint_named_late() -> list[Patch]:
    saved = executor.Executor._save

    def late(self: Any, save: Any) -> None:
        def append(commit: Any) -> None:
            committed = commit.committed

            def name_late() -> None:
                commit.position = self._run.head.computed
                committed()

            commit.committed = name_late
            appended(commit)

        appended, self._committer.append = self._committer.append, append
        try:
            saved(self, save)
        finally:
            self._committer.append = appended

    return [(executor.Executor, "_save", late)]


def _takeover_leaves_the_queue() -> list[Patch]:
    admitted = sessions.Sessions._admit

    def keeping(self: Any, *arguments: Any) -> None:
        waiting = self._run.queue
        refuse, waiting.refuse_steps = waiting.refuse_steps, lambda _: None
        try:
            admitted(self, *arguments)
        finally:
            waiting.refuse_steps = refuse

    return [(sessions.Sessions, "_admit", keeping)]


def _no_lock() -> list[Patch]:
    def unlocked(run_dir: Path) -> int:
        import os

        return os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)

    made = database.Database.__init__

    def shared(self: Any, run_dir: Path, *, durable: bool = True) -> None:
        made(self, run_dir, durable=durable)
        self._db.execute("PRAGMA locking_mode=NORMAL")
        self._db.execute("SELECT count(*) FROM run").fetchone()

    return [(database, "lock", unlocked), (database.Database, "__init__", shared)]


def _the_same_nonce_opens_again() -> list[Patch]:
    return [(journal.Journal, "session_of_nonce", lambda *_: None)]


def _epochs_in_memory_only() -> list[Patch]:
    return [(journal.Journal, "last_session", lambda _: None)]


def _restored_steps_answered() -> list[Patch]:
    return [(admission, "_require_in_history", lambda *_: None)]


def _skipped_steps_said_applied() -> list[Patch]:
    digest = executor.step_digest
    return [(executor, "step_digest", lambda *a: digest(*a[:-1], int(Outcome.APPLIED)))]


def _checkpoints_of_other_runs_count() -> list[Patch]:
    return [(provenance.Provenance, "problem", lambda *_: None)]


def _fallbacks_not_read_again() -> list[Patch]:
    return [(saver.Saver, "_fallbacks_are_intact", lambda *_: True)]


def _the_log_stays_while_held() -> list[Patch]:
    return [(committer.Committer, "_free_log_space", lambda _: False)]


def _owed_evaluations_left_out() -> list[Patch]:
    def nothing(_: Any) -> Iterator[Any]:
        yield lambda: None

    return [(fit_milestones, "_not_evaluated", nothing)]


def _evaluations_in_memory_only() -> list[Patch]:
    return [(startup, "recorded_evaluation", lambda _: (0, 0))]


def _metrics_not_filled_in() -> list[Patch]:
    return [(backfill, "_fill", lambda *_: iter(()))]


def _critic_alone_weighted() -> list[Patch]:
    from maskwire_server.training import objective

    def weighted(sums: Any, config: Any, modes: Any, numerics_version: int) -> Any:
        if sums.critic is None:
            return sums.generator
        generator = sums.generator if modes.generator_learns else 0 * sums.generator.detach()
        return generator + config.critic_loss_weight * sums.critic

    return [(objective, "minimized", weighted)]


def _tolerance_without_a_bound() -> list[Patch]:
    return [(replay, "excess", lambda *_: None)]


def _no_tolerance() -> list[Patch]:
    return [(replay_settings, "reproducible", lambda _: True)]


def _changed_outcome_accepted() -> list[Patch]:
    return [(replay, "outcome_differs", lambda *_: False)]


def _inexact_state_not_saved() -> list[Patch]:
    return [(replay.Replayed, "inexact", property(lambda _: []))]


def _inexact_replays_not_recorded() -> list[Patch]:
    return [(inexact_replays, "record", lambda *_: None)]


def _inexact_replays_not_in_manifests() -> list[Patch]:
    return [(inexact_replays, "within", lambda *_: ())]


BUGS = {
    **{name: Bug(*parts) for name, parts in planted_pipeline.BUGS.items()},
    "no-epoch-check": Bug("a superseded writer goes on", _no_epoch_check, the_model),
    "journal-without-flushes": Bug("the journal is not flushed", _journal_without_flushes,
        partial(a_power_loss, bug="journal-without-flushes")),
    "checkpoint-files-not-flushed": Bug("a checkpoint's files are not flushed",
        _checkpoint_files_not_flushed, partial(a_power_loss, bug="checkpoint-files-not-flushed")),
    "checkpoint-folder-not-flushed": Bug("a checkpoint's name is not flushed",
        _checkpoint_folder_not_flushed, partial(a_power_loss, bug="checkpoint-folder-not-flushed")),
    "run-folder-not-flushed": Bug("the run directory's own name is not flushed",
        _run_folder_not_flushed, partial(a_power_loss, bug="run-folder-not-flushed")),
    "payloads-dropped-too-early": Bug("batches go behind the newest checkpoint, not the one before",
        _payloads_dropped_too_early, the_newest_checkpoint_gone),
    "request-ids-not-recorded": Bug("a retry after a restart is a new step", _request_ids_not_recorded,
        the_model),
    "digest-not-chained": Bug("the digest forgets what was before", _digest_not_chained, the_model),
    "replay-leaves-a-step-out": Bug("recovery leaves a step out", _replay_leaves_the_first_step_out,
        the_model),
    "rows-without-hashes": Bug("rows are not held against their hashes",
        _rows_not_held_against_their_hashes, every_row),
    "batches-without-hashes": Bug("kept batches are not held against their hashes",
        _batches_not_held_against_their_hashes, a_changed_batch),
    "checkpoint-files-not-verified": Bug("a checkpoint's files are not held against the manifest",
        _checkpoint_files_not_verified, damage_to_files),
    "another-payload-under-one-id": Bug("a request id answers for another batch",
        _another_payload_under_one_id, the_model),
    "non-finite-forgotten": Bug("a restart forgets the steps that were not finite",
        _non_finite_steps_forgotten, the_model),
    "checkpoint-named-late": Bug("a checkpoint is named after a later step", _checkpoint_named_late,
        checkpoints_beside_fast_steps),
    "takeover-leaves-the-queue": Bug("steps of a writer that was taken over are trained",
        _takeover_leaves_the_queue, a_takeover_of_a_queue),
    "no-lock": Bug("two servers share a run directory", _no_lock, two_servers_on_one_directory),
    "nonce-opens-again": Bug("a nonce opens a session more than once", _the_same_nonce_opens_again,
        the_model),
    "epochs-in-memory": Bug("a restart forgets who was fenced", _epochs_in_memory_only, the_model),
    "restored-steps-answered": Bug("steps that a restore went back behind are said to be there",
        _restored_steps_answered, the_model),
    "skipped-said-applied": Bug("the digest says that a skipped step was applied",
        _skipped_steps_said_applied, the_model),
    "other-runs-checkpoints-count": Bug("checkpoints that were copied in count in retention",
        _checkpoints_of_other_runs_count, checkpoints_of_another_run),
    "fallbacks-not-read-again": Bug("batches are dropped while a checkpoint that a start needs is damaged",
        _fallbacks_not_read_again, a_checkpoint_damaged_between_saves),
    "log-stays-while-held": Bug("the log is not merged while training waits for disk space",
        _the_log_stays_while_held, a_full_disk_and_a_long_log),
    "owed-evaluation-left-out": Bug("nobody makes up for an evaluation that was broken off",
        _owed_evaluations_left_out, a_job_that_was_stopped),
    "evaluations-in-memory": Bug("a restart of the server forgets what was evaluated",
        _evaluations_in_memory_only, a_job_that_was_stopped),
    "metrics-not-filled-in": Bug("steps whose answers a job did not see are missing in its metrics",
        _metrics_not_filled_in, a_job_that_was_stopped),
    "critic-alone-weighted": Bug("a critic that trains alone minimises its weighted loss",
        _critic_alone_weighted, a_critic_of_weight_0),
    "tolerance-without-a-bound": Bug("any loss is accepted where results are not reproducible",
        _tolerance_without_a_bound, an_inexact_replay),
    "no-tolerance": Bug("a GPU's replay has to give the same bytes", _no_tolerance, an_inexact_replay),
    "changed-outcome-accepted": Bug("a replay may skip a step that was applied",
        _changed_outcome_accepted, an_inexact_replay),
    "inexact-state-not-saved": Bug("steps follow from an inexact replay that is not saved",
        _inexact_state_not_saved, an_inexact_replay),
    "inexact-replays-not-recorded": Bug("inexact replays are not recorded",
        _inexact_replays_not_recorded, an_inexact_replay),
    "inexact-replays-not-in-manifests": Bug("checkpoints do not say that inexact replays led to them",
        _inexact_replays_not_in_manifests, an_inexact_replay),
    **{name: Bug(*parts) for name, parts in planted_mirror.BUGS.items()},
}  # fmt: skip


_CAUGHT = (AssertionError, BaseExceptionGroup, RunDirectoryError, Refused, TimeoutError, FileNotFoundError)
"""What a test says of a bug; anything else is a mistake of the planting, not a bug that was found."""


def traced(bug: Bug) -> bool:
    """Whether it is planted in a process that strace records."""
    return isinstance(bug.caught_by, partial)


def caught(name: str) -> str:
    """Plant a bug and run its test: what the test said. AssertionError when it said nothing."""
    bug = BUGS[name]
    if traced(bug) and shutil.which("strace") is None:
        raise RuntimeError("system calls are recorded with strace: install it")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as room:
        try:
            if traced(bug):
                bug.caught_by(Path(room))
            else:
                with bug.planted():
                    bug.caught_by(Path(room))
        except _CAUGHT as found:
            return f"{type(found).__name__}: {found}"
    raise AssertionError(f"{name} is not caught: {bug.what}")
