"""Limits a client to the process that created it: a fork copies the object, but not its connection."""

from __future__ import annotations

import os
from typing import NoReturn

from maskwire.errors import ForkError


class ProcessBound:
    """Base class of both clients: an object that only the process that created it can use.

    After a fork, the child process has a copy of the object whose threads do not exist, whose locks may be
    held forever, and whose socket belongs to the parent.
    """

    target: str

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def _inherited(self) -> bool:
        """Whether this object is a copy in a forked child, which must not use or close the connection."""
        return os.getpid() != self._process

    def _check_process(self) -> None:
        if self._inherited:
            raise ForkError(
                f"this {type(self).__name__} was created in process {self._process} and cannot be used in "
                f"its forked child {os.getpid()}, because a fork does not copy the connection: start the "
                "child with multiprocessing.get_context('spawn') and create a client in it with "
                f"maskwire.attach({self.target!r}), or use the client in the parent process only",
                reason="FORKED",
            )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a maskwire {type(self).__name__} cannot be pickled or copied, because it holds a connection. "
            f"Send the target ({self.target!r}) instead, and create a client there with "
            "maskwire.attach(target), or a trainer with maskwire.connect(target)"
        )
