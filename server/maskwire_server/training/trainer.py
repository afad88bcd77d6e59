"""The trainer: the networks and their optimizers. It computes one step, evaluation or generation at a time.

It keeps no step number: the caller passes the step of each batch, and all random draws follow from it.
Construct it and use it on the same thread. Once a second thread has entered a parallel region, OpenMP stops
busy-waiting, and small steps take twice as long.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskwire.v1.values import Losses, ModelInfo, Outcome
from maskwire_server.batch import Batch, Modes, Prompts
from maskwire_server.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ServeConfig
from maskwire_server.errors import StateLost
from maskwire_server.results import (
    EvalOptions,
    EvalResult,
    GenerateOptions,
    GenerationState,
    Order,
    StepResult,
)
from maskwire_server.training import (
    chain_rule,
    device_errors,
    draws,
    evaluation,
    model_checks,
    numerics,
    optimizers,
    sampling,
    snapshot,
)
from maskwire_server.training.batch_losses import BatchLosses
from maskwire_server.training.block_calls import CallOrder
from maskwire_server.training.corruption import StepKey, Vocabulary
from maskwire_server.training.draws import Purpose
from maskwire_server.training.gathered import Gathered
from maskwire_server.training.model_info import described
from maskwire_server.training.models import sources
from maskwire_server.training.models.generator_critic import Networks
from maskwire_server.training.optimizers import Group
from maskwire_server.training.ranks_interface import Ranks
from maskwire_server.training.shards import Shards
from maskwire_server.training.snapshot import SavedState
from maskwire_server.training.step_gradients import NextStep, PreparedStep, StepSettings, accumulate, prepare
from maskwire_server.training.tensor_batch import TensorBatch

log = logging.getLogger(__name__)


class TorchTrainer:
    """Trains and evaluates one model on one device."""

    def __init__(
        self,
        model: ModelConfig,
        objective: ObjectiveConfig,
        optimizer: OptimizerConfig,
        serve: ServeConfig,
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        """With several `ranks`, each rank makes an equal trainer and the same calls in the same order."""
        self._ranks = ranks or Ranks()
        torch.set_num_threads(serve.threads or self._ranks.cores or numerics.cores())
        self._model, self._objective, self._optimizer = model, objective, optimizer
        self._seed, self._numerics_version = seed, numerics.NUMERICS_VERSION
        self._initial_sha256, self._next = "", NextStep()
        self._device = self._ranks.device or numerics.choose_device(serve.device)
        self._bf16 = numerics.choose_bf16(serve.precision, self._device)
        self._numerics = numerics.set_numerics(serve, self._device, bf16=self._bf16)
        self._budget = serve.micro_batch_tokens or numerics.default_budget(self._device)
        self._vocabulary = Vocabulary.of(model)
        draws_of_torch = model.source != "encoder" or any(model.dropouts)
        sizes = self._budget, numerics.smallest_part(self._device)
        self._step = StepSettings(objective, self._vocabulary, *sizes, self._bf16, draws_of_torch)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draws.key(Purpose.WEIGHTS, seed))
            self.networks = Networks(model, objective)  # on the CPU: the same weights for every device
        self.networks.checkpoint_activations(serve.activation_checkpointing)
        parts = {"generator": self.networks.generator, "critic": self.networks.critic}
        orders: dict[str, CallOrder] = {}
        if foreign := self._ranks.is_sharded and model.source != "encoder":
            host = Ranks(torch.device("cpu"))
            self._initial_sha256, before = self._load_initial_weights(host), self._small_gradients(host)
            orders = model_checks.call_orders(parts, model, partial(self._trial, host))
        averages = self._ranks.divide(parts, with_averages=bool(optimizer.ema_decay), orders=orders)
        self.networks.to(self._device)
        groups = optimizers.make_groups(parts, optimizer, self._device, bf16=self._bf16, averages=averages)
        self.generator, self.critic = groups["generator"], groups.get("critic")
        self._copier = snapshot.Copier(self._ranks)
        self._gathered = Gathered(self._ranks, lambda: Networks(model, objective).to(self._device))
        kept = {part: group.ema for part, group in groups.items() if group.ema is not None}
        self._averaged = self.networks.with_modules(**kept) if kept else None
        if foreign:
            model_checks.check_divided(before, lambda: self._small_gradients(self._ranks))
        if serve.compile != "off":
            for networks in filter(None, (self.networks, self._averaged)):
                networks.compile_blocks(serve.compile)

    @property
    def info(self) -> ModelInfo:
        """The description of the model that is served."""
        count = sum(weight.numel() for weight in self.networks.parameters())
        return described(self._model, self._objective, count)

    @property
    def read_tokens(self) -> int:
        """The default of `serve.max_read_tokens` on this device."""
        return numerics.read_tokens(self._device)

    @property
    def versions(self) -> dict[str, str]:
        """The versions and settings that results depend on, by name, apart from the configuration."""
        name = numerics.processor_of(self._device)
        return {
            "torch": torch.__version__,
            "device": f"{self._device}{f' ({name})' if name else ''}",
            **self._numerics,
            **sources.versions(self._model),
            "threads": str(torch.get_num_threads()),
            **self._ranks.versions,
            "micro_batch_tokens": str(self._budget),
        }

    def use_threads(self, count: int) -> None:
        """Compute with `count` threads. With another number of threads, sums are rounded differently."""
        if count != torch.get_num_threads():
            log.info("using %d threads, as the run did before; set serve.threads to change that", count)
            torch.set_num_threads(count)

    def usable_after(self, error: BaseException) -> bool:
        """Whether the device can still compute after an error that another method raised."""
        return device_errors.usable_after(error, self._device)

    def configure(self, optimizer: dict[str, Any], numerics_version: int = numerics.NUMERICS_VERSION) -> None:
        """Continue with another [optimizer] section and another version of the numerics.

        Raises ValueError, naming the key, if the section has another optimizer, freezes other parameters, or
        differs from the present section in whether it keeps a moving average.
        """
        config = OptimizerConfig(**optimizer)
        optimizers.configure(self._groups(), self._optimizer, config, numerics_version)
        self._optimizer, self._numerics_version = config, numerics_version

    def begin(self) -> str:
        """Load the initial weights, if the model's source provides weights, and check the model.

        Returns the SHA-256 of the initial state, or "" for the built-in encoder, whose weights follow
        from the seed. Raises ConfigError if the weights cannot be loaded or a check fails.
        """
        if self._model.source != "encoder" and not self._initial_sha256:
            self._initial_sha256 = self._load_initial_weights(self._ranks)
            for group in self._groups().values():
                group.begin_average()
        return self._initial_sha256

    def _load_initial_weights(self, ranks: Ranks) -> str:
        """Load the initial weights, but not the averages, check the model, and return the SHA-256."""
        exact = (self._numerics["deterministic"], self._numerics["compile"]) == ("yes", "off")
        return model_checks.begin(self.networks, self._model, partial(self._trial, ranks), exact=exact)

    def _small_gradients(self, ranks: Ranks) -> dict[str, Tensor]:
        found = model_checks.small_gradients(self.networks, self._model, partial(self._trial, ranks))
        for network in self.networks.children():
            ranks.release(network)
        return found

    def _trial(self, ranks: Ranks, batch: TensorBatch, number: int = 0) -> BatchLosses:
        return self._gradients(self._prepared(batch, Modes(), StepKey(self._seed, 0, number), ranks))

    def warm_up(self) -> None:
        """Compute a small step and discard it, so that the first real step is not slow."""
        self._trial(self._ranks, model_checks.small_batch(self._model))
        self._clear_gradients()

    def prepare_step(self, lineage: int, step: int, batch: Batch, modes: Modes) -> None:
        """Mask a batch and copy it to the device, for a call of `train_step` with the same arguments."""
        at = StepKey(self._seed, lineage, step)
        self._next.keep(batch, modes, self._prepared(self._host(batch), modes, at))

    def train_step(
        self, lineage: int, step: int, batch: Batch, modes: Modes, meanwhile: Callable[[], None] | None = None
    ) -> StepResult:
        """Train on one logical batch. The split into micro-batches does not change losses and gradients.

        `meanwhile` is called while the device computes, and may call `prepare_step`; on a CPU, where the step
        is computed by then, it is not called. If losses or gradients are not finite, or if memory runs out
        before the update, the state does not change. Raises StateLost if the update itself fails.
        """
        at = StepKey(self._seed, lineage, step)
        ready = self._next.take(batch, modes, at)
        self.check_modes(modes)
        chosen = modes.learning_rate
        rate = optimizers.learning_rate(self._optimizer, step) if chosen is None else chosen
        try:
            sums = self._gradients(ready or self._prepared(self._host(batch), modes, at))
            self._ranks.add(sums.sums)
            learners = self._learners(modes)
            copy = sums.begin_read(optimizers.clip(learners, self._optimizer.clip_grad_norm, self._ranks))
            if meanwhile is not None and self._device.type != "cpu":
                meanwhile()
            losses, gradient_norm = sums.read(copy, self._objective.critic_loss_weight, modes)
        except BaseException as error:
            self._clear_gradients()
            if not device_errors.out_of_memory(error) or self._ranks.is_sharded:
                raise  # the other ranks wait for this one
            return StepResult(Outcome.OUT_OF_MEMORY, Losses(math.nan), learning_rate=rate)
        finite = math.isfinite(losses.loss) and math.isfinite(gradient_norm)
        facts = f"{losses}, gradient norm {gradient_norm!r} at {at}"
        self._ranks.agree(facts, (weight for each in self._groups().values() for weight in each.weights))
        try:
            if finite and sums.masked:
                for group in learners:
                    group.update(rate)
        except BaseException as error:
            raise StateLost(f"the update of step {step} failed half-way; restart the server") from error
        finally:
            self._clear_gradients()
        outcome = Outcome.APPLIED if finite else Outcome.SKIPPED_NON_FINITE
        return StepResult(outcome, losses, gradient_norm, rate, sums.masked, sums.maskable)

    def check_modes(self, modes: Modes) -> None:
        """Raise ValueError if `modes` exclude each other, or need a critic that the model does not have."""
        if modes.only_train_generator and modes.only_train_critic:
            raise ValueError("only_train_generator and only_train_critic exclude each other; set only one")
        if modes.only_train_critic and self.critic is None:
            raise ValueError("only_train_critic needs a critic, and the model has none; leave this mode out")

    def eval_loss(
        self, batch: Batch, options: EvalOptions, wanted: Callable[[], bool] = lambda: True
    ) -> EvalResult:
        """Evaluate one batch, and change nothing. `reads_average` says which weights are used."""
        averaged = self.reads_average(raw=options.raw_weights)
        networks = self._gathered.of(self._live(averaged=averaged))
        networks.eval()
        try:
            with torch.no_grad(), self._autocast():
                what = (networks, self._objective, self._vocabulary, self._host(batch), options)
                how: dict[str, Any] = {"budget": self._budget, "device": self._device}
                how |= {"ema_weights": averaged, "wanted": wanted}
                if options.chain_rule:
                    return chain_rule.evaluate(*what, **how)
                smallest, has_critic = self._step.smallest, self.critic is not None
                return evaluation.evaluate(*what, **how, smallest=smallest, has_critic=has_critic)
        finally:
            self.networks.train()

    def adopt(self, weights: dict[str, Tensor]) -> None:
        """Replace all weights with `weights`, named as in `Networks`, and restart the moving averages."""
        self.networks.load_state_dict(weights, strict=True)
        for group in self._groups().values():
            group.begin_average()

    def generate(
        self, prompts: Prompts, options: GenerateOptions, wanted: Callable[[], bool] = lambda: True
    ) -> Iterator[GenerationState]:
        """Fill in the prompts, and yield a state after each pass. `reads_average` says which weights to use.

        Between two states nothing is left running or changed, so the caller may stop after any of them.
        Raises Unwanted soon after `wanted` returns False.
        """
        if options.order is Order.CRITIC and self.critic is None:
            raise ValueError("order 'critic' needs a critic, and this model has none; use another order")
        averaged = self.reads_average(raw=options.raw_weights)
        networks = self._gathered.of(self._live(averaged=averaged))
        limit = numerics.sampled_budget(self._device, self._model.num_tokens, options.top_p < 1)
        states = sampling.generate(
            networks, self._objective, self._vocabulary, prompts, options,
            budget=min(self._budget, limit), device=self._device, ema_weights=averaged, wanted=wanted,
        )  # fmt: skip
        while True:
            networks.eval()
            try:
                with torch.no_grad(), self._autocast():
                    state = next(states, None)
            finally:
                self.networks.train()
            if state is None:
                return
            yield state

    def snapshot(self) -> snapshot.Snapshot:
        """Copy the whole state to host memory, and return the copy."""
        return self._copier.copy(snapshot.live_tensors(self._groups()))

    def copy_shards(self) -> Shards:
        """Copy the parts of the state that this rank saves to host memory, and return the copy."""
        return self._copier.copy_shards(snapshot.live_tensors(self._groups()))

    def load(self, folder: Path) -> None:
        """Load the files of a snapshot. Raises ValueError, with the state unchanged, if they do not fit."""
        self.receive(self.read(folder))

    def read(self, folder: Path) -> SavedState:
        """Find the tensors in the files of a snapshot. Raises ValueError if they do not fit the trainer."""
        return snapshot.read(folder, self._groups())

    def receive(self, saved: SavedState | None = None) -> None:
        """Load a state that `read` found. With several ranks, the leader passes it, and the others None."""
        snapshot.load(saved, self._groups(), self._ranks)

    def _groups(self) -> dict[str, Group]:
        return {"generator": self.generator} | ({} if self.critic is None else {"critic": self.critic})

    def gather(self, *, averaged: bool) -> None:
        """Copy the weights of all ranks to the leader for evaluation. Every rank must call this."""
        self._gathered.gather(self._live(averaged=averaged))

    def reads_average(self, *, raw: bool) -> bool:
        """Whether evaluations and generations use the moving average: if one is kept and `raw` is False."""
        return not raw and self._averaged is not None

    def _live(self, *, averaged: bool) -> Networks:
        return self._averaged if averaged and self._averaged is not None else self.networks

    def _learners(self, modes: Modes) -> list[Group]:
        trained = {"generator": not modes.only_train_critic, "critic": not modes.only_train_generator}
        return [group for part, group in self._groups().items() if trained[part]]

    def _host(self, batch: Batch) -> TensorBatch:
        return TensorBatch.of(batch, self._model.pad_id)

    def _prepared(
        self, batch: TensorBatch, modes: Modes, at: StepKey, ranks: Ranks | None = None
    ) -> PreparedStep:
        ranks, has_critic = ranks or self._ranks, self.networks.critic is not None
        device, version = ranks.device or self._device, self._numerics_version
        return prepare(self._step, batch, modes, at, ranks, device, version, has_critic=has_critic)

    def _gradients(self, step: PreparedStep) -> BatchLosses:
        return accumulate(self.networks, self._step, step)

    def _clear_gradients(self) -> None:
        for group in self._groups().values():
            group.clear_gradients()
            self._ranks.release(group.module)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16)
