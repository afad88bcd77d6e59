"""What retention lets go, and what it never does."""

from __future__ import annotations

from typing import Any

from maskwire_server.checkpoints.retention import collectable, droppable, needed
from maskwire_server.config import CheckpointsConfig
from maskwire_server.journal.records import Lineage, Stretch
from maskwire_server.manifest import Manifest
from maskwire_server.results import CheckpointInfo

ONE = {1: Lineage(1, None, 0, b"", None, None)}
RESTORED = {**ONE, 2: Lineage(2, 1, 6, b"", None, "s6")}


def saved(name: str, step: int, lineage: int = 1, score: float | None = None, **fields: Any) -> Manifest:
    info = CheckpointInfo(name, lineage, step, b"d" * 32, (), 100.0 + step, {}, score)
    return Manifest(info, "r", fields.get("automatic", True), None, {}, {})


def settings(**fields: Any) -> CheckpointsConfig:
    return CheckpointsConfig(**fields)


def test_the_newest_the_multiples_and_the_named_stay() -> None:
    manifests = [saved(f"s{step}", step, automatic=step != 5) for step in range(10, 0, -1)]
    gone = collectable(manifests, ONE, 1, settings(keep_last=3, keep_every=4))
    assert gone == ["s7", "s6", "s3", "s2", "s1"]


def test_the_best_stay_and_do_not_count_among_the_newest() -> None:
    plain = [saved(f"s{step}", step) for step in (9, 7, 5, 3)]
    scored = [saved(f"b{step}", step, score=score) for step, score in ((8, 2.5), (6, 2.0), (4, 3.0))]
    manifests = sorted(plain + scored, key=lambda m: -m.info.step)
    assert collectable(manifests, ONE, 1, settings(keep_last=2, keep_best=1)) == ["s5", "b4", "s3"]
    assert collectable(manifests, ONE, 1, settings(keep_last=2, keep_best=2)) == ["s5", "b4", "s3"], (
        "b8 is new"
    )
    assert "b6" in collectable(manifests, ONE, 1, settings(keep_last=2, keep_best=0))


def test_the_two_newest_stay_whoever_saved_them() -> None:
    manifests = [saved("b3", 3, score=9.0), saved("b2", 2, score=8.0), saved("b1", 1, score=1.0)]
    assert collectable(manifests, ONE, 1, settings(keep_best=0)) == ["b1"]
    assert needed(manifests, ONE, 1).keys() == {"b3", "b2"}


def test_only_the_ancestry_counts_and_a_lineages_parent_stays() -> None:
    before = [saved(f"s{step}", step) for step in (9, 8, 6, 4, 2)]  # lineage 2 went on from step 6
    after = [saved(f"t{step}", step, lineage=2) for step in (10, 8, 7)]
    gone = collectable([*after, *before], RESTORED, 2, settings(keep_last=2))
    assert gone == ["t7", "s4", "s2"], "steps 8 and 9 of lineage 1 are another branch, s6 began lineage 2"
    assert needed([*after, *before], RESTORED, 2) == {
        "t10": "a start may need it", "t8": "a start may need it", "s6": "lineage 2 started from it",
    }  # fmt: skip


def test_batches_go_behind_the_second_newest_checkpoint_of_the_ancestry() -> None:
    first = [saved(f"s{step}", step) for step in (9, 6, 4)]
    assert droppable(first[:1], ONE, 1) == []
    assert droppable(first, ONE, 1) == [Stretch(1, -1, 6)]
    one_after = [saved("t8", 8, lineage=2), *first]
    assert droppable(one_after, RESTORED, 2) == [Stretch(1, -1, 6), Stretch(1, 6)], "t8, then s6"
    two_after = [saved("t9", 9, lineage=2), *one_after]
    assert droppable(two_after, RESTORED, 2) == [Stretch(1, -1), Stretch(2, -1, 8)]
