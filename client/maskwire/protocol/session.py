"""The session of the run's writer: how it is opened, confirmed after an outage, and closed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from maskwire import results
from maskwire.arguments import check_flag, check_str
from maskwire.errors import FencedError, WriterPresentError
from maskwire.process_identity import default_name, holder_of, is_gone, this_process
from maskwire.protocol import codec
from maskwire.protocol.acknowledged import AcknowledgedHistory
from maskwire.protocol.effects import Operation, Until
from maskwire.protocol.retried_calls import new_id
from maskwire.protocol.retry import RetryPolicy
from maskwire.protocol.sessionless_calls import Calls
from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.digest import VERSIONS
from maskwire.v1.values import TokenizerDescription


class Session(Calls):
    """The writer's session, and what the server reported about the run when the session was opened."""

    def __init__(
        self,
        target: str,
        policy: RetryPolicy,
        on_wait: Callable[[str], None],
        clock: Callable[[], float],
        name: str | None,
    ) -> None:
        super().__init__(target, policy, on_wait, clock)
        if name is not None:
            check_str("name", name)
        self.name = name or default_name()
        self.takeover_message = ""
        """A message about the open session that this session took over; empty if there was none."""
        self.acknowledged = AcknowledgedHistory()
        self.model: results.ModelInfo
        self.limits: results.Limits
        self.tokenizer = ""
        self._kept_tokenizer_digest = ""
        self.inexact_replays: tuple[results.InexactReplay, ...] = ()
        self.data: dict[str, str] = {}
        self.evaluated = (0, 0)
        self._nonce = new_id()
        self._stale = False  # the server may have been restarted since the session was last confirmed
        self._reopening = False

    @property
    def unreachable(self) -> bool:
        """Whether an attempt got no answer, and the session has not been confirmed since then."""
        return self._stale

    def open(
        self,
        *,
        takeover: bool = False,
        tokenizer: str = "",
        evaluated_step: int = 0,
        replace: bool = False,
        began: float | None = None,
        data: Mapping[str, str] | None = None,
        allow_changed_data: bool = False,
    ) -> Operation[None]:
        """Open the session, or confirm that it is still open and that the server has this client's steps.

        If `replace` is True, opens a new session whose history starts at the server's last durable step.
        """
        check_flag("takeover", takeover)
        nonce = new_id() if replace else self._nonce
        request = pb.OpenSessionRequest(
            client_name=self.name,
            nonce=nonce,
            takeover=takeover,
            held_epoch=None if replace else self.acknowledged.session.epoch or None,
            history=None if replace else self.acknowledged.history(),
            tokenizer=tokenizer,
            data=data,
            allow_changed_data=allow_changed_data,
            process=this_process(),
            evaluated_step=evaluated_step,
            digest_versions=VERSIONS,
        )
        response = yield from self._open(request, began)
        if response.HasField("superseded"):
            self.takeover_message = _took_over(response.superseded, request)
        if replace or not self.acknowledged.digest:
            self._nonce = nonce
            self.acknowledged = AcknowledgedHistory()
            self.acknowledged.open(response)
        elif response.session.epoch != self.acknowledged.session.epoch:
            raise FencedError(
                f"this client's session (epoch {self.acknowledged.session.epoch}) was replaced by another "
                f"session (epoch {response.session.epoch}); connect again",
                reason="FENCED",
            )
        self.model = codec.read_model(response.model)
        self.limits = codec.read_limits(response.limits)
        self.tokenizer = response.tokenizer
        self._kept_tokenizer_digest = response.kept_tokenizer_digest
        self.inexact_replays = codec.read_inexact_replays(response.inexact_replays)
        self.data = dict(response.data)
        self.evaluated = (response.evaluated_lineage, response.evaluated_step)

    def _open(self, request: pb.OpenSessionRequest, began: float | None) -> Operation[pb.OpenSessionResponse]:
        """Open the session. If another client holds it but that client's process has ended, take it over."""
        while True:
            try:
                response: pb.OpenSessionResponse = yield from self._ask(
                    "OpenSession", lambda: request, began=began
                )
                return response
            except WriterPresentError as error:
                epoch = int(error.metadata.get("epoch", 0))
                if epoch <= request.gone_epoch or not is_gone(holder_of(error.metadata)):
                    raise
                request.gone_epoch = epoch

    def close_request(self) -> pb.CloseSessionRequest | None:
        """Return the request that closes the session; None if no session was opened."""
        return pb.CloseSessionRequest(session=self.acknowledged.session) if self.acknowledged.digest else None

    def use_tokenizer(self, tokenizer: str) -> Operation[None]:
        """Record with the run which tokenizer produced its token ids.

        tokenizer: "bytes", or "sha256:" and the hash of the tokenizer's file; empty: nothing is recorded.

        `fit` calls this for data with a `tokenizer`. Raises TokenizerError if the run has another tokenizer.
        """
        if not isinstance(tokenizer, str):
            raise TypeError(
                f"tokenizer must be a string that names a tokenizer, such as 'bytes', got {tokenizer!r}"
            )
        if tokenizer and tokenizer != self.tokenizer:
            yield from self.open(tokenizer=tokenizer)

    def keep_tokenizer(self, tokenizer: TokenizerDescription) -> Operation[None]:
        """Store the tokenizer of the data with the run, so that prompts can be encoded as the data was.

        tokenizer: The tokenizer's description. Its `name` must be the one given to `use_tokenizer`.

        Sends nothing if the run has this tokenizer already. `fit` calls this for data with a
        `tokenizer_description`.
        """
        if tokenizer.digest == self._kept_tokenizer_digest:
            return
        sent = pb.Tokenizer(**vars(tokenizer))
        yield from self._ask("KeepTokenizer", lambda: pb.KeepTokenizerRequest(tokenizer=sent))
        self._kept_tokenizer_digest = tokenizer.digest

    def use_data(self, fingerprint: Mapping[str, str], *, allow_changed: bool = False) -> Operation[None]:
        """Record with the run the fingerprint of its training data.

        fingerprint: Named parts, such as those of `TokenData.fingerprint`; empty: nothing is recorded.
        allow_changed: Replace a different recorded fingerprint, instead of raising DataMismatchError.

        `fit` calls this for data with a `fingerprint()`.
        """
        check_flag("allow_changed", allow_changed)
        if not isinstance(fingerprint, Mapping) or not all(
            isinstance(word, str) for part in fingerprint.items() for word in part
        ):
            raise TypeError(
                f"fingerprint must be a dict of strings, such as {{'rows': '1000'}}, got {fingerprint!r}"
            )
        if fingerprint and dict(fingerprint) != self.data:
            yield from self.open(data=fingerprint, allow_changed_data=allow_changed)

    def mark_evaluated(self) -> Operation[None]:
        """Record that the current step was evaluated, so that `fit` does not repeat the evaluation.

        `fit` calls this after each evaluation.
        """
        yield from self.open(evaluated_step=self.acknowledged.step)

    def _unreachable(self) -> None:
        self._stale = True

    def _confirm(self, began: float) -> Operation[None]:
        """If the server was unreachable, check that it still has the session and the acknowledged steps."""
        if not self._stale:
            return
        yield Until(lambda: not self._reopening)
        if self._stale:
            self._reopening = True
            try:
                yield from self.open(began=began)
                self._stale = False
            finally:
                self._reopening = False


def _took_over(holder: pb.SessionHolder, request: pb.OpenSessionRequest) -> str:
    process = holder.process
    where = f" (host {process.host}, process {process.process_id})" if holder.HasField("process") else ""
    gone = ", a process that is gone" if holder.epoch == request.gone_epoch else ""
    return f"took over the session of {holder.client_name!r}{where}{gone}"
