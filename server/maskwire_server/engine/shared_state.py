"""The state that the threads of a run share, under one mutex."""

from __future__ import annotations

import threading
from collections.abc import Callable

from maskwire.v1.digest import VERSIONS, DigestVersion, newest_common
from maskwire.v1.values import RunState
from maskwire_server.config import ServeConfig
from maskwire_server.engine.admission_rules import Situation
from maskwire_server.engine.aggregates import Aggregates
from maskwire_server.engine.device_share import DeviceSharing
from maskwire_server.engine.event_publisher import Publisher
from maskwire_server.engine.lease import Lease
from maskwire_server.engine.progress import Progress
from maskwire_server.engine.queue import Queue
from maskwire_server.engine.state import Conditions, Head
from maskwire_server.engine.step_timeout import StepTimeout
from maskwire_server.engine.wakeup import Wakeup
from maskwire_server.events import StateChanged
from maskwire_server.journal.records import Lineage

REMEMBERED_IDS = 10_000


class Run:
    """The run's conditions, the head of its history, its writer lease, and the executor's queue.

    Admission, the executor and the committer change them under `mutex`. Status reports read them without
    locking it.
    """

    def __init__(self, serve: ServeConfig, clock: Callable[[], float]) -> None:
        self.mutex = threading.RLock()
        self.work = Wakeup()
        """Set when the executor may have work."""
        self.conditions = Conditions()
        self.head = Head()
        self.lease = Lease(serve.session_idle_seconds, clock)
        self.queue = Queue(clock, serve.gap_seconds)
        self.aggregates = Aggregates(clock)
        self.events = Publisher(self.aggregates.add)
        self.conditions.on_change(self._publish_state)
        self.share = DeviceSharing(clock, serve.max_read_seconds)
        self.step_timeout = StepTimeout(serve.step_timeout_seconds)
        self.computing = Progress(clock)
        """What the executor is doing."""
        self.committing = Progress(clock)
        """What the committer is doing."""
        self.lineages: dict[int, Lineage] = {}
        """Every recorded lineage, by number."""
        self.num_tokens = 0
        """The size of the vocabulary, which payload hashes depend on."""
        self.trained_ids: dict[str, int] = {}
        """Step numbers by request id, for the last REMEMBERED_IDS steps of this process that had such an id.

        A client may renumber a step and keep its id: a delayed request under the old number must not train
        the batch again.
        """
        self.uncommitted = 0
        """Computed steps that are not durable yet."""
        self.uncommitted_bytes = 0
        """The encoded size of the batches of those steps, in bytes."""
        self._window = serve.window

    def _publish_state(self, state: RunState) -> None:
        conditions = self.conditions
        self.events.publish(StateChanged(conditions.since, state, conditions.waiting_for))

    def remember(self, request_id: str | None, number: int) -> None:
        """Note that step `number`, which has this request id, was computed."""
        if request_id is not None:
            self.trained_ids[request_id] = number
            if len(self.trained_ids) > REMEMBERED_IDS:
                del self.trained_ids[next(iter(self.trained_ids))]

    @property
    def next_number(self) -> int:
        """The number of the first step that is neither applied nor in flight."""
        return self.head.computed.step + self.queue.ahead + 1

    @property
    def digest_version(self) -> DigestVersion | None:
        """The version of the run's digest; None before the first step.

        A first step that is being computed counts: its version becomes the run's unless the step fails.
        """
        computing = self.queue.computing
        return self.head.digest_version or (computing.digest_version if computing else None)

    def step_version(self, *, bare: bool) -> DigestVersion:
        """The digest version with which to hash a new step. `bare` says that the call has no session.

        This is the run's version. Before the first step, it is the newest version that the caller supports.
        """
        number = VERSIONS[-1] if bare else newest_common(self.lease.digest_versions)
        return self.digest_version or DigestVersion(number, self.num_tokens)

    def situation(self) -> Situation:
        """The facts by which admission decides on a request."""
        here, version = self.head.computed, self.digest_version
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
            digest_version=version.number if version else 0,
            digest_version_provisional=version is not self.head.digest_version,
            digest_versions=self.lease.digest_versions,
        )
