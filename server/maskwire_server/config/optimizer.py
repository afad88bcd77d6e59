"""The section [optimizer] of the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from maskwire_server.config.base import Finite, Positive, Section, Steps


class ParameterGroup(Section):
    """An entry of `optimizer.groups`: different settings for the parameters whose names match a pattern."""

    match: str = Field(min_length=1)
    """Pattern of parameter names, in the generator and the critic: `blocks.*`, `*.bias`, `critic.*`. `*` also
    matches dots. A parameter belongs to the first group that matches it."""
    lr_scale: Finite = Field(1.0, ge=0)
    """Factor of the learning rate."""
    weight_decay: Annotated[Finite, Field(ge=0)] | None = None
    """Weight decay of the matrices that match. Default: optimizer.weight_decay."""
    train: bool = True
    """false: freeze the parameters: no gradient, no optimizer state, no average of their own. Fixed from the
    first step on."""


class OptimizerConfig(Section):
    """[optimizer]: the optimizer and its learning rate. Can be changed at a restart."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon for the matrices in the blocks and AdamW for everything else. Fixed from the first
    step on."""
    learning_rate: Finite = Field(1e-3, ge=0)
    """Peak learning rate."""
    warmup_steps: int = Field(100, ge=0)
    """Number of steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or half a cosine down to min_learning_rate at total_steps."""
    total_steps: Steps = None
    """The step at which the cosine ends. After it the rate stays at min_learning_rate. off: no cosine."""
    min_learning_rate: Finite = Field(0.0, ge=0)
    """Learning rate at the end of the cosine."""
    weight_decay: Finite = Field(0.01, ge=0)
    """Decoupled weight decay of matrices. Norms, biases and embeddings do not decay."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """AdamW's decay rates."""
    eps: Finite = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Muon's momentum."""
    clip_grad_norm: Positive = 1.0
    """Maximum global gradient norm. Larger gradients are scaled down. off: no clipping."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay of the moving average of the weights, which is then used in evaluation. 0: no average."""
    groups: tuple[ParameterGroup, ...] = ()
    """Different settings for some parameters: a list of tables, each with a pattern and the settings that
    differ, as `[{match = "blocks.*", lr_scale = 0.5}]`, or written as `[[optimizer.groups]]`."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> OptimizerConfig:
        if self.schedule != "cosine":
            return self
        if self.total_steps is None:
            raise ValueError("total_steps must be set with schedule = 'cosine', got none")
        if self.total_steps <= self.warmup_steps:
            raise ValueError(
                f"total_steps must be above warmup_steps = {self.warmup_steps}, got {self.total_steps}"
            )
        return self
