"""The rules of OpenSession as pure functions: who may become the writer, and with which history and data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from maskwire_server.engine.admission_rules import (
    Situation,
    check_digest_version,
    fenced,
    refuse_unavailable,
    writer_present,
)
from maskwire_server.errors import Refused
from maskwire_server.position import HistoryPosition
from maskwire_server.requests import SessionRequest

_BYTES = "bytes"  # the tokenizer of clients whose ids are bytes
_LONGEST_SHOWN = 24  # characters; a longer part of a fingerprint is a hash, which is not worth showing


@dataclass(frozen=True)
class SessionFacts:
    """An OpenSession request, and the recorded facts on which the decision depends."""

    request: SessionRequest
    nonce_epoch: int | None
    """The epoch that was opened with the request's nonce, if any."""
    durable_step: int
    recorded_digest: bytes | None
    """The digest recorded at the client's newest step in this lineage; None if there is none."""
    tokenizer: str = ""
    """The run's tokenizer; empty if it is not known."""
    pretrained: bool = False
    """Whether the model started from pretrained weights, which expect the ids of their own tokenizer."""
    data: Mapping[str, str] = field(default_factory=dict)
    """The fingerprint of the run's data; empty if it is not known."""


def admit_session(facts: SessionFacts, at: Situation) -> bool:
    """Whether to open a new epoch for a request; False if its nonce already has one. Raises Refused."""
    refuse_unavailable(at.state)
    request = facts.request
    if request.history is not None:
        _check_history(request.history, facts, at)
    check_digest_version(request.digest_versions, at)
    if request.tokenizer == _BYTES and facts.pretrained:
        raise Refused(
            "TOKENIZER_MISMATCH",
            "the run's model was pretrained with a tokenizer, but this client sends bytes as token ids: "
            "prepare the data with the model's tokenizer.json (maskwire data prepare --tokenizer)",
            client_tokenizer=request.tokenizer,
        )
    if request.tokenizer and facts.tokenizer and request.tokenizer != facts.tokenizer:
        raise Refused(
            "TOKENIZER_MISMATCH",
            f"the run uses tokenizer {facts.tokenizer}, but this client uses {request.tokenizer}: prepare "
            "the data with the run's tokenizer, or start a new run",
            tokenizer=facts.tokenizer,
            client_tokenizer=request.tokenizer,
        )
    if request.data and facts.data and not request.allow_changed_data:
        _check_data(request.data, facts.data)
    if facts.nonce_epoch is not None:
        if facts.nonce_epoch < at.epoch:
            raise fenced(facts.nonce_epoch, at)
        if at.closed:
            raise Refused(
                "UNKNOWN_EPOCH",
                f"this session (epoch {facts.nonce_epoch}) was closed; open another session with a new nonce",
                epoch=at.epoch,
                session_epoch=facts.nonce_epoch,
            )
        return False
    if request.held_epoch is not None and request.held_epoch < at.epoch:
        raise fenced(request.held_epoch, at)
    may_supersede = at.writer == request.client_name or request.gone_epoch == at.epoch
    if at.writer and not may_supersede and not request.takeover:
        raise writer_present(at, "wait until that session is closed or idle, or take over")
    return True


def _check_data(sent: Mapping[str, str], kept: Mapping[str, str]) -> None:
    changed = [part for part in sorted({*sent, *kept}) if sent.get(part) != kept.get(part)]
    if not changed:
        return
    words = [
        f"{part} differs"
        if max(len(kept.get(part, "")), len(sent.get(part, ""))) > _LONGEST_SHOWN
        else f"{part} was {kept.get(part, 'not set')} and is now {sent.get(part, 'not set')}"
        for part in changed
    ]
    raise Refused(
        "DATA_CHANGED",
        f"the data differs from what the run was trained on: {'; '.join(words)}. Restore the original data, "
        "or continue with the changed data (allow_changed_data)",
        changed=",".join(changed),
    )


def _check_history(history: HistoryPosition, facts: SessionFacts, at: Situation) -> None:
    if history.run_id != at.run_id or history.lineage != at.lineage:
        raise Refused(
            "WRONG_RUN",
            f"the client continues run {history.run_id!r}, lineage {history.lineage}, but the server has run "
            f"{at.run_id!r}, lineage {at.lineage}; restart the client",
            run_id=at.run_id,
            lineage=at.lineage,
        )
    if history.step > facts.durable_step:
        raise Refused(
            "HISTORY_LOST",
            f"the client has seen step {history.step}, but the server's newest step is {facts.durable_step}: "
            "acknowledged steps are missing; check the server's storage before you continue",
            client_step=history.step,
            durable_step=facts.durable_step,
        )
    if history.digest != facts.recorded_digest:
        raise Refused(
            "HISTORY_LOST",
            f"the histories of the client and the server are not the same up to step {history.step}; "
            "check the server's storage before you continue",
            client_step=history.step,
            durable_step=facts.durable_step,
        )
