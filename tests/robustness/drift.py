"""How far a replay drifts from the run where results are not reproducible: what the tolerances stand on.

    PYTHONPATH=tests python -m robustness.drift [STEPS]

A run and its replay are trained on the same batches. In the replay every sum of the backward pass rounds
otherwise: to each gradient noise of one rounding of the precision is added, relative to the root mean
square of its tensor (a kernel that adds in another order is off by that much, whatever the sum comes to),
and each updated weight is rounded once more, in fp32. The critics' inputs are sampled from the generator,
so that a token flips now and then. Printed are the largest differences of any step, relative as the
tolerance is.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np
import torch

from maskwire_server import config
from maskwire_server.batch import Batch, Modes
from maskwire_server.recovery.tolerance import SMALL
from maskwire_server.results import StepResult
from maskwire_server.training.trainer import TorchTrainer

ROUNDING = {"fp32": 2.0**-23, "tf32": 2.0**-10, "bf16": 2.0**-8}
"""One unit in the last place of each precision."""


class PerturbedTrainer(TorchTrainer):
    """Rounds otherwise than its like at every step, and never twice the same way."""

    rounding = ROUNDING["fp32"]
    noise_seed = 1

    def __init__(self, *arguments: Any) -> None:
        self.noise = torch.Generator().manual_seed(self.noise_seed)
        super().__init__(*arguments)

    def _gradients(self, *arguments: Any) -> Any:
        shares = super()._gradients(*arguments)
        for weight in self._weights():
            if weight.grad is not None:
                scale = self.rounding * weight.grad.square().mean().sqrt()
                weight.grad += scale * self._uniform(weight)
        return shares

    def train_step(self, *arguments: Any) -> StepResult:
        result = super().train_step(*arguments)
        with torch.no_grad():
            for weight in self._weights():
                weight *= 1 + ROUNDING["fp32"] * self._uniform(weight)
        return result

    def _weights(self) -> list[torch.Tensor]:
        return [weight for group in self._groups().values() for weight in group.weights]

    def _uniform(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * torch.rand(weight.shape, generator=self.noise) - 1


def text(step: int, rows: int, columns: int) -> Batch:
    """Rows that can be learnt: each counts up from a drawn id by a drawn stride."""
    draw = np.random.default_rng([7, step])
    start, stride = draw.integers(0, 64, (rows, 1)), draw.integers(1, 4, (rows, 1))
    return Batch((start + stride * np.arange(columns)) % 64, rows, columns)


def settings(critic: str, precision: str, rate: float = 1e-3, **more: Any) -> config.Config:
    return config.load(
        None,
        model={
            "num_tokens": 65, "mask_id": 64, "max_seq_len": 64, "dim": 32, "depth": 1, "heads": 2,
            "dim_head": 16, **more.pop("model", {}),
        },
        objective={"critic": critic, "preset": "x-transformers"},
        optimizer={"learning_rate": rate, "warmup_steps": 20},
        serve={"device": "cpu", "threads": 1, "precision": precision},
        run={"seed": 3, **more.pop("run", {})},
    )  # fmt: skip


def trainer(kind: type[TorchTrainer], whole: config.Config, seed: int | None = None) -> TorchTrainer:
    chosen = whole.run.seed if seed is None else seed
    return kind(whole.model, whole.objective, whole.optimizer, whole.serve, chosen)


def relative(one: float | None, other: float | None) -> float:
    if one is None or other is None:
        return 0.0 if one is other else float("inf")
    return abs(one - other) / max(abs(one), SMALL)


def differences(a: StepResult, b: StepResult) -> tuple[float, float, float]:
    """Of generator loss, critic loss and gradient norm."""
    return (
        relative(a.losses.generator_loss, b.losses.generator_loss),
        relative(a.losses.critic_loss, b.losses.critic_loss),
        relative(a.gradient_norm, b.gradient_norm),
    )


def drift(run: TorchTrainer, replay: TorchTrainer, steps: int, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """The differences of each step, [steps, 3]."""
    found = []
    for step in range(1, steps + 1):
        batch = text(step, *size)
        found.append(
            differences(run.train_step(1, step, batch, Modes()), replay.train_step(1, step, batch, Modes()))
        )
    return np.array(found)


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    print(f"largest relative difference over {steps} steps: generator loss, critic loss, gradient norm")
    for precision, critic, size in itertools.product(ROUNDING, ("self", "token"), ((4, 16), (8, 32))):
        PerturbedTrainer.rounding = ROUNDING[precision]
        whole = settings(critic, "bf16" if precision == "bf16" else "fp32")
        run, replay = trainer(TorchTrainer, whole), trainer(PerturbedTrainer, whole)
        largest = drift(run, replay, steps, size).max(0)
        numbers = " ".join(f"{value:9.2e}" for value in largest)
        words = f"{precision} {critic:5} critic, {size[0]} x {size[1]}"
        print(f"{words}: {numbers}", flush=True)


if __name__ == "__main__":
    main()
