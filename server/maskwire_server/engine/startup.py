"""Startup of a run: open the journal, build the trainer, recover the history."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from maskwire.v1.values import ModelInfo, RunState
from maskwire_server.checkpoints import provenance
from maskwire_server.checkpoints.catalogue import Catalogue
from maskwire_server.checkpoints.retention import INITIAL
from maskwire_server.checkpoints.saver import Saver
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.engine.committer import RETRY_SECONDS
from maskwire_server.engine.engine_options import EngineOptions
from maskwire_server.engine.mirror import Mirror
from maskwire_server.engine.quarantine import Quarantine
from maskwire_server.engine.sessions import recorded_digest_versions, recorded_evaluation, recorded_process
from maskwire_server.engine.shared_state import Run
from maskwire_server.engine.trainer_interface import Trainer, guarded, snapshot
from maskwire_server.errors import Refused, RunDirectoryError
from maskwire_server.events import LineageOpened, RecoveryPhase
from maskwire_server.journal import inexact_replays, reserve
from maskwire_server.journal.database import JournalError, explained, is_full
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.reserve import Reserve, free_log_space
from maskwire_server.position import HistoryPosition
from maskwire_server.recovery import boot, fingerprint, initial_weights
from maskwire_server.requests import SaveRequest

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Ready:
    """The objects that startup created to serve the recovered run."""

    journal: Journal
    trainer: Trainer
    quarantine: Quarantine | None
    configuration_id: int


class Startup:
    """Recovers a run, on the thread that will own its trainer."""

    def __init__(
        self,
        run: Run,
        checkpoints: Checkpoints,
        catalogue: Catalogue,
        saver: Saver,
        disk: Reserve,
        options: EngineOptions,
        versions: dict[str, str],
        mirror: Mirror | None = None,
    ) -> None:
        self._run = run
        self._checkpoints = checkpoints
        self._catalogue = catalogue
        self._saver = saver
        self._disk = disk
        self._options = options
        self._versions = versions
        self._mirror = mirror
        self.stopping = False
        """Whether `stop` was called."""
        self._journal: Journal | None = None
        self.read_tokens: int | None = None
        """Default of `Limits.max_read_tokens`; None until the model is built."""
        self.info: ModelInfo | None = None
        """The served model; None until the model is built."""

    def stop(self) -> None:
        """Stop waiting for disk space and the mirror. Can be called from any thread."""
        self.stopping = True
        if self._mirror is not None:
            self._mirror.stop()

    def close(self) -> None:
        """Close the journal, and release the run directory."""
        if self._journal is not None:
            self._journal.close()

    def recover(self) -> Ready:
        """Bring the trainer to the last durable step, and return what serves the run.

        Raises RunDirectoryError if the run cannot be recovered.
        """
        with explained(self._options.run_dir):
            return self._recover()

    def _recover(self) -> Ready:
        began = self._options.clock()
        run, head = self._run, self._run.head
        trainer, canonical = None, self._options.canonical
        if self._options.identity is not None:
            with self._phase("build"):
                trainer = self._options.factory()
                with guarded(trainer):
                    canonical = self._options.identity(trainer.begin())
        opening = self._options.clock()
        self._journal = journal = self._when_there_is_space(
            partial(
                boot.open_journal,
                self._options.run_dir,
                seed=self._options.seed,
                canonical=canonical,
                durable=self._options.serve.durability == "full",
            )
        )
        run_id = journal.fact("run_id")
        head.move(HistoryPosition(run_id, 1, 0, b""))
        if journal.log_bytes() >= reserve.MERGE_BYTES:  # left by a process that was killed
            free_log_space(journal, self._disk)
        self._attach_mirror(journal)
        self._catalogue.load(journal, self._checkpoints.all())
        self._saver.refresh()
        said = journal.last_event("tokenizer")
        head.tokenizer = said[1]["tokenizer"] if said else ""
        said = journal.last_event("data")
        head.data = said[1] if said else {}
        head.evaluated = recorded_evaluation(journal)
        self._ended("open", self._options.clock() - opening)
        if trainer is None:
            with self._phase("build"):
                trainer = self._options.factory()
        threads = None if self._options.serve.threads else fingerprint.pinned_threads(journal)
        if threads is not None:
            trainer.use_threads(threads)
        self.info, self.read_tokens = trainer.info, trainer.read_tokens
        run.num_tokens = trainer.info.num_tokens
        self._versions.update(trainer.versions)
        where = self._versions.get("device", "?")
        log.info("trainer built on %s in %.1f s", where, self._options.clock() - began)

        self._wait_for("the newest checkpoint")
        numerics = fingerprint.numerics(self._options.configuration, trainer.versions)
        with guarded(trainer):
            recovered = boot.recover(
                journal,
                self._checkpoints,
                trainer,
                numerics,
                accept_inexact=self._options.accept_inexact_replay,
                accept_lost=self._options.accept_lost_history is not None,
                tell=self._wait_for,
                when_space=self._when_there_is_space,
            )
        self._ended("load", recovered.load_seconds)
        self._ended("replay", recovered.replay_seconds)
        self._saver.refresh()  # recovery may have renamed damaged checkpoints
        self._wait_for("the warm-up")
        warming = self._options.clock()
        with self._phase("warm_up"), guarded(trainer):
            trainer.warm_up()
        log.info("warmed up in %.1f s", self._options.clock() - warming)
        if self._options.accept_lost_history is not None:
            recovered = boot.accept_lost_history(
                journal, recovered, self._options.accept_lost_history, when_space=self._when_there_is_space
            )

        run.lineages = journal.lineages()
        head.move(HistoryPosition(run_id, recovered.lineage, recovered.step, recovered.digest))
        head.non_finite = recovered.non_finite
        session = journal.last_session()
        run.lease.resume(
            session, recorded_process(journal, session), recorded_digest_versions(journal, session)
        )
        head.digest_version = journal.digest_version()
        head.inexact_replays = self._saver.inexact_replays = inexact_replays.recorded(journal)
        with self._phase("save"):
            self._save_where_needed(journal, trainer, recovered, numerics)
        configuration_id = self._when_there_is_space(partial(self._record, journal, numerics))
        if self._mirror is not None:
            self._when_there_is_space(partial(self._mirror.settle, journal))
        here = head.computed
        run.events.publish(LineageOpened(time.time(), run_id, here.lineage, here.step))
        log.info("run %s is at step %d after %.1f s", run_id, here.step, self._options.clock() - began)
        after = self._options.serve.poison_after
        quarantine = Quarantine(self._options.run_dir, after) if after else None
        return Ready(journal, trainer, quarantine, configuration_id)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = self._options.clock()
        yield
        self._ended(name, self._options.clock() - began)

    def _ended(self, phase: str, seconds: float) -> None:
        self._run.events.publish(RecoveryPhase(time.time(), phase, seconds))

    def _wait_for(self, words: str) -> None:
        self._run.conditions.set(RunState.RECOVERING, waiting_for=words)

    def _attach_mirror(self, journal: Journal) -> None:
        """Become the writer of the run's mirror. If no mirror is set, stop recording changes."""
        if self._mirror is not None:
            self._when_there_is_space(partial(self._mirror.attach, journal, self._wait_for))
        elif journal.outbox.active:
            log.warning("the run had a mirror, but storage.mirror is not set: that mirror is not updated")
            self._when_there_is_space(partial(journal.transaction, journal.outbox.remove))

    def _save_where_needed(
        self, journal: Journal, trainer: Trainer, recovered: boot.Recovered, numerics: dict[str, Any]
    ) -> None:
        """Save a checkpoint if one is needed before any step is trained or any answer is sent.

        A run needs a checkpoint before its first step. The state after an inexact replay is saved because
        another replay would give another state. A state that this server could not replay is saved a second
        time if possible, in case one checkpoint is damaged.
        """
        if self._saver.newest is None or recovered.replayed_inexactly:
            word = "accepted" if recovered.accepted else "replayed"
            first = recovered.step == 0 and initial_weights.recorded(journal) is not None
            word = word if recovered.replayed_inexactly else INITIAL if first else ""
            try:
                self._when_there_is_space(partial(self._save, journal, trainer, word))
            except Refused as refused:
                raise RunDirectoryError(f"{self._options.run_dir}: {refused.message}") from refused
        elif not self._has_two_bases(journal, trainer, numerics):
            with contextlib.suppress(Refused):  # best effort: the run can be served without it
                self._save(journal, trainer, "changed")

    def _record(self, journal: Journal, numerics: dict[str, Any]) -> int:
        """Record this start and the checkpoint catalogue. Returns the id of the recorded configuration."""
        configuration_id, changes = 0, {}

        def write() -> None:
            nonlocal configuration_id, changes
            configuration_id = fingerprint.record_start(journal, self._versions, numerics)
            changes = self._catalogue.record(journal)

        journal.transaction(write)
        self._catalogue.recorded(changes)
        return configuration_id

    def _has_two_bases(self, journal: Journal, trainer: Trainer, numerics: dict[str, Any]) -> bool:
        """Whether the run could recover if its newest checkpoint were damaged."""
        here = self._run.head.computed
        if not here.step or fingerprint.replayable(journal, numerics, trainer.configure):
            return True
        own = [manifest.info for manifest in self._checkpoints.own()]
        return sum((info.lineage, info.step) == (here.lineage, here.step) for info in own) > 1

    def _save(self, journal: Journal, trainer: Trainer, word: str) -> None:
        """Save a checkpoint before the first step is admitted. Raises Refused.

        Its name begins with `word`; if `word` is empty, the saver chooses the name.

        Initial weights that do not come from the seed are saved like a checkpoint that a client named, so
        that retention keeps them.
        """
        here, save_id = self._run.head.computed, provenance.new_save_id()
        name = f"{word}-{here.step:09d}-{uuid.uuid4().hex[:6]}" if word else None
        automatic = word != INITIAL
        copy = snapshot(trainer)
        try:
            journal.transaction(partial(provenance.record_save, journal, here, save_id))
            self._saver.write(SaveRequest(name), automatic, copy, here, save_id, self._run.lineages)
            self._saver.collect(self._run.lineages, here.lineage)
        except Refused as refusal:
            log.error("%s", refusal)
            raise
        except (OSError, MemoryError, JournalError) as error:
            if isinstance(error, JournalError) and not is_full(error):
                raise
            raise self._run.conditions.failed("the checkpoint", error) from error

    def _when_there_is_space(self, act: Callable[[], T]) -> T:
        """Call `act`, which writes to disk, and return its result. While the disk is full, wait and retry."""
        waits = False
        while True:
            try:
                return act()
            except Exception as error:
                if self.stopping or not (is_full(error) or is_full(error.__cause__)):
                    raise
                if not waits:
                    log.error("the disk is full (%s): startup waits until space is freed", error)
                waits = True
            self._wait_for("space on the disk")
            until = time.monotonic() + RETRY_SECONDS
            while not self.stopping and time.monotonic() < until:
                time.sleep(0.05)
            if self._journal is not None:
                free_log_space(self._journal, self._disk)
