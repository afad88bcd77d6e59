"""This process as one rank of a group, which it joins using the launcher's environment variables."""

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
"""Exit code: another rank was lost."""
_COLLECTIVE = timedelta(minutes=30)  # limit for a hung device; lost ranks are noticed long before
_SAVE = timedelta(hours=1)  # how long the files of one checkpoint may take
_UNBOUNDED = timedelta(days=3650)  # between two orders, or two saves, a run may be idle


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
        """Whether this is the first rank of the host that has the run directory."""
        return self.local_rank == 0 and (self.hosts == 1 or os.environ.get(LEADER) == "1")


class Member:
    """This process in its group. The leader calls `order` while all others call `next_order`."""

    def __init__(self, place: Place, ranks: ManyRanks, leader: int) -> None:
        self.place, self.ranks = place, ranks
        self.is_leader = ranks.is_leader
        self._leader = leader
        self._orders = dist.new_group(backend="gloo", timeout=_UNBOUNDED)
        self._saves = dist.new_group(backend="gloo", timeout=_SAVE)  # used by the savers' threads alone
        self.lost = exit_now(EXIT_LOST, note_loss)
        """Exits this process with the given reason; the other ranks then exit too."""
        self._monitor: Monitor | None = None

    def watch(self, timeout: float) -> None:
        """Watch the other ranks from now on, and exit when one is lost."""
        if self.is_leader:
            host = LOOPBACK if self.place.hosts == 1 else address_towards(os.environ["MASTER_ADDR"])
            self._monitor = Monitor(host, self.place.size - 1, timeout, self.lost)
            self.order(Order("watch", asdict(self._monitor.address)))
        else:
            address = LeaderAddress(**self.next_order().arguments)
            watch_leader(address, self.place.rank, timeout, self.lost, lambda: os._exit(0))

    def order(self, order: Order) -> None:
        """Send an order to all followers."""
        data = order.encode()
        self.ranks.record(data)
        self._broadcast(self._orders, data)

    def next_order(self) -> Order:
        """Wait for an order, for as long as it takes."""
        data = self._broadcast(self._orders)
        self.ranks.record(data)
        return Order.decode(data)

    def order_save(self, order: Order) -> None:
        """Send an order to the savers of all followers."""
        self._broadcast(self._saves, order.encode())

    def next_save(self) -> Order:
        """Wait for an order to the saver, for as long as it takes."""
        return Order.decode(self._broadcast(self._saves))

    def exchange(self, report: bytes) -> list[bytes]:
        """The reports of all ranks' savers. Waits for all of them."""
        size = torch.tensor([len(report)], dtype=torch.int64)
        sizes = [torch.zeros_like(size) for _ in range(self.place.size)]
        dist.all_gather(sizes, size, group=self._saves)
        own = torch.zeros(max(map(int, sizes)), dtype=torch.uint8)
        own[: len(report)] = torch.frombuffer(bytearray(report), dtype=torch.uint8)
        found = [torch.empty_like(own) for _ in sizes]
        dist.all_gather(found, own, group=self._saves)
        return [each[: int(length)].numpy().tobytes() for each, length in zip(found, sizes, strict=True)]

    def _broadcast(self, group: dist.ProcessGroup, data: bytes | None = None) -> bytes:
        """Send bytes from the leader to all others, which wait for them without a time limit."""
        size = torch.tensor([len(data or b"")], dtype=torch.int64)
        options = dist.BroadcastOptions()
        options.rootRank = self._leader
        if data is None:
            options.timeout = _UNBOUNDED
        group.broadcast([size], options).wait()
        there = torch.empty(int(size), dtype=torch.uint8)
        if data is not None:
            there = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        group.broadcast([there], options).wait()
        return there.numpy().tobytes()

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
    """The `init_method`: a file in the launcher's folder, or `env://` with several hosts or torchrun."""
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
