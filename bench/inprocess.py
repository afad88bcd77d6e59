"""The trainer by itself, no server: python -m bench.inprocess STEPS ROWS COLUMNS SECTION.KEY=VALUE …

Prints JSON: steps per second, the same of the median step, the peak of resident memory in MiB, and the
masked positions of a step.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from bench.harness import WARM, report
from maskwire_server import config
from maskwire_server.batch import Batch, Modes
from maskwire_server.training.trainer import TorchTrainer


def main() -> None:
    """Train on one batch, over and over."""
    steps, rows, columns = map(int, sys.argv[1:4])
    flags: dict[str, dict[str, Any]] = {}
    for setting in sys.argv[4:]:
        key, _, value = setting.partition("=")
        section, _, name = key.partition(".")
        flags.setdefault(section, {})[name] = value
    whole = config.load(None, **flags)
    trainer = TorchTrainer(whole.model, whole.objective, whole.optimizer, whole.serve, whole.run.seed)
    ids = np.random.default_rng(0).integers(0, whole.model.num_tokens - 1, (rows, columns))
    masked = 0
    seconds: list[float] = []
    for step in range(1, steps + WARM + 1):
        began = time.perf_counter()
        result = trainer.train_step(1, step, Batch(ids, rows, columns), Modes())
        seconds.append(time.perf_counter() - began)
        masked += result.masked_tokens * (step > WARM)
    report(seconds[WARM:], masked / steps)


if __name__ == "__main__":
    main()
