"""Engines with a mirror in a folder, and what a restore brings back."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from counter import CounterTrainer
from rig import WAIT, bare, make_engine

from maskwire.v1.values import MirrorStatus
from maskwire_server import config
from maskwire_server.config import StorageConfig
from maskwire_server.engine.engine import Engine
from maskwire_server.journal import restored_journal
from maskwire_server.journal.journal import Journal
from maskwire_server.journal.mirror_segment_writer import resume
from maskwire_server.journal.mirror_segments import Segment
from maskwire_server.journal.object_store import ObjectStore

Tables = dict[str, list[tuple[Any, ...]]]
OWN = ("outbox", "mirror", "sqlite_sequence")


class MirroredRig:
    """One address, and the run directories on it."""

    def __init__(self, folder: Path, acknowledge: str = "local") -> None:
        self.folder = folder
        self.address = f"file://{folder}/mirror"
        self.acknowledge = acknowledge
        self.engines: list[Engine] = []
        self.fatal: list[BaseException] = []

    @property
    def store(self) -> ObjectStore:
        return ObjectStore(self.address)

    def start(
        self,
        name: str = "run",
        trainer: Callable[[], CounterTrainer] = CounterTrainer,
        *,
        wait: bool = True,
        accept_inexact_replay: bool = False,
        **sections: Any,
    ) -> Engine:
        seconds = sections.pop("segment_seconds", 0.02)
        storage = StorageConfig(
            mirror=self.address, acknowledge=self.acknowledge, segment_seconds=seconds,  # type: ignore[arg-type]
            **sections.pop("storage", {}),
        )  # fmt: skip
        engine = make_engine(
            self.folder / name, config.load(None, **sections), trainer, storage=storage,
            store=self.store, on_fatal=self.fatal.append, accept_inexact_replay=accept_inexact_replay,
        )  # fmt: skip
        self.engines.append(engine)
        if wait:
            engine.wait_serving(WAIT)
        return engine

    def restore(self, name: str) -> bool:
        """What a server does first that starts on an empty directory."""
        return restored_journal.restore(self.folder / name, self.store, self.acknowledge, mock.Mock())

    def close(self) -> None:
        for engine in self.engines:
            engine.close()


def tables(run_dir: Path) -> Tables:
    """Every row of a journal that nobody has open, but what is about the mirror itself."""
    with closing(sqlite3.connect(run_dir / "journal.sqlite")) as db:
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            name: sorted(db.execute(f"SELECT * FROM {name}").fetchall(), key=repr)
            for name in names
            if name not in OWN
        }


def mirror(engine: Engine) -> MirrorStatus:
    found = engine.status().mirror
    assert found is not None
    return found


def failed_segments(engine: Engine) -> int:
    """How often a segment could not be uploaded; the status also counts checkpoints that could not."""
    assert engine._mirror is not None
    return engine._mirror._failures


def train(engine: Engine, count: int, first: int = 0) -> None:
    for step in range(first, first + count):
        engine.train_step(bare(step, f"step-{step}")).result(WAIT)


def restored(rig: MirroredRig, name: str) -> str:
    """Restore, and return what the run's status says of it."""
    assert rig.restore(name)
    with closing(Journal(rig.folder / name)) as journal:
        state = journal.outbox.state()
    assert state is not None
    return state.restored


def steps(rig: MirroredRig, name: str) -> int:
    return len(tables(rig.folder / name)["steps"])


def segments(rig: MirroredRig) -> list[Segment]:
    names = sorted((rig.folder / "mirror/segments").glob("*[0-9]"))  # not one that is being written
    return [Segment.decode(path.read_bytes()) for path in names]


def upload_all(rig: MirroredRig, size: int = 1) -> Iterator[bool]:
    """Upload what the run directory has, in small segments; yields after each whether it was the last."""
    with closing(Journal(rig.folder / "run")) as journal:
        writer, after, more = resume(journal, rig.store, rig.acknowledge), 0, True
        yield False
        while more:
            page = journal.outbox.page(after, size)
            writer.compose(page)
            writer.send()
            after, more = page.last, page.more
            yield not more


def lose_the_machine(rig: MirroredRig, engine: Engine) -> None:
    """The process ends without a word, and its directory is gone."""
    with down():
        engine.close()
    shutil.rmtree(rig.folder / "run")


@contextmanager
def down(*methods: str) -> Iterator[None]:
    """A store that fails whatever is asked of it, or only these methods."""
    names = methods or ("create", "put", "put_file", "copy", "get", "get_part", "get_file", "names", "delete")
    failing = [True]

    def failing_while_down(name: str) -> Callable[..., Any]:
        works = getattr(ObjectStore, f"_{name}")

        def call(store: ObjectStore, *arguments: Any) -> Any:
            if failing[0]:
                raise OSError("the store is down")
            return works(store, *arguments)

        return call

    calls = {f"_{name}": failing_while_down(name) for name in names}
    with mock.patch.multiple(ObjectStore, **calls):  # type: ignore[arg-type]
        yield
        failing[0] = False  # for calls that are being repeated
