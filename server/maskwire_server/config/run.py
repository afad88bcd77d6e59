"""The section [run]."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field, field_validator

from maskwire_server.config.base import Section


class RunConfig(Section):
    """[run]: where the run lives, and its seed."""

    dir: Path = Path("runs/default")
    """Everything the run needs to come back, under one folder."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seeds the weights, the masks and every other draw. It belongs to the run and cannot change."""

    @field_validator("dir")
    @classmethod
    def _readable(cls, value: Path) -> Path:
        # safetensors writes under any path and reads under UTF-8 alone: the second start would fail.
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raw = os.fsencode(value)
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                raise ValueError(f"the path must be UTF-8, got {raw!r}") from None
            raise ValueError(
                "the path is UTF-8, but this process runs in a locale of ASCII and cannot read it: set "
                f"LC_ALL=C.UTF-8 or PYTHONUTF8=1, got {text!r}"
            ) from None
        return value
