"""Rules for retries: which failed attempts are repeated, after how long, and which error ends them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from maskwire.arguments import check_real
from maskwire.errors import Failure, MaskwireError, UnavailableError

_MAX_SECONDS = 1e7  # gRPC accepts no infinite deadline
_CONNECTED_AFTER = 60.0  # seconds after which an attempt that is still running has reached the server
_CALLS_WITHOUT_DEADLINE = {"Generate"}  # may take thousands of passes; keepalive detects a vanished server
# The server restarts these calls from the beginning when a deadline ends one, so their deadline is long.
_LONG_CALLS = {"EvalLoss", "Checkpoint", "RestoreCheckpoint"}
_SHORT_CALLS = {"GetStatus", "ListCheckpoints", "ListSteps"}
_RETRY_ADVICE = re.compile(r"; retry(?: with the same request id)?$")


@dataclass(frozen=True)
class RetryPolicy:
    """How long to retry a call, the deadline of each attempt, and the waits between attempts."""

    retry_for: float = 300.0
    """Seconds for which a call to a server that does not answer is retried."""
    attempt_timeout: float = 60.0
    """Deadline of one attempt, in seconds."""
    first_wait: float = 0.05
    longest_wait: float = 1.0

    def __post_init__(self) -> None:
        for name, lowest in (("retry_for", 0.0), ("attempt_timeout", 1e-3)):
            value = getattr(self, name)
            check_real(name.removeprefix("attempt_"), value, " of seconds")
            if not lowest <= value <= _MAX_SECONDS:
                raise ValueError(
                    f"{name.removeprefix('attempt_')} must be {lowest:g} to {_MAX_SECONDS:g} s, got {value}"
                )

    def timeout(self, method: str) -> float:
        """Return the deadline of one attempt to call a method of the service, in seconds."""
        if method in _CALLS_WITHOUT_DEADLINE:
            return _MAX_SECONDS
        if method in _LONG_CALLS:
            return max(self.attempt_timeout, self.retry_for)
        if method in _SHORT_CALLS:
            return min(self.attempt_timeout, max(1.0, self.retry_for))
        return self.attempt_timeout

    def restarts_limit(self, method: str, seconds: float) -> bool:
        """Whether the time limit for retries starts again after an attempt that failed after `seconds`.

        It does for a call without a deadline that lasted longer than the limit, because the server was
        computing during that time. Shorter attempts may have failed to connect, which takes up to 20 s.
        """
        return method in _CALLS_WITHOUT_DEADLINE and seconds > max(self.retry_for, _CONNECTED_AFTER)

    def wait(
        self, failure: Failure, attempt: int, elapsed: float, jitter: Callable[[], float] = random.random
    ) -> float | None:
        """Return the seconds to wait before the next attempt; None if the call is given up.

        attempt: The number of the attempt that failed, from 0.
        elapsed: The seconds since the call began.

        The wait grows exponentially up to `longest_wait`. A random factor in [0.5, 1) keeps many clients from
        retrying at the same moment when the server is back.
        """
        if not failure.retryable or elapsed >= self.retry_for:
            return None
        wait = max(self.first_wait * 2.0 ** min(attempt, 30), failure.retry_after or 0.0)
        return min(self.longest_wait, wait) * (0.5 + jitter() / 2)


def without_advice(error: MaskwireError) -> str:
    """Return an error's message without the server's advice to retry, since this client does retry."""
    return _RETRY_ADVICE.sub("", str(error))


def given_up(
    target: str, method: str, last: Failure, retry_for: float, answered: tuple[MaskwireError, float] | None
) -> UnavailableError:
    """Return the error that a call raises when its retries end without success.

    `last` is the last failure. `answered` is the last error with which the server itself answered, and how
    many seconds ago it did. If the server is reachable but keeps refusing, as with HELD, the message says so.
    """
    error = last.error
    if not last.unreachable:
        text = (
            f"{target} still answers {error.reason} after {retry_for:g} s: {without_advice(error)}; "
            f"`maskwire status -t {target}` shows what it is waiting for"
        )
    else:
        text = (
            f"{target} did not answer within {retry_for:g} s ({error}); is the server running and the "
            "address right?"
        )
        if method != "GetStatus":  # `maskwire status` calls this method itself
            text += f" `maskwire status -t {target}` shows its state."
        if answered is not None:
            answer, ago = answered
            text += f" Its last answer, {ago:.0f} s ago, was {answer.reason}: {without_advice(answer)}"
    return UnavailableError(text, reason=error.reason, metadata=error.metadata)
