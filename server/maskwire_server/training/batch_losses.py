"""Sums the losses of a logical batch over its micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor

from maskwire.v1.values import Losses
from maskwire_server.batch import Modes
from maskwire_server.training.device_copies import Download
from maskwire_server.training.evaluation_figures import combine
from maskwire_server.training.objective import PartLosses


class BatchLosses:
    """The losses of a logical batch, summed over its micro-batches on the device."""

    def __init__(self, masked: int, maskable: int, device: torch.device, *, critic: bool) -> None:
        self.masked = masked
        self.maskable = maskable
        self._critic = critic
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        """The sums of the generator's and of the critic's losses: fp64, of shape [2]."""

    def add(self, part: PartLosses) -> None:
        """Add the losses of one micro-batch."""
        critic = torch.zeros_like(part.generator) if part.critic is None else part.critic
        self.sums += torch.stack((part.generator, critic)).detach()

    def begin_read(self, norm: Tensor) -> Download:
        """Begin to copy the losses and the gradient norm to the host."""
        return Download(torch.cat((self.sums, norm.double().view(1).to(self.sums))))

    def read(self, copy: Download, critic_weight: float, modes: Modes) -> tuple[Losses, float]:
        """Wait for a copy that `begin_read` began, and return the step's losses and its gradient norm."""
        generator, critic, norm = copy.wait().tolist()
        losses = combine(generator, critic if self._critic else None, critic_weight, modes.only_train_critic)
        return losses, norm
