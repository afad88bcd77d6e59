"""The state that the threads of a run share, under one mutex."""

from __future__ import annotations

import threading
from collections.abc import Callable

from maskwire_server.config import ServeConfig
from maskwire_server.engine.admission import Situation
from maskwire_server.engine.lease import Lease
from maskwire_server.engine.queue import Queue
from maskwire_server.engine.state import Conditions, Head
from maskwire_server.engine.throughput import Rate
from maskwire_server.journal.records import Lineage


class Run:
    """The run's conditions, the head of its history, its writer lease, and the executor's queue.

    Admission, the executor and the committer change them under `mutex`. Status reports read without it.
    """

    def __init__(self, serve: ServeConfig, clock: Callable[[], float]) -> None:
        self.mutex = threading.RLock()
        self.work = threading.Condition(self.mutex)
        """Notified when the executor may have work."""
        self.conditions = Conditions()
        self.head = Head()
        self.lease = Lease(serve.session_idle_seconds, clock)
        self.queue = Queue(clock, serve.gap_seconds)
        self.rate = Rate(60, clock)
        self.lineages: dict[int, Lineage] = {}
        """Every recorded lineage, by number."""
        self.uncommitted = 0
        """Computed steps that are not durable yet."""
        self.uncommitted_bytes = 0
        """The encoded size of their batches."""
        self._window = serve.window

    @property
    def next_number(self) -> int:
        """The number of the first step that is neither applied nor in flight."""
        return self.head.computed.step + self.queue.ahead + 1

    def situation(self) -> Situation:
        """The facts that admission decides on."""
        here = self.head.computed
        return Situation(
            state=self.conditions.state,
            run_id=here.run_id,
            lineage=here.lineage,
            epoch=self.lease.epoch,
            writer=self.lease.present(self.queue.busy),
            closed=self.lease.closed,
            next_step=self.next_number,
            window=self._window,
            refused_step=self.queue.refused_number,
            holder=self.lease.holder,
        )

    def expire(self) -> None:
        """Refuse early steps whose predecessor did not arrive within `gap_seconds`."""
        self.queue.expire(self.next_number)
