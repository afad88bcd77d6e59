"""Calls that are retried until the server answers, or until an error that a retry cannot fix."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from maskwire.arguments import check_function
from maskwire.errors import Failure, MaskwireError
from maskwire.protocol.effects import Call, Notify, Operation, Pause, Receive, Stream
from maskwire.protocol.retry import RetryPolicy, given_up, without_advice


class OrderedCall(Protocol):
    """A call that belongs to a sequence of calls, which determines when each attempt may be sent."""

    def before_attempt(self, began: float) -> Operation[None]:
        """Wait until the call may be sent. `began` is the time at which the call was first tried."""

    def after_attempt(self) -> None:
        """Record that the attempt has ended, with or without an answer."""

    def can_resend_now(self, error: MaskwireError) -> Operation[bool]:
        """Whether to send the call, which was refused with `error`, again at once."""

    def compute_hash(self) -> object:
        """Compute the hash of the payload. Called while the request is in flight."""

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """The gRPC metadata of this call alone, in addition to the metadata of every call."""


def new_id() -> str:
    """Return a new random id for a request or a session: 32 hexadecimal digits."""
    return secrets.token_hex(16)


class RetriedCalls:
    """Makes calls to one server, retries them, and reports to `on_wait` what the client waits for."""

    def __init__(
        self, target: str, policy: RetryPolicy, on_wait: Callable[[str], None], clock: Callable[[], float]
    ) -> None:
        check_function("on_wait", on_wait)
        self.target = target
        self._policy = policy
        self._on_wait = on_wait
        self._clock = clock
        self._reached = False  # the server has answered this client at least once
        self.seconds_waited = 0.0
        """The seconds of all reported waits that have ended. Time in which several calls wait counts once."""
        self._wait_ended = -math.inf

    def _count_wait(self, began: float) -> None:
        now = self._clock()
        self.seconds_waited += now - max(began, self._wait_ended)
        self._wait_ended = now

    def _unreachable(self) -> None:
        """Hook for a subclass, called after an attempt without an answer: the server may have restarted."""

    def _ask(
        self,
        method: str,
        make_request: Callable[[], Any],
        *,
        order: OrderedCall | None = None,
        on_message: Callable[[Any], None] | None = None,
        progress: Callable[[], int] = lambda: 0,
        began: float | None = None,
        stream: bool = False,
    ) -> Operation[Any]:
        """Call a method until the server answers or a retry cannot fix the error, and return the answer.

        With `stream`, returns a `Stream` and its first message. `order` determines when each attempt may be
        sent. `progress` returns how many bytes of a download have arrived: an attempt that makes progress
        restarts the time limit for retries. So does, once, an attempt for which `RetryPolicy.restarts_limit`
        is true. `began` is the time at which the operation that includes this call began.
        """
        began, attempt, reported = self._clock() if began is None else began, 0, ""
        restarted = False  # only once, because the call itself may crash the server each time
        answered: tuple[MaskwireError, float] | None = None  # the server's own last error, and when it came
        while True:
            if order:
                yield from order.before_attempt(began)
            before, timeout, sent = progress(), self._policy.timeout(method), self._clock()
            opened = Stream(method, make_request(), timeout) if stream else None
            reply = yield (
                Receive(opened)
                if opened is not None
                else Call(
                    method,
                    make_request(),
                    timeout,
                    on_message,
                    order.compute_hash if order else None,
                    order.headers if order else (),
                )
            )
            if order:
                order.after_attempt()
            if not isinstance(reply, Failure):
                self._reached = True
                if reported:
                    self._count_wait(began)
                return reply if opened is None else (opened, reply)
            error = reply.error
            if not reply.unreachable:
                self._reached = True
                answered = error, self._clock()
            if reply.unresolved and not self._reached:
                raise error
            if not restarted and self._policy.restarts_limit(method, self._clock() - sent):
                began, attempt, restarted = self._clock(), 0, True
            if progress() != before:
                began, attempt = self._clock(), 0
            elapsed = self._clock() - began
            if order and elapsed < self._policy.retry_for and (yield from order.can_resend_now(error)):
                continue
            wait = self._policy.wait(reply, attempt, elapsed)
            if wait is None:
                if not reply.retryable:
                    raise error
                last = answered and (answered[0], self._clock() - answered[1])
                raise given_up(self.target, method, reply, self._policy.retry_for, last)
            if reply.unreachable:
                self._unreachable()
            message = f"waiting for {self.target}: {without_advice(error)}"
            if attempt and message != reported:  # the first failure is often the only one
                yield Notify(partial(self._on_wait, message))
                reported = message
            attempt += 1
            yield Pause(wait)
