"""The section [checkpoints] of the configuration."""

from __future__ import annotations

from pydantic import Field

from maskwire_server.config.base import Positive, Section, Steps


class CheckpointsConfig(Section):
    """[checkpoints]: when to save checkpoints and which to keep. Can be changed at a restart."""

    every_steps: Steps = None
    """Save every this many steps. off: do not save by number of steps."""
    every_seconds: Positive = 300.0
    """Save this many seconds after the last checkpoint, if there are new steps. off: do not save by time."""
    keep_last: int = Field(3, ge=2)
    """Keep this many of the newest automatic checkpoints. Checkpoints saved on request without a score are
    always kept."""
    keep_every: Steps = None
    """Also keep checkpoints whose step is a multiple of this. off: none."""
    keep_best: int = Field(1, ge=0)
    """Keep this many of the checkpoints saved with a score: those with the lowest scores."""
