"""A real server process around the counter trainer: no torch, slow on request.

python counting_server.py SECONDS_A_STEP [--hold=PATH] [--fail=PLACE:KIND:NUMBER[:PATH]] [--hang=METHOD]
    --set=SECTION.KEY=VALUE …

--hold: while PATH exists, a step that has begun waits. The log tells when a step arrives and when it begins.
--hang: eval_loss, generate or snapshot never ends, after the start; what may compile kernels first gets no
    longer than serve.step_timeout_seconds.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from counter import CounterSnapshot, CounterTrainer
from faults import Fault

from maskwire_server import config, failpoints
from maskwire_server.app import serve
from maskwire_server.batch import Prompts
from maskwire_server.engine import step_timeout
from maskwire_server.results import EvalResult, GenerateOptions, GenerationState, StepResult


class SlowTrainer(CounterTrainer):
    seconds = 0.0
    hold_file: Path | None = None
    hanging = ""

    def train_step(self, lineage: int, step: int, *arguments: Any) -> StepResult:
        logging.info("a step begins: %d", step)
        while self.hold_file is not None and self.hold_file.exists():
            time.sleep(0.002)
        time.sleep(self.seconds)
        return super().train_step(lineage, step, *arguments)

    def eval_loss(self, *arguments: Any) -> EvalResult:
        self.hang("eval_loss")
        return super().eval_loss(*arguments)

    def snapshot(self) -> CounterSnapshot:
        if self.trained:  # not checkpoint 0
            self.hang("snapshot")
        return super().snapshot()

    def hang(self, method: str) -> None:
        if method == self.hanging:
            threading.Event().wait()

    def generate(
        self, prompts: Prompts, options: GenerateOptions, wanted: Callable[[], bool] = lambda: True
    ) -> Iterator[GenerationState]:
        self.hang("generate")
        for state in super().generate(prompts, options, wanted):
            time.sleep(self.seconds)
            logging.info("generation pass %d", state.unmasking_step)
            yield state


def tell_arrivals(place: str) -> None:
    if place == "step.admitted":
        logging.info("a step arrives")


def main() -> int:
    logging.basicConfig(level=logging.INFO)
    SlowTrainer.seconds = float(sys.argv[1])
    flags: dict[str, dict[str, str]] = {}
    for argument in sys.argv[2:]:
        if argument.startswith("--fail="):
            Fault.parse(argument.removeprefix("--fail=")).install()
            continue
        if argument.startswith("--hang="):
            SlowTrainer.hanging = argument.removeprefix("--hang=")
            step_timeout.LEAST_SECONDS = 0.0
            continue
        if argument.startswith("--hold="):
            SlowTrainer.hold_file = Path(argument.removeprefix("--hold="))
            failpoints.install(tell_arrivals)
            continue
        key, _, value = argument.removeprefix("--set=").partition("=")
        section, _, name = key.partition(".")
        flags.setdefault(section, {})[name] = value
    return serve(config.load(None, **flags), factory=lambda _: SlowTrainer())


if __name__ == "__main__":
    sys.exit(main())
