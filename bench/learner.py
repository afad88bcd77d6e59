"""One run of L3: python -m bench.learner ARM SEED SECONDS [--rate RATE] [--rows HELD-OUT ROWS].

Prints JSON: {"steps": steps made, "curve": [[seconds of training, held-out bits per byte], ... ten of them]}.

ARM is one of:
- `linear`, `quadratic`: maskwire with its defaults and that schedule;
- `peer`: x-transformers' wrapper with its loss weight corrected to 1/m(t), as in the paper that it cites;
  uncorrected, training makes the model worse;
- `bernoulli`: the loop of LLaDA and dLLM: each token is masked with probability t, and its loss weighs 1/t.

All have the recipe that was the best over 15 minutes (docs/recipe.md): 4 blocks of width 96, and Muon. They
begin with the same weights, see the same batches in the same order, have the same evaluator, and train for
the same seconds. Evaluations are not counted. The learning rate rises over the first 5% of the seconds and
then falls as half a cosine to 0.
"""

from __future__ import annotations

import argparse
import json
import random
import warnings
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.recipe import share
from demo.library import python_sources
from maskwire.data.file_data import ByteData
from maskwire_server import config
from maskwire_server.batch import Batch, Modes
from maskwire_server.results import EvalOptions
from maskwire_server.training import evaluation, optimizers
from maskwire_server.training.corruption import Vocabulary
from maskwire_server.training.head import Head
from maskwire_server.training.models.x_transformers_export import encoder_options, wrapper_options
from maskwire_server.training.models.x_transformers_import import import_state_dict
from maskwire_server.training.ranks_interface import Ranks
from maskwire_server.training.tensor_batch import TensorBatch
from maskwire_server.training.trainer import TorchTrainer

ROWS, COLUMNS, HELD_OUT, POINTS = 16, 128, 0.05, 10
MODEL = config.ModelConfig(
    num_tokens=257, mask_id=256, max_seq_len=COLUMNS, dim=96, depth=4, heads=3, dim_head=32,
    positions="rotary", norm="rmsnorm", qk_norm=True, qk_norm_gain="per_head",
)  # fmt: skip
RATE = 8e-3
"""The best of 2e-3, 4e-3 and 8e-3 after a minute, for every arm."""
EVAL_ROWS, EVAL_DRAWS = 64, 16
SMALLEST_TIME = 1e-3
"""The smallest t of `bernoulli`, as in dLLM: 1/t is then at most 1,000."""
ARMS = ("peer", "bernoulli", "linear", "quadratic")
TrainStep = Callable[[int, npt.NDArray[np.uint8], float], None]


def main() -> None:
    """Train and evaluate."""
    parser = argparse.ArgumentParser(prog="python -m bench.learner")
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("seed", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--rate", type=float, default=RATE, help="peak learning rate")
    parser.add_argument("--rows", type=int, default=EVAL_ROWS, help="held-out rows")
    chosen = parser.parse_args()
    training, held_out = sources(chosen.seed, chosen.rows)
    wrapper = peer(chosen.seed)
    is_ours = chosen.arm in ("linear", "quadratic")
    whole = config.load(
        None,
        model=MODEL.model_dump(exclude_unset=True),
        objective={"schedule": chosen.arm if is_ours else "linear"},
        optimizer={"name": "muon"},
        serve={"threads": 1},  # several run at once
        run={"seed": chosen.seed},
    )
    trainer = TorchTrainer(whole.model, whole.objective, whole.optimizer, whole.serve, chosen.seed)
    begin = import_state_dict(wrapper.state_dict(), whole.model, whole.objective)
    trainer.adopt(begin.weights)
    networks = trainer.networks if is_ours else Foreign(wrapper.net)
    train = ours_step(trainer)
    if chosen.arm == "peer":
        train = peer_step(wrapper, lambda ids: wrapper(ids).loss, whole.optimizer)
    elif chosen.arm == "bernoulli":
        train = peer_step(wrapper, lambda ids: bernoulli_loss(wrapper.net, ids), whole.optimizer)
    curve: list[tuple[float, float]] = []
    step, spent = 0, 0.0
    while len(curve) < POINTS:
        step += 1
        ids = np.stack(list(training.batch(step)))
        began = perf_counter()
        train(step, ids, chosen.rate * share("cosine", spent / chosen.seconds))
        spent += perf_counter() - began
        while len(curve) < POINTS and spent >= chosen.seconds * (len(curve) + 1) / POINTS:
            curve.append((spent, bits(networks, held_out)))
    print(json.dumps({"steps": step, "curve": curve}))


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
    layers = x_transformers.Encoder(**encoder_options(MODEL), attn_flash=True)
    net = x_transformers.TransformerWrapper(**wrapper_options(MODEL), attn_layers=layers)
    net.blocks = [layer[1] for layer in layers.layers]  # Muon trains their matrices
    wrapper: Any = NonAutoregressiveWrapper(
        net, mask_id=MODEL.mask_id, no_replace_prob=0.0, random_token_prob=0.0
    )
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


def bernoulli_loss(net: Any, ids: Tensor) -> Tensor:
    """The loss of masking each token with probability t, t uniform per row (LLaDA, arXiv 2502.09992)."""
    times_b1 = SMALLEST_TIME + (1 - SMALLEST_TIME) * torch.rand(len(ids), 1)
    masked_bn = torch.rand(ids.shape) < times_b1
    logits_bnv = net(torch.where(masked_bn, MODEL.mask_id, ids))
    losses_m = F.cross_entropy(logits_bnv[masked_bn], ids[masked_bn], reduction="none")
    return (losses_m / times_b1.expand_as(ids)[masked_bn]).sum() / ids.numel()


def ours_step(trainer: TorchTrainer) -> TrainStep:
    """A training step of maskwire."""

    def step(number: int, ids: npt.NDArray[np.uint8], rate: float) -> None:
        trainer.train_step(1, number, Batch(ids, *ids.shape), Modes(learning_rate=rate))

    return step


def peer_step(
    wrapper: Any, loss_of: Callable[[Tensor], Tensor], settings: config.OptimizerConfig
) -> TrainStep:
    """A training step on x-transformers' network, with the same settings of the same optimizer."""
    group = optimizers.Group(wrapper.net, settings, fused=True)

    def step(_: int, ids: npt.NDArray[np.uint8], rate: float) -> None:
        torch.autograd.backward(loss_of(torch.from_numpy(ids.astype(np.int64))))
        optimizers.clip([group], settings.clip_grad_norm, Ranks())
        group.update(rate)
        group.clear_gradients()

    return step


def bits(networks: Any, ids: Tensor) -> float:
    """Held-out bits per byte: the bound, with the same draws every time."""
    every = torch.ones(ids.shape, dtype=torch.bool)
    with torch.no_grad():
        found = evaluation.evaluate(
            networks,
            config.ObjectiveConfig(),
            Vocabulary.of(MODEL),
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
