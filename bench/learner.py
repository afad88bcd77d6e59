"""One run of L3: python -m bench.learner ARM SEED STEPS [HELD-OUT ROWS].

Prints JSON: [[step, held-out bits per byte], …] at ten steps.

ARM is `linear` or `quadratic` (maskwire with its defaults and that schedule), or `peer`: x-transformers'
wrapper with its loss weight corrected to 1/m(t), as in the paper that it cites; uncorrected, training makes
the model worse. All begin with the same weights, see the same batches, use the same optimizer, and have the
same evaluator.
"""

from __future__ import annotations

import json
import random
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demo.library import python_sources
from maskwire.data.file_data import ByteData
from maskwire_server import config
from maskwire_server.batch import Batch, Modes
from maskwire_server.results import EvalOptions
from maskwire_server.training import evaluation, optimizers
from maskwire_server.training.corruption import Vocabulary
from maskwire_server.training.head import Head
from maskwire_server.training.models.x_transformers_import import import_state_dict
from maskwire_server.training.ranks_interface import Ranks
from maskwire_server.training.tensor_batch import TensorBatch
from maskwire_server.training.trainer import TorchTrainer

ROWS, COLUMNS, HELD_OUT, POINTS = 32, 128, 0.05, 10
MODEL = {"num_tokens": 257, "mask_id": 256, "max_seq_len": COLUMNS, "dim": 128, "depth": 3, "heads": 2}
OPTIMIZER = {"learning_rate": 2e-3, "warmup_steps": 60}
EVAL_ROWS, EVAL_DRAWS = 64, 16


def main() -> None:
    """Train and evaluate."""
    arm, seed, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    training, held_out = sources(seed, int(sys.argv[4]) if len(sys.argv) > 4 else EVAL_ROWS)
    wrapper = peer(seed)
    whole = config.load(
        None,
        model=MODEL,
        objective={"schedule": "linear" if arm == "peer" else arm},
        optimizer=OPTIMIZER,
        serve={"threads": 1},  # several run at once
        run={"seed": seed},
    )
    trainer = TorchTrainer(whole.model, whole.objective, whole.optimizer, whole.serve, seed)
    begin = import_state_dict(wrapper.state_dict(), config.ModelConfig(mask_id=256), whole.objective)
    trainer.adopt(begin.weights)
    networks = Foreign(wrapper.net) if arm == "peer" else trainer.networks
    train = peer_step(wrapper, whole.optimizer) if arm == "peer" else ours_step(trainer)
    points = []
    for step in range(1, steps + 1):
        train(step, np.stack(list(training.batch(step))))
        if step % (steps // POINTS) == 0:
            points.append([step, bits(networks, held_out)])
    print(json.dumps(points))


def sources(seed: int, count: int) -> tuple[ByteData, Tensor]:
    """Batches of the standard library's sources, and held-out rows, as the demo takes them."""
    data = ByteData(python_sources(), length=COLUMNS, batch_size=ROWS, seed=seed)
    training, held_out = data.split(HELD_OUT)
    rows = [row for row in held_out.spread(2 * count) if len(row) == COLUMNS][:count]
    return training, torch.from_numpy(np.stack(rows).astype(np.int64))


def peer(seed: int) -> Any:
    """x-transformers' wrapper around an encoder of the same size, without augmentation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import x_transformers
        from x_transformers.nonautoregressive_wrapper import NonAutoregressiveWrapper
    torch.manual_seed(seed)
    random.seed(seed)
    layers = x_transformers.Encoder(
        dim=MODEL["dim"], depth=MODEL["depth"], heads=MODEL["heads"], attn_flash=True
    )
    net = x_transformers.TransformerWrapper(num_tokens=257, max_seq_len=COLUMNS, attn_layers=layers)
    wrapper: Any = NonAutoregressiveWrapper(net, mask_id=256, no_replace_prob=0.0, random_token_prob=0.0)
    wrapper.loss_weight_fn = lambda times: 1 / (1 - times).clamp(min=1 / COLUMNS)
    return wrapper


class Foreign:
    """x-transformers' network, with the interface that the evaluation needs."""

    def __init__(self, net: Any) -> None:
        self._net = net

    def embed(
        self, ids_bn: Tensor, valid_bn: Tensor | None, cond: Tensor | None, read_m: Tensor | None = None
    ) -> Tensor:
        """Embeddings after the final norm."""
        assert cond is None
        e_bnd: Tensor = self._net(ids_bn, mask=valid_bn, return_embeddings=True)
        return e_bnd if read_m is None else e_bnd.flatten(0, 1)[read_m]

    def head(self, e_md: Tensor) -> Head:
        """The output layer."""
        return Head(e_md, self._net.to_logits.weight)

    def project(self, e_md: Tensor) -> Tensor:
        """Logits."""
        logits_mv: Tensor = self._net.to_logits(e_md)
        return logits_mv

    def conditioning(self, e_bnd: Tensor | None) -> Tensor | None:
        """None: it has no self-conditioning."""
        del e_bnd
        return None

    def criticize(self, ids_bn: Tensor, valid_bn: Tensor | None, *, train_trunk: bool) -> Tensor:
        """There is no critic."""
        raise NotImplementedError


def ours_step(trainer: TorchTrainer) -> Callable[[int, Any], None]:
    """A training step of maskwire."""

    def step(number: int, ids: Any) -> None:
        trainer.train_step(1, number, Batch(ids, *ids.shape), Modes())

    return step


def peer_step(wrapper: Any, settings: config.OptimizerConfig) -> Callable[[int, Any], None]:
    """A training step of x-transformers, with the same settings of the same optimizer."""
    group = optimizers.Group(wrapper, settings, fused=True)

    def step(number: int, ids: Any) -> None:
        wrapper(torch.from_numpy(ids.astype(np.int64))).loss.backward()
        optimizers.clip([group], settings.clip_grad_norm, Ranks())
        group.update(optimizers.learning_rate(settings, number))
        group.clear_gradients()

    return step


def bits(networks: Any, ids: Tensor) -> float:
    """Held-out bits per byte: the bound, with the same draws every time."""
    every = torch.ones(ids.shape, dtype=torch.bool)
    with torch.no_grad():
        found = evaluation.evaluate(
            networks,
            config.ObjectiveConfig(),
            Vocabulary(257, 256, None),
            TensorBatch(ids, every, ~every),
            EvalOptions(tuple(range(len(ids))), EVAL_DRAWS, 0),
            budget=2**14,
            smallest=2**11,
            device=torch.device("cpu"),
            has_critic=False,
            ema_weights=False,
        )
    return found.bits_per_token


if __name__ == "__main__":
    main()
