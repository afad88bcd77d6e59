"""The errors that the client raises.

    MaskwireError
    ├── RequestError             the server refused the request; nothing changed
    │   ├── InvalidRequestError      a field is wrong; `.field` names it
    │   ├── ConflictError            the step or request id is already used, or a step before it is missing
    │   ├── HaltedError              three steps in a row were not finite
    │   ├── DivergedError            the weights give losses or logits that are not finite
    │   ├── CheckpointError          not found, taken, needed, damaged, or not written
    │   ├── TokenizerError           the run was started with another tokenizer
    │   ├── DataMismatchError        the run was trained on other data
    │   ├── DigestVersionError       this client is too old for the run's digest
    │   └── UnimplementedError       this server does not support the call
    ├── SessionError             this client may not train the run
    │   ├── FencedError              another writer took over: stop
    │   ├── WriterPresentError       another client's session is open
    │   └── WrongRunError            the session is of another run, lineage or epoch
    ├── HistoryError             server and client disagree about what was trained: stop
    │   ├── HistoryLostError         the server lacks steps that it acknowledged
    │   └── DigestMismatchError      the digests differ
    ├── AccessError              access denied: TLS or token rejected
    │   ├── UnauthenticatedError     the token is missing, unknown or expired
    │   ├── PermissionDeniedError    the token's role does not permit the call
    │   └── TlsError                 the TLS handshake failed
    ├── ForkError                the client was made before this process was forked
    ├── EventLoopError           the asyncio client belongs to another event loop
    ├── StepMovedError           the run's step changed between the calls of one evaluation or generation
    ├── UnavailableError         no answer, or not yet: the outcome is unknown
    │   └── UnresolvedError          the target's host name does not exist
    └── ServerError              the server failed; its log explains `.error_id`

`REASONS` maps the reasons on the wire to these classes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from maskwire.signatures import refuse_unknown_keywords


@refuse_unknown_keywords
class MaskwireError(Exception):
    """Base class. `reason` is the error's name on the wire; `metadata` has the values in its message."""

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
    """The step or the request id is already used for something else, or the step is not the next one."""


class HaltedError(RequestError):
    """Three steps in a row were not finite. Check the data, then connect with takeover=True."""


class DivergedError(RequestError):
    """The weights give losses or logits that are not finite. Restore an earlier checkpoint."""


class CheckpointError(RequestError):
    """The checkpoint does not exist, its name is taken, it is needed or damaged, or writing it failed."""


class UnimplementedError(RequestError):
    """This server does not support the call."""


class SessionError(MaskwireError):
    """This client may not train the run."""


class FencedError(SessionError):
    """Another writer, named in the message, took over. This client must stop."""


class WriterPresentError(SessionError):
    """Another client's session is open; wait until it is closed or idle, or connect with takeover=True."""


class WrongRunError(SessionError):
    """The session belongs to another run, lineage or epoch (connect again), or a request expected the run at
    another step.
    """


class TokenizerError(RequestError):
    """The run was started with another tokenizer, so the same ids mean something else."""


class DataMismatchError(RequestError):
    """The run was trained on other data. `fit(allow_changed_data=True)` continues with the changed data."""


class DigestVersionError(RequestError):
    """This client cannot compute the run's version of the digest. Use a newer client."""


class AccessError(MaskwireError):
    """The server denied access."""


class UnauthenticatedError(AccessError):
    """The token is missing, unknown to the server, or expired."""


class PermissionDeniedError(AccessError):
    """The token's role does not permit the call. The message names a role that does."""


class TlsError(AccessError):
    """The TLS handshake failed. The message says which certificate is wrong."""


class ForkError(MaskwireError, RuntimeError):
    """The client was made before this process was forked. Make a client in this process."""


class EventLoopError(MaskwireError, RuntimeError):
    """The asyncio client was first used in another event loop. Make a client for each loop."""


class StepMovedError(MaskwireError):
    """The run was trained on, or restored, between the calls of one evaluation or generation."""


class HistoryError(MaskwireError):
    """Server and client disagree about what was trained. Stop, and check the server's storage."""


class HistoryLostError(HistoryError):
    """The server lost steps that it acknowledged to this client."""


class DigestMismatchError(HistoryError):
    """The server's digest does not match what this client sent."""


class UnavailableError(MaskwireError):
    """No answer came, or the server asks to retry later. Whether a step was applied is unknown."""


class UnresolvedError(UnavailableError):
    """The target's host name does not exist. Nothing was sent."""


class ServerError(MaskwireError):
    """The server failed unexpectedly. Nothing changed; its log explains `error_id`."""

    @property
    def error_id(self) -> str:
        """The id to search for in the server's log."""
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
    "READ_TOO_LONG": RequestError,
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


# Messages of gRPC when a TLS connection fails, and what to do about each.
_TLS: dict[str, str] = {
    "certificate has expired": "the server's certificate has expired: renew it",
    "certificate is not yet valid": "the server's certificate is not valid yet: check both machines' clocks",
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not signed by an authority that this "
    "client trusts: pass the authority's file as ca (--ca)",
    "Hostname Verification Check failed": "the server's certificate is for another name: connect by a name "
    "in the certificate, or pass one as server_name (--server-name)",
    "WRONG_VERSION_NUMBER": "the server speaks plaintext on this port: connect without TLS, or to its "
    "TLS port",
}
_TOO_LONG = "larger than max"
_TOO_LONG_HINT = ": send fewer rows in one call, or raise the server's serve.max_message_bytes"
# Messages of gRPC's resolvers for a name that does not exist. They do not cover temporary states: a name
# without an address (a headless service whose pods are not ready yet), or a DNS server that fails or does not
# answer.
_NO_SUCH_NAME = ("Domain name not found", "Misformatted domain name", "Name or service not known")
_CLOSED = "Socket closed"
# What gRPC writes before the cause, as in "UNKNOWN: ipv4:127.0.0.1:1: Failed to connect to remote host: ".
_BEFORE_CAUSE = re.compile(
    r"^(?:[A-Z_]+: )?(?:(?:ipv4|ipv6|unix|unix-abstract|vsock):\S+: )?(?:Failed to connect to remote host: )?"
)
_CLOSED_HINT = (
    "; if the server wants TLS, pass its authority's file (ca=, --ca) or use the system's authorities "
    "(tls=True, --tls); if it wants a client certificate, pass cert and key"
)


@dataclass(frozen=True)
class Failure:
    """A failed attempt: its error, and whether another attempt can help."""

    error: MaskwireError
    retryable: bool
    """The outcome is unknown, or the server said when to retry."""
    unreachable: bool = False
    """No answer came; the server may have been restarted meanwhile."""
    unresolved: bool = False
    """The target's host name does not exist. Retrying helps only if it existed before."""
    retry_after: float | None = field(default=None)
    """Seconds, if the server said."""


def closed_meanwhile(target: str) -> UnavailableError:
    """Make the error of a call that was waiting when its client was closed."""
    return UnavailableError(
        f"the client was closed while {target} did not answer: the outcome is unknown", reason="CANCELLED"
    )


def read_failure(error: grpc.RpcError) -> Failure:
    """Interpret a failed RPC."""
    call: Any = error  # the errors that a stub raises are also a grpc.Call
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
                f"the target's host name does not resolve: check its spelling, and the DNS of this machine, "
                f"container or cluster ({text})",
                reason="UNRESOLVED",
            )
            return Failure(unresolved, retryable=True, unreachable=True, unresolved=True)
    kind = _BY_STATUS.get(code, ServerError)
    if code is grpc.StatusCode.UNAVAILABLE:
        text = _cause(text) + (_CLOSED_HINT if _CLOSED in text else "")
    else:
        text = f"{code.name}: {text}"
    return Failure(kind(text, reason=code.name), unknown, unreachable=unknown)


def _last(text: str) -> str:
    """gRPC's message without the list of addresses that it tried."""
    return text.rpartition("last error: ")[2]


def _cause(text: str) -> str:
    """The last cause in gRPC's message about an unreachable server, without status names and addresses."""
    cause = _last(text)
    if cause != text or _CLOSED in text:
        cause = _BEFORE_CAUSE.sub("", cause)
        cause = cause[:1].lower() + cause[1:]
    return cause


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
