"""The errors that the client raises.

    MaskwireError
    ├── RequestError             the server refused the request; nothing changed
    │   ├── InvalidRequestError      a field is wrong; `.field` names it
    │   ├── ConflictError            the step or request id is used already, or an earlier step is missing
    │   ├── HaltedError              the loss or gradient of three steps in a row was not finite
    │   ├── DivergedError            the weights give losses or logits that are not finite
    │   ├── CheckpointError          the checkpoint is missing, damaged or needed, or could not be saved
    │   ├── TokenizerError           the run uses another tokenizer
    │   ├── DataMismatchError        the run was trained on other data
    │   ├── DigestVersionError       this client is too old for the run's version of the digest
    │   └── UnimplementedError       this server does not support the call
    ├── SessionError             this client may not train the run
    │   ├── FencedError              another writer took over: stop
    │   ├── WriterPresentError       another client's session is open
    │   └── WrongRunError            the session is closed or of another run, or the run is at another step
    ├── HistoryError             server and client disagree about what was trained: stop
    │   ├── HistoryLostError         the server lost steps that it had acknowledged
    │   └── DigestMismatchError      the history digests differ
    ├── AccessError              access denied: TLS or token rejected
    │   ├── UnauthenticatedError     the token is missing, unknown or expired
    │   ├── PermissionDeniedError    the token's role does not permit the call
    │   └── TlsError                 the TLS handshake failed
    ├── ForkError                the client was created before this process was forked
    ├── EventLoopError           the asyncio client belongs to another event loop
    ├── StepMovedError           the run's step changed between the calls of one evaluation or generation
    ├── UnavailableError         no answer came, or the server asks to retry: the outcome is unknown
    │   └── UnresolvedError          the target's host name does not exist
    └── ServerError              the server failed; search its log for `.error_id`

`REASONS` maps the reason in a server's error to one of these classes.
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
    """The base class of this client's errors.

    `reason` is the error's name in the protocol. `metadata` has the values that the message mentions.
    """

    def __init__(self, message: str, *, reason: str = "", metadata: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.metadata = metadata or {}


class RequestError(MaskwireError):
    """The server refused the request; nothing changed."""


class InvalidRequestError(RequestError):
    """A field of the request is wrong. The message says which values are valid."""

    @property
    def field(self) -> str:
        """The name of the wrong field; empty if the server did not name it."""
        return self.metadata.get("field", "")


class ConflictError(RequestError):
    """The step number or request id is already used for another request, or an earlier step is missing."""


class HaltedError(RequestError):
    """The loss or gradient of three steps in a row was not finite, so the server stopped training.

    Check the data and the learning rate, then connect with takeover=True.
    """


class DivergedError(RequestError):
    """The model's weights give losses or logits that are not finite. Restore an earlier checkpoint."""


class CheckpointError(RequestError):
    """A request about a checkpoint failed; the message says why.

    The checkpoint does not exist or is damaged, its name is taken, it cannot be deleted because it is needed,
    or writing it failed.
    """


class UnimplementedError(RequestError):
    """This server does not support the call."""


class SessionError(MaskwireError):
    """This client may not train the run."""


class FencedError(SessionError):
    """Another writer, named in the message, took over. This client must stop."""


class WriterPresentError(SessionError):
    """Another client's session is open.

    Wait until that session is closed or idle, or connect with takeover=True.
    """


class WrongRunError(SessionError):
    """The session does not belong to the run's current state, or the run is not at the expected step.

    A session can be closed, or belong to another run or lineage: connect again. Calls with `expected_step` or
    `expected_lineage` raise this error if the run is elsewhere.
    """


class TokenizerError(RequestError):
    """The run was started with another tokenizer, so the same token ids stand for other text."""


class DataMismatchError(RequestError):
    """The data differs from what the run was trained on. To use it anyway, pass allow_changed_data=True."""


class DigestVersionError(RequestError):
    """The run's history digest has a version that this client cannot compute. Use a newer client."""


class AccessError(MaskwireError):
    """Access was denied: the token or the TLS connection was rejected."""


class UnauthenticatedError(AccessError):
    """The access token is missing, unknown to the server, or expired."""


class PermissionDeniedError(AccessError):
    """The role of the access token does not permit the call. The message names a role that does."""


class TlsError(AccessError):
    """The TLS handshake failed. The message says why, and what to change."""


class ForkError(MaskwireError, RuntimeError):
    """The client was created before this process was forked. Create a client in this process."""


class EventLoopError(MaskwireError, RuntimeError):
    """The asyncio client was first used in another event loop. Create one client for each loop."""


class StepMovedError(MaskwireError):
    """A training step or a restore changed the weights between the calls of an evaluation or generation."""


class HistoryError(MaskwireError):
    """Server and client disagree about what was trained. Stop training, and check the server's storage."""


class HistoryLostError(HistoryError):
    """The server lost steps that it had acknowledged to this client."""


class DigestMismatchError(HistoryError):
    """The server's history digest does not match the steps that this client sent."""


class UnavailableError(MaskwireError):
    """No answer came, or the server asks to retry later. Whether a step was applied is unknown."""


class UnresolvedError(UnavailableError):
    """The target's host name does not exist. Nothing was sent."""


class ServerError(MaskwireError):
    """The server failed unexpectedly and changed nothing. Search its log for `error_id`."""

    @property
    def error_id(self) -> str:
        """The id of the failure, to search for in the server's log; empty if the server gave none."""
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
    """A failed attempt of a call: its error, and whether another attempt can help."""

    error: MaskwireError
    retryable: bool
    """Whether another attempt can help: the outcome is unknown, or the server said when to retry."""
    unreachable: bool = False
    """Whether no answer came; the server may have been restarted meanwhile."""
    unresolved: bool = False
    """Whether the target's host name does not exist. A retry helps only if the name existed before."""
    retry_after: float | None = field(default=None)
    """Seconds after which to retry, if the server said so."""


def closed_meanwhile(target: str) -> UnavailableError:
    """Return the error for a call that still waited for its answer when its client was closed."""
    return UnavailableError(
        f"the client was closed before {target} answered: whether the call took effect is unknown; create a "
        "client and check the run's status",
        reason="CANCELLED",
    )


def read_failure(error: grpc.RpcError) -> Failure:
    """Convert the error of a failed RPC to a `Failure`, which says whether a retry can help."""
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
                f"the target's host name does not resolve: check its spelling, and the DNS settings of this "
                f"machine, container or cluster ({text})",
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
    """Return gRPC's message without the list of addresses that gRPC tried."""
    return text.rpartition("last error: ")[2]


def _cause(text: str) -> str:
    """Return the last cause in gRPC's message about an unreachable server, without status and addresses."""
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
