"""Binds a client to the process that made it: a fork copies the object, but not its connection."""

from __future__ import annotations

import os
from typing import NoReturn

from maskwire.errors import ForkError


class ProcessBound:
    """Base of both clients: usable only in the process that made it.

    After a fork the child has a copy whose threads do not exist, whose locks may be held forever, and whose
    socket belongs to the parent.
    """

    target: str

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def _inherited(self) -> bool:
        """Whether this is the copy in a forked child, which must neither use nor close the connection."""
        return os.getpid() != self._process

    def _check_process(self) -> None:
        if self._inherited:
            raise ForkError(
                f"this {type(self).__name__} was made in process {self._process} and is used in process "
                f"{os.getpid()}, a fork of it: a connection does not survive a fork. Make a client "
                f"there with maskwire.attach({self.target!r}), in a process started by spawn or forkserver "
                "(multiprocessing.get_context('spawn')), or send the work back to the parent",
                reason="FORKED",
            )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a maskwire {type(self).__name__} cannot be pickled or copied: it holds a connection. Send the "
            f"target ({self.target!r}) and make a client there: maskwire.attach(target), or maskwire.connect "
            "for the run's trainer"
        )
