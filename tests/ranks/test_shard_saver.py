"""Checkpoints that several ranks write: complete and intact, or refused by the name of the file at fault."""

from __future__ import annotations

import contextlib
import errno
import json
import queue
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from maskwire_server import failpoints
from maskwire_server.checkpoints.files import is_unfinished
from maskwire_server.checkpoints.rank_parts import PartFiles
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.errors import ConfigError, Refused
from maskwire_server.manifest import SHARDED, Manifest
from maskwire_server.ranks import shard_saver, shared_folder
from maskwire_server.ranks.follower import call
from maskwire_server.ranks.leader import carried_out
from maskwire_server.ranks.orders import Order
from maskwire_server.ranks.shard_saver import ShardSaver
from maskwire_server.ranks.shared_folder import SavePlace
from maskwire_server.results import FROZEN_FILE, CheckpointInfo
from maskwire_server.training import checkpoint_tensors, shards
from maskwire_server.training.shards import Piece, Shards

STATE: dict[str, dict[str, Tensor]] = {
    "model.safetensors": {"generator.a": torch.arange(35.0).view(7, 5), "generator.b": torch.arange(2.0)},
    "ema.safetensors": {"generator.a": -torch.arange(35.0).view(7, 5)},
    "optimizer.safetensors": {"generator.updates": torch.tensor(3)},
    FROZEN_FILE: {"generator.base": torch.arange(6, dtype=torch.bfloat16)},
}
RANKS = 3


def parts(rank: int, state: dict[str, dict[str, Tensor]] = STATE, size: int = RANKS) -> Shards:
    """What a rank saves: consecutive rows of each tensor, scalars on rank 0; some have no rows of some."""
    pieces: dict[str, dict[str, Piece]] = {}
    for file, tensors in state.items():
        for name, tensor in tensors.items():
            rows = -(-tensor.shape[0] // size) if tensor.ndim else 1
            start = rows * rank
            part = tensor[start : start + rows] if tensor.ndim else tensor
            if part.numel() and (tensor.ndim or not rank):
                offsets = (start, *[0] * (tensor.ndim - 1)) if tensor.ndim else ()
                pieces.setdefault(file, {})[name] = Piece(part, offsets, tuple(tensor.shape))
    return Shards(rank, pieces, {file: frozenset(tensors) for file, tensors in state.items()})


class Group:
    """Ranks of one process: what `Member` does for savers, by queues."""

    def __init__(self, files: PartFiles | None = None) -> None:
        self._orders: list[queue.Queue[Order]] = [queue.Queue() for _ in range(RANKS)]
        self._reports = [b""] * RANKS
        self._all = threading.Barrier(RANKS)
        self.lost: queue.Queue[str] = queue.Queue()
        self.savers = [ShardSaver(self._member(rank), files or PartFiles()) for rank in range(RANKS)]

    def _member(self, rank: int) -> Any:
        def exchange(report: bytes) -> list[bytes]:
            self._reports[rank] = report
            self._all.wait(30)
            found = list(self._reports)
            self._all.wait(30)
            return found

        return SimpleNamespace(
            is_leader=rank == 0,
            place=SimpleNamespace(rank=rank, size=RANKS),
            order_save=lambda order: [each.put(order) for each in self._orders[1:]],
            next_save=self._orders[rank].get,
            exchange=exchange,
            lost=self.lost.put,
        )

    def copy(self, number: int = 1, state: dict[str, dict[str, Tensor]] = STATE) -> Any:
        for rank in range(1, RANKS):
            self.savers[rank].keep(number, partial(parts, rank, state))
        return self.savers[0].snapshot(number, parts(0, state))


@pytest.fixture(autouse=True)
def _no_grace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shard_saver, "GRACE_SECONDS", 0.0)
    yield
    failpoints.install(None)


def manifest(name: str = "a", step: int = 1) -> Manifest:
    info = CheckpointInfo(name, 1, step, b"d" * 32, (), 100.0 + step)
    return Manifest(info, "r", True, None, {}, {})


def read(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {
        file: checkpoint_tensors.read(
            checkpoint_tensors.find(checkpoint_tensors.files_of(folder, file), file)
        )
        for file in STATE
    }


def assert_is_the_state(folder: Path) -> None:
    found = read(folder)
    for file, tensors in STATE.items():
        assert found[file].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[file][name].dtype == tensor.dtype
            assert torch.equal(found[file][name], tensor), f"{file} {name}"


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Checkpoints, Manifest]:
    checkpoints = Checkpoints(tmp_path)
    return checkpoints, checkpoints.write(Group().copy(), manifest())


Saved = tuple[Checkpoints, Manifest]


def test_the_files_of_all_ranks_are_the_state(saved: Saved) -> None:
    checkpoints, written = saved
    names = [file.name for file in written.info.files]
    assert names == [
        "ema-r0000-001.safetensors", "ema-r0001-001.safetensors", "ema-r0002-001.safetensors",
        "frozen-r0000-001.safetensors", "frozen-r0001-001.safetensors", "frozen-r0002-001.safetensors",
        "model-r0000-001.safetensors", "model-r0001-001.safetensors", "model-r0002-001.safetensors",
        "optimizer-r0000-001.safetensors",
    ]  # fmt: skip
    assert written.format == SHARDED
    assert json.loads((checkpoints.path("a") / "manifest.json").read_bytes())["format"] == 3
    assert checkpoints.get("a") == written
    assert checkpoints.damage(written) is None
    assert sorted(path.name for path in checkpoints.path("a").iterdir()) == sorted([*names, "manifest.json"])
    assert_is_the_state(checkpoints.path("a"))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_reader_reads_them(saved: Saved) -> None:
    checkpoints, _ = saved
    wanted = {
        f"{Path(file).stem}/{name}": torch.zeros_like(tensor)
        for file, tensors in STATE.items()
        for name, tensor in tensors.items()
    }
    dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(checkpoints.path("a"))), no_dist=True)
    for file, tensors in STATE.items():
        for name, tensor in tensors.items():
            assert torch.equal(wanted[f"{Path(file).stem}/{name}"], tensor), name


@pytest.mark.parametrize("how", ["deleted", "damaged", "swapped"])
def test_each_file_that_is_not_as_it_was_written_is_named(saved: Saved, how: str) -> None:
    checkpoints, written = saved
    folder = checkpoints.path("a")
    files = [file.name for file in written.info.files]
    for name, other in zip(files, [*files[1:], files[0]], strict=True):
        path, whole = folder / name, (folder / name).read_bytes()
        if how == "deleted":
            path.unlink()
        elif how == "damaged":
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        else:
            path.write_bytes((folder / other).read_bytes())
        problem = checkpoints.damage(written)
        assert problem is not None
        assert problem.startswith(f"{name}: ")
        path.write_bytes(whole)
        assert checkpoints.damage(written) is None


@pytest.mark.parametrize("name", ["model-r0003-001.safetensors", "model.safetensors", "notes"])
def test_a_file_that_was_added_is_named(saved: Saved, name: str) -> None:
    checkpoints, written = saved
    shutil.copy(checkpoints.path("a") / "model-r0002-001.safetensors", checkpoints.path("a") / name)
    problem = checkpoints.damage(written)
    assert problem == f"{name}: is not listed in manifest.json; move it out of the folder"


def test_files_without_a_part_of_a_tensor_are_not_read(saved: Saved) -> None:
    """Even if the manifest is not asked, as torch's reader does not."""
    folder = saved[0].path("a")
    for rank, words in (
        (0, "rows 0 to 2 of generator.a are in none of the files"),
        (1, "rows 3 to 5 of generator.a are in none of the files"),
        (2, "rows 6 to 6 of generator.a are in none of the files"),
    ):
        path = folder / f"model-r000{rank}-001.safetensors"
        path.rename(path.with_suffix(".kept"))
        with pytest.raises(ValueError, match=words):
            read(folder)
        path.with_suffix(".kept").rename(path)
    shutil.copy(folder / "model-r0001-001.safetensors", folder / "model-r0007-001.safetensors")
    with pytest.raises(
        ValueError, match=r"model-r0007.*generator.a repeats rows from row 3 on, which another file holds"
    ):
        read(folder)


def test_no_file_is_larger_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_FILE_BYTES", 22)
    for rank in range(RANKS):
        names = parts(rank).write(tmp_path, with_frozen=True)
        assert len(names) == len(set(names))
    for path in tmp_path.iterdir():
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size - 8 - header <= 22
    assert len(checkpoint_tensors.files_of(tmp_path, "ema.safetensors")) == 7, "a row of 20 bytes in each"
    assert_is_the_state(tmp_path)


def test_a_rank_that_cannot_write_refuses_the_save_and_leaves_nothing(tmp_path: Path) -> None:
    class Full(PartFiles):
        def describe(self, parts: Path, names: Any) -> Any:
            if any("-r0002-" in name for name in names):
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().describe(parts, names)

    checkpoints, group = Checkpoints(tmp_path), Group(Full())
    with pytest.raises(Refused, match=r"rank 2 cannot .*: No space left .*free some space") as raised:
        checkpoints.write(group.copy(), manifest())
    assert raised.value.reason == "CHECKPOINT_FAILED"
    assert not checkpoints.path("a").exists()
    assert group.lost.empty(), "no rank ends"


def test_a_follower_writes_only_the_copy_that_the_leader_means(tmp_path: Path) -> None:
    checkpoints, group = Checkpoints(tmp_path), Group()
    older = group.copy(1)
    group.copy(2)
    with pytest.raises(Refused, match="rank 1 cannot write its files: it has no copy number 1"):
        checkpoints.write(older, manifest())


def test_a_state_that_is_not_complete_is_not_a_checkpoint(tmp_path: Path) -> None:
    group = Group()
    copy = group.copy()
    less = {**STATE, "model.safetensors": {"generator.b": torch.arange(2.0)}}
    group.savers[1].keep(1, partial(parts, 1, less))
    with pytest.raises(Refused, match=r"rows 3 to 5 of generator\.a are in none"):
        Checkpoints(tmp_path).write(copy, manifest())


def test_a_rank_that_fails_otherwise_ends_the_group(tmp_path: Path) -> None:
    class Broken(PartFiles):
        def describe(self, parts: Path, names: Any) -> Any:
            raise RuntimeError("as a test wants it")

    group = Group(Broken())
    with pytest.raises(RuntimeError):
        Checkpoints(tmp_path).write(group.copy(), manifest())
    assert "failed in a save: as a test wants it" in group.lost.get(timeout=30)


@pytest.mark.parametrize("place", [name for name in failpoints.SHARD_NAMES if name != "shard.ordered"])
def test_a_save_that_ends_half_way_leaves_the_older_checkpoint(tmp_path: Path, place: str) -> None:
    checkpoints, group = Checkpoints(tmp_path), Group()
    older = checkpoints.write(group.copy(), manifest())

    class Killed(BaseException):
        pass

    def kill(name: str) -> None:
        if name == place and threading.current_thread() is threading.main_thread():
            raise Killed

    failpoints.install(kill)
    copy = group.copy(2)
    with pytest.raises(Killed):
        checkpoints.write(copy, manifest("b", 2))
    group._all.abort()  # the others' connection is lost, too
    failpoints.install(None)
    assert is_unfinished(checkpoints.path("b"))
    assert checkpoints.all() == [older]
    assert checkpoints.damage(older) is None
    assert checkpoints.sweep() == ["b"]


def test_a_file_that_a_rank_renames_meanwhile_leaves_its_folder_an_unfinished_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    temporary = PartFiles().begin(folder) / ".tmpabc"  # as safetensors names a file until it is complete
    temporary.touch()
    complete = temporary.with_name("model-r0001-001.safetensors")
    is_file = Path.is_file

    def after_the_rename(path: Path) -> bool:
        if path == temporary:
            path.rename(complete)
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", after_the_rename)
    assert is_unfinished(folder)
    assert complete.exists()
    temporary.symlink_to("nowhere")  # no save writes a link, and it does not count as renamed
    monkeypatch.undo()
    assert not is_unfinished(folder)


def test_a_folder_is_deleted_while_a_rank_of_an_earlier_group_writes_to_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.path("a").mkdir(parents=True)
    earlier = PartFiles().begin(checkpoints.path("a"))
    written, ended = threading.Event(), threading.Event()

    def write_until_the_folder_is_gone() -> None:
        with contextlib.suppress(OSError):
            while not ended.is_set():
                parts(1).write(earlier, with_frozen=True)
                written.set()

    writer = threading.Thread(target=write_until_the_folder_is_gone)
    writer.start()
    try:
        assert written.wait(30)
        assert checkpoints.sweep() == ["a"]
    finally:
        ended.set()
    writer.join(30)
    assert not writer.is_alive()
    assert not checkpoints.path("a").exists()


def test_a_rank_of_an_earlier_group_cannot_change_a_later_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.path("a").mkdir(parents=True)
    earlier = PartFiles().begin(checkpoints.path("a"))  # its leader was killed, and this rank not yet
    assert checkpoints.sweep() == ["a"]
    other = {file: {name: tensor + 1 for name, tensor in each.items()} for file, each in STATE.items()}
    tried = []

    def write_late(name: str) -> None:
        if name == "shard.gathered":
            failpoints.install(None)
            with pytest.raises(FileNotFoundError):
                parts(1, other).write(earlier, with_frozen=True)
            tried.append(name)

    failpoints.install(write_late)
    written = checkpoints.write(Group().copy(), manifest())
    assert tried
    assert checkpoints.damage(written) is None
    assert_is_the_state(checkpoints.path("a"))


def test_the_copy_of_a_follower_is_there_before_the_ranks_agree() -> None:
    """Otherwise the leader could order to write it too early."""
    member: Any = SimpleNamespace(is_leader=True)
    saver, trainer = ShardSaver(member, PartFiles()), SimpleNamespace(copy_shards=partial(parts, 1))
    member.place = SimpleNamespace(rank=1)
    member.ranks = SimpleNamespace(agree=lambda _: agreed.append(saver._kept))
    agreed: list[Any] = []
    order = Order("copy_shards", {"save": 4})
    carried_out(member, order, call(member, trainer, saver, order))  # type: ignore[arg-type]
    assert agreed[0][0] == 4


def test_the_folder_of_checkpoints_can_be_a_link(tmp_path: Path) -> None:
    """To a folder that several hosts share at the same path."""
    shared, run_dir = tmp_path / "shared", tmp_path / "run"
    shared.mkdir()
    run_dir.mkdir()
    (run_dir / "checkpoints").symlink_to(shared)
    path = shared_folder.place_probe(run_dir / "checkpoints")
    assert path.parent == shared
    path.unlink()
    Checkpoints(run_dir).write(Group().copy(), manifest())
    assert_is_the_state(shared / "a")


def test_frozen_weights_are_stored_once_whichever_ranks_wrote_them(saved: Saved) -> None:
    checkpoints, first = saved
    second = checkpoints.write(Group().copy(), manifest("b", 2))
    frozen = {file for file in first.info.files if file.name.startswith("frozen")}
    assert frozen <= set(second.info.files)
    for file in frozen:
        assert (checkpoints.path("a") / file.name).samefile(checkpoints.path("b") / file.name)
    assert checkpoints.damage(second) is None
    assert_is_the_state(checkpoints.path("b"))


def test_ranks_that_do_not_share_the_folder_are_told_apart(tmp_path: Path) -> None:
    place = SavePlace(tmp_path / "run" / "checkpoints", "auto")
    stale = place.folder / ".probe-old"
    place.folder.mkdir(parents=True)
    stale.touch()
    path = shared_folder.place_probe(place.folder)
    assert not stale.exists()
    assert path.stat().st_size == 0, "so that a full disk takes it"
    assert shared_folder.sees(path)
    assert not shared_folder.sees(path.with_name("elsewhere"))
    other = tmp_path / "another host" / "checkpoints"
    other.mkdir(parents=True)
    assert shared_folder.place_probe(other).name != path.name, "no two folders have the same file"
    assert list(place.folder.iterdir()) == [path], "nothing is left beside it"


def test_without_a_shared_folder_the_leader_saves_unless_ranks_must(caplog: Any) -> None:
    def decide(by: str, without: list[int]) -> bool:
        return SavePlace(Path("x"), by).decide(without)

    assert decide("auto", [])
    assert not decide("auto", [2, 3])
    assert "is not the same folder on rank 2 and 1 others" in caplog.text
    with pytest.raises(ConfigError, match=r"checkpoints_by is ranks, but .* share at the same path, or set"):
        decide("ranks", [2])
    assert not SavePlace(Path("x"), "leader").wanted(2)
    assert not SavePlace(Path("x"), "auto").wanted(1), "one rank writes whole files"
