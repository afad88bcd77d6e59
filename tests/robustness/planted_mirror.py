"""R9's faults of the mirror: what catches them, and how each is planted."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from mirrors import MirroredRig, down, failed_segments, lose_the_machine, mirror, train
from rig import WAIT, bare, wait_for

from maskwire.v1.values import RunState
from maskwire_server.engine import withheld
from maskwire_server.errors import FencedError, StoreError
from maskwire_server.journal import journal, mirror_segment_writer
from maskwire_server.journal.records import Stretch

Patch = tuple[Any, str, Any]
STEPS = 6


def an_answer_while_the_store_is_down(folder: Path) -> None:
    """Where answers wait for the mirror, none comes while the store is down."""
    with closing(MirroredRig(folder, "mirrored")) as rig:
        engine = rig.start()
        train(engine, 1)
        wait_for(lambda: mirror(engine).step == 1)
        with down():
            step = engine.train_step(bare(1, "step-1"))
            wait_for(lambda: step.done() or failed_segments(engine) >= 2)  # half a second after the first
            assert not step.done(), "the step was answered before the mirror had it"
            assert engine.status().state is RunState.HELD
        assert step.result(WAIT).step == 2


def a_lost_machine(folder: Path) -> None:
    """A run whose store fails for a while, and whose directory is lost, comes back from the address alone."""
    with closing(MirroredRig(folder)) as rig:
        engine = rig.start(checkpoints={"every_steps": 1000})
        train(engine, 2)
        with down():
            train(engine, STEPS - 2, first=2)
            wait_for(lambda: failed_segments(engine) > 0 or mirror(engine).step == STEPS)
        wait_for(lambda: mirror(engine).step == STEPS)
        before = engine.status()
        lose_the_machine(rig, engine)
        assert rig.restore("run"), "the mirror holds no run"
        again = rig.start()
        assert (again.status().durable_step, again.status().digest) == (STEPS, before.digest)
        train(again, 1, first=STEPS)


def two_servers_at_one_address(folder: Path) -> None:
    """The first server ends when the second has taken the run over."""
    with closing(MirroredRig(folder)) as rig:
        first = rig.start()
        train(first, 2)
        wait_for(lambda: mirror(first).step == 2)
        assert rig.restore("other")
        rig.start("other")
        first.train_step(bare(9, "late"))
        wait_for(lambda: bool(rig.fatal) or mirror(first).step == 3)
        assert rig.fatal, "the first server went on"
        assert isinstance(rig.fatal[0], FencedError)


def batches_beside_a_store_that_is_down(folder: Path) -> None:
    """Batches that the mirror lacks stay in the journal, whatever is to be dropped."""
    with closing(MirroredRig(folder)) as rig:
        engine = rig.start()
        wait_for(lambda: mirror(engine).segment > 0)
        with down():
            train(engine, 3)
            engine.close()
        opened = journal.Journal(folder / "run")
        opened.transaction(lambda: opened.drop_payloads([Stretch(1, -1)], 100, 2**20))
        kept = [batch is not None for _, batch in opened.steps_after(1, 0)]
        opened.close()
        assert kept == [True, True, True]


def _answers_before_the_mirror() -> list[Patch]:
    return [(withheld.Withheld, "holds_back", lambda *_: False)]


def _failed_uploads_counted() -> list[Patch]:
    writer = mirror_segment_writer.SegmentWriter
    try_send = writer.try_send

    def sent(self: Any) -> bytes | None:
        try:
            return try_send(self)
        except StoreError:
            self.number += 1
            self.hash, self.pending = mirror_segment_writer.hash_of(self._data), None
            return None

    return [(writer, "try_send", sent)]


def _batches_not_uploaded() -> list[Patch]:
    writer = mirror_segment_writer.SegmentWriter
    try_send = writer.try_send

    def without_batches(self: Any) -> bytes | None:
        self._objects = []
        return try_send(self)

    return [(writer, "try_send", without_batches)]


def _another_servers_segment_is_taken_for_its_own() -> list[Patch]:
    writer = mirror_segment_writer.SegmentWriter
    try_send = writer.try_send

    def sent(self: Any) -> bytes | None:
        if (found := try_send(self)) is not None:
            self.number += 1
            self.hash, self.pending = mirror_segment_writer.hash_of(found), None
        return None

    return [(writer, "try_send", sent)]


def _batches_dropped_before_their_upload() -> list[Patch]:
    return [(journal, "UPLOADED", "TRUE")]


BUGS = {
    "answers-before-the-mirror": (
        "steps are answered before the mirror has them",
        _answers_before_the_mirror, an_answer_while_the_store_is_down,
    ),
    "failed-uploads-counted": (
        "an upload that failed counts as done", _failed_uploads_counted, a_lost_machine,
    ),
    "batches-not-uploaded": ("segments are uploaded without their batches",
        _batches_not_uploaded, a_lost_machine,
    ),
    "not-fenced": ("a server takes another server's segment for its own",
        _another_servers_segment_is_taken_for_its_own, two_servers_at_one_address,
    ),
    "batches-dropped-before-their-upload": (
        "batches are dropped before the mirror has them",
        _batches_dropped_before_their_upload, batches_beside_a_store_that_is_down,
    ),
}  # fmt: skip
