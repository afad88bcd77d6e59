"""A real server process around the counter trainer: no torch, slow on request.

python counting_server.py SECONDS_A_STEP [--hold=PATH] [--fail=PLACE:KIND:NUMBER[:PATH]]
    --set=SECTION.KEY=VALUE …

--hold: while PATH exists, a step that has begun waits. The log tells when a step arrives and when it begins.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from counter import CounterTrainer
from faults import Fault

from maskwire_server import config, failpoints
from maskwire_server.app import serve
from maskwire_server.batch import Batch, Modes, Prompts
from maskwire_server.results import GenerateOptions, GenerationState, StepResult


class SlowTrainer(CounterTrainer):
    seconds = 0.0
    hold_file: Path | None = None

    def train_step(self, lineage: int, step: int, batch: Batch, modes: Modes) -> StepResult:
        logging.info("a step begins: %d", step)
        while self.hold_file is not None and self.hold_file.exists():
            time.sleep(0.002)
        time.sleep(self.seconds)
        return super().train_step(lineage, step, batch, modes)

    def generate(self, prompts: Prompts, options: GenerateOptions) -> Iterator[GenerationState]:
        for state in super().generate(prompts, options):
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
