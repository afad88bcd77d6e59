"""A generation on its way from the device, which makes states, to one reader, who may be slower."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future

from maskwire_server.engine.futures import answer, refuse
from maskwire_server.requests import GenerateRequest
from maskwire_server.results import GenerateAnswer, GenerationState

MOST_PENDING_BYTES = 32 * 2**20


class Generation:
    """A job in the line, and what its reader iterates over.

    Three threads meet here: the device's puts states in, the engine's says what they saw once that is
    durable and when there are no more, the reader's takes them out and may cancel. What the reader has
    not taken is bounded: states on the way give way to newer ones, the last one never does, and the
    device never waits.
    """

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.future: Future[None] = Future()
        """Done when nothing more comes: finished, refused or cancelled."""
        self._changed = threading.Condition()
        self._states: deque[GenerationState] = deque()
        self._pending_bytes = 0
        self._seen: tuple[int, bytes] | None = None
        self.future.add_done_callback(lambda _: self._notify())

    @property
    def over(self) -> bool:
        """Nobody wants another pass."""
        return self.future.done()

    def put(self, state: GenerationState) -> bool:
        """A pass was made; whether another is wanted."""
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
        """The step whose weights are sampled is durable: the reader may see what there is."""
        with self._changed:
            self._seen = (step, digest)
            self._changed.notify_all()

    def finish(self) -> None:
        """The last state was put in, and may be seen."""
        if not self.over:
            answer(self.future, None)

    def refuse(self, error: BaseException) -> None:
        """Nothing more comes, and this is why."""
        if not self.over:
            refuse(self.future, error)

    def cancel(self) -> None:
        """The reader has gone."""
        self.future.cancel()

    def __iter__(self) -> Iterator[GenerateAnswer]:
        """Answers until the last; raises Refused, or CancelledError after `cancel`."""
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
