"""A follower: carries out the leader's orders until the leader ends."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from maskwire_server.batch import Payload
from maskwire_server.ranks import shared_folder
from maskwire_server.ranks.leader import carried_out
from maskwire_server.ranks.orders import Order
from maskwire_server.ranks.process_group import Member
from maskwire_server.ranks.shard_saver import ShardSaver
from maskwire_server.training.trainer import TorchTrainer

log = logging.getLogger(__name__)

_CALLS: dict[str, Callable[..., Any]] = {
    "use_threads": TorchTrainer.use_threads,
    "configure": TorchTrainer.configure,
    "receive": TorchTrainer.receive,
    "warm_up": TorchTrainer.warm_up,
    "snapshot": TorchTrainer.snapshot,
    "gather": TorchTrainer.gather,
}


def follow(member: Member, build: Callable[[dict[str, Any]], TorchTrainer], saver: ShardSaver) -> NoReturn:
    """Build the trainer that the first order describes, then carry out all later orders.

    Never returns: `liveness.watch_leader` ends the process when the leader ends. Raises StateLost if a call
    fails, unless all ranks refuse to `configure` with the same ValueError.
    """
    trainer = build(member.next_order().arguments)
    while True:
        order = member.next_order()
        with contextlib.suppress(ValueError):  # refused on every rank
            carried_out(member, order, call(member, trainer, saver, order))


def call(member: Member, trainer: TorchTrainer, saver: ShardSaver, order: Order) -> Callable[[], Any]:
    """Return the function that carries out an order on this rank."""
    given = order.arguments
    if order.name == "copy_shards":
        return lambda: saver.keep(given["save"], trainer.copy_shards)
    if order.name == "probe":
        return lambda: member.ranks.which(not shared_folder.sees(Path(given["path"])))
    if order.name == "train_step":
        return lambda: _train_step(trainer, given, order.payload)
    return lambda: _CALLS[order.name](trainer, **given)


def _train_step(trainer: TorchTrainer, given: dict[str, Any], encoded: bytes) -> None:
    payload = Payload.decode(encoded)
    trainer.train_step(given["lineage"], given["step"], payload.batch, payload.modes)
