"""The full weights of a model that is divided among ranks, for computations on one rank alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from maskwire_server.errors import StateLost
from maskwire_server.training import module_state
from maskwire_server.training.models.generator_critic import Networks
from maskwire_server.training.ranks_interface import Ranks, whole


class Gathered:
    """The leader's full copy of the weights. The other ranks help to gather it, but keep no copy."""

    def __init__(self, ranks: Ranks, build: Callable[[], Networks]) -> None:
        """`build` makes networks of the model on this rank's device. It is called once, when needed."""
        self._ranks, self._build = ranks, build
        self._copy: Networks | None = None

    def gather(self, live: Networks) -> None:
        """Copy the weights of all ranks to the leader. Every rank must call this."""
        if not self._ranks.is_sharded:
            return
        if self._copy is None and self._ranks.is_leader:
            with torch.random.fork_rng(devices=[]):
                self._copy = self._build()
        copies = None if self._copy is None else module_state.tensors(self._copy)
        for name, tensor in module_state.tensors(live).items():
            full = whole(tensor.detach())
            if copies is not None:
                copies[name].data.copy_(full)

    def of(self, live: Networks) -> Networks:
        """Networks that this rank can use alone: the gathered copy or, if nothing is divided, `live`."""
        if not self._ranks.is_sharded:
            return live
        if self._copy is None:
            raise StateLost(
                "the weights are divided among ranks, and this rank has no gathered copy; restart the server"
            )
        return self._copy
