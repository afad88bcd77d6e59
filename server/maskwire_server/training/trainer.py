"""The trainer: the networks, their optimizers, and one step or evaluation at a time.

It keeps no step number: whoever calls it says which step a batch is, and every draw follows from that.
All of it, the construction too, belongs on one thread: once a second thread has entered a parallel
region, OpenMP stops spinning and small steps take twice as long.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskwire_server.batch import Batch, Modes, Prompts
from maskwire_server.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ServeConfig
from maskwire_server.errors import StateLost
from maskwire_server.results import (
    WEIGHT_FILES,
    EvalOptions,
    EvalResult,
    GenerateOptions,
    GenerationState,
    Losses,
    ModelInfo,
    Order,
    Outcome,
    StepResult,
)
from maskwire_server.training import (
    chain_rule,
    device_errors,
    draws,
    evaluation,
    objective,
    optim,
    sampling,
    snapshot,
    summary,
)
from maskwire_server.training.corruption import StepKey, Vocabulary, corrupt, random_ids
from maskwire_server.training.draws import Purpose
from maskwire_server.training.models.networks import Networks
from maskwire_server.training.numerics import (
    NUMERICS_VERSION,
    choose_bf16,
    choose_device,
    cores,
    default_budget,
    processor,
    read_tokens,
    sampled_budget,
    set_numerics,
)
from maskwire_server.training.optim import Group

log = logging.getLogger(__name__)

MODEL_FILE, EMA_FILE = WEIGHT_FILES


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
        torch.set_num_threads(serve.threads or cores())
        self._model, self._objective, self._optimizer = model, objective, optimizer
        self._seed = seed
        self._numerics_version = NUMERICS_VERSION
        self._device = choose_device(serve.device)
        self._bf16 = choose_bf16(serve.precision, self._device)
        self._numerics = set_numerics(serve, self._device, bf16=self._bf16)
        self._budget = serve.micro_batch_tokens or default_budget(self._device)
        self._vocabulary = Vocabulary.of(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draws.key(Purpose.WEIGHTS, seed))
            self.networks = Networks(model, objective)  # on the CPU, so that every device begins alike
        self.networks.to(self._device)
        self.networks.checkpoint_activations(serve.activation_checkpointing)
        fused = self._device.type in ("cpu", "cuda")
        self.generator = Group(self.networks.generator, optimizer, fused=fused)
        critic = self.networks.critic
        self.critic = None if critic is None else Group(critic, optimizer, fused=fused)
        self._copier = snapshot.Copier()
        self._averaged: Networks | None = None
        if self.generator.ema is not None:
            self._averaged = averaged(self.networks, self.generator, self.critic)
        if serve.compile != "off":
            for networks in (self.networks, self._averaged):
                if networks is not None:
                    networks.compile_blocks(serve.compile)

    @property
    def info(self) -> ModelInfo:
        """What is served."""
        config = self._objective
        words = f"{config.preset}: {config.schedule} schedule, {config.masking} masking, {config.weighting}"
        if config.augments:
            words += ", augmented (the training loss is no bound; evaluation is)"
        if config.critic != "none":
            words += f", {config.critic} critic"
        return ModelInfo(
            num_tokens=self._model.num_tokens,
            mask_id=self._model.mask_id,
            pad_id=self._model.pad_id,
            max_seq_len=self._model.max_seq_len,
            parameters=sum(weight.numel() for weight in self.networks.parameters()),
            objective=words,
            loss_is_bound=config.loss_is_bound,
            has_critic=self.critic is not None,
            self_cond=config.self_cond,
            read_tokens=read_tokens(self._device),
        )

    @property
    def versions(self) -> dict[str, str]:
        """What results depend on beside the configuration."""
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else processor()
        return {
            "torch": torch.__version__,
            "device": f"{self._device}{f' ({name})' if name else ''}",
            **self._numerics,
            "threads": str(torch.get_num_threads()),
            "micro_batch_tokens": str(self._budget),
        }

    def use_threads(self, count: int) -> None:
        """Compute with so many threads: sums come out otherwise with another number."""
        if count != torch.get_num_threads():
            log.info("computing with %d threads, as the run did (serve.threads sets another number)", count)
            torch.set_num_threads(count)

    def usable_after(self, error: BaseException) -> bool:
        """Whether the device still computes after an error that came out of another method."""
        return device_errors.usable_after(error, self._device)

    def configure(self, optimizer: dict[str, Any], numerics_version: int = NUMERICS_VERSION) -> None:
        """Go on under another [optimizer] section, as another version of the mathematics computed.

        ValueError names a key of the section that the state cannot follow.
        """
        config = OptimizerConfig(**optimizer)
        was = self._optimizer
        if config.name != was.name or bool(config.ema_decay) != bool(was.ema_decay):
            key = "name" if config.name != was.name else "ema_decay"
            raise ValueError(f"optimizer.{key} was {getattr(config, key)!r}, is {getattr(was, key)!r}")
        self._optimizer, self._numerics_version = config, numerics_version
        for group in self._groups().values():
            group.configure(config, numerics_version)

    def warm_up(self) -> None:
        """Compute a small step and throw it away, so that the first real one is not slow."""
        n = min(self._model.max_seq_len, 16)
        u_bn = draws.uniform(draws.keys(Purpose.RANDOM_ID, rows=range(2)), n)
        every = torch.ones(2, n, dtype=torch.bool)
        batch = evaluation.TensorBatch(random_ids(u_bn, self._vocabulary), every, ~every)
        self._gradients(batch, Modes(), StepKey(self._seed, 0, 0))
        self._clear_gradients()

    def train_step(self, lineage: int, step: int, batch: Batch, modes: Modes) -> StepResult:
        """Train on one logical batch: loss and gradient are those of the undivided batch.

        Losses or gradients that are not finite leave everything as it was, and so does running out of
        memory before the update. Raises StateLost when the update itself fails.
        """
        if modes.only_train_generator and modes.only_train_critic:
            raise ValueError("only_train_generator and only_train_critic exclude each other, got both")
        if modes.only_train_critic and self.critic is None:
            raise ValueError("only_train_critic needs a critic, this model has none")
        at = StepKey(self._seed, lineage, step)
        rate = modes.learning_rate
        rate = optim.learning_rate(self._optimizer, step) if rate is None else rate
        try:
            shares = self._gradients(self._host(batch), modes, at)
            learners = self._learners(modes)
            norm = optim.clip(learners, self._optimizer.clip_grad_norm)
            generator, critic, gradient_norm = shares.read(norm)
        except BaseException as error:
            self._clear_gradients()
            if not (isinstance(error, RuntimeError) and _out_of_memory(error)):
                raise
            return StepResult(Outcome.OUT_OF_MEMORY, Losses(math.nan), learning_rate=rate)
        losses = summary.combine(
            generator, critic, self._objective.critic_loss_weight, modes.only_train_critic
        )
        finite = math.isfinite(losses.loss) and math.isfinite(gradient_norm)
        try:
            if finite and shares.masked:
                for group in learners:
                    group.update(rate)
        except BaseException as error:
            raise StateLost(f"the update of step {step} failed half-way") from error
        finally:
            self._clear_gradients()
        outcome = Outcome.APPLIED if finite else Outcome.SKIPPED_NON_FINITE
        return StepResult(outcome, losses, gradient_norm, rate, shares.masked, shares.maskable)

    def eval_loss(
        self, batch: Batch, options: EvalOptions, wanted: Callable[[], bool] = lambda: True
    ) -> EvalResult:
        """Evaluate one batch, by the moving average's weights if one is kept; changes nothing."""
        networks = self.networks
        if self._averaged is not None and not options.raw_weights:
            networks = self._averaged
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
        """Begin at these weights, by the names of `Networks`; they must be all of them."""
        self.networks.load_state_dict(weights, strict=True)
        for group in self._groups().values():
            group.begin_average()

    def generate(self, prompts: Prompts, options: GenerateOptions) -> Iterator[GenerationState]:
        """Fill prompts in, by the moving average's weights if one is kept: a state after each pass.

        Between two states nothing is under way and everything is as it was, so that the caller may stop.
        """
        if options.order is Order.CRITIC and self.critic is None:
            raise ValueError("order must be another than critic, this model has none")
        networks = self.networks
        if self._averaged is not None and not options.raw_weights:
            networks = self._averaged
        states = sampling.generate(
            networks,
            self._objective,
            self._vocabulary,
            prompts,
            options,
            budget=min(self._budget, sampled_budget(self._device, self._model.num_tokens, options.top_p < 1)),
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
        return self._copier.copy(self._state())

    def load(self, folder: Path) -> None:
        """Take over the files of a snapshot. Raises ValueError, the state untouched, if they do not fit."""
        state = self._state()
        if not (folder / EMA_FILE).exists():
            # It was not kept when the checkpoint was saved: it begins at the weights.
            state.pop(EMA_FILE, None)
        snapshot.load(folder, state)
        if EMA_FILE not in state:
            for group in self._groups().values():
                group.begin_average()
        for name, group in self._groups().items():
            group.updates = int(state["optimizer.safetensors"][f"{name}.updates"])

    def _groups(self) -> dict[str, Group]:
        return {"generator": self.generator} | ({} if self.critic is None else {"critic": self.critic})

    def _state(self) -> dict[str, dict[str, Tensor]]:
        files: dict[str, dict[str, Tensor]] = {MODEL_FILE: {}, "optimizer.safetensors": {}}
        for group_name, group in self._groups().items():
            for name, weight in zip(group.names, group.weights, strict=True):
                files[MODEL_FILE][f"{group_name}.{name}"] = weight
            for name, value in group.state().items():
                files["optimizer.safetensors"][f"{group_name}.{name}"] = value
            if group.ema is not None:
                averages = files.setdefault(EMA_FILE, {})
                averages |= {f"{group_name}.{name}": w for name, w in group.ema.named_parameters()}
        return files

    def _learners(self, modes: Modes) -> list[Group]:
        learners = [] if modes.only_train_critic else [self.generator]
        if self.critic is not None and not modes.only_train_generator:
            learners.append(self.critic)
        return learners

    def _host(self, batch: Batch) -> evaluation.TensorBatch:
        return evaluation.TensorBatch(*(torch.from_numpy(grid) for grid in batch.dense(self._model.pad_id)))

    def _gradients(self, batch: evaluation.TensorBatch, modes: Modes, at: StepKey) -> Shares:
        """Add up the gradients of the logical batch's parts."""
        config = self._objective
        whole = corrupt(batch.ids_rn, batch.valid_rn, batch.prompt_rn, config, self._vocabulary, at)
        plan = objective.plan_step(
            config,
            at,
            has_critic=self.critic is not None,
            train_generator=not modes.only_train_critic,
            train_critic=not modes.only_train_generator,
            temperature=modes.generator_sample_temperature,
        )
        shares = Shares(int(whole.k_b.sum()), int(whole.n_b.sum()), self._device, critic=plan.critic)
        if not shares.masked:
            return shares
        weight_b = objective.position_weights(config, whole.n_b, whole.k_b)
        rows = range(batch.ids_rn.shape[0])
        keys_b = draws.keys(Purpose.CRITIC_SAMPLE, at.seed, at.lineage, at.number, rows=rows)
        with self._seeded_dropout(at):
            for part in split(whole.valid_bn, self._budget):
                with self._autocast():
                    sums = objective.losses(
                        self.networks,
                        config,
                        self._vocabulary,
                        whole.rows(part).to(self._device),
                        weight_b[part].to(self._device),
                        shares.maskable,
                        plan,
                        keys_b[part].to(self._device),
                    )
                shares.add(sums)
                total = objective.minimized(sums, config, plan, self._numerics_version)
                total.backward()  # type: ignore[no-untyped-call]
        return shares

    def _clear_gradients(self) -> None:
        for group in self._groups().values():
            group.clear_gradients()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16)

    @contextlib.contextmanager
    def _seeded_dropout(self, at: StepKey) -> Iterator[None]:
        if not self._model.dropout:
            yield
            return
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(draws.key(Purpose.DROPOUT, at.seed, at.lineage, at.number))
            yield


class Shares:
    """What the parts of a logical batch add up to; it stays on the device until it is read."""

    def __init__(self, masked: int, maskable: int, device: torch.device, *, critic: bool) -> None:
        self.masked = masked
        self.maskable = maskable
        self._critic = critic
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, sums: objective.PartLosses) -> None:
        """Add a part's losses."""
        critic = torch.zeros_like(sums.generator) if sums.critic is None else sums.critic
        self._sums += torch.stack((sums.generator, critic)).detach()

    def read(self, norm: Tensor) -> tuple[float, float | None, float]:
        """Generator loss, critic loss if one was computed, gradient norm: one copy to the host."""
        generator, critic, norm_value = torch.cat((self._sums, norm.double().view(1).to(self._sums))).tolist()
        return generator, critic if self._critic else None, norm_value


def averaged(networks: Networks, generator: Group, critic: Group | None) -> Networks:
    """Networks that share the groups' moving averages."""
    shell = copy.copy(networks)
    shell._modules = dict(networks._modules)
    shell.generator = generator.ema  # type: ignore[assignment]
    shell.critic = None if critic is None else critic.ema
    return shell


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def split(valid_bn: Tensor, budget: int) -> Iterator[slice]:
    """Consecutive rows of at most `budget` positions together, at least one row a part."""
    length_b = [int(row.nonzero().max()) + 1 if bool(row.any()) else 1 for row in valid_bn]
    start = 0
    while start < len(length_b):
        stop, longest = start, 0
        while stop < len(length_b):
            longest = max(longest, length_b[stop])
            if stop > start and longest * (stop + 1 - start) > budget:
                break
            stop += 1
        yield slice(start, stop)
        start = stop
