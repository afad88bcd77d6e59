"""Questions about the journal, answered on the committer's thread between two transactions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from maskwire_server.engine.futures import refuse
from maskwire_server.engine.shared_state import Run
from maskwire_server.errors import Refused, RunDirectoryError, is_shortage
from maskwire_server.journal.database import JournalError, is_damaged
from maskwire_server.journal.journal import Journal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JournalQuery:
    """A question about the journal, and the future that receives its answer."""

    question: Callable[..., Any]
    arguments: tuple[Any, ...]
    future: Future[Any]
    waits: bool
    """Whether the answer must wait until the mirror has the records that it comes from."""

    def find(self, journal: Journal, run: Run) -> tuple[Any] | None:
        """Return the answer in a tuple of one, or None if the caller no longer waits for it.

        If the query is refused, its future gets the error, and None is returned.
        """
        future = self.future
        if future.cancelled():
            return None
        try:
            return (self.question(journal, *self.arguments),)
        except Refused as refusal:
            refuse(future, refusal)
        except RunDirectoryError as error:  # a damaged record
            log.error("%s", error)
            refuse(future, Refused("HISTORY_LOST", str(error)))
        except JournalError as error:
            if not is_damaged(error):
                raise
            log.error("the journal is damaged: %s; check the server's disk", error)
            refuse(
                future, Refused("HISTORY_LOST", f"the journal is damaged ({error}); check the server's disk")
            )
        except (OSError, MemoryError) as error:
            if not is_shortage(error):
                raise
            with run.mutex:
                refused = run.conditions.failed("a request", error)
            refuse(future, refused)
        return None
