"""How a run starts to serve: its journal is opened, its trainer built, its history recovered."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from maskwire_server.checkpoints import membership
from maskwire_server.checkpoints.saver import Saver
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.config import ServeConfig
from maskwire_server.engine.committer import RETRY_SECONDS
from maskwire_server.engine.device import Device, Trainer, build
from maskwire_server.engine.quarantine import Poison
from maskwire_server.engine.run import Run
from maskwire_server.engine.sessions import recorded_digest_versions, recorded_evaluation, recorded_process
from maskwire_server.errors import Refused, RunDirectoryError
from maskwire_server.journal import reserve
from maskwire_server.journal.journal import Journal, explained, is_full
from maskwire_server.journal.reserve import Reserve, make_room
from maskwire_server.position import HistoryPosition
from maskwire_server.recovery import boot, fingerprint, inexact
from maskwire_server.requests import SaveRequest
from maskwire_server.results import ModelInfo, RunState

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Ready:
    """What serving the recovered run needs."""

    journal: Journal
    device: Device
    quarantine: Poison
    configuration_id: int


class Start:
    """Recovers a run, on the thread that will own its trainer."""

    def __init__(
        self,
        run: Run,
        checkpoints: Checkpoints,
        saver: Saver,
        disk: Reserve,
        *,
        factory: Callable[[], Trainer],
        run_dir: Path,
        seed: int,
        canonical: bytes,
        configuration: dict[str, Any],
        serve: ServeConfig,
        versions: dict[str, str],
        accept_inexact_replay: bool,
        accept_lost_history: int | None,
        clock: Callable[[], float],
    ) -> None:
        self._run = run
        self._checkpoints = checkpoints
        self._saver = saver
        self._disk = disk
        self._factory = factory
        self._run_dir = run_dir
        self._seed = seed
        self._canonical = canonical
        self._configuration = configuration
        self._serve = serve
        self._versions = versions
        self._accept_inexact_replay = accept_inexact_replay
        self._accept_lost_history = accept_lost_history
        self._clock = clock
        self._stopping = False
        self._journal: Journal | None = None
        self.info: ModelInfo | None = None
        """What is served; None until the model is built."""

    def stop(self) -> None:
        """Give up waiting for room on the disk; from any thread."""
        self._stopping = True

    def close(self) -> None:
        """Release the run directory."""
        if self._journal is not None:
            self._journal.close()

    def recover(self) -> Ready:
        """Bring the trainer to the last durable step. Raises RunDirectoryError."""
        with explained(self._run_dir):
            return self._recover()

    def _recover(self) -> Ready:
        began = self._clock()
        run, head = self._run, self._run.head
        self._journal = journal = self._when_there_is_room(
            partial(
                boot.open_journal,
                self._run_dir,
                seed=self._seed,
                canonical=self._canonical,
                durable=self._serve.durability == "full",
            )
        )
        run_id = journal.fact("run_id")
        head.move(HistoryPosition(run_id, 1, 0, b""))
        if journal.log_bytes() >= reserve.FOLD_BYTES:  # of a process that was killed
            make_room(journal, self._disk)
        self._checkpoints.recognise(journal)
        self._saver.refresh()
        said = journal.last_event("tokenizer")
        head.tokenizer = said[1]["tokenizer"] if said else ""
        said = journal.last_event("data")
        head.data = said[1] if said else {}
        head.evaluated = recorded_evaluation(journal)
        device = build(self._factory, None if self._serve.threads else fingerprint.pinned_threads(journal))
        self.info = device.info
        run.num_tokens = device.info.num_tokens
        self._versions.update(device.versions)
        where = self._versions.get("device", "?")
        log.info("trainer built on %s in %.1f s", where, self._clock() - began)

        self._wait_for("the newest checkpoint")
        numerics = fingerprint.numerics(self._configuration, device.versions)
        recovered = boot.recover(
            journal,
            self._checkpoints,
            device,
            numerics,
            accept_inexact=self._accept_inexact_replay,
            accept_lost=self._accept_lost_history is not None,
            tell=self._wait_for,
            with_room=self._when_there_is_room,
        )
        self._saver.refresh()  # some may have been set aside
        self._wait_for("the warm-up")
        warming = self._clock()
        device.warm_up()
        log.info("warmed up in %.1f s", self._clock() - warming)
        if self._accept_lost_history is not None:
            recovered = boot.accept_lost_history(
                journal, recovered, self._accept_lost_history, with_room=self._when_there_is_room
            )

        run.lineages = journal.lineages()
        head.move(HistoryPosition(run_id, recovered.lineage, recovered.step, recovered.digest))
        head.non_finite = recovered.non_finite
        session = journal.last_session()
        run.lease.resume(
            session, recorded_process(journal, session), recorded_digest_versions(journal, session)
        )
        head.digest_version = journal.digest_version()
        head.inexact_replays = self._saver.inexact_replays = inexact.recorded(journal)
        self._save_where_needed(journal, device, recovered, numerics)
        configuration_id = self._when_there_is_room(
            partial(fingerprint.record_start, journal, self._versions, numerics)
        )
        here = head.computed
        log.info("run %s is at step %d after %.1f s", run_id, here.step, self._clock() - began)
        quarantine = Poison(self._run_dir, self._serve.poison_after)
        return Ready(journal, device, quarantine, configuration_id)

    def _wait_for(self, words: str) -> None:
        self._run.conditions.set(RunState.RECOVERING, waiting_for=words)

    def _save_where_needed(
        self, journal: Journal, device: Device, recovered: boot.Recovered, numerics: dict[str, Any]
    ) -> None:
        """Save what must be durable before a step follows from it.

        Checkpoint 0 comes before the first step, and so does a state that an inexact replay led to: another
        replay would lead to another state.
        """
        if self._saver.newest is None or recovered.replayed_inexactly:
            word = "accepted" if recovered.accepted else "replayed"
            try:
                self._when_there_is_room(
                    partial(self._save, journal, device, word if recovered.replayed_inexactly else "")
                )
            except Refused as refused:
                raise RunDirectoryError(f"{self._run_dir}: {refused.message}") from refused
        elif not self._has_two_bases(journal, device, numerics):
            with contextlib.suppress(Refused):  # the run is no worse off than it was
                self._save(journal, device, "changed")

    def _has_two_bases(self, journal: Journal, device: Device, numerics: dict[str, Any]) -> bool:
        """Whether one damaged checkpoint is not the end: another, or steps that can be computed again."""
        here = self._run.head.computed
        if not here.step or fingerprint.replayable(journal, numerics, device.configure):
            return True
        own = [manifest.info for manifest in self._checkpoints.own()]
        return sum((info.lineage, info.step) == (here.lineage, here.step) for info in own) > 1

    def _save(self, journal: Journal, device: Device, word: str) -> None:
        """Save before the first step is admitted, under a name with `word`. Raises Refused."""
        here, save_id = self._run.head.computed, membership.new_save_id()
        name = f"{word}-{here.step:09d}-{uuid.uuid4().hex[:6]}" if word else None
        copy = device.snapshot()
        try:
            journal.transaction(partial(membership.record_save, journal, here, save_id))
            self._saver.write(SaveRequest(name), True, copy, here, save_id, self._run.lineages)
        except Refused as refusal:
            log.error("%s", refusal)
            raise
        except (OSError, MemoryError, sqlite3.Error) as error:
            if isinstance(error, sqlite3.Error) and not is_full(error):
                raise
            raise self._run.conditions.failed("the checkpoint", error) from error

    def _when_there_is_room(self, act: Callable[[], T]) -> T:
        """Do something that writes to the disk; while that is full, wait, as HELD would, and try again."""
        waits = False
        while True:
            try:
                return act()
            except Exception as error:
                if self._stopping or not (is_full(error) or is_full(error.__cause__)):
                    raise
                if not waits:
                    log.error("no room on the disk, the start waits until there is: %s", error)
                waits = True
            self._wait_for("room on the disk")
            until = time.monotonic() + RETRY_SECONDS
            while not self._stopping and time.monotonic() < until:
                time.sleep(0.05)
            if self._journal is not None:
                make_room(self._journal, self._disk)
