"""Check a model that maskwire did not build, before training starts.

A step must be reproducible: the same state, batch and seed must give the same gradients, and computing them
must change nothing. A row must not depend on its padding or on other rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from maskwire_server.config import ModelConfig
from maskwire_server.errors import ConfigError
from maskwire_server.training import draws, module_state
from maskwire_server.training.block_calls import BlockCalls, CallOrder
from maskwire_server.training.corruption import Vocabulary, random_ids
from maskwire_server.training.draws import Purpose
from maskwire_server.training.models import sources
from maskwire_server.training.models.backbone import Backbone
from maskwire_server.training.models.generator_critic import Networks
from maskwire_server.training.ranks_interface import whole
from maskwire_server.training.tensor_batch import TensorBatch
from maskwire_server.training.user_code import one_line

SHORT = 16
"""The maximum number of columns of a short batch."""
DIVIDED_TOLERANCE = 0.1
"""Largest norm of the difference between two gradients of a tensor, relative to the norm of the first.
Another device or precision causes a smaller difference, a wrong gradient a larger one."""
ORDER_STEPS = 16
"""The number of steps in which a start looks for blocks that are skipped at random. A block that is skipped
with probability p passes with probability (1 - p)^16. The checks of each later pass then find it."""
TOLERANCE = 1e-3
"""Largest difference between a row's embeddings alone and in a batch, relative to the largest of them."""


def begin(
    networks: Networks,
    model: ModelConfig,
    step: Callable[[TensorBatch], object],
    *,
    exact: bool,
) -> str:
    """Load the initial weights of a model that maskwire did not build, and check the model as `check` does.

    Returns the SHA-256 of the initial state, or "" for the built-in encoder. Raises ConfigError if
    the weights cannot be loaded or a check fails.
    """
    if model.source == "encoder":
        return ""
    sources.load_initial_weights(model, networks.backbones)
    check(networks, model, step, exact=exact)
    return sources.sha256(module_state.tensors(networks))


def check(
    networks: Networks,
    model: ModelConfig,
    step: Callable[[TensorBatch], object],
    *,
    exact: bool,
) -> None:
    """Raise ConfigError if steps of a model fail, cannot be reproduced, or mix the rows of a batch.

    `step` computes the gradients of a batch, with the same seed at each call. With `exact`, two calls for the
    same batch must give the same bits; otherwise, they may differ by rounding.
    """
    vocabulary = Vocabulary.of(model)
    longest, ragged = _longest(model, vocabulary), _ragged(model.max_seq_len, vocabulary)
    short = _ragged(min(model.max_seq_len, SHORT), vocabulary)
    before, outside = _state(networks), _outside()
    try:
        _check_shapes(networks, model, longest)
        first, second = _gradients(networks, step, longest), _gradients(networks, step, longest)
        _check_unchanged(networks, before, outside)
        _compare(first, second, exact)
        # After its first short row, BigBird uses another kind of attention.
        of_short = _gradients(networks, step, short)
        _compare(first, _gradients(networks, step, longest), exact)
        del first, second  # as large as the model
        _compare(of_short, _gradients(networks, step, short), exact)
        for batch in (short, ragged):
            _check_rows(networks, batch)
        _check_unchanged(networks, before, outside)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"model: a step with rows of up to model.max_seq_len = {model.max_seq_len} tokens failed: "
            f"{one_line(error)}; if the model does not accept rows that long, lower model.max_seq_len"
        ) from error


State = dict[str, tuple[int, str]]


def _check_unchanged(networks: Networks, before: State, outside: tuple[object, ...]) -> None:
    """Raise ConfigError if a step changed the state, or drew random numbers outside torch."""
    if _outside() != outside:
        raise ConfigError(
            "model: it must draw random numbers with torch alone, got draws from Python's random or from "
            "numpy, which make its steps irreproducible; use torch's random functions instead"
        )
    after = _state(networks)
    changed = next((name for name, found in before.items() if after.get(name) != found), None)
    if changed is not None:
        raise ConfigError(
            f"model: its forward pass must not change its state, got a change of {changed}; only the "
            "optimizer may change weights; register a buffer that changes with persistent=False"
        )


def _compare(first: dict[str, Tensor], second: dict[str, Tensor], exact: bool) -> None:
    """Raise ConfigError if the gradients of two computations of the same step differ."""
    for name, gradient in first.items():
        other = second.get(name)
        if other is None or not _close(gradient, other, exact):
            raise ConfigError(
                f"model: the same step must give the same gradients, but those of {name} differed the "
                "second time; make the model depend on nothing but its weights, the batch and torch's seed"
            )


def small_batch(model: ModelConfig) -> TensorBatch:
    """A batch of two rows of `SHORT` random ids, or fewer if model.max_seq_len is smaller."""
    n = min(model.max_seq_len, SHORT)
    return _batch(torch.ones(2, n, dtype=torch.bool), Vocabulary.of(model))


def _state(networks: Networks) -> State:
    """The id() and the SHA-256 of each weight and persistent buffer. Copies of them could fill the memory."""
    live = networks.state_dict(keep_vars=True)
    return {name: (id(tensor), sources.sha256({name: tensor})) for name, tensor in live.items()}


def _gradients(
    networks: Networks, step: Callable[[TensorBatch], object], batch: TensorBatch
) -> dict[str, Tensor]:
    step(batch)
    found = {name: weight.grad for name, weight in networks.named_parameters() if weight.grad is not None}
    for weight in networks.parameters():
        weight.grad = None
    return found


@torch.no_grad()
def _check_shapes(networks: Networks, model: ModelConfig, batch: TensorBatch) -> None:
    device = next(networks.parameters()).device
    e_bnd = networks.embed(batch.ids_rn.to(device), batch.valid_rn.to(device), None)
    if e_bnd.ndim != 3 or e_bnd.shape[:2] != batch.ids_rn.shape:
        raise ConfigError(
            "model: its embeddings must have the shape [rows, columns, width] with [rows, columns] = "
            f"{list(batch.ids_rn.shape)}, got {list(e_bnd.shape)}"
        )
    logits = networks.project(e_bnd[0, :1]).shape[-1]
    if logits != model.num_tokens:
        raise ConfigError(
            "model.num_tokens: must be the number of logits that the model gives per position, "
            f"{logits}, got {model.num_tokens}"
        )


@torch.no_grad()
def _check_rows(networks: Networks, batch: TensorBatch) -> None:
    """Raise ConfigError if the output of a row changes with the other rows or with the ids at its padding."""
    device = next(networks.parameters()).device
    ids_bn, valid_bn = batch.ids_rn.to(device), batch.valid_rn.to(device)
    other_bn = torch.where(valid_bn, ids_bn, ids_bn.flip(0))
    outputs: list[Callable[[Tensor, Tensor | None], Tensor]] = [
        lambda ids, valid: networks.embed(ids, valid, None)
    ]
    if networks.generator.to_self_cond is not None:
        outputs.append(
            lambda ids, valid: networks.embed(
                ids, valid, networks.conditioning(networks.embed(ids, valid, networks.conditioning(None)))
            )
        )
    if networks.critic is not None:
        outputs.append(lambda ids, valid: networks.criticize(ids, valid, train_trunk=False)[..., None])
    networks.eval()
    try:
        for output in outputs:
            e_bnd, at_other_ids_bnd = output(ids_bn, valid_bn), output(other_bn, valid_bn)
            limit = TOLERANCE * float(e_bnd[valid_bn].abs().max())
            for row in range(ids_bn.shape[0]):
                n = int(valid_bn[row].sum())
                alone_nd = output(ids_bn[row : row + 1, :n], None)[0]
                for what, found_nd in (
                    ("the ids under its padding", at_other_ids_bnd[row, :n]),
                    ("the other rows or their length", alone_nd),
                ):
                    difference = float((e_bnd[row, :n] - found_nd).abs().max())
                    if not difference <= limit:
                        raise ConfigError(
                            f"model: a row must not depend on {what}, got outputs that differ by "
                            f"{difference:.3g} (up to {limit:.3g} is rounding); make the model respect its "
                            "attention mask"
                        )
    finally:
        networks.train()


def _ragged(n: int, vocabulary: Vocabulary) -> TensorBatch:
    lengths = sorted({n, max(1, n // 2), max(1, n // 3)}, reverse=True)
    valid = torch.arange(n)[None, :] < torch.tensor(lengths)[:, None]
    return _batch(valid, vocabulary)


def _longest(model: ModelConfig, vocabulary: Vocabulary) -> TensorBatch:
    return _batch(torch.ones(1, model.max_seq_len, dtype=torch.bool), vocabulary)


def _batch(valid_rn: Tensor, vocabulary: Vocabulary) -> TensorBatch:
    keys = draws.keys(Purpose.RANDOM_ID, rows=range(valid_rn.shape[0]))
    ids_rn = random_ids(draws.uniform(keys, valid_rn.shape[1]), vocabulary)
    return TensorBatch(torch.where(valid_rn, ids_rn, 0), valid_rn, torch.zeros_like(valid_rn))


def _outside() -> tuple[object, ...]:
    """The states of Python's and numpy's random number generators, which a step's seed does not set."""
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, np.asarray(keys).tobytes(), *rest


def small_gradients(
    networks: Networks, model: ModelConfig, step: Callable[[TensorBatch], object]
) -> dict[str, Tensor]:
    """The gradients of a small step without dropout, by name: whole tensors on the CPU."""
    networks.eval()
    found = _gradients(networks, step, small_batch(model))
    networks.train()
    return {name: whole(gradient).cpu() for name, gradient in found.items()}


def call_orders(
    parts: Mapping[str, nn.Module | None], model: ModelConfig, step: Callable[[TensorBatch, int], object]
) -> dict[str, CallOrder]:
    """The order in which each network calls its blocks, in several small steps with different numbers.

    Raises ConfigError if a pass differs, for example because it skips a block at random.
    """
    found = {name: BlockCalls(part) for name, part in parts.items() if isinstance(part, Backbone)}
    for number in range(ORDER_STEPS):
        step(small_batch(model), number)
    for part in parts.values():
        for weight in part.parameters() if part is not None else ():
            weight.grad = None
    for calls in found.values():
        calls.remove()
    return {name: calls.order() for name, calls in found.items()}


def check_divided(before: dict[str, Tensor], step: Callable[[], dict[str, Tensor]]) -> None:
    """Raise ConfigError if dividing the weights among ranks changed a step's gradients.

    `before` holds the gradients from before the division, and `step` returns those from after it, both as
    whole tensors by name. A model that changes the output of one of its layers in place can lose the hook
    that gathers the layer's weights for the backward pass.
    """
    cure = (
        "a model that is divided among ranks must not change the outputs of its layers in place: write "
        "`x = x + y` instead of `x += y`, or train with one process"
    )
    try:
        after = step()
    except Exception as error:
        raise ConfigError(
            f"distributed: a step with divided weights failed: {one_line(error)}; {cure}"
        ) from error
    for name, expected in before.items():
        found = after.get(name)
        limit = DIVIDED_TOLERANCE * float(expected.norm()) + 1e-6
        if found is None or not float((found - expected).norm()) <= limit:
            raise ConfigError(
                f"distributed: dividing the weights among ranks changed the gradient of {name}; {cure}"
            )


def _close(one: Tensor, other: Tensor, exact: bool) -> bool:
    if exact:
        return torch.equal(one, other)
    return bool((one - other).abs().max() <= 1e-3 * one.abs().max().clamp(min=1e-6))
