"""Where the time of a step goes in the server: the stretches between the points that a step passes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from maskwire_server import failpoints
from maskwire_server.rpc.service import TrainingService

SKIPPED = 100  # steps, until caches and pools are warm
STRETCHES = {
    "step.admitted": "decode, hash",
    "step.computing": "admit, hand over to the executor",
    "step.consumed": "compute nothing, extend the digest",
    "journal.begin": "hand over to the committer",
    "journal.written": "insert",
    "journal.committed": "commit and flush",
    "step.answered": "set the answer",
    "response": "hand over to the gRPC worker, encode",
}
"""The stretches, by the point at which each ends."""


class Stretches:
    """Records when each step passes each point. Steps must come one at a time."""

    def __init__(self) -> None:
        self._steps: list[dict[str, float]] = []
        self._cpu: list[float] = []

    def install(self) -> None:
        """Watch this process's server."""
        train_step = TrainingService.TrainStep

        def watched(service: TrainingService, request: Any, context: Any) -> Any:
            self._steps.append({"request": time.perf_counter()})
            response = train_step(service, request, context)
            self._note("response")
            self._cpu.append(time.process_time())
            return response

        TrainingService.TrainStep = watched  # type: ignore[assignment,method-assign]
        failpoints.install(self._note)

    def _note(self, place: str) -> None:
        if self._steps:
            self._steps[-1].setdefault(place, time.perf_counter())

    def write(self, path: Path) -> None:
        """Write the median of each stretch in milliseconds, and the process's CPU time per step."""
        steps = [step for step in self._steps[SKIPPED:] if STRETCHES.keys() <= step.keys()]
        found, start = {}, "request"
        for end, words in STRETCHES.items():
            found[words] = 1e3 * median(step[end] - step[start] for step in steps)
            start = end
        cpu = self._cpu[SKIPPED:]
        path.write_text(json.dumps({"ms": found, "cpu_ms": 1e3 * (cpu[-1] - cpu[0]) / (len(cpu) - 1)}))
