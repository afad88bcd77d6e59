"""A training step that was submitted and is not yet acknowledged."""

from __future__ import annotations

import threading

from maskwire.protocol import codec
from maskwire.step_spans import StepSpan
from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.digest import DigestVersion


class PendingStep:
    """A submitted training step: its request, and how far it got.

    The server may have applied any step that was sent. The client therefore sends such a step again, with the
    same request id, until it has the answer, even if the caller was interrupted.
    """

    def __init__(self, request: pb.TrainStepRequest, step: int | None) -> None:
        self.request = request
        self.required_number = step
        """The number that the step must have; None: the number that its position in the submission order
        gives.
        """
        self.started = False
        """Whether the step may have been sent."""
        self.sent_number = 0
        """The step number of the attempt that is, or after an interrupt may be, in flight; 0 if none is."""
        self.sent_epoch = 0
        """The session's epoch when the attempt in flight was sent."""
        self.acknowledged_when_sent = 0
        """The last acknowledged step when the latest attempt was sent."""
        self.answer: pb.TrainStepResponse | None = None
        """The server's answer, while the answers of earlier steps are outstanding."""
        self.digest_version = DigestVersion(1)
        """How to hash the payload; set when the step gets its position in the submission order."""
        self.span: StepSpan | None = None
        """The span that traces the step; None if steps are not traced."""
        self._hash: bytes | None = None
        self._hashing = threading.Lock()

    def payload_hash(self) -> bytes:
        """Return the payload's hash. The first caller computes it, on any thread; other callers wait."""
        with self._hashing:
            if self._hash is None:
                self._hash = codec.hash_of(self.request, self.digest_version)
            return self._hash
