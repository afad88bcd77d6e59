"""A step minimises the loss that it reports, for every mode and critic weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from maskwire_server import config
from maskwire_server.batch import Batch, Modes
from maskwire_server.training.trainer import TorchTrainer

BATCH = Batch(np.random.default_rng(0).integers(0, 8, (16, 6)), 16, 6)
WEIGHTS = (0.0, 0.5, 2.0)
MODES = {
    "both": Modes(generator_sample_temperature=1.0),
    "generator": Modes(only_train_generator=True),
    "critic": Modes(only_train_critic=True, generator_sample_temperature=1.0),
}


def make(weight: float, critic: str, **optimizer: Any) -> TorchTrainer:
    whole = config.load(
        None,
        model={
            "num_tokens": 9, "mask_id": 8, "max_seq_len": 6, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8,
        },
        objective={"critic": critic, "critic_loss_weight": weight, "self_cond": True},
        optimizer={"warmup_steps": 0, "clip_grad_norm": None, "weight_decay": 0, **optimizer},
        serve={"device": "cpu", "threads": 1, "micro_batch_tokens": 36},
    )  # fmt: skip
    return TorchTrainer(whole.model, whole.objective, whole.optimizer, whole.serve, seed=0)


def gradients(trainer: TorchTrainer, modes: Modes) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of step 1 and the gradients of what learns, the weights left as they are."""
    found: dict[str, torch.Tensor] = {}

    def instead(group: str) -> Any:
        def update(_: float) -> None:
            named = getattr(trainer.networks, group).named_parameters()
            found.update({f"{group}.{n}": w.grad.clone() for n, w in named if w.grad is not None})

        return update

    trainer.generator.update = instead("generator")  # type: ignore[method-assign]
    assert trainer.critic is not None
    trainer.critic.update = instead("critic")  # type: ignore[method-assign]
    return trainer.train_step(1, 1, BATCH, modes).losses.loss, found


@pytest.mark.parametrize("critic", ["self", "token"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_gradient_belongs_to_the_reported_loss(weight: float, mode: str, critic: str) -> None:
    trainer = make(weight, critic)
    _, found = gradients(trainer, MODES[mode])
    norm = float(torch.nn.utils.get_total_norm(list(found.values())))
    weights = dict(trainer.networks.named_parameters())
    start = {name: weights[name].detach().clone() for name in found}
    losses = []
    for step in (5e-3, -5e-3):
        with torch.no_grad():
            for name, gradient in found.items():
                weights[name].copy_(start[name] + step * gradient / norm)
        losses.append(gradients(trainer, MODES[mode])[0])
    # The derivative along the gradient's direction is the gradient's norm.
    assert (losses[0] - losses[1]) / 1e-2 == pytest.approx(norm, rel=0.02)


@pytest.mark.parametrize("critic", ["self", "token"])
def test_a_critic_that_trains_alone_has_the_same_gradient_whatever_its_weight(critic: str) -> None:
    (first_loss, first), *others = (gradients(make(weight, critic), MODES["critic"]) for weight in WEIGHTS)
    assert first
    assert all(name.startswith("critic.") for name in first)
    assert any(bool(gradient.any()) for gradient in first.values())
    for loss, found in others:
        assert loss == first_loss
        assert found.keys() == first.keys()
        assert all(torch.equal(found[name], first[name]) for name in first)


@pytest.mark.parametrize("critic", ["self", "token"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_critic_that_trains_alone_learns_whatever_its_weight(weight: float, critic: str) -> None:
    trainer = make(weight, critic, learning_rate=1e-2)
    losses = [trainer.train_step(1, step, BATCH, MODES["critic"]).losses.loss for step in range(1, 61)]
    assert np.mean(losses[-10:]) < 0.9 * losses[0]
