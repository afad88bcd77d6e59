"""The trainer by itself, no server: python -m bench.inprocess STEPS ROWS COLUMNS SECTION.KEY=VALUE …

Prints steps per second.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from maskwire_server import config
from maskwire_server.batch import Batch, Modes
from maskwire_server.training.trainer import Trainer


def main() -> None:
    """Train on one batch, over and over."""
    steps, rows, columns = map(int, sys.argv[1:4])
    flags: dict[str, dict[str, Any]] = {}
    for setting in sys.argv[4:]:
        key, _, value = setting.partition("=")
        section, _, name = key.partition(".")
        flags.setdefault(section, {})[name] = value
    whole = config.load(None, **flags)
    trainer = Trainer(whole.model, whole.objective, whole.optimizer, whole.serve, whole.run.seed)
    ids = np.random.default_rng(0).integers(0, whole.model.num_tokens - 1, (rows, columns))
    for step in range(1, 4):
        trainer.train_step(1, step, Batch(ids, rows, columns), Modes())
    began = time.perf_counter()
    for step in range(4, steps + 4):
        trainer.train_step(1, step, Batch(ids, rows, columns), Modes())
    print(steps / (time.perf_counter() - began))


if __name__ == "__main__":
    main()
