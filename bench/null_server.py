"""A maskwire server whose trainer does nothing.

python -m bench.null_server RUN_DIR [STRETCHES_FILE] [--set=SECTION.KEY=VALUE …]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.stretches import Stretches
from maskwire.v1.values import Losses, ModelInfo, Outcome
from maskwire_server import config
from maskwire_server.app import serve
from maskwire_server.batch import Batch, Modes, Prompts
from maskwire_server.cli import options
from maskwire_server.results import EvalOptions, EvalResult, GenerateOptions, GenerationState, StepResult


class NullSnapshot:
    """No state."""

    def write(self, folder: Path) -> None:
        (folder / "state.json").write_text(json.dumps({}))


class NullTrainer:
    """Consumes steps and keeps nothing."""

    read_tokens = 2**26

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(257, 256, None, 4096, 0, "nothing", False, False)

    @property
    def versions(self) -> dict[str, str]:
        return {"device": "none"}

    def begin(self) -> str:
        return ""

    def configure(self, optimizer: dict[str, object], numerics_version: int) -> None:
        pass

    def usable_after(self, error: BaseException) -> bool:  # noqa: ARG002
        return True

    def use_threads(self, count: int) -> None:
        pass

    def warm_up(self) -> None:
        pass

    def prepare_step(self, lineage: int, step: int, batch: Batch, modes: Modes) -> None:
        pass

    def train_step(self, *arguments: object) -> StepResult:  # noqa: ARG002
        return StepResult(Outcome.APPLIED, Losses(1.0, 1.0), 1.0)

    def eval_loss(self, batch: Batch, options: EvalOptions, wanted: Callable[[], bool]) -> EvalResult:
        raise NotImplementedError

    def generate(
        self, prompts: Prompts, options: GenerateOptions, wanted: Callable[[], bool]
    ) -> Iterator[GenerationState]:
        raise NotImplementedError

    def snapshot(self) -> NullSnapshot:
        return NullSnapshot()

    def load(self, folder: Path) -> None:
        pass


if __name__ == "__main__":
    paths = [argument for argument in sys.argv[1:] if not argument.startswith("--set=")]
    flags: dict[str, dict[str, str]] = {"run": {"dir": paths[0]}, "serve": {"address": "127.0.0.1:0"}}
    for setting in sys.argv[1:]:
        if setting.startswith("--set="):
            key, _, value = setting.removeprefix("--set=").partition("=")
            section, _, name = key.partition(".")
            flags.setdefault(section, {})[name] = value
    chosen = config.load(None, **flags)
    options.start_log("info", chosen.telemetry.log_format)
    stretches = Stretches()
    if len(paths) > 1:
        stretches.install()
    code = serve(chosen, factory=lambda _: NullTrainer())
    if len(paths) > 1:
        stretches.write(Path(paths[1]))
    sys.exit(code)
