"""The trainer without a server: python -m bench.inprocess STEPS ROWS COLUMNS SECTION.KEY=VALUE …

With batch.rows=ragged, rows have 1 to COLUMNS tokens; with `packed`, the same rows are the documents of
packed rows; with `padded`, they are padded to COLUMNS and computed in one part. Prints JSON: steps per
second, the same of the median step, the peak of resident memory in MiB, the masked positions per step, and
the tokens per batch.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from bench.harness import WARM, report
from maskwire_server import config
from maskwire_server.batch import Batch, Modes
from maskwire_server.training.tensor_batch import TensorBatch
from maskwire_server.training.trainer import TorchTrainer


def main() -> None:
    """Train on one batch, over and over."""
    steps, rows, columns = map(int, sys.argv[1:4])
    flags: dict[str, dict[str, Any]] = {}
    for setting in sys.argv[4:]:
        key, _, value = setting.partition("=")
        section, _, name = key.partition(".")
        flags.setdefault(section, {})[name] = value
    kind = flags.pop("batch", {}).get("rows", "full")
    if kind == "padded":
        flags.setdefault("serve", {})["micro_batch_tokens"] = rows * columns
    whole = config.load(None, **flags)
    trainer = TorchTrainer(whole.model, whole.objective, whole.optimizer, whole.serve, whole.run.seed)
    batch = make_batch(kind, rows, columns, whole.model.num_tokens - 1)
    if kind == "padded":
        TensorBatch.lengths = property(lambda _: [columns] * rows)  # type: ignore[assignment]
    masked = 0
    seconds: list[float] = []
    for step in range(1, steps + WARM + 1):
        began = time.perf_counter()
        result = trainer.train_step(1, step, batch, Modes())
        seconds.append(time.perf_counter() - began)
        masked += result.masked_tokens * (step > WARM)
    report(seconds[WARM:], masked / steps, tokens=batch.tokens)


def make_batch(kind: str, rows: int, columns: int, top: int) -> Batch:
    """A batch of random ids below `top`."""
    random = np.random.default_rng(0)
    if kind == "full":
        return Batch(random.integers(0, top, (rows, columns)), rows, columns)
    lengths = random.integers(1, columns + 1, rows).astype(np.int32)
    lengths[0] = columns
    ids = random.integers(0, top, int(lengths.sum()))
    if kind != "packed":
        return Batch(ids, rows, columns, lengths)
    filled: list[int] = []  # tokens of each packed row; documents stay in order
    numbers: list[int] = []
    for length in lengths.tolist():
        if filled and filled[-1] + length <= columns:
            filled[-1] += length
            numbers += [numbers[-1] + 1] * length
        else:
            filled.append(length)
            numbers += [0] * length
    segments = np.array(numbers, dtype=np.int32)
    return Batch(ids, len(filled), columns, np.array(filled, dtype=np.int32), segment_ids=segments)


if __name__ == "__main__":
    main()
