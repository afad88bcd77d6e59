"""The trainer: the networks and their optimizers. It computes one step, evaluation or generation at a time.

It keeps no step number: the caller says which step a batch is, and all random draws follow from that.
Construct it and use it on the same thread. Once a second thread has entered a parallel region, OpenMP stops
busy-waiting, and small steps take twice as long.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
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
    evaluation_figures,
    model_checks,
    numerics,
    objective,
    optim,
    sampling,
    snapshot,
)
from maskwire_server.training.corruption import StepKey, Vocabulary, corrupt
from maskwire_server.training.draws import Purpose
from maskwire_server.training.micro_batches import BatchLosses, row_lengths, split
from maskwire_server.training.model_info import described
from maskwire_server.training.models import sources
from maskwire_server.training.models.networks import Networks
from maskwire_server.training.optim import Group

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
    ) -> None:
        torch.set_num_threads(serve.threads or numerics.cores())
        self._model, self._objective, self._optimizer = model, objective, optimizer
        self._seed = seed
        self._numerics_version = numerics.NUMERICS_VERSION
        self._initial_sha256 = ""
        self._device = numerics.choose_device(serve.device)
        self._bf16 = numerics.choose_bf16(serve.precision, self._device)
        self._numerics = numerics.set_numerics(serve, self._device, bf16=self._bf16)
        self._budget = serve.micro_batch_tokens or numerics.default_budget(self._device)
        self._vocabulary = Vocabulary.of(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draws.key(Purpose.WEIGHTS, seed))
            self.networks = Networks(model, objective)  # on the CPU, for the same weights on each device
        self.networks.to(self._device)
        self.networks.checkpoint_activations(serve.activation_checkpointing)
        parts = {"generator": self.networks.generator, "critic": self.networks.critic}
        groups = optim.make_groups(parts, optimizer, self._device, bf16=self._bf16)
        self.generator, self.critic = groups["generator"], groups.get("critic")
        self._copier = snapshot.Copier()
        self._averaged: Networks | None = None
        if self.generator.ema is not None:
            self._averaged = self.networks.with_modules(
                self.generator.ema, None if self.critic is None else self.critic.ema
            )
        if serve.compile != "off":
            for networks in (self.networks, self._averaged):
                if networks is not None:
                    networks.compile_blocks(serve.compile)

    @property
    def info(self) -> ModelInfo:
        """The model that is served."""
        parameters = sum(weight.numel() for weight in self.networks.parameters())
        return described(self._model, self._objective, parameters)

    @property
    def read_tokens(self) -> int:
        """Default of `serve.max_read_tokens` on this device."""
        return numerics.read_tokens(self._device)

    @property
    def versions(self) -> dict[str, str]:
        """What results depend on, apart from the configuration."""
        on_gpu = self._device.type == "cuda"
        name = torch.cuda.get_device_name(self._device) if on_gpu else numerics.processor()
        return {
            "torch": torch.__version__,
            "device": f"{self._device}{f' ({name})' if name else ''}",
            **self._numerics,
            **sources.versions(self._model),
            "threads": str(torch.get_num_threads()),
            "micro_batch_tokens": str(self._budget),
        }

    def use_threads(self, count: int) -> None:
        """Compute with this number of threads. Another number rounds sums differently."""
        if count != torch.get_num_threads():
            log.info("using %d threads, as the run did before; set serve.threads to change that", count)
            torch.set_num_threads(count)

    def usable_after(self, error: BaseException) -> bool:
        """Whether the device can still compute after an error that another method raised."""
        return device_errors.usable_after(error, self._device)

    def configure(self, optimizer: dict[str, Any], numerics_version: int = numerics.NUMERICS_VERSION) -> None:
        """Continue with another [optimizer] section and another version of the numerics.

        Raises ValueError that names the key if the state does not fit the section: another optimizer, other
        frozen parameters, or a moving average that the state has and the section does not, or the reverse.
        """
        config = OptimizerConfig(**optimizer)
        current = self._optimizer
        if config.name != current.name or bool(config.ema_decay) != bool(current.ema_decay):
            key = "name" if config.name != current.name else "ema_decay"
            raise ValueError(f"optimizer.{key} was {getattr(config, key)!r}, is {getattr(current, key)!r}")
        optim.configure(self._groups(), config, numerics_version)
        self._optimizer, self._numerics_version = config, numerics_version

    def begin(self) -> str:
        """Load the initial weights, if the model's source has some, and check the model.

        Returns the SHA-256 of the initial state, or "" for the built-in encoder, whose weights the seed
        makes. Raises ConfigError.
        """
        if self._model.source == "encoder":
            return ""
        if self._initial_sha256:
            return self._initial_sha256
        sources.load_initial_weights(self._model, self.networks.backbones)
        for group in self._groups().values():
            group.begin_average()
        exact = self._numerics["deterministic"] == "yes" and self._numerics["compile"] == "off"
        at = StepKey(self._seed, 0, 0)
        model_checks.check(
            self.networks,
            self._model,
            lambda batch: self._gradients(batch, Modes(), at),
            exact=exact,
        )
        self._initial_sha256 = sources.sha256(snapshot.model_tensors(self._groups()))
        return self._initial_sha256

    def warm_up(self) -> None:
        """Compute a small step and discard it, so that the first real step is not slow."""
        self._gradients(model_checks.small_batch(self._model), Modes(), StepKey(self._seed, 0, 0))
        self._clear_gradients()

    def train_step(self, lineage: int, step: int, batch: Batch, modes: Modes) -> StepResult:
        """Train on one logical batch. Loss and gradient do not depend on how it is split.

        If losses or gradients are not finite, or if memory runs out before the update, the state does not
        change. Raises StateLost if the update itself fails.
        """
        if modes.only_train_generator and modes.only_train_critic:
            raise ValueError("only_train_generator and only_train_critic exclude each other, got both")
        if modes.only_train_critic and self.critic is None:
            raise ValueError("only_train_critic needs a critic, this model has none")
        at = StepKey(self._seed, lineage, step)
        rate = modes.learning_rate
        rate = optim.learning_rate(self._optimizer, step) if rate is None else rate
        try:
            sums = self._gradients(self._host(batch), modes, at)
            learners = self._learners(modes)
            norm = optim.clip(learners, self._optimizer.clip_grad_norm)
            generator, critic, gradient_norm = sums.read(norm)
        except BaseException as error:
            self._clear_gradients()
            if not device_errors.out_of_memory(error):
                raise
            return StepResult(Outcome.OUT_OF_MEMORY, Losses(math.nan), learning_rate=rate)
        losses = evaluation_figures.combine(
            generator, critic, self._objective.critic_loss_weight, modes.only_train_critic
        )
        finite = math.isfinite(losses.loss) and math.isfinite(gradient_norm)
        try:
            if finite and sums.masked:
                for group in learners:
                    group.update(rate)
        except BaseException as error:
            raise StateLost(f"the update of step {step} failed half-way") from error
        finally:
            self._clear_gradients()
        outcome = Outcome.APPLIED if finite else Outcome.SKIPPED_NON_FINITE
        return StepResult(outcome, losses, gradient_norm, rate, sums.masked, sums.maskable)

    def eval_loss(
        self, batch: Batch, options: EvalOptions, wanted: Callable[[], bool] = lambda: True
    ) -> EvalResult:
        """Evaluate one batch, with the moving average if the run keeps one. Changes nothing."""
        networks = self._evaluated(raw=options.raw_weights)
        networks.eval()
        try:
            with torch.no_grad(), self._autocast():
                what = (networks, self._objective, self._vocabulary, self._host(batch), options)
                how: dict[str, Any] = {
                    "budget": self._budget,
                    "device": self._device,
                    "ema_weights": networks is self._averaged,
                    "wanted": wanted,
                }
                if options.chain_rule:
                    return chain_rule.evaluate(*what, **how)
                return evaluation.evaluate(*what, **how, has_critic=self.critic is not None)
        finally:
            self.networks.train()

    def adopt(self, weights: dict[str, Tensor]) -> None:
        """Start from these weights, all of those of `Networks`, by name."""
        self.networks.load_state_dict(weights, strict=True)
        for group in self._groups().values():
            group.begin_average()

    def generate(self, prompts: Prompts, options: GenerateOptions) -> Iterator[GenerationState]:
        """Fill in the prompts, with the moving average if the run keeps one. Yields a state after each pass.

        Between two states nothing is left running or changed, so the caller may stop at any of them.
        """
        if options.order is Order.CRITIC and self.critic is None:
            raise ValueError("order 'critic' needs a critic, this model has none; use another order")
        networks = self._evaluated(raw=options.raw_weights)
        limit = numerics.sampled_budget(self._device, self._model.num_tokens, options.top_p < 1)
        states = sampling.generate(
            networks,
            self._objective,
            self._vocabulary,
            prompts,
            options,
            budget=min(self._budget, limit),
            device=self._device,
            ema_weights=networks is self._averaged,
        )
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
        """A copy of the state in host memory."""
        return self._copier.copy(snapshot.live_tensors(self._groups()))

    def load(self, folder: Path) -> None:
        """Load the files of a snapshot. Raises ValueError, with the state unchanged, if they do not fit."""
        snapshot.load(folder, self._groups())

    def _groups(self) -> dict[str, Group]:
        return {"generator": self.generator} | ({} if self.critic is None else {"critic": self.critic})

    def _evaluated(self, *, raw: bool) -> Networks:
        return self.networks if raw or self._averaged is None else self._averaged

    def _learners(self, modes: Modes) -> list[Group]:
        learners = [] if modes.only_train_critic else [self.generator]
        if self.critic is not None and not modes.only_train_generator:
            learners.append(self.critic)
        return learners

    def _host(self, batch: Batch) -> evaluation.TensorBatch:
        return evaluation.TensorBatch(*(torch.from_numpy(grid) for grid in batch.dense(self._model.pad_id)))

    def _gradients(self, batch: evaluation.TensorBatch, modes: Modes, at: StepKey) -> BatchLosses:
        """Add up the gradients of the micro-batches."""
        config = self._objective
        there = batch.to(self._device)
        corrupted = corrupt(there.ids_rn, there.valid_rn, there.prompt_rn, config, self._vocabulary, at)
        plan = objective.plan_step(
            config,
            at,
            has_critic=self.critic is not None,
            train_generator=not modes.only_train_critic,
            train_critic=not modes.only_train_generator,
            temperature=modes.generator_sample_temperature,
        )
        sums = BatchLosses(
            int(corrupted.k_b.sum()), int(corrupted.n_b.sum()), self._device, critic=plan.critic
        )
        if not sums.masked:
            return sums
        weight_b = objective.position_weights(config, corrupted.n_b, corrupted.k_b)
        rows = range(batch.ids_rn.shape[0])
        keys_b = draws.keys(Purpose.CRITIC_SAMPLE, at.seed, at.lineage, at.number, rows=rows)
        weight_b, keys_b = weight_b.to(self._device), keys_b.to(self._device)
        with self._seeded_dropout(at):
            for part, columns in split(row_lengths(batch.valid_rn), self._budget):
                with self._autocast():
                    losses = objective.losses(
                        self.networks,
                        config,
                        self._vocabulary,
                        corrupted.rows(part, columns),
                        weight_b[part],
                        sums.maskable,
                        plan,
                        keys_b[part],
                    )
                sums.add(losses)
                total = objective.minimized(losses, config, plan, self._numerics_version)
                if total.requires_grad:  # False if all that this step trains is frozen
                    total.backward()  # type: ignore[no-untyped-call]
        return sums

    def _clear_gradients(self) -> None:
        for group in self._groups().values():
            group.clear_gradients()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16)

    @contextlib.contextmanager
    def _seeded_dropout(self, at: StepKey) -> Iterator[None]:
        if self._model.source == "encoder" and not any(self._model.dropouts):
            yield
            return
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(draws.key(Purpose.DROPOUT, at.seed, at.lineage, at.number))
            yield
