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
    """Build the trainer of the first order, which has the leader's configuration, and serve the others.

    Ends with the process: `Member.watch` ends it when the leader ends. Raises what a call raised that not all
    ranks refused alike.
    """
    trainer = build(member.next_order().arguments)
    while True:
        order = member.next_order()
        with contextlib.suppress(ValueError):  # refused on every rank
            carried_out(member, order, call(member, trainer, saver, order))


def call(member: Member, trainer: TorchTrainer, saver: ShardSaver, order: Order) -> Callable[[], Any]:
    """The call of the trainer that an order stands for."""
    given = order.arguments
    if order.name == "copy_shards":
        return lambda: saver.keep(given["save"], trainer.copy_shards)
    if order.name == "probe":
        return lambda: member.ranks.which(not shared_folder.sees(Path(given["path"])))
    if order.name == "train_step":
        payload = Payload.decode(order.payload)
        return lambda: trainer.train_step(given["lineage"], given["step"], payload.batch, payload.modes)
    return lambda: _CALLS[order.name](trainer, **given)
