"""This process as one rank of a group: joined from the launcher's environment variables."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from maskwire_server.config import DistributedConfig, ServeConfig
from maskwire_server.errors import ConfigError
from maskwire_server.ranks.launcher import FOLDER, LEADER, address_towards, check_layout, note_loss
from maskwire_server.ranks.liveness import LOOPBACK, LeaderAddress, Monitor, exit_now, watch_leader
from maskwire_server.ranks.orders import Order
from maskwire_server.training.numerics import choose_device, cores
from maskwire_server.training.sharding import ManyRanks

log = logging.getLogger(__name__)

EXIT_LOST = 75
"""A rank was lost."""
_COLLECTIVE = timedelta(minutes=30)  # a hung device; lost ranks are noticed long before
_UNBOUNDED = timedelta(days=3650)  # between two orders a run may be idle


@dataclass(frozen=True)
class Place:
    """A rank's place, from the environment that torch's launchers set."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    hosts: int

    @staticmethod
    def from_environment() -> Place:
        """The place of this process."""
        rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        return Place(rank, size, local_rank, local_size, int(os.environ.get("GROUP_WORLD_SIZE", 1)))

    @property
    def may_lead(self) -> bool:
        """Whether the run directory is here."""
        return self.local_rank == 0 and (self.hosts == 1 or os.environ.get(LEADER) == "1")


class Member:
    """This process in its group. One rank calls `order` while all others call `next_order`."""

    def __init__(self, place: Place, ranks: ManyRanks, leader: int) -> None:
        self.place, self.ranks = place, ranks
        self.is_leader = ranks.is_leader
        self._leader = leader
        self._orders = dist.new_group(backend="gloo", timeout=_UNBOUNDED)
        self._monitor: Monitor | None = None

    def watch(self, timeout: float) -> None:
        """Watch the other ranks from now on, and exit when one is lost."""
        lost = exit_now(EXIT_LOST, note_loss)
        if self.is_leader:
            host = LOOPBACK if self.place.hosts == 1 else address_towards(os.environ["MASTER_ADDR"])
            self._monitor = Monitor(host, self.place.size - 1, timeout, lost)
            self.order(Order("watch", asdict(self._monitor.address)))
        else:
            address = LeaderAddress(**self.next_order().arguments)
            watch_leader(address, self.place.rank, timeout, lost, lambda: os._exit(0))

    def order(self, order: Order) -> None:
        """Send an order to all followers."""
        data = order.encode()
        self.ranks.record(data)
        size = torch.tensor([len(data)], dtype=torch.int64)
        dist.broadcast(size, self._leader, group=self._orders)
        dist.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8), self._leader, group=self._orders)

    def next_order(self) -> Order:
        """Wait for an order, for as long as it takes."""
        size = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(size, self._leader, group=self._orders)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, self._leader, group=self._orders)
        found = data.numpy().tobytes()
        self.ranks.record(found)
        return Order.decode(found)

    def end(self) -> None:
        """Let the followers exit: the leader ends for good."""
        if self._monitor is not None:
            self._monitor.end_followers()


def join(distributed: DistributedConfig, serve: ServeConfig) -> Member:
    """Join the group of the launcher. Raises ConfigError if the ranks do not fit the configuration."""
    place = Place.from_environment()
    check_layout(distributed, place.size)
    device = choose_device(serve.device)
    if device.type == "cuda":
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        init_method=_store(place), rank=place.rank, world_size=place.size, timeout=_COLLECTIVE,
    )  # fmt: skip
    leader = _leader(place)
    ranks = ManyRanks(device, replicate=distributed.replicate, leader=leader, timeout=_COLLECTIVE)
    ranks.cores = max(1, cores() // place.local_size)
    member = Member(place, ranks, leader)
    member.watch(distributed.rank_timeout_seconds)
    log.info("rank %d of %d%s", place.rank, place.size, ", the leader" if ranks.is_leader else "")
    return member


def _store(place: Place) -> str:
    """Where the ranks meet: on one host a file of the launcher's folder, otherwise a port of rank 0."""
    folder = os.environ.get(FOLDER)
    if folder is None or place.hosts > 1:
        return "env://"
    return f"file://{folder}/ranks-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _leader(place: Place) -> int:
    """The rank of the leader. Raises ConfigError unless exactly one host has the run directory."""
    may = torch.tensor([place.may_lead], dtype=torch.int64)
    found = [torch.zeros_like(may) for _ in range(place.size)]
    dist.all_gather(found, may)
    leaders = [rank for rank, each in enumerate(found) if int(each)]
    if len(leaders) != 1:
        raise ConfigError(
            f"distributed: exactly one host must have the run directory, got {len(leaders)}; set {LEADER}=1 "
            "there, or start with: maskwire-server serve --ranks N --nodes M --rendezvous HOST:PORT"
        )
    return leaders[0]
