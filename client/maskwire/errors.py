"""Everything the client raises.

    MaskwireError
    ├── RequestError             the server refused the request, nothing changed
    │   ├── InvalidRequestError      a field is wrong; `.field` names it
    │   ├── ConflictError            the step or request id was used otherwise
    │   ├── HaltedError              three steps in a row were not finite
    │   ├── DivergedError            the weights give losses or logits that are not finite
    │   ├── CheckpointError          not found, taken, needed, damaged, or not written
    │   ├── TokenizerError           the run's ids stand for something else
    │   ├── DataMismatchError        the run was trained on other data
    │   ├── DigestVersionError       this client is too old for the run's digest
    │   └── UnimplementedError       this server does not serve it
    ├── SessionError             this client may not write
    │   ├── FencedError              another writer took over: stop
    │   ├── WriterPresentError       another client's session is open
    │   └── WrongRunError            the session is of another run, lineage or epoch
    ├── HistoryError             server and client disagree about what was trained: stop
    │   ├── HistoryLostError         the server lacks steps that it acknowledged
    │   └── DigestMismatchError      the digests differ
    ├── AccessError              access denied: TLS or token rejected
    │   ├── UnauthenticatedError     no token, or one that it does not know
    │   ├── PermissionDeniedError    the token's role may not do this
    │   └── TlsError                 the certificates do not fit
    ├── ForkError                the client was made before this process was forked
    ├── EventLoopError           the asyncio client belongs to another event loop
    ├── StepMovedError           the run was trained on while it was evaluated over several calls
    ├── UnavailableError         no answer, or not yet: the outcome is unknown
    │   └── UnresolvedError          the target's host name does not exist
    └── ServerError              the server failed; its log explains `.error_id`

`REASONS` is the one table from the wire's reasons to these classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status


class MaskwireError(Exception):
    """`reason` is the wire's name of it, `metadata` every dynamic value of the message."""

    def __init__(self, message: str, *, reason: str = "", metadata: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.metadata = metadata or {}


class RequestError(MaskwireError):
    """The server refused the request; nothing changed."""


class InvalidRequestError(RequestError):
    """A field of the request is wrong; the message says what would be right."""

    @property
    def field(self) -> str:
        """The field's name."""
        return self.metadata.get("field", "")


class ConflictError(RequestError):
    """The step or the request id was used for something else."""


class HaltedError(RequestError):
    """Three steps in a row were not finite; look at the data, then connect with takeover=True."""


class DivergedError(RequestError):
    """The weights give losses or logits that are not finite; restore a checkpoint from before."""


class CheckpointError(RequestError):
    """The checkpoint was not found, is taken, needed or damaged, or could not be written."""


class UnimplementedError(RequestError):
    """This server does not serve the request."""


class SessionError(MaskwireError):
    """This client may not write."""


class FencedError(SessionError):
    """Another writer took over, named in the message; this client must stop."""


class WriterPresentError(SessionError):
    """Another client's session is open; wait until it is closed or idle, or connect with takeover=True."""


class WrongRunError(SessionError):
    """The session is of another run, lineage or epoch: connect again; or a save expected another step."""


class TokenizerError(RequestError):
    """The run was begun with another tokenizer: the same ids stand for something else."""


class DataMismatchError(RequestError):
    """The run was trained on other data; `fit` continues with the changed data if `allow_changed_data`."""


class DigestVersionError(RequestError):
    """This client does not compute the version of the run's digest: use a newer client."""


class AccessError(MaskwireError):
    """The server does not let this client in."""


class UnauthenticatedError(AccessError):
    """No token came with the request, or one that the server does not know or that has expired."""


class PermissionDeniedError(AccessError):
    """The token's role may not do this; the message names the one that may."""


class TlsError(AccessError):
    """The connection could not be secured: the message says which certificate does not fit."""


class ForkError(MaskwireError, RuntimeError):
    """The client was made in another process, of which this one is a fork: make one here."""


class EventLoopError(MaskwireError, RuntimeError):
    """The asyncio client was first used in another event loop: make one for each loop."""


class StepMovedError(MaskwireError):
    """The run was trained on, or restored, during an evaluation that takes several calls."""


class HistoryError(MaskwireError):
    """Server and client disagree about what was trained; stop and look at the server's storage."""


class HistoryLostError(HistoryError):
    """The server lacks steps that it acknowledged to this client."""


class DigestMismatchError(HistoryError):
    """The server's digest is not the one of what this client sent."""


class UnavailableError(MaskwireError):
    """No answer came, or the server asks to wait: whether a step was applied is unknown."""


class UnresolvedError(UnavailableError):
    """The target's host name does not exist: nothing was sent."""


class ServerError(MaskwireError):
    """The server failed unexpectedly; nothing changed, and its log explains `error_id`."""

    @property
    def error_id(self) -> str:
        """What to look for in the server's log."""
        return self.metadata.get("error_id", "")


REASONS: dict[str, type[MaskwireError]] = {
    "INVALID_FIELD": InvalidRequestError,
    "PAYLOAD_MISMATCH": ConflictError,
    "STEP_TAKEN": ConflictError,
    "GAP": ConflictError,
    "HALTED": HaltedError,
    "DIVERGED": DivergedError,
    "CHECKPOINT_EXISTS": CheckpointError,
    "CHECKPOINT_NOT_FOUND": CheckpointError,
    "CHECKPOINT_NEEDED": CheckpointError,
    "CHECKPOINT_DAMAGED": CheckpointError,
    "CHECKPOINT_FAILED": CheckpointError,
    "UNIMPLEMENTED": UnimplementedError,
    "FENCED": FencedError,
    "WRITER_PRESENT": WriterPresentError,
    "WRONG_RUN": WrongRunError,
    "UNKNOWN_EPOCH": WrongRunError,
    "TOKENIZER_MISMATCH": TokenizerError,
    "DATA_CHANGED": DataMismatchError,
    "DIGEST_VERSION": DigestVersionError,
    "HISTORY_LOST": HistoryLostError,
    "UNAUTHENTICATED": UnauthenticatedError,
    "PERMISSION_DENIED": PermissionDeniedError,
    "QUEUE_FULL": UnavailableError,
    "RECOVERING": UnavailableError,
    "RESTORING": UnavailableError,
    "DRAINING": UnavailableError,
    "HELD": UnavailableError,
    "OUT_OF_RESOURCES": UnavailableError,
    "DEADLINE_EXCEEDED": UnavailableError,
    "CANCELLED": UnavailableError,
    "INTERNAL": ServerError,
}

_BY_STATUS: dict[grpc.StatusCode, type[MaskwireError]] = {
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: UnavailableError,
    grpc.StatusCode.CANCELLED: UnavailableError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: RequestError,
}


# What gRPC says when a secure connection fails, and what to do about it.
_TLS: dict[str, str] = {
    "certificate has expired": "the server's certificate has expired: have it renewed",
    "certificate is not yet valid": "the server's certificate is not valid yet: look at both clocks",
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not signed by an authority that this client "
    "trusts: give its file as ca (--ca)",
    "Hostname Verification Check failed": "the server's certificate is for another name: connect by a name "
    "that it lists, or give that as server_name (--server-name)",
    "WRONG_VERSION_NUMBER": "the server speaks plaintext there: leave TLS out, or reach its TLS port",
}
_TOO_LONG = "larger than max"
_TOO_LONG_HINT = ": send fewer rows in one call, or raise the server's serve.max_message_bytes"
# What gRPC's resolvers say of a name that does not exist. Not one of these: a name without an address (a
# headless service whose pods are not ready yet), and a DNS server that fails or is silent.
_NO_SUCH_NAME = ("Domain name not found", "Misformatted domain name", "Name or service not known")
_CLOSED = "Socket closed"
_CLOSED_HINT = (
    "; if the server wants TLS, give its authority's file (ca=, --ca) or speak TLS by the system's "
    "authorities (tls=True, --tls); if it wants a client certificate, give cert and key"
)


@dataclass(frozen=True)
class Failure:
    """One failed attempt: the error it would be, and whether another attempt can help."""

    error: MaskwireError
    retryable: bool
    """The outcome is unknown, or the server says when to ask again."""
    unreachable: bool = False
    """No answer came: the server may have been restarted meanwhile."""
    unresolved: bool = False
    """The target's name does not exist: nothing there can start, unless it existed before."""
    retry_after: float | None = field(default=None)
    """Seconds, where the server said."""


def read_failure(error: grpc.RpcError) -> Failure:
    """What a failed RPC means."""
    call: Any = error  # what a stub raises is a grpc.Call too
    code, text = call.code(), call.details() or str(error)
    info, retry_after = _details(call)
    unknown = code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    if info is not None:
        kind = REASONS.get(info.reason, ServerError)
        made = kind(text, reason=info.reason, metadata=dict(info.metadata))
        return Failure(made, unknown or retry_after is not None, retry_after=retry_after)
    for sign, cure in _TLS.items():
        if unknown and sign in text:
            return Failure(TlsError(f"{cure} ({_last(text)})", reason="TLS"), retryable=False)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LONG in text:
        text += _TOO_LONG_HINT
    for sign in _NO_SUCH_NAME:
        if unknown and sign in text:
            unresolved = UnresolvedError(
                f"the target's host name does not resolve: is it spelled right, and does the DNS of this "
                f"machine, container or cluster know it? ({text})",
                reason="UNRESOLVED",
            )
            return Failure(unresolved, retryable=True, unreachable=True, unresolved=True)
    if unknown and _CLOSED in text:
        text = _last(text).removeprefix(f"{code.name}: ") + _CLOSED_HINT
    kind = _BY_STATUS.get(code, ServerError)
    return Failure(kind(f"{code.name}: {text}", reason=code.name), unknown, unreachable=unknown)


def _last(text: str) -> str:
    """gRPC's text without the list of what it tried."""
    return text.rpartition("last error: ")[2]


def _details(call: Any) -> tuple[error_details_pb2.ErrorInfo | None, float | None]:
    info, retry_after = None, None
    status: Any = rpc_status.from_call(call)
    for detail in () if status is None else status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    return info, retry_after
