"""The errors of the server, and one table of the reasons for which it refuses a call.

    MaskwireError
    ├── Refused            a call is refused; `reason` is a key of REASONS
    ├── ConfigError        the configuration is invalid; one line per problem
    ├── RunDirectoryError  the run directory cannot be used; the server does not start
    │   └── FencedError    another server has taken the run over through its mirror
    ├── StoreError         the object store failed or refused; the same call may succeed later
    ├── Unwanted           the client no longer waits for the result, so the computation was stopped
    ├── Diverged           the weights produce results that are not finite
    ├── DeviceLost         the device failed; the process must restart
    └── StateLost          an update failed half-way; the process must restart

A status is the name of a `grpc.StatusCode`, as a string, so that this module does not import gRPC.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """The gRPC status of a refusal, and when the client may retry the call."""

    status: str
    """The name of the `grpc.StatusCode`."""
    retry_after_seconds: float | None = None
    """Sent as RetryInfo; None if waiting does not help."""


REASONS: dict[str, Reason] = {
    "INVALID_FIELD": Reason("INVALID_ARGUMENT"),
    "PAYLOAD_MISMATCH": Reason("INVALID_ARGUMENT"),
    "WRONG_RUN": Reason("FAILED_PRECONDITION"),
    "UNKNOWN_EPOCH": Reason("FAILED_PRECONDITION"),
    "WRITER_PRESENT": Reason("FAILED_PRECONDITION"),
    "HALTED": Reason("FAILED_PRECONDITION"),
    "DIVERGED": Reason("FAILED_PRECONDITION"),
    "TOKENIZER_MISMATCH": Reason("FAILED_PRECONDITION"),
    "DATA_CHANGED": Reason("FAILED_PRECONDITION"),
    "DIGEST_VERSION": Reason("FAILED_PRECONDITION"),
    "UNAUTHENTICATED": Reason("UNAUTHENTICATED"),
    "PERMISSION_DENIED": Reason("PERMISSION_DENIED"),
    "FENCED": Reason("ABORTED"),
    "STEP_TAKEN": Reason("ALREADY_EXISTS"),
    "CHECKPOINT_EXISTS": Reason("ALREADY_EXISTS"),
    "CHECKPOINT_NOT_FOUND": Reason("NOT_FOUND"),
    "CHECKPOINT_NEEDED": Reason("FAILED_PRECONDITION"),
    "CHECKPOINT_DAMAGED": Reason("DATA_LOSS"),
    "CHECKPOINT_FAILED": Reason("RESOURCE_EXHAUSTED"),
    "HISTORY_LOST": Reason("DATA_LOSS"),
    "GAP": Reason("OUT_OF_RANGE"),
    "QUEUE_FULL": Reason("RESOURCE_EXHAUSTED", 0.1),
    "READ_TOO_LONG": Reason("RESOURCE_EXHAUSTED"),
    "RECOVERING": Reason("UNAVAILABLE", 1.0),
    "RESTORING": Reason("UNAVAILABLE", 0.5),
    "DRAINING": Reason("UNAVAILABLE", 1.0),
    "HELD": Reason("UNAVAILABLE", 1.0),
    "OUT_OF_RESOURCES": Reason("RESOURCE_EXHAUSTED", 1.0),
    "DEADLINE_EXCEEDED": Reason("DEADLINE_EXCEEDED"),
    "CANCELLED": Reason("CANCELLED"),
    "UNIMPLEMENTED": Reason("UNIMPLEMENTED"),
    "INTERNAL": Reason("INTERNAL"),
}


class MaskwireError(Exception):
    """An error that the server raises on purpose."""


class Refused(MaskwireError):
    """The server refuses a call, and has changed nothing.

    `metadata` holds the values that the message contains. `fields` holds the message about each invalid
    field, by the field's name, and is sent as BadRequest.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        fields: dict[str, str] | None = None,
        **metadata: object,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_seconds = REASONS[reason].retry_after_seconds
        self.message = message
        self.fields = fields or {}
        self.metadata = {name: str(value) for name, value in metadata.items()}


def invalid_field(field: str, message: str, **metadata: object) -> Refused:
    """The refusal of an invalid field; `message` must begin with its name and say what would be valid."""
    return Refused("INVALID_FIELD", message, fields={field: message}, field=field, **metadata)


_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN)


def is_shortage(error: BaseException | None) -> bool:
    """Whether an error means that the process or machine ran out of open files or memory.

    A file that could not be read for this reason may be intact.
    """
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _SHORTAGES)


def shortage(error: BaseException) -> Refused | None:
    """The refusal of a request that failed for lack of open files or memory; None for any other error."""
    if not is_shortage(error):
        return None
    what = (error.strerror if isinstance(error, OSError) else None) or "out of memory"
    return Refused(
        "OUT_OF_RESOURCES",
        f"the server ran out of open files or memory ({what}), and nothing changed; retry, and if the error "
        "persists, raise the server's limit of open files (ulimit -n) or of memory",
        error=what,
    )


class ConfigError(MaskwireError):
    """The configuration is invalid. The message names the key, the value and what would be valid."""


class RunDirectoryError(MaskwireError):
    """The run directory cannot be used. The message says why, and what to do."""


class FencedError(RunDirectoryError):
    """Another server has taken the run over: it wrote the next segment at the mirror's address.

    This process must end, and its run directory must not be served again.
    """


class StoreError(MaskwireError):
    """The object store failed, or refused a call. The same call may succeed later."""


class Unwanted(MaskwireError):
    """The client no longer waits for the result, for example because it disconnected."""


class DeviceLost(MaskwireError):
    """The device cannot be used any more in this process.

    The process ends, and a restart recovers the last durable step.
    """


class Diverged(MaskwireError):
    """The weights produce results that are not finite, so they cannot be evaluated or sampled from."""


class StateLost(MaskwireError):
    """An update failed half-way: the state in memory is neither the old one nor the new one.

    The process ends, and a restart recovers the last durable step.
    """
