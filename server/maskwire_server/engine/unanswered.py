"""The answers that callers wait for: each caller gets one, even if the process is shutting down."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from maskwire_server.engine import admission_rules
from maskwire_server.engine.futures import refuse
from maskwire_server.engine.shared_state import Run
from maskwire_server.errors import Refused, is_shortage

T = TypeVar("T")


class Unanswered:
    """The futures that are not answered yet. All methods can be called from any thread."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._futures: set[Future[Any]] = set()
        self._serving = self._stopped = False

    @property
    def serving(self) -> bool:
        """Whether the run has recovered and the process is not shutting down."""
        return self._serving and not self._stopped

    def begin(self) -> None:
        """Accept requests from now on, because the run has recovered."""
        self._serving = True

    def end(self) -> None:
        """Accept no more requests, because the process is shutting down."""
        self._stopped = True

    def require_serving(self) -> None:
        """Raise Refused unless requests are accepted."""
        if not self.serving:
            admission_rules.refuse_unavailable(self._run.conditions.state)
            raise admission_rules.shutting_down()

    def add(self, future: Future[T]) -> Future[T]:
        """Register and return `future`, which is refused if the process shuts down before it is answered."""
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        if self._stopped:  # `refuse_all` may have run before `future` was added
            self.refuse_all()
        return future

    @contextlib.contextmanager
    def answering(self, future: Future[Any]) -> Iterator[None]:
        """Register `future`, and refuse it if the `with` block raises Refused.

        The future is also refused if the block runs out of memory or open files. Raises Refused unless
        requests are accepted.
        """
        self.require_serving()
        self.add(future)
        try:
            yield
        except Refused as refusal:
            refuse(future, refusal)
        except (OSError, MemoryError) as error:
            if not is_shortage(error):
                raise
            with self._run.mutex:
                refused = self._run.conditions.failed("a request", error)
            refuse(future, refused)

    def refuse_all(self) -> None:
        """Refuse every unanswered future. Two threads may call this at once."""
        with contextlib.suppress(KeyError):
            while True:
                future = self._futures.pop()
                if not future.done():
                    refuse(future, admission_rules.shutting_down())
