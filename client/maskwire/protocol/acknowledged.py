"""What the server has acknowledged, and the digest chain that proves it."""

from __future__ import annotations

from maskwire.errors import DigestMismatchError
from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.digest import DigestVersion, step_digest


class AcknowledgedHistory:
    """A session, its last acknowledged step, and the digest after that step."""

    def __init__(self) -> None:
        self.session = pb.SessionRef()
        self.position: tuple[int, bytes] = 0, b""
        """Step and digest; one value, so that they change together."""
        self.digest_version = DigestVersion(1)
        """How the run hashes payloads."""

    @property
    def step(self) -> int:
        """The last acknowledged step."""
        return self.position[0]

    @property
    def digest(self) -> bytes:
        """The digest after the last acknowledged step; empty before a session is open."""
        return self.position[1]

    def open(self, response: pb.OpenSessionResponse) -> None:
        """Start at the server's durable position."""
        self.session = response.session
        self.position = response.durable_step, response.digest
        # A server of version 0.1 leaves the digest's version at 0.
        self.digest_version = DigestVersion(response.digest_version or 1, response.model.num_tokens)

    def history(self) -> pb.History | None:
        """Return what the server must still have."""
        if not self.digest:
            return None
        return pb.History(
            run_id=self.session.run_id, lineage=self.session.lineage, step=self.step, digest=self.digest
        )

    def next_position(self, response: pb.TrainStepResponse, payload_hash: bytes) -> tuple[int, bytes]:
        """The position after an answer. Raises DigestMismatchError if it does not match what was sent."""
        if response.step != self.step + 1:
            raise DigestMismatchError(
                f"the server answered with step {response.step}; expected step {self.step + 1}; stop, and "
                "check the server's storage"
            )
        expected = step_digest(
            self.digest, self.session.lineage, response.step, payload_hash, response.outcome
        )
        if response.digest != expected:
            raise DigestMismatchError(
                f"the server's digest after step {response.step} is {response.digest.hex()[:16]}…, but what "
                f"this client sent gives {expected.hex()[:16]}…: their histories differ; stop, and check the "
                "server's storage"
            )
        return response.step, response.digest
