"""Restores a run from its mirror when the run directory of a server holds no run."""

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
    """Restore the journal from the mirror if the run directory has no journal and the mirror holds a run.

    The checkpoints are fetched later, when the run starts. While the object store cannot be read, this waits
    and retries: the mirror may hold a run, so the server must not start a new one. Returns early when `stop`
    is set. Raises ConfigError or RunDirectoryError.
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
    """Log how far the run was restored from its mirror, and what may be lost."""
    with contextlib.closing(Journal(run_dir)) as journal:
        state = journal.outbox.state()
    assert state is not None
    level = logging.WARNING if state.lost else logging.INFO
    log.log(level, "the run was restored from %s: %s", state.address, state.restored)


def _wait(stop: threading.Event, failure: StoreError) -> bool:
    """Log a failed call and wait before it is retried. Returns False if the server is stopping."""
    log.error("%s; retrying until the object store answers", failure)
    return not stop.wait(RETRY_SECONDS)
