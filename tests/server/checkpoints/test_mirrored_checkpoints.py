"""Checkpoints in a mirror that are damaged, incomplete, or gone where the run is served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from mirrors import MirroredRig, down, lose_the_machine, mirror, train
from rig import WAIT, wait_for

from maskwire_server.checkpoints.mirrored_checkpoints import MirroredCheckpoints
from maskwire_server.engine import checkpoint_uploader
from maskwire_server.journal.records import Lineage
from maskwire_server.requests import SaveRequest


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MirroredRig]:
    monkeypatch.setattr(checkpoint_uploader, "RETRY_SECONDS", 0.05)
    rig = MirroredRig(tmp_path)
    yield rig
    rig.close()


@pytest.mark.parametrize("gone", [False, True])
def test_a_damaged_checkpoint_does_not_keep_the_others_from_the_mirror(
    local: MirroredRig, gone: bool
) -> None:
    engine = local.start()
    train(engine, 1)
    with down("put_file"):
        for name in ("older", "newer"):
            engine.save(SaveRequest(name)).result(WAIT)
            train(engine, 1, first=1 if name == "older" else 2)
        state = local.folder / "run" / "checkpoints" / "newer" / "state.json"
        if gone:
            state.unlink()
        else:
            state.write_bytes(state.read_bytes().replace(b'"state"', b'"staTe"'))
    wait_for(lambda: mirror(engine).checkpoint == "older")
    wait_for(lambda: mirror(engine).problem == "")


def test_a_checkpoint_that_lacks_a_file_in_the_mirror_is_passed_over(local: MirroredRig) -> None:
    engine = local.start()
    train(engine, 2)
    engine.save(SaveRequest("two")).result(WAIT)
    train(engine, 2, first=2)
    engine.drain(WAIT)
    lose_the_machine(local, engine)
    newest = sorted((local.folder / "mirror" / "checkpoints").glob("step-000000004*"))[0]
    (newest / "state.json").unlink()
    assert local.restore("run")
    again = local.start()
    assert again.status().durable_step == 4
    assert [info.name for info in again.checkpoints()] == ["two", "step-000000000"]


def test_what_a_start_from_the_mirror_may_need_stays_though_it_is_gone_here(local: MirroredRig) -> None:
    engine = local.start()
    for step in range(3):
        train(engine, 1, first=step)
        engine.save(SaveRequest(f"at-{step + 1}")).result(WAIT)
    engine.drain(WAIT)
    copies = MirroredCheckpoints(local.store, mock.Mock(own=list))
    copies.load({folder: manifest for folder, (manifest, _) in copies.read_all().items()})
    run = engine._run
    gone = copies.collectable(run.lineages, 1, batches=False)
    assert sorted(name.split("/")[1].split(".")[0] for name in gone) == ["at-1", "step-000000000"]
    parent = Lineage(2, 1, 1, b"d" * 32, None, "at-1")
    gone = copies.collectable({**run.lineages, 2: parent}, 2, batches=False)
    kept = {"at-1", "step-000000000"}  # the two newest of this ancestry, and where it started
    assert not kept & {name.split("/")[1].split(".")[0] for name in gone}
