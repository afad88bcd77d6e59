"""What a test changes in every rank of a group; see `sitecustomize`."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from maskwire_server.ranks import process_group
from maskwire_server.training.trainer import TorchTrainer

SHORT = 20


def short_timeouts() -> None:
    """Every time limit of the group is 20 s. The wait for an order has none, and keeps none."""
    process_group._FORM_SECONDS = SHORT
    for name in ("_LEAVE", "_COLLECTIVE", "_SAVE"):
        setattr(process_group, name, timedelta(seconds=SHORT))


def limited_orders() -> None:
    """A mistake: the wait for an order has a time limit too."""
    short_timeouts()
    process_group._UNBOUNDED = timedelta(seconds=SHORT)


def pickled_broadcast() -> None:
    """A mistake: the ranks exchange pickles before their first step."""
    warm_up = TorchTrainer.warm_up

    def changed(trainer: TorchTrainer) -> None:
        objects: list[Any] = [{"planted": 1}]
        dist.broadcast_object_list(objects)
        warm_up(trainer)

    TorchTrainer.warm_up = changed  # type: ignore[method-assign]
