"""The steps that the server has acknowledged to this client, and the digest that identifies them."""

from __future__ import annotations

from maskwire.errors import DigestMismatchError
from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.digest import DigestVersion, step_digest


class AcknowledgedHistory:
    """A session, its last acknowledged step, and the history digest after that step."""

    def __init__(self) -> None:
        self.session = pb.SessionRef()
        self.position: tuple[int, bytes] = 0, b""
        """The step and the digest after it, in one value so that they change together."""
        self.digest_version = DigestVersion(1)
        """The version of the digest that the run uses."""

    @property
    def step(self) -> int:
        """The number of the last acknowledged step; 0 if there is none."""
        return self.position[0]

    @property
    def digest(self) -> bytes:
        """The digest after the last acknowledged step, 32 bytes; empty before a session is open."""
        return self.position[1]

    def open(self, response: pb.OpenSessionResponse) -> None:
        """Take the session and the last durable step and digest from the server's answer to OpenSession."""
        self.session = response.session
        self.position = response.durable_step, response.digest
        # A server of version 0.1 leaves the digest's version at 0.
        self.digest_version = DigestVersion(response.digest_version or 1, response.model.num_tokens)

    def history(self) -> pb.History | None:
        """Return the acknowledged history, which the server must still have; None without a session."""
        if not self.digest:
            return None
        return pb.History(
            run_id=self.session.run_id, lineage=self.session.lineage, step=self.step, digest=self.digest
        )

    def next_position(self, response: pb.TrainStepResponse, payload_hash: bytes) -> tuple[int, bytes]:
        """Return the step and digest after the answer to the next step.

        Raises DigestMismatchError if the answer does not match what this client sent.
        """
        if response.step != self.step + 1:
            raise DigestMismatchError(
                f"the server answered with step {response.step}, but the next step is {self.step + 1}: the "
                "server and client have different histories; stop training, and check the server's storage"
            )
        expected = step_digest(
            self.digest, self.session.lineage, response.step, payload_hash, response.outcome
        )
        if response.digest != expected:
            raise DigestMismatchError(
                f"the server's digest after step {response.step} is {response.digest.hex()[:16]}…, but the "
                f"steps that this client sent give {expected.hex()[:16]}…: server and client have different "
                "histories; stop training, and check the server's storage"
            )
        return response.step, response.digest
