"""The generator and its critic, with the methods that the objective calls."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from maskwire_server.config import ModelConfig, ObjectiveConfig
from maskwire_server.errors import ConfigError
from maskwire_server.training.conditioning_type import Conditioning
from maskwire_server.training.head import Head
from maskwire_server.training.models import sources
from maskwire_server.training.models.backbone import Backbone


class Networks(nn.Module):
    """A generator, and its critic if objective.critic is not "none".

    The critic is a linear layer on the generator's embeddings ("self") or a model of its own ("token").
    """

    def __init__(
        self, model: ModelConfig, objective: ObjectiveConfig, factory: sources.Factory | None = None
    ) -> None:
        super().__init__()
        self.generator = sources.generator(model, factory, self_cond=objective.self_cond)
        self.critic: nn.Module | None = None
        if objective.critic == "self":
            self.critic = nn.Linear(self.generator.dim, 1)
        elif objective.critic == "token":
            self.critic = sources.critic(model, factory)
        _make_contiguous(self)

    def with_modules(self, generator: nn.Module, critic: nn.Module | None = None) -> Networks:
        """Return a copy with another generator and critic, for example those of the moving averages."""
        if not isinstance(generator, Backbone):
            raise TypeError(f"generator must be a Backbone, got {type(generator).__name__}")
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.generator, other.critic = generator, critic
        return other

    def checkpoint_activations(self, on: bool) -> None:
        """Turn activation checkpointing on or off. With it, the backward pass recomputes each block."""
        for backbone in self.backbones:
            backbone.checkpoint_activations(on)

    def compile_blocks(self, mode: str) -> None:
        """Compile each block with torch.compile, for batches of any shape.

        The last block never runs in a CUDA graph, because the number of positions that it computes changes
        from step to step. Raises ConfigError if a model has no blocks.
        """
        for backbone in self.backbones:
            if not backbone.blocks:
                raise ConfigError(
                    f"serve.compile: must be off for a model that has no list of layers, got {mode}"
                )
            *others, last = backbone.blocks
            for block in others:
                block.compile(mode=mode, dynamic=True)
            last.compile(mode="default", dynamic=True)

    @property
    def backbones(self) -> list[Backbone]:
        """The generator, and the critic if it is a separate model."""
        return [each for each in (self.generator, self.critic) if isinstance(each, Backbone)]

    def embed(
        self, ids_bn: Tensor, valid_bn: Tensor | None, cond: Conditioning, read_m: Tensor | None = None
    ) -> Tensor:
        """Return the generator's embeddings of the ids, [b, n, d], or only those at `read_m`, [m, d]."""
        e: Tensor = self.generator(ids_bn, valid_bn, cond, read_m)
        return e

    def head(self, e_md: Tensor) -> Head:
        """Return the input, weight and bias of the generator's output layer for m positions."""
        return self.generator.head(e_md)

    def project(self, e_md: Tensor) -> Tensor:
        """Return the generator's logits, [m, v], for the embeddings of m positions."""
        return self.generator.project(e_md)

    def conditioning(self, e_bnd: Tensor | None) -> Conditioning:
        """Return the conditioning of a pass: the embeddings of a first pass, or "null" if there was none.

        Returns None if the generator has no self-conditioning.
        """
        if self.generator.null_embed is None:
            return None
        return "null" if e_bnd is None else e_bnd

    def criticize(self, ids_bn: Tensor, valid_bn: Tensor | None, *, train_trunk: bool) -> Tensor:
        """Return the critic's logits, [b, n]. The critic's passes are never self-conditioned.

        A self critic trains the generator only with `train_trunk`.
        """
        if self.critic is None:
            raise ValueError("objective.critic must be 'self' or 'token' to score ids, got 'none'")
        if isinstance(self.critic, Backbone):
            scores_bn1 = self.critic.project(self.critic(ids_bn, valid_bn))
        else:
            with torch.set_grad_enabled(train_trunk and torch.is_grad_enabled()):
                e_bnd = self.generator(ids_bn, valid_bn)
            if self.generator.gives_logits:
                raise ConfigError(
                    'objective.critic: "self" needs a model whose logits are a linear map of its embeddings; '
                    'use "token" or "none"'
                )
            scores_bn1 = self.critic(e_bnd)
        return scores_bn1[..., 0]


def _make_contiguous(module: nn.Module) -> None:
    """Make buffers and frozen weights contiguous, so that they can be saved, and loaded in place."""
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):
            if not buffer.is_contiguous():
                child._buffers[name] = buffer.contiguous()
        for weight in child.parameters(recurse=False):
            if not weight.requires_grad and not weight.is_contiguous():
                weight.data = weight.data.contiguous()
