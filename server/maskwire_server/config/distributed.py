"""The section [distributed]."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from maskwire_server.config.base import Finite, Section, Steps


class DistributedConfig(Section):
    """[distributed]: how ranks share a run. Read if there are several (`maskwire-server serve --ranks N`)."""

    replicate: int = Field(1, ge=1)
    """The number of copies of the model. Ranks of different copies train on different rows."""
    shard: Steps = None
    """The number of ranks that share one copy: each holds a part of every weight, gradient and moment. off:
    all ranks, divided by `replicate`."""
    rank_timeout_seconds: Annotated[Finite, Field(gt=0)] = 10.0
    """End all ranks, and restart them, when one was silent for this long."""
    checkpoints_by: Literal["auto", "ranks", "leader"] = "auto"
    """Who writes checkpoints. ranks: each its part, into the checkpoints' folder, which all hosts must share.
    leader: the leader, which gathers the state in its memory. auto: the ranks if they share the folder."""
