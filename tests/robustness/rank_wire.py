"""R12: what ranks send is recorded with strace, and has no pickle in it.

torch's launcher, whose rendezvous is known to use pickles, is not recorded. The scan looks for two forms. A
pickle of protocol 4 or 5 begins with 11 bytes, its protocol and the length of a frame, which tensors hardly
contain by chance, so it is found anywhere in a message. A pickle without a frame (protocol 2 or 3) is found
only if it is the entire message.
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from rank_groups import SECONDS, RankServer
from robustness.power_loss import strace
from robustness.rank_faults import SETTINGS, SIZE, work

CALLS = "write,writev,sendto,sendmsg,sendmmsg"
LONGEST = 2**20
"""How much of a message is recorded."""
_SENT = re.compile(r"(?:write|writev|sendto|sendmsg|sendmmsg)\(\d+<(?:TCP|UNIX|UDP|socket)")
_BORN = re.compile(r"(?:clone|clone3|fork|vfork)\(.* = (\d+)$")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
_FRAMED = re.compile(rb"\x80[\x04\x05]\x95", re.DOTALL)


def scan(folder: Path) -> dict[str, Any]:
    """Everything that two ranks send has no pickle in it; a planted one is found. Raises AssertionError."""
    if strace() is None:
        return {"skipped": "strace is not installed"}
    messages = list(_recorded(folder / "clean", ""))
    assert any(b'["train_step"' in message for message in messages), "orders are not in what was recorded"
    found = [message[:200] for message in messages if has_pickle(message)]
    assert not found, f"{len(found)} pickles: {found[:3]}"
    planted = sum(map(has_pickle, _recorded(folder / "planted", "pickled_broadcast")))
    assert planted, "a planted pickle was not found"
    return {"messages": len(messages), "MB": round(sum(map(len, messages)) / 1e6, 1), "planted": planted}


def has_pickle(message: bytes) -> bool:
    """Whether a message is a pickle, or has one with a frame in it."""
    if message[:1] == b"\x80" and _length(message) == len(message):
        return True
    for each in _FRAMED.finditer(message):
        (frame,) = struct.unpack("<Q", message[each.end() : each.end() + 8].ljust(8, b"\xff"))
        rest = message[each.start() :]
        # A message that was sent in parts ends before its frame does.
        if 0 < frame < 2**31 and (_length(rest) or frame > len(rest) - 11):
            return True
    return False


def _length(data: bytes) -> int:
    """The length of the pickle with which data begins; 0 if it does not begin with a whole one."""
    try:
        return max(at + 1 for code, _, at in pickletools.genops(io.BytesIO(data)) if at is not None)
    except Exception:  # whatever bytes that are no pickle lead to
        return 0


def _recorded(folder: Path, patch: str) -> Iterator[bytes]:
    """What the ranks of a server sent through sockets, message by message, until it stopped."""
    folder.mkdir(parents=True)
    prefix = [
        strace() or "strace", "-ff", "-yy", "-xx", "-s", str(LONGEST),
        "-e", f"trace={CALLS},clone,clone3,fork,vfork", "-o", str(folder / "trace"),
    ]  # fmt: skip
    server = RankServer(folder, SIZE, *SETTINGS, "distributed.rank_timeout_seconds=60", patch=patch,
                        prefix=prefix)  # fmt: skip
    try:
        work(server)
        ranks = [rank.pid for rank in server.ranks().values()]
        assert server.restarts() == 0
        (launcher,) = psutil.Process(server.process.pid).children()
        launcher.terminate()  # strace itself ignores the signal
        assert server.process.wait(SECONDS) == 0
    finally:
        server.kill()
    todo = list(ranks)
    assert len(todo) == SIZE
    while todo:  # the threads of the ranks
        for line in (folder / f"trace.{todo.pop()}").read_text().splitlines():
            if born := _BORN.match(line):
                todo.append(int(born[1]))
            elif _SENT.match(line):
                for text, cut in _TEXT.findall(line):
                    assert not cut, "a message is too long to be recorded"
                    yield bytes.fromhex(text.replace("\\x", ""))
