"""A run restored from its mirror, for a server whose run directory holds none."""

from __future__ import annotations

import contextlib
import logging
import threading
from functools import partial
from pathlib import Path

from maskwire_server.config import Config
from maskwire_server.errors import StoreError
from maskwire_server.journal import restored_journal
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.object_store import ObjectStore
from maskwire_server.journal.run_directory import JOURNAL_FILE
from maskwire_server.recovery import recorded_config

log = logging.getLogger(__name__)

RETRY_SECONDS = 2.0


def restore_journal(config: Config, store: ObjectStore, stop: threading.Event) -> None:
    """Restore the journal of a run directory that has none, if the mirror has the run.

    The checkpoints are fetched later, when the run starts. Waits until the store answers: while it cannot be
    read, the server must not start a new run, because the mirror may hold one. Returns when `stop` is set.
    Raises ConfigError, RunDirectoryError.
    """
    if (config.run.dir / JOURNAL_FILE).is_file():
        return
    check = partial(recorded_config.completed, config, store.address)
    store.patience = partial(_wait, stop)
    with contextlib.suppress(StoreError):  # `stop` is set
        store.probe()
        if restored_journal.restore(config.run.dir, store, config.storage.acknowledge, check):
            _report(config.run.dir)


def _report(run_dir: Path) -> None:
    """Log to which point the run was restored, and what may be lost, as its status tells it."""
    with contextlib.closing(Journal(run_dir)) as journal:
        state = journal.outbox.state()
    assert state is not None
    level = logging.WARNING if state.lost else logging.INFO
    log.log(level, "the run was restored from %s: %s", state.address, state.restored)


def _wait(stop: threading.Event, failure: StoreError) -> bool:
    """Wait before a call is retried; False if the server is stopping."""
    log.error("%s; trying again", failure)
    return not stop.wait(RETRY_SECONDS)
