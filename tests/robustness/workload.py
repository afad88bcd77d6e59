"""What is traced for `power_loss`: steps, checkpoints and their collection, each answer written down.

python -m robustness.workload FOLDER [BUG]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from rig import make_engine, wait_for
from robustness.damage import WAIT, payload

from maskwire_server import config
from maskwire_server.journal import reserve
from maskwire_server.requests import SaveRequest, StepRequest

STEPS = 10
CONFIG = config.load(
    None, serve={"reserve_bytes": 0}, checkpoints={"every_steps": 2, "keep_last": 2, "keep_best": 0}
)


def main() -> None:
    folder = Path(sys.argv[1])
    if len(sys.argv) > 2:
        from robustness.planted import BUGS

        BUGS[sys.argv[2]].plant()
    reserve.MERGE_BYTES = 40 * 2**10
    engine = make_engine(folder / "run", CONFIG, on_fatal=lambda _: os._exit(70))
    engine.wait_serving(WAIT)
    acknowledged = os.open(folder / "acknowledged", os.O_WRONLY | os.O_CREAT)
    for step in range(1, STEPS + 1):
        answer = engine.train_step(StepRequest(payload(step), request_id=f"request-{step}")).result(WAIT)
        os.write(acknowledged, json.dumps([answer.step, answer.digest.hex()]).encode() + b"\n")
        if step == 5:
            info = engine.save(SaveRequest("named")).result(WAIT)
            os.write(acknowledged, json.dumps([info.name]).encode() + b"\n")
        elif step != 4:  # there, steps and a save at once
            wait_for(lambda: not engine._saves.busy)
    engine.close()


if __name__ == "__main__":
    main()
