"""The section [distributed] of the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from maskwire_server.config.base import Finite, Section, Steps


class DistributedConfig(Section):
    """[distributed]: how several ranks (processes) share a run, with `maskwire-server serve --ranks N`."""

    replicate: int = Field(1, ge=1)
    """The number of copies of the model. Ranks of different copies train on different rows."""
    shard: Steps = None
    """The number of ranks that share one copy: each holds a part of every weight, gradient and moment. off:
    the number of ranks divided by `replicate`."""
    rank_timeout_seconds: Annotated[Finite, Field(ge=2)] = 10.0
    """Restart all ranks when one has sent no heartbeat for this long. They send one every second."""
    checkpoints_by: Literal["auto", "ranks", "leader"] = "auto"
    """Who writes checkpoints. ranks: each rank writes its part to the folder of the checkpoints, which all
    hosts must share. leader: the leader gathers the state in its memory and writes it. auto: the ranks if
    they share this folder, otherwise the leader."""
