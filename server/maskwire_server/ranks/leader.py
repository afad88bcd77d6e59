"""The leader's trainer: each call becomes an order to the followers and the same call on this rank."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from maskwire.v1.values import ModelInfo
from maskwire_server import failpoints
from maskwire_server.batch import Batch, Modes, Payload, Prompts
from maskwire_server.error_output import say
from maskwire_server.errors import ConfigError, StateLost
from maskwire_server.exit_codes import EXIT_CONFIG
from maskwire_server.ranks import shared_folder
from maskwire_server.ranks.launcher import note_exit, note_loss
from maskwire_server.ranks.liveness import GRACE_SECONDS
from maskwire_server.ranks.orders import Order
from maskwire_server.ranks.process_group import Member
from maskwire_server.ranks.shard_saver import ShardSaver, ShardSnapshot
from maskwire_server.ranks.shared_folder import SavePlace
from maskwire_server.results import EvalOptions, EvalResult, GenerateOptions, GenerationState, StepResult
from maskwire_server.training.snapshot import Snapshot
from maskwire_server.training.trainer import TorchTrainer

log = logging.getLogger(__name__)

T = TypeVar("T")


class LeaderTrainer:
    """Carries out the calls of a `TorchTrainer` on all ranks, with the same methods.

    A call that fails on one rank leaves the others waiting. Every error is therefore raised as StateLost: the
    processes exit, and a restart recovers the run from its last durable step. The exception is a ValueError
    of `configure`: all ranks raise it alike, and no rank waits for another.
    """

    def __init__(
        self, trainer: TorchTrainer, member: Member, saver: ShardSaver, save_place: SavePlace
    ) -> None:
        self._trainer, self._member, self._saver, self._place = trainer, member, saver, save_place
        self._saves = 0
        self._sharded = False
        """Whether each rank saves its own part of the state."""
        self._gathered: bool | None = None
        """Whether the last gathered weights are the averaged ones; None if they are missing or outdated."""

    @property
    def info(self) -> ModelInfo:
        """A description of the model."""
        return self._trainer.info

    @property
    def read_tokens(self) -> int:
        """The default of `Limits.max_read_tokens` for this model and device."""
        return self._trainer.read_tokens

    @property
    def versions(self) -> dict[str, str]:
        """The versions and settings on which results depend, including the layout of the ranks."""
        return self._trainer.versions

    def usable_after(self, error: BaseException) -> bool:
        """Whether this rank's device still works after an error."""
        return self._trainer.usable_after(error)

    def begin(self) -> str:
        """The hash of the initial weights, which every rank has loaded; "" for the built-in encoder."""
        return self._trainer.begin()

    def use_threads(self, count: int) -> None:
        """Compute with `count` threads on every rank."""
        self._together(Order("use_threads", {"count": count}), lambda: self._trainer.use_threads(count))

    def configure(self, optimizer: dict[str, Any], numerics_version: int) -> None:
        """Continue with another [optimizer] section and numerics version. Raises ValueError if impossible."""
        order = Order("configure", {"optimizer": optimizer, "numerics_version": numerics_version})
        self._together(order, lambda: self._trainer.configure(optimizer, numerics_version))

    def load(self, folder: Path) -> None:
        """Load a checkpoint, which this rank reads for all. Raises ValueError if the model does not fit."""
        saved = self._trainer.read(folder)
        self._together(Order("receive"), lambda: self._trainer.receive(saved))

    def warm_up(self) -> None:
        """Compute a step and discard it. Raises ConfigError if the ranks cannot save as configured."""
        self._together(Order("warm_up"), self._trainer.warm_up)
        if self._place.wanted(self._member.place.size):
            self._sharded = self._place.decide(self._ranks_without_folder())

    def prepare_step(self, lineage: int, step: int, batch: Batch, modes: Modes) -> None:
        """Do nothing: all ranks prepare a step together, and the others get its batch when it begins."""

    def train_step(
        self, lineage: int, step: int, batch: Batch, modes: Modes, meanwhile: Callable[[], None] | None = None
    ) -> StepResult:
        """Train one step on all ranks, and return its result. `meanwhile` is not called."""
        del meanwhile
        self._trainer.check_modes(modes)
        order = Order("train_step", {"lineage": lineage, "step": step}, Payload(batch, modes).encode())
        return self._together(order, lambda: self._trainer.train_step(lineage, step, batch, modes))

    def snapshot(self) -> Snapshot | ShardSnapshot:
        """Copy the state to host memory: on each rank its own part, or on this rank all of it."""
        if self._sharded:
            self._saves += 1
            order = Order("copy_shards", {"save": self._saves})
            shards = self._together(order, self._trainer.copy_shards, changes=False)
            return self._saver.snapshot(self._saves, shards)
        return self._together(Order("snapshot"), self._trainer.snapshot, changes=False)

    def eval_loss(
        self, batch: Batch, options: EvalOptions, wanted: Callable[[], bool] = lambda: True
    ) -> EvalResult:
        """Evaluate one batch on this rank, with weights gathered from all ranks."""
        self._gather(raw=options.raw_weights)
        return self._trainer.eval_loss(batch, options, wanted)

    def generate(
        self, prompts: Prompts, options: GenerateOptions, wanted: Callable[[], bool] = lambda: True
    ) -> Iterator[GenerationState]:
        """Sample the unknown positions of prompts on this rank, with weights gathered from all ranks."""
        self._gather(raw=options.raw_weights)
        yield from self._trainer.generate(prompts, options, wanted)

    def _ranks_without_folder(self) -> list[int]:
        """The ranks that do not see the folder of the checkpoints, or cannot write to it."""
        try:
            path = shared_folder.place_probe(self._place.folder)
        except OSError as error:
            log.error("cannot write to %s (%s); check that folder", self._place.folder, error.strerror)
            return [self._member.place.rank]
        try:
            order = Order("probe", {"path": str(path)})
            return self._together(order, lambda: self._member.ranks.which(False), changes=False)
        finally:
            path.unlink(missing_ok=True)

    def _gather(self, *, raw: bool) -> None:
        averaged = self._trainer.reads_average(raw=raw)
        if self._gathered != averaged:
            order = Order("gather", {"averaged": averaged})
            self._together(order, lambda: self._trainer.gather(averaged=averaged), changes=False)
            self._gathered = averaged

    def _together(self, order: Order, call: Callable[[], T], *, changes: bool = True) -> T:
        """Carry out an order on every rank. Raises StateLost, or a ValueError that all ranks raise alike."""
        if changes:
            self._gathered = None
        failpoints.passing("rank.ordering")
        with fatal(self._member, order):
            self._member.order(order)
        return carried_out(self._member, order, call)


def carried_out(member: Member, order: Order, call: Callable[[], T]) -> T:
    """Carry out an order on this rank, and check that all ranks succeed, or refuse `configure` alike."""
    refusal: ValueError | None = None
    with fatal(member, order):
        failpoints.passing("rank.ordered")
        try:
            result = call()
        except ValueError as error:
            if order.name != "configure":
                raise  # for example from the model: other ranks may wait for this rank in a collective
            refusal = error
        if refusal is not None:
            member.ranks.agree(f"{order.name} refused: {refusal}")
        elif order.name != "train_step":  # in a training step, the ranks agree before the update
            member.ranks.agree(f"{order.name} done")
    if refusal is not None:
        raise refusal
    failpoints.passing("rank.carried_out")
    return result


@contextlib.contextmanager
def fatal(member: Member, order: Order) -> Iterator[None]:
    """Raise every error as StateLost, because the other ranks wait for this rank, or have ended."""
    try:
        yield
    except StateLost:
        raise
    except BaseException as error:
        what = f"rank {member.place.rank} failed in {order.name}: {error}"
        time.sleep(GRACE_SECONDS)
        note_loss(what)
        if isinstance(error, ConfigError):  # the model's, which a restart would repeat
            say(error)
            note_exit(EXIT_CONFIG)
        raise StateLost(what) from error
