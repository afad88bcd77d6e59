"""A step between its submission and its acknowledgement."""

from __future__ import annotations

import threading

from maskwire.protocol import codec
from maskwire.step_spans import StepSpan
from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.digest import DigestVersion


class PendingStep:
    """One step: its request and its progress.

    A step that was sent may have been applied, so it is repeated with the same request id until its answer is
    known, even if its caller was interrupted.
    """

    def __init__(self, request: pb.TrainStepRequest, step: int | None) -> None:
        self.request = request
        self.required_number = step
        """The number that the step must have; None: the one that follows from its position in the submission
        order.
        """
        self.started = False
        """It may have been sent."""
        self.sent_number = 0
        """The number under which an attempt is in flight, or may be after an interrupt; 0: there is none."""
        self.sent_epoch = 0
        """The session's epoch when that attempt was sent."""
        self.acknowledged_when_sent = 0
        """The last acknowledged step when the latest attempt was sent."""
        self.answer: pb.TrainStepResponse | None = None
        """The server's answer, while the answers of earlier steps are outstanding."""
        self.digest_version = DigestVersion(1)
        """How to hash the payload; set when the step gets its position in the submission order."""
        self.span: StepSpan | None = None
        """Its trace; None: steps are not traced."""
        self._hash: bytes | None = None
        self._hashing = threading.Lock()

    def payload_hash(self) -> bytes:
        """Return the payload's hash. The first caller computes it, on any thread; others wait for it."""
        with self._hashing:
            if self._hash is None:
                self._hash = codec.hash_of(self.request, self.digest_version)
            return self._hash
