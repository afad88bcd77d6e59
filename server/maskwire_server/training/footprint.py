"""The memory that a configuration needs, computed from the shapes of its tensors."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from maskwire_server.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ServeConfig
from maskwire_server.training import cgroup, cross_entropy, model_checks, optimizers
from maskwire_server.training.models.generator_critic import Networks
from maskwire_server.training.numerics import choose_device, default_budget


@dataclass(frozen=True)
class Term:
    """A product, written out in words, and its value in bytes."""

    words: str
    size: int

    def __str__(self) -> str:
        return f"{self.words} = {size_text(self.size)}"


@dataclass(frozen=True)
class Footprint:
    """A report in lines of text, and whether the configuration fits in memory."""

    lines: list[str]
    fits: bool
    parameters: list[str]
    """A line for each parameter: its rule, shape and name."""


def footprint(
    model: ModelConfig, objective: ObjectiveConfig, optimizer: OptimizerConfig, serve: ServeConfig
) -> Footprint:
    """Report the parameters, the memory and the micro-batches of a configuration.

    Raises ConfigError if the device does not exist or `optimizer.groups` does not fit the parameters.
    """
    device = choose_device(serve.device)
    with torch.device("meta"):
        networks = Networks(model, objective)
    parameters = sum(weight.numel() for weight in networks.parameters())
    parts = {"generator": networks.generator, "critic": networks.critic}
    learning = optimizers.counts(parts, optimizer)
    trained = sum(learning.values())
    numbers_of = {
        "weights": parameters,
        "gradients": trained,
        "AdamW's two moments": 2 * learning["adamw"],
        "Muon's momentum": learning["muon"],
        "average": trained if optimizer.ema_decay else 0,
    }
    state = 4 * sum(numbers_of.values())
    positions = serve.micro_batch_tokens or default_budget(device)
    activations = of_activations(model, objective, serve, networks, positions)
    logits = of_logits(model, device)
    copied = sum(numbers_of.values()) - trained  # not the gradients; from the first checkpoint on
    copy = 4 * copied
    need = state + activations.size + (copy if device.type == "cpu" else 0)
    have = available(device)
    if need + logits.size <= have and gives_logits(model, objective):
        logits = of_logits(model, device, all_of=positions)
    need += logits.size
    fits = need <= have
    lines = [
        f"parameters      {parameters:,}" + (f", {parameters - trained:,} frozen" * (trained < parameters)),
        f"state           ({' + '.join(f'{what} {count:,}' for what, count in numbers_of.items() if count)}) "
        f"x 4 bytes = {size_text(state)}",
        f"activations     {positions:,} positions per micro-batch x {activations}",
        f"logits          {logits}",
        f"checkpoint copy {copied:,} numbers x 4 bytes, kept in host memory = {size_text(copy)}",
        f"together        {size_text(need)} of {size_text(have)} available on {device}",
        (
            f"fits; batches are split into micro-batches of {positions:,} positions, up to "
            f"serve.max_batch_tokens = {serve.max_batch_tokens:,} in a batch"
            if fits
            else "does not fit: lower serve.micro_batch_tokens, set serve.activation_checkpointing, or "
            "lower model.dim, model.depth or model.num_tokens"
        ),
    ]
    return Footprint(lines, fits, optimizers.listed(parts, optimizer))


def of_activations(
    model: ModelConfig, objective: ObjectiveConfig, serve: ServeConfig, networks: Networks, positions: int
) -> Term:
    """The activations that a micro-batch of `positions` positions keeps for its backward pass.

    The words describe one position, the bytes are those of all positions. Per position, a block keeps about 8
    vectors of size dim (norms, q, k, v, attention, residuals) and 2 of the feed-forward's width.
    """
    dim, depth = model.dim, model.depth
    if model.source != "encoder":  # an estimate for a block of the usual shape
        dim = networks.generator.dim
        depth = int(model.x_transformers.get("depth", 0)) or len(networks.generator.blocks) or 1
    widths = 8 * dim + 2 * int(dim * model.ff_mult) * (2 if model.gated else 1)
    passes = 2 if objective.critic != "none" else 1
    numbers = f"{widths:,} numbers x {depth} blocks"
    kept = widths * depth
    if serve.activation_checkpointing:
        numbers = f"({dim:,} numbers x {depth} blocks + {widths:,} of one)"
        kept = dim * depth + widths
    return Term(f"{numbers} x {passes} pass{'es' * (passes != 1)} x 4 bytes", 4 * positions * kept * passes)


def of_logits(model: ModelConfig, device: torch.device, all_of: int | None = None) -> Term:
    """The memory of the logits, which are computed in chunks or, if given, at `all_of` positions at once.

    Three copies count: the matrix product, the fp32 logits, and their log softmax.
    """
    rows = all_of or cross_entropy.chunk_rows(model.num_tokens, device)
    at = f"{rows:,} masked positions computed together"
    if all_of:
        at = f"no linear map of an embedding: computed at all {rows:,} positions of a micro-batch"
    return Term(f"{at} x {model.num_tokens:,} ids x 3 copies x 4 bytes", 4 * 3 * rows * model.num_tokens)


def gives_logits(model: ModelConfig, objective: ObjectiveConfig) -> bool:
    """Whether the model gives logits itself, not embeddings for a linear map. Runs the model on the CPU."""
    if model.source in ("encoder", "x-transformers"):
        return False
    with torch.random.fork_rng(devices=[]):
        networks = Networks(model, objective)
    batch = model_checks.small_batch(model)
    with torch.no_grad():
        networks.embed(batch.ids_rn, batch.valid_rn, None)
    return networks.generator.gives_logits


def available(device: torch.device) -> int:
    """The free memory of a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = cgroup.free_memory()
    if free is None:  # not on Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free


def size_text(count: int) -> str:
    """Format a number of bytes in MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
