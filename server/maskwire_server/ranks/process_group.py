"""Makes this process one rank of the group that the launcher's environment variables describe."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from maskwire_server.config import DistributedConfig, ServeConfig
from maskwire_server.errors import ConfigError
from maskwire_server.ranks import addresses
from maskwire_server.ranks.launcher import FOLDER, LEADER, check_layout, note_loss
from maskwire_server.ranks.liveness import LOOPBACK, LeaderAddress, Monitor, exit_now, watch_leader
from maskwire_server.ranks.orders import Order
from maskwire_server.training.numerics import choose_device, cores
from maskwire_server.training.sharding import ManyRanks

log = logging.getLogger(__name__)

EXIT_LOST = 75
"""Exit code: another rank was lost."""
_FORM_SECONDS = 60
"""How long a starting rank waits for the others, which must import torch meanwhile. Afterwards it watches
them. If the time is too short, the ranks restart, and import torch again from a warmer disk cache."""
_LEAVE = timedelta(seconds=10)  # how long a rank's answer to a configuration error may take
_COLLECTIVE = timedelta(minutes=30)  # limit for a hung device; lost ranks are detected much sooner
_SAVE = timedelta(hours=1)  # how long the files of one checkpoint may take
_UNBOUNDED = timedelta(days=3650)  # between two orders, or two saves, a run may be idle


@dataclass(frozen=True)
class Place:
    """A rank's place in the group and on its host, from the environment that torch's launchers set."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    hosts: int

    @staticmethod
    def from_environment() -> Place:
        """The place of this process, from its environment variables."""
        rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        return Place(rank, size, local_rank, local_size, int(os.environ.get("GROUP_WORLD_SIZE", 1)))

    @property
    def may_lead(self) -> bool:
        """Whether this is the first rank of the host that has the run directory."""
        return self.local_rank == 0 and (self.hosts == 1 or os.environ.get(LEADER) == "1")


@dataclass(frozen=True)
class Terms:
    """The properties and settings of a rank that must fit those of the other ranks."""

    host: str
    settings: dict[str, str]
    """The settings that must be the same on all ranks, by name."""
    problem: str
    """Why this rank cannot take part; empty if it can."""
    may_lead: bool


_exit_lost = exit_now(EXIT_LOST, note_loss)


class Member:
    """This process as a member of its group. The leader calls `order`; all others call `next_order`."""

    def __init__(self, place: Place, ranks: ManyRanks, leader: int, monitor: Monitor | None) -> None:
        """`monitor` watches the followers; it is None on followers."""
        self.place, self.ranks = place, ranks
        self.is_leader = ranks.is_leader
        self._leader = leader
        self._orders = dist.new_group(backend="gloo", timeout=_UNBOUNDED)
        self._saves = dist.new_group(backend="gloo", timeout=_SAVE)  # used by the savers' threads alone
        self.lost = _exit_lost
        """Exits this process with the given reason; the other ranks then exit too."""
        self._monitor = monitor

    def order(self, order: Order) -> None:
        """Send an order to all followers."""
        data = order.encode()
        self.ranks.record(data)
        self._broadcast(self._orders, data)

    def next_order(self) -> Order:
        """Wait for the leader's next order, without a time limit, and return it."""
        data = self._broadcast(self._orders)
        self.ranks.record(data)
        return Order.decode(data)

    def order_save(self, order: Order) -> None:
        """Send an order to the savers of all followers."""
        self._broadcast(self._saves, order.encode())

    def next_save(self) -> Order:
        """Wait for the leader's next order to the saver, without a time limit, and return it."""
        return Order.decode(self._broadcast(self._saves))

    def exchange(self, report: bytes) -> list[bytes]:
        """Send this saver's report to all ranks, and return the reports of all savers, by rank."""
        size = torch.tensor([len(report)], dtype=torch.int64)
        sizes = [torch.zeros_like(size) for _ in range(self.place.size)]
        dist.all_gather(sizes, size, group=self._saves)
        own = torch.zeros(max(map(int, sizes)), dtype=torch.uint8)
        own[: len(report)] = torch.frombuffer(bytearray(report), dtype=torch.uint8)
        found = [torch.empty_like(own) for _ in sizes]
        dist.all_gather(found, own, group=self._saves)
        return [each[: int(length)].numpy().tobytes() for each, length in zip(found, sizes, strict=True)]

    def _broadcast(self, group: dist.ProcessGroup, data: bytes | None = None) -> bytes:
        """Send `data` from the leader to all other ranks, and return it. Only the leader passes `data`.

        The other ranks wait for it without a time limit.
        """
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
        """Let the followers exit, because the leader ends for good."""
        if self._monitor is not None:
            self._monitor.end_followers()


def join(distributed: DistributedConfig, serve: ServeConfig) -> Member:
    """Join the launcher's group. From now on, this process exits when another rank is lost.

    Raises ConfigError on every rank if any rank does not fit the configuration or the other ranks.
    """
    place = Place.from_environment()
    late = threading.Timer(_FORM_SECONDS, _exit_lost, [f"the ranks did not meet within {_FORM_SECONDS} s"])
    late.daemon = True
    late.start()
    store, _, _ = next(rendezvous(_store(place), place.rank, place.size, timeout=_COLLECTIVE))
    store.set_timeout(_COLLECTIVE)
    terms = _exchange(store, place, own_terms(place, distributed, serve))
    try:
        leader = agreed(terms, distributed)
    except ConfigError:
        _leave_together(store, place)
        raise
    monitor = _watch(store, place, leader, distributed.rank_timeout_seconds)
    late.cancel()  # from now on, each rank watches the leader, and the leader watches all others
    device = rank_device(serve.device, place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store, rank=place.rank, world_size=place.size, timeout=_COLLECTIVE,
    )  # fmt: skip
    ranks = ManyRanks(device, replicate=distributed.replicate, leader=leader, timeout=_COLLECTIVE)
    ranks.cores = max(1, cores() // place.local_size)
    member = Member(place, ranks, leader, monitor)
    log.info("rank %d of %d%s", place.rank, place.size, ", the leader" if ranks.is_leader else "")
    return member


def rank_device(wish: str, place: Place) -> torch.device:
    """The device of this rank. Raises ConfigError unless this host has a device for each of its ranks."""
    device = choose_device(wish)
    if device.type != "cuda":
        return device
    if ":" in wish:
        raise ConfigError(f"serve.device: with several ranks must be auto, cpu or cuda, got {wish!r}")
    if place.local_size > torch.cuda.device_count():
        raise ConfigError(
            f"--ranks: must be at most the number of CUDA devices, {torch.cuda.device_count()}, "
            f"got {place.local_size}; start fewer ranks, or set serve.device=cpu"
        )
    return torch.device("cuda", place.local_rank)


def own_terms(place: Place, distributed: DistributedConfig, serve: ServeConfig) -> Terms:
    """The properties and settings of this rank that must fit those of the other ranks."""
    device, problem = "", ""
    try:
        device = rank_device(serve.device, place).type
    except ConfigError as error:
        problem = str(error)
    settings = {
        "distributed.replicate": str(distributed.replicate),
        "distributed.shard": str(distributed.shard or "off"),
        "serve.device": device,
    }
    return Terms(socket.gethostname(), settings, problem, place.may_lead)


def agreed(terms: Sequence[Terms], distributed: DistributedConfig) -> int:
    """Check that all ranks fit together, and return the rank of the leader.

    Raises ConfigError, with the same message on every rank, if they do not.
    """
    for rank, each in enumerate(terms):
        if each.problem:
            raise ConfigError(f"rank {rank} on {each.host}: {each.problem}")
    first = terms[0]
    for rank, each in enumerate(terms):
        for name, value in each.settings.items():
            if value != first.settings[name]:
                raise ConfigError(
                    f"{name}: must be the same on all ranks, got {first.settings[name]} on rank 0 "
                    f"({first.host}) and {value} on rank {rank} ({each.host})"
                )
    check_layout(distributed, len(terms))
    leaders = [rank for rank, each in enumerate(terms) if each.may_lead]
    if len(leaders) != 1:
        raise ConfigError(
            f"distributed: exactly one host must have the run directory, got {len(leaders)}; set {LEADER}=1 "
            "on that host, or start with: maskwire-server serve --ranks N --nodes M --rendezvous HOST:PORT"
        )
    return leaders[0]


def _exchange(store: Store, place: Place, own: Terms) -> list[Terms]:
    """Publish the terms of this rank, and return the terms of all ranks once all have published."""
    store.set(f"terms/{place.rank}", json.dumps(asdict(own)))
    found = store.multi_get([f"terms/{rank}" for rank in range(place.size)])
    return [Terms(**json.loads(each)) for each in found]


def _leave_together(store: Store, place: Place) -> None:
    """Report that this rank has read the store. Rank 0, which may host it, waits for the other ranks."""
    with contextlib.suppress(RuntimeError):  # includes torch's errors of a store that is gone
        store.set(f"left/{place.rank}", "")
        if place.rank == 0:
            store.wait([f"left/{rank}" for rank in range(place.size)], _LEAVE)


def _watch(store: Store, place: Place, leader: int, timeout: float) -> Monitor | None:
    """Watch the other ranks from now on, and exit when one is lost. Returns the monitor on the leader."""
    if place.rank == leader:
        host = LOOPBACK if place.hosts == 1 else addresses.towards(os.environ["MASTER_ADDR"])
        monitor = Monitor(host, place.size - 1, timeout, _exit_lost)
        store.set("monitor", json.dumps(asdict(monitor.address)))
        return monitor
    address = LeaderAddress(**json.loads(store.get("monitor")))
    watch_leader(address, place.rank, timeout, _exit_lost, lambda: os._exit(0))
    return None


def _store(place: Place) -> str:
    """The URL of the group's store: a file in the launcher's folder; env:// for torchrun or several hosts."""
    folder = os.environ.get(FOLDER)
    if folder is None or place.hosts > 1:
        return "env://"
    return f"file://{folder}/ranks-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
