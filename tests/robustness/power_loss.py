"""R2 and R3: the recorded writes and flushes of a run, replayed with unflushed ones missing.

A kill finds everything that was written; a power loss only what was flushed, and of the rest any part. strace
records every system call that changes a file of the run directory, in order, with its data. For each point
between two of them the files are made again as a disk could hold them then: all of what is not flushed there,
none of it, single pieces missing (each in the whole campaign), and random parts. Recovery from each must have
every step that had been acknowledged by that point, and the very state of the step that it comes back to.

The model is stricter than common file systems: data is safe after fsync of the file, a name after fsync of
its folder, and nothing else is in any order. Idea: Pillai et al., "All File Systems Are Not Created Equal"
(OSDI 2014).
"""

from __future__ import annotations

import json
import logging
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from counter import CounterTrainer
from rig import make_engine
from robustness.damage import WAIT, payload
from robustness.expected import Expected
from robustness.processes import ROOT
from robustness.workload import CONFIG, STEPS

from maskwire_server.errors import RunDirectoryError
from maskwire_server.manifest import MANIFEST

CALLS = (
    "openat,creat,write,pwrite64,fsync,fdatasync,ftruncate,rename,renameat,renameat2,unlink,unlinkat,mkdir,"
    "mkdirat,rmdir"
)
_CREATE, _TRUNCATE = 0o100, 0o1000
_LINE = re.compile(r"^(\d+) +(\w+)\((.*)\) += (-?\d+)")


def strace() -> str | None:
    """The tracer, if this machine has it."""
    return shutil.which("strace")


@dataclass
class Call:
    """One change, or one flush."""

    kind: str
    path: str
    other: str = ""
    offset: int = 0
    data: bytes = b""


def record(folder: Path, bug: str = "") -> list[Call]:
    """Run the workload under strace."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / "trace"
    command = [
        strace() or "strace", "-f", "-yy", "-X", "raw", "-xx", "-s", "1000000", "-e", f"trace={CALLS}",
        "-o", str(trace), sys.executable, "-m", "robustness.workload", str(folder), *([bug] if bug else []),
    ]  # fmt: skip
    subprocess.run(
        command, check=True, timeout=120, capture_output=True,
        env={"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    return list(read(trace, str(folder)))


def _whole_lines(trace: Path) -> Iterator[str]:
    """Calls that another thread's interrupted are put together, at their end."""
    begun: dict[str, str] = {}
    for line in trace.read_text().splitlines():
        thread, _, rest = line.partition(" ")
        if rest.endswith("<unfinished ...>"):
            begun[thread] = line.removesuffix("<unfinished ...>")
        elif " resumed>" in rest:
            yield begun.pop(thread, "") + rest.partition(" resumed>")[2]
        else:
            yield line


def _text(literal: str) -> str:
    return _bytes(literal).decode(errors="replace")


def _bytes(literal: str) -> bytes:
    return bytes.fromhex(literal.replace("\\x", ""))


def read(trace: Path, root: str) -> Iterator[Call]:
    """The calls that change something below `root`."""
    positions: dict[str, int] = {}
    for line in _whole_lines(trace):
        found = _LINE.match(line)
        if found is None or int(found[4]) < 0:
            continue
        name, arguments, result = found[2], found[3], found[4]
        strings = [_text(s) for s in re.findall(r'"((?:\\x[0-9a-f]{2})*)"', arguments)] if name not in (
            "write", "pwrite64") else []  # fmt: skip
        descriptor = re.match(r"(\d+)<((?:\\x[0-9a-f]{2})*)", arguments)
        at = _text(descriptor[2]) if descriptor else ""
        if name in ("openat", "creat"):
            path = _resolved(arguments, strings[0])
            flags = int(arguments.split(",")[2].strip(), 0) if name == "openat" else _CREATE
            positions[result] = 0
            if path.startswith(root) and flags & _CREATE:
                yield Call("create", path)
            if path.startswith(root) and flags & _TRUNCATE:
                yield Call("truncate", path, offset=0)
        elif name in ("write", "pwrite64") and at.startswith(root) and descriptor:
            literal = re.search(r'"((?:\\x[0-9a-f]{2})*)"', arguments)
            data = _bytes(literal[1])[: int(result)] if literal else b""
            if name == "pwrite64":
                offset = int(arguments.rsplit(",", 1)[1])
            else:
                offset = positions.get(descriptor[1], 0)
                positions[descriptor[1]] = offset + len(data)
            yield Call("write", at, offset=offset, data=data)
        elif name in ("fsync", "fdatasync") and at.startswith(root):
            yield Call("flush", at)
        elif name == "ftruncate" and at.startswith(root):
            yield Call("truncate", at, offset=int(arguments.rsplit(",", 1)[1]))
        elif name.startswith("rename"):
            first, second = (_resolved(arguments, s) for s in strings[:2])
            if second.startswith(root):
                yield Call("rename", first, second)
        elif name.startswith(("unlink", "rmdir", "mkdir")):
            path = _resolved(arguments, strings[0])
            if path.startswith(root):
                yield Call("make folder" if name.startswith("mkdir") else "remove", path)


def _resolved(arguments: str, path: str) -> str:
    """Paths of the *at calls are relative to an open folder."""
    if path.startswith("/"):
        return path
    base = re.match(r"-?\d+<((?:\\x[0-9a-f]{2})*)>", arguments)
    return f"{_text(base[1])}/{path}" if base else path


@dataclass(eq=False)
class Node:
    """A file or a folder: what it holds, and what is not flushed yet."""

    folder: bool
    content: bytearray = field(default_factory=bytearray)
    waiting: list[Call] = field(default_factory=list)


@dataclass
class Disk:
    """Names lead to nodes; a folder's names, like a file's bytes, are safe once it was flushed."""

    live: dict[str, Node] = field(default_factory=dict)
    safe: dict[str, Node] = field(default_factory=dict)
    names: list[tuple[str, Call, Node | None]] = field(default_factory=list)
    """Changes of names that are not flushed: the folder, the change, the node."""

    def apply(self, call: Call) -> None:
        """Let one call happen."""
        parent = str(Path(call.other or call.path).parent)
        if call.kind in ("create", "make folder"):
            if call.path not in self.live:
                node = self.live[call.path] = Node(call.kind == "make folder")
                self.names.append((parent, call, node))
        elif call.kind == "rename":
            node = self.live.pop(call.path)
            for path in [path for path in self.live if path.startswith(call.path + "/")]:
                self.live[call.other + path.removeprefix(call.path)] = self.live.pop(path)
            self.live[call.other] = node
            self.names.append((parent, call, node))
        elif call.kind == "remove":
            self.names.append((parent, call, self.live.pop(call.path, None)))
        elif call.kind == "flush":
            node = self.live.get(call.path)
            if node is None or node.folder:
                mine = [entry for entry in self.names if entry[0] == call.path]
                self.names = [entry for entry in self.names if entry[0] != call.path]
                for _, change, changed in mine:
                    _rename(self.safe, change, changed)
            else:
                for waiting in node.waiting:
                    _write(node.content, waiting)
                node.waiting.clear()
        else:
            self.live[call.path].waiting.append(call)

    def pieces(self) -> list[Any]:
        """Everything that is not flushed."""
        writes = [(node, call) for node in dict.fromkeys(self.live.values()) for call in node.waiting]
        return [*self.names, *writes]

    def files(self, missing: set[int]) -> dict[str, bytes | None]:
        """What the disk holds without the pieces at these places; None is a folder."""
        pieces = self.pieces()
        names = dict(self.safe)
        for entry in self.names:
            if not any(entry is pieces[at] for at in missing):
                _rename(names, entry[1], entry[2])
        lost_writes = {(id(pieces[at][0]), id(pieces[at][1])) for at in missing if len(pieces[at]) == 2}
        held: dict[str, bytes | None] = {}
        for path, node in names.items():
            content = bytearray(node.content)
            for call in node.waiting:
                if (id(node), id(call)) not in lost_writes:
                    _write(content, call)
            held[path] = None if node.folder else bytes(content)
        return held


def _write(content: bytearray, call: Call) -> None:
    if call.kind == "truncate":
        del content[call.offset :]
        content.extend(bytes(call.offset - len(content)))
        return
    content.extend(bytes(max(0, call.offset - len(content))))
    content[call.offset : call.offset + len(call.data)] = call.data


def _rename(names: dict[str, Node], call: Call, node: Node | None) -> None:
    if call.kind in ("create", "make folder") and node is not None:
        names[call.path] = node
    elif call.kind == "remove":
        names.pop(call.path, None)
    elif call.kind == "rename" and call.path in names:
        for path in [path for path in names if path.startswith(call.path + "/")]:
            names[call.other + path.removeprefix(call.path)] = names.pop(path)
        names[call.other] = names.pop(call.path)


def campaign(folder: Path, seed: int, *, bug: str = "", every: int = 1, singles: int = 6) -> dict[str, Any]:
    """Every point of a recorded run, or every `every`-th. Raises AssertionError when something is lost."""
    logging.getLogger("maskwire_server").setLevel(logging.CRITICAL + 1)
    calls = record(folder, bug)
    root = str(folder.resolve())
    draw = random.Random(seed)
    disk, tally = Disk(), Counter[str]()
    disk.live[root] = disk.safe[root] = Node(True)
    acknowledged, saved = 0, set[str]()
    for number, call in enumerate(calls):
        if call.path == f"{root}/acknowledged":
            for line in call.data.splitlines():
                said = json.loads(line)
                acknowledged, saved = (
                    (said[0], saved) if len(said) == 2 else (acknowledged, saved | set(said))
                )
            continue
        disk.apply(call)
        if number % every:
            continue
        count = len(disk.pieces())
        choices: list[set[int]] = [set(), set(range(count))]
        choices += [{at} for at in draw.sample(range(count), min(count, singles))]
        choices += [{at for at in range(count) if draw.random() < 0.5} for _ in range(2 if count > 1 else 0)]
        for missing in choices:
            files = disk.files(missing)
            try:
                tally[_recover(files, root, acknowledged, saved)] += 1
            except AssertionError as error:
                raise AssertionError(
                    f"after call {number} ({call.kind} {call.path}), without {sorted(missing)} of {count}: "
                    f"{error}"
                ) from error
    manifests = Counter(
        call.kind for call in calls if MANIFEST in (Path(call.path).name, Path(call.other).name)
    )
    assert manifests["remove"], "no checkpoint was deleted: that is part of what is recorded"
    return {
        "calls": len(calls), "crashes": sum(tally.values()), "outcomes": dict(tally),
        "saved": manifests["rename"], "collected": manifests["remove"],
    }  # fmt: skip


def _recover(files: dict[str, bytes | None], root: str, acknowledged: int, saved: set[str]) -> str:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as room:
        run = Path(room) / "run"
        for path, content in sorted(files.items()):
            place = Path(room) / path.removeprefix(root).lstrip("/")
            if not place.parent.is_dir() and path != root:
                continue  # the name of a folder above it was lost
            if content is None:
                place.mkdir(exist_ok=True)
            else:
                place.write_bytes(content)
        trainer = CounterTrainer()
        fatal: list[BaseException] = []
        engine = make_engine(run, CONFIG, lambda: trainer, on_fatal=fatal.append)
        try:
            engine.wait_serving(WAIT)
        except RunDirectoryError as error:
            assert not acknowledged, f"step {acknowledged} was acknowledged, and it does not start: {error}"
            assert not saved
            return "not begun: says so" if (run / "journal.sqlite").exists() else "nothing yet"
        finally:
            if not engine._serving.done() or engine._serving.exception() is not None:
                engine.close()
        status = engine.status()
        names = {info.name for info in engine.checkpoints()}
        start_digest = _first_digest(engine)
        engine.close()
        assert not fatal, fatal
        assert acknowledged <= status.durable_step <= STEPS, (
            f"step {acknowledged} was acknowledged, it comes back at {status.durable_step}"
        )
        assert "named" in names or "named" not in saved, "a checkpoint that was answered is gone"
        expected = Expected(start_digest)
        for step in range(1, status.durable_step + 1):
            expected.train(payload(step).batch.ids.reshape(2, 8).astype("uint8"))
        assert status.digest == expected.digest
        assert trainer.state == expected.states[status.durable_step], "the right step with other weights"
        return "recovered"


def _first_digest(engine: Any) -> bytes:
    lineages = engine._run.lineages
    digest: bytes = lineages[1].digest
    return digest
