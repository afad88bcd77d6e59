"""Requests to the engine: validated values without gRPC types."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from maskwire.v1.digest import VERSIONS
from maskwire_server.batch import Batch, Payload, Prompts
from maskwire_server.position import HistoryPosition
from maskwire_server.results import EvalOptions, GenerateOptions
from maskwire_server.session_holder import ClientProcess

CHECKPOINT_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
AUTOMATIC_NAME = re.compile(r"(step|best)-\d+(-lineage-\d+)?(-\d+)?")
"""Names that the server gives to checkpoints; clients cannot choose them."""


@dataclass(frozen=True)
class SessionRef:
    """The session that a request belongs to."""

    run_id: str
    lineage: int
    epoch: int


@dataclass(frozen=True)
class SessionRequest:
    """A request to open a session, which makes the client the run's writer."""

    client_name: str
    nonce: str
    takeover: bool = False
    held_epoch: int | None = None
    history: HistoryPosition | None = None
    """The last acknowledged step that the client knows."""
    tokenizer: str = ""
    """The tokenizer of the client's ids; empty: not given."""
    data: dict[str, str] = field(default_factory=dict)
    """The fingerprint of the client's data, in named parts; empty: not given."""
    allow_changed_data: bool = False
    """Accept `data` even if it differs from the run's, and record it."""
    process: ClientProcess | None = None
    """The client's process; None: not given."""
    gone_epoch: int | None = None
    """The epoch to take over from, because the client found that the process of its holder has ended."""
    evaluated_step: int = 0
    """The last step that the writer has evaluated; 0: not given."""
    digest_versions: tuple[int, ...] = VERSIONS
    """The versions of the digest that the client computes."""


@dataclass(frozen=True)
class StepRequest:
    """A request to train one step. Only the payload is required."""

    payload: Payload
    session: SessionRef | None = None
    step: int | None = None
    request_id: str | None = None


@dataclass(frozen=True)
class EvalRequest:
    """A request to evaluate a batch without changing the run."""

    batch: Batch
    options: EvalOptions
    credential: str = ""
    """A name for the caller's token or certificate that does not reveal it; empty: the caller has none."""


@dataclass(frozen=True)
class GenerateRequest:
    """A request to sample rows without changing the run."""

    prompts: Prompts
    options: GenerateOptions
    every_step: bool = False
    """Answer after each unmasking pass, not only after the last."""
    credential: str = ""
    """The same as in `EvalRequest`."""


@dataclass(frozen=True)
class SaveRequest:
    """A request to save a checkpoint."""

    name: str | None = None
    request_id: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    score: float | None = None
    expected_lineage: int | None = None
    expected_step: int | None = None


@dataclass(frozen=True)
class RestoreRequest:
    """A request to restore the run from a checkpoint."""

    name: str
    request_id: str | None = None
    expected_lineage: int | None = None
    expected_step: int | None = None


@dataclass(frozen=True)
class DownloadRequest:
    """A request to download the files of a checkpoint."""

    name: str
    weights_only: bool = False
    file: str | None = None
    """Only this file; None: all files."""
    offset: int = 0
    """The position in `file` at which to start, in bytes."""
