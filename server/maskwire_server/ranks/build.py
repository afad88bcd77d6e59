"""Builds the trainer of a rank."""

from __future__ import annotations

import logging
import time

import torch

from maskwire_server.config import Config
from maskwire_server.errors import ConfigError, MaskwireError
from maskwire_server.ranks.liveness import GRACE_SECONDS
from maskwire_server.ranks.process_group import Member
from maskwire_server.training import device_errors
from maskwire_server.training.trainer import TorchTrainer
from maskwire_server.training.user_code import one_line

log = logging.getLogger(__name__)


def build(member: Member, config: Config) -> TorchTrainer:
    """Build the trainer of this rank. Raises ConfigError if a restart would not help.

    If another rank was lost meanwhile, `liveness` ends this process before the error is raised.
    """
    ranks = member.ranks
    ranks.use_device()
    try:
        return TorchTrainer(
            config.model, config.objective, config.optimizer, config.serve, config.run.seed, ranks
        )
    except MaskwireError:
        time.sleep(GRACE_SECONDS)
        raise
    except Exception as error:
        time.sleep(config.distributed.rank_timeout_seconds + GRACE_SECONDS)
        if not device_errors.usable_after(error, ranks.device or torch.device("cpu")):
            raise
        log.exception("rank %d failed to build the model", ranks.rank)
        raise ConfigError(
            f"distributed: the model could not be built, or divided among ranks: {one_line(error)}; the log "
            "has the details; change the model, or train with one process"
        ) from error
