"""Every error the server answers with, as values in one table.

    MaskwireError
    ├── Refused          an RPC is refused; `reason` is a row of REASONS
    ├── ConfigError      the configuration cannot be used; one line a problem
    └── RunDirectoryError  the run directory cannot be used; the server does not start

The status is a name of `grpc.StatusCode`, kept as a string so that nothing here needs gRPC.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """How one refusal travels."""

    status: str
    """The name of the `grpc.StatusCode`."""
    retry_after_seconds: float | None = None
    """Sent as RetryInfo when waiting helps."""


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
    """Everything that maskwire's server raises on purpose."""


class Refused(MaskwireError):
    """An RPC is refused and nothing changed.

    `metadata` holds every dynamic value of the message, `fields` the offending fields with what would
    be right (BadRequest).
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
        self.message = message
        self.fields = fields or {}
        self.metadata = {name: str(value) for name, value in metadata.items()}

    @property
    def kind(self) -> Reason:
        """The row of the table."""
        return REASONS[self.reason]


def invalid_field(field: str, message: str, **metadata: object) -> Refused:
    """An INVALID_FIELD refusal; `message` begins with the field's name and tells what would be right."""
    return Refused("INVALID_FIELD", message, fields={field: message}, field=field, **metadata)


_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN)


def is_shortage(error: BaseException | None) -> bool:
    """Whether the process, or the machine, was out of open files or memory: it says nothing of any file."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _SHORTAGES)


def shortage(error: BaseException) -> Refused | None:
    """The refusal of a request that failed for such a want; None for any other error."""
    if not is_shortage(error):
        return None
    what = (error.strerror if isinstance(error, OSError) else None) or "out of memory"
    return Refused(
        "OUT_OF_RESOURCES",
        f"the server is short of what the request takes ({what}), and nothing changed; ask again, and if it "
        "stays so, raise the server's limit of open files (ulimit -n) or of memory",
        error=what,
    )


class ConfigError(MaskwireError):
    """The configuration cannot be used; the message names the key, the value and the range."""


class RunDirectoryError(MaskwireError):
    """The run directory cannot be used; the message says why and what to do."""


class Unwanted(MaskwireError):
    """Whoever asked has gone: there is no more to compute."""


class DeviceLost(MaskwireError):
    """The device computes nothing more in this process.

    The process ends; a restart recovers the last durable step.
    """


class Diverged(MaskwireError):
    """What the weights compute is not finite: there is nothing to evaluate or to sample from."""


class StateLost(MaskwireError):
    """An update failed half-way: the state in memory is neither the old one nor the new one.

    The process ends; a restart recovers the last durable step.
    """
