"""What the service asks of the engine: validated values, free of gRPC."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from maskwire.v1.digest import VERSIONS
from maskwire_server.batch import Batch, Payload, Prompts
from maskwire_server.holder import ClientProcess
from maskwire_server.position import HistoryPosition
from maskwire_server.results import EvalOptions, GenerateOptions

CHECKPOINT_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
AUTOMATIC_NAME = re.compile(r"(step|best)-\d+(-lineage-\d+)?(-\d+)?")
"""What the server names its own after; nobody else's, so that it never meets a name that is taken."""


@dataclass(frozen=True)
class SessionRef:
    """The writer's session that a request names."""

    run_id: str
    lineage: int
    epoch: int


@dataclass(frozen=True)
class SessionRequest:
    """A client asks to be the run's writer."""

    client_name: str
    nonce: str
    takeover: bool = False
    held_epoch: int | None = None
    history: HistoryPosition | None = None
    """The last acknowledged step that the client holds."""
    tokenizer: str = ""
    """What the client's ids stand for; empty: not said."""
    data: dict[str, str] = field(default_factory=dict)
    """The fingerprint of the client's data, in named parts; empty: not said."""
    allow_changed_data: bool = False
    """Keep it in place of another one."""
    process: ClientProcess | None = None
    """The client's process; None: not said."""
    gone_epoch: int | None = None
    """Take over from this epoch, whose process the client found gone."""
    evaluated_step: int = 0
    """The writer has evaluated this step; 0: not said."""
    digest_versions: tuple[int, ...] = VERSIONS
    """The versions of the digest that the client computes."""


@dataclass(frozen=True)
class StepRequest:
    """A client asks for one training step; only the payload is needed."""

    payload: Payload
    session: SessionRef | None = None
    step: int | None = None
    request_id: str | None = None


@dataclass(frozen=True)
class EvalRequest:
    """A client asks for an evaluation, which changes nothing."""

    batch: Batch
    options: EvalOptions


@dataclass(frozen=True)
class GenerateRequest:
    """A client asks for samples, which changes nothing."""

    prompts: Prompts
    options: GenerateOptions
    every_step: bool = False
    """Answer with each unmasking pass, not the last alone."""


@dataclass(frozen=True)
class SaveRequest:
    """A client asks for a checkpoint."""

    name: str | None = None
    request_id: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    score: float | None = None
    expected_lineage: int | None = None
    expected_step: int | None = None


@dataclass(frozen=True)
class RestoreRequest:
    """A client asks to go back to a checkpoint."""

    name: str
    request_id: str | None = None
    expected_lineage: int | None = None
    expected_step: int | None = None


@dataclass(frozen=True)
class DownloadRequest:
    """A client asks for a checkpoint's files."""

    name: str
    weights_only: bool = False
    file: str | None = None
    """Only this one; None: all."""
    offset: int = 0
    """Where in `file` to begin, in bytes."""
