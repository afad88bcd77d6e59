"""A running generation: a bounded buffer between the device and one reader, who may be slower."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future

from maskwire_server.requests import GenerateRequest
from maskwire_server.results import GenerateAnswer, GenerationState

MOST_PENDING_BYTES = 32 * 2**20


class Generation:
    """A queue entry for the executor, and an iterator over answers for the reader.

    Three threads use it. The executor puts states into the buffer. The committer calls `reveal` when the step
    whose weights are used is durable, and answers `future` after the last state. The reader iterates, and may
    cancel.
    The buffer is bounded: newer states replace older ones, the last state is never replaced, and the
    executor never waits.
    """

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.future: Future[None] = Future()
        """Done when the generation has finished, was refused or was cancelled."""
        self._changed = threading.Condition()
        self._states: deque[GenerationState] = deque()
        self._pending_bytes = 0
        self._seen: tuple[int, bytes] | None = None
        self.future.add_done_callback(lambda _: self._notify())

    @property
    def over(self) -> bool:
        """Whether the generation has ended, so that no further pass is needed."""
        return self.future.done()

    def put(self, state: GenerationState) -> bool:
        """Buffer the state after a pass, and return whether another pass is needed."""
        if not (state.done or self.request.every_step):
            return not self.over
        with self._changed:
            self._states.append(state)
            self._pending_bytes += state.ids.nbytes
            while self._pending_bytes > MOST_PENDING_BYTES and len(self._states) > 1:
                self._pending_bytes -= self._states.popleft().ids.nbytes
            self._changed.notify_all()
        return not self.over

    def reveal(self, step: int, digest: bytes) -> None:
        """Let the reader see the buffered states, now that the step whose weights they use is durable."""
        with self._changed:
            self._seen = (step, digest)
            self._changed.notify_all()

    def cancel(self) -> None:
        """Stop the generation, because its client has disconnected."""
        self.future.cancel()

    def __iter__(self) -> Iterator[GenerateAnswer]:
        """Yield the answers until the last one. Raises Refused, or CancelledError after `cancel`."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.over or (self._seen and self._states))
                if self.future.cancelled():
                    raise CancelledError
                if not self._seen or not self._states:
                    break
                state = self._states.popleft()
                self._pending_bytes -= state.ids.nbytes
                step, digest = self._seen
            yield GenerateAnswer(state, step, digest)
        self.future.result()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
