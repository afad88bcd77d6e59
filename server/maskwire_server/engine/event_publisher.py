"""The publisher of a run's events. It never blocks: a subscriber that is slow, blocks or fails loses events.

Each subscriber has a bounded queue and a thread of its own, so that none delays the run or another
subscriber. Without subscribers there is neither queue nor thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from maskwire_server.events import Event, Subscriber

log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0
PAUSE_SECONDS = 0.05
"""How long a subscriber's thread sleeps between groups of events: waking it for each would delay a step."""
QUEUED_EVENTS = 4096
"""The most events that wait for one subscriber; a step publishes one to three."""


class Publisher:
    """Passes each event to the aggregates at once, and to the subscribers through their queues."""

    def __init__(self, aggregate: Callable[[Event], None] | None = None) -> None:
        self._aggregate = aggregate
        self._feeds: tuple[Feed, ...] = ()

    def subscribe(self, subscriber: Subscriber, limit: int = QUEUED_EVENTS) -> None:
        """Start to pass events to a subscriber."""
        feed = Feed(subscriber, limit)
        self._feeds = (*self._feeds, feed)
        feed.start()

    def publish(self, event: Event) -> None:
        """Pass an event to the aggregates and the subscribers. Any thread may call it. It never waits."""
        if self._aggregate is not None:
            self._aggregate(event)
        for feed in self._feeds:
            if type(event) in feed.subscriber.kinds:
                feed.put(event)

    def wanted(self, kind: type[Event]) -> bool:
        """Whether a subscriber wants events of this kind. If not, such events need not be created."""
        return any(kind in feed.subscriber.kinds for feed in self._feeds)

    @property
    def dropped(self) -> dict[str, int]:
        """The number of events that each subscriber has lost."""
        return {feed.subscriber.name: feed.dropped for feed in self._feeds}

    def close(self, seconds: float = 2.0) -> None:
        """Let each subscriber handle its queued events, for at most `seconds`, and end their threads."""
        for feed in self._feeds:
            feed.stop()
        for feed in self._feeds:
            feed.join(seconds)


class Feed:
    """The bounded queue of one subscriber, and the thread that empties it."""

    def __init__(self, subscriber: Subscriber, limit: int) -> None:
        self.subscriber = subscriber
        self.dropped = 0
        """Events that found the queue full, or that the subscriber failed to handle."""
        self._limit = limit
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._stopping = self._waiting = False
        self._failed = False
        self._thread = threading.Thread(target=self._main, name=f"maskwire-{subscriber.name}", daemon=True)

    def start(self) -> None:
        """Start the subscriber's thread."""
        self._thread.start()

    def put(self, event: Event) -> None:
        """Queue an event, or count it as dropped."""
        with self._changed:
            if len(self._events) >= self._limit or self._stopping:
                self.dropped += 1
                return
            self._events.append(event)
            if self._waiting:
                self._waiting = False
                self._changed.notify()

    def stop(self) -> None:
        """Accept no more events. The thread ends when it has handled those that are queued."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def join(self, seconds: float) -> None:
        """Wait at most `seconds` for the thread to end. A blocked thread ends with the process."""
        self._thread.join(seconds)

    def _main(self) -> None:
        again = False
        while True:
            with self._changed:
                if not self._events and not self._stopping:
                    self._waiting = True
                    self._changed.wait(IDLE_SECONDS if again else None)
                    self._waiting = False
                if self._stopping and not self._events:
                    break
            while self._events:
                self._call(self.subscriber.receive, self._events.popleft())
                time.sleep(0)  # let a thread of the run go first
            again = bool(self._call(self.subscriber.idle))
            if not self._stopping:
                time.sleep(PAUSE_SECONDS)
        self._call(self.subscriber.close)

    def _call(self, method: Callable[..., bool | None], *event: Event) -> bool | None:
        try:
            return method(*event)
        except Exception:
            with self._changed:
                self.dropped += len(event)
            if not self._failed:  # once: it may fail for every event
                self._failed = True
                log.exception(
                    "%s failed; the run continues, and further failures are only counted",
                    self.subscriber.name,
                )
            return None
