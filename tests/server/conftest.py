from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path / "run")
    yield made
    made.trainer.gate.set()
    for engine in made.engines:
        engine.close()
