"""The section [run] of the configuration."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field, field_validator

from maskwire_server.config.base import Section


class RunConfig(Section):
    """[run]: the folder and the seed of the run."""

    dir: Path = Path("runs/default")
    """The run directory. It holds everything that is needed to restart the run."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the initial weights, the masks and all other random draws. Fixed once the run exists."""

    @field_validator("dir")
    @classmethod
    def _readable(cls, value: Path) -> Path:
        # safetensors writes to any path but reads only from paths in UTF-8. Without this check, the run
        # would start and then fail to restart.
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raw = os.fsencode(value)
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                raise ValueError(f"the path must be UTF-8, got {raw!r}; rename the folder") from None
            raise ValueError(
                "the path is UTF-8, but this process runs in an ASCII locale and cannot read it, got "
                f"{text!r}: set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
            ) from None
        return value
