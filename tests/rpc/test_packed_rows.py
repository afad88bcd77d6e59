"""Rows packed with several documents, through a real server that is killed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from serving import ServerProcess

import maskwire
from maskwire.errors import DigestVersionError, InvalidRequestError

DOCUMENTS = [np.arange(size) + size for size in (3, 5, 2, 6)]
PACKED = [np.concatenate(DOCUMENTS[:2]), np.concatenate(DOCUMENTS[2:])]
SEGMENTS = [[0] * 3 + [1] * 5, [0] * 2 + [1] * 6]


def test_packed_rows_are_their_documents_also_after_a_kill(
    serve: Callable[..., ServerProcess],
) -> None:
    server = serve(checkpoints__every_steps="off", checkpoints__every_seconds="off")
    with maskwire.connect(server.address, on_wait=lambda _: None) as trainer:
        first = trainer.train_step(np.stack(PACKED), segment_ids=SEGMENTS)
    server.kill()
    server.start()
    with maskwire.connect(server.address, takeover=True, on_wait=lambda _: None) as trainer:
        assert trainer.step == 1
        second = trainer.train_step(np.stack(PACKED), segment_ids=np.array(SEGMENTS))
        packed = trainer.eval_loss(PACKED, segment_ids=SEGMENTS, row_ids=[7, 8, 9, 10])
        with pytest.raises(
            InvalidRequestError, match="row_ids must have one id per segment, 4, or none, got 2"
        ):
            trainer.eval_loss(PACKED, segment_ids=SEGMENTS, row_ids=[7, 8])
        with pytest.raises(ValueError, match=r"segment_ids must have one number per token, \[2, 8\]"):
            trainer.train_step(np.stack(PACKED), segment_ids=SEGMENTS[:1])
        with pytest.raises(TypeError, match="segment_ids"):
            trainer.generate(PACKED, segment_ids=SEGMENTS)
        with pytest.raises(ValueError, match="give each document as a row"):
            trainer.evaluate(PACKED, segment_ids=SEGMENTS)
        unpacked = trainer.eval_loss(DOCUMENTS, row_ids=[7, 8, 9, 10])
    assert packed.nats_per_token == unpacked.nats_per_token
    assert packed.rows == unpacked.rows
    other = serve("b")
    with maskwire.connect(other.address) as trainer:
        assert [trainer.train_step(DOCUMENTS).loss for _ in range(2)] == [first.loss, second.loss]


def test_a_run_whose_digest_does_not_cover_segments_refuses_them(
    serve: Callable[..., ServerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(seconds=0)
    monkeypatch.setattr("maskwire.protocol.session.VERSIONS", (1,))
    with maskwire.connect(server.address) as trainer:
        trainer.train_step([[1, 2]])
        with pytest.raises(DigestVersionError, match="or start a new run"):
            trainer.train_step([[1, 2]], segment_ids=[[0, 1]])
        assert trainer.train_step([[1, 2]]).step == 2
