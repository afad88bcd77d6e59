"""The section [checkpoints]."""

from __future__ import annotations

from pydantic import Field

from maskwire_server.config.base import Positive, Section, Steps


class CheckpointsConfig(Section):
    """[checkpoints]: when they are saved and how long they are kept."""

    every_steps: Steps = None
    """Save after every so many steps; off: not for their number."""
    every_seconds: Positive = 300.0
    """Save when this much time passed since the last, if a step was trained; off: not for the time."""
    keep_last: int = Field(3, ge=2)
    """Keep this many of the automatic checkpoints; those that somebody asked for, without a score, stay."""
    keep_every: Steps = None
    """Keep also those whose step is a multiple of this; off: none for that."""
    keep_best: int = Field(1, ge=0)
    """Of those saved with a score, keep the best (lowest) so many."""
