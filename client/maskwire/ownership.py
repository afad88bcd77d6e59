"""What ties a client to the process that made it: a fork copies the object, but not its connection."""

from __future__ import annotations

import os
from typing import NoReturn

from maskwire.errors import ForkError


class ProcessBound:
    """Base of both clients: works in the process that made it, and nowhere else.

    After a fork the child holds a copy whose threads do not exist, whose locks may be held for ever, and
    whose socket is the parent's.
    """

    target: str

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def _inherited(self) -> bool:
        """Whether this is the copy of a forked child. Nothing of it may be used or closed there."""
        return os.getpid() != self._process

    def _check_process(self) -> None:
        if self._inherited:
            raise ForkError(
                f"this {type(self).__name__} was made in process {self._process} and is used in process "
                f"{os.getpid()}, a fork of it: a connection does not survive a fork. Make one there with "
                f"maskwire.attach({self.target!r}), in a process that was started by spawn or forkserver "
                "(multiprocessing.get_context('spawn')), or send the work back to the parent",
                reason="FORKED",
            )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a maskwire {type(self).__name__} cannot be pickled or copied: it holds a connection. Send the "
            f"target ({self.target!r}) and make a client there: maskwire.attach(target), or maskwire.connect "
            "for the run's one trainer"
        )
