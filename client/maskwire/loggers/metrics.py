"""The metrics file: one JSON object per line, each with its run, lineage and step.

A job that is killed can leave a partial line, and steps that were applied but whose answers it never saw. The
next job that writes the file repairs the line and fetches those steps from the server.
"""

from __future__ import annotations

import json
import math
import os
import stat
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from maskwire.errors import UnimplementedError
from maskwire.nonfatal_output import LineFile
from maskwire.results import EvalResult, Losses, RecordedStep, StepResult, StepsPage

_BLOCK = 2**20  # bytes at the end of the file that are searched for the last step
_LONGEST_LINE = 4096  # bytes
_PAGE = 250  # the most steps that a server returns
_FIRST = (1, 0)  # lineage and step at which a run starts


@dataclass(frozen=True)
class Place:
    """A position in a run's history."""

    run_id: str
    lineage: int
    step: int


class Metrics:
    """A metrics file, open for appending. Raises ValueError if the file contains something else."""

    def __init__(self, path: str | Path) -> None:
        self._last: dict[str, Any] = {}
        self._emptied = ended = False
        if Path(path).exists() and stat.S_ISREG(Path(path).stat().st_mode):
            with Path(path).open("r+b") as file:
                self._last, ended = _repair(file, path)
                self._emptied = not file.seek(0, os.SEEK_END)
        self._file = LineFile(path)
        if ended:
            self._file.write(b"\n")

    @property
    def failure(self) -> str:
        """Why lines are missing; empty: none is missing."""
        return self._file.failure

    def write(self, line: dict[str, Any]) -> None:
        """Append a line."""
        self._file.write(json.dumps(line).encode() + b"\n")

    def write_evaluation(self, line: dict[str, Any]) -> None:
        """Append an evaluation, unless the file ends with it: its job was stopped just after writing it."""
        if any(self._last.get(key) != line[key] for key in ("run_id", "lineage", "step")) or (
            "eval_bits_per_token" not in self._last
        ):
            self.write(line)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def catch_up(self, trainer: Any) -> Generator[Callable[[], Any], Any, None]:
        """Append the lines missing up to the trainer's step. Yields calls of the trainer, as `fit` does.

        Lines with an `event` mark the step at which the file starts ("started") and those at which a new
        lineage starts ("restored").
        """
        here = Place(trainer.run_id, trainer.lineage, trainer.step)
        try:
            last = yield from self._last_place(trainer)
            if last is not None and last.run_id == here.run_id and _order(last) <= _order(here):
                yield from self._fill(trainer, last, here)
                return
        except UnimplementedError:
            pass  # an older server does not list steps
        if self._last or _order(here) != _FIRST:  # a file without this line starts where the run does
            self.write(
                {**vars(here), "event": "started", "digest": trainer.digest.hex(), "time": time.time()}
            )

    def _last_place(self, trainer: Any) -> Generator[Callable[[], Any], StepsPage, Place | None]:
        """The file's last step; None if the file does not say."""
        line = self._last
        if self._emptied:  # a job that started with the run was stopped before its first line
            return Place(trainer.run_id, *_FIRST)
        if {"run_id", "lineage"} <= line.keys():
            return Place(str(line["run_id"]), int(line["lineage"]), int(line["step"]))
        step = int(line.get("step", 0))
        if not step:
            return None
        # Lines of older versions do not name the run; the digest tells whether it is this one.
        page = yield partial(trainer.steps_page, first_step=step, last_step=step)
        known = [recorded.digest.hex() for recorded in page.steps]
        return Place(page.run_id, page.lineage, step) if known == [line["digest"]] else None

    def _fill(self, trainer: Any, last: Place, here: Place) -> Generator[Callable[[], Any], StepsPage, None]:
        if last == here:
            return
        for lineage in range(last.lineage, here.lineage + 1):
            first = last.step + 1 if lineage == last.lineage else 0
            through = here.step if lineage == here.lineage else 0
            token = ""
            while True:
                page = yield partial(
                    trainer.steps_page, page_size=_PAGE, page_token=token, run_id=here.run_id,
                    lineage=lineage, first_step=first, last_step=through,
                )  # fmt: skip
                if lineage > last.lineage and not token:
                    self.write(_restored_line(page))
                for step in page.steps:
                    self.write(_recorded_line(here.run_id, step))
                token = page.next_page_token
                if not token:
                    break


def step_line(run_id: str, lineage: int, answer: StepResult, tokens: int) -> dict[str, Any]:
    """Return the line of a step. Numbers that are not finite become null."""
    return {
        "run_id": run_id,
        "lineage": lineage,
        "step": answer.step,
        **_losses(answer.losses),
        **_finite(
            gradient_norm=answer.metrics.gradient_norm,
            learning_rate=answer.metrics.learning_rate,
            compute_seconds=answer.metrics.compute_seconds,
        ),
        "tokens": tokens,
        "outcome": answer.outcome.name,
        "digest": answer.digest.hex(),
        "time": time.time(),
    }


def evaluation_line(run_id: str, lineage: int, found: EvalResult) -> dict[str, Any]:
    """Return the line of an evaluation."""
    error = found.standard_error
    return {
        "run_id": run_id,
        "lineage": lineage,
        "step": found.step,
        "eval_bits_per_token": found.bits_per_token,
        "eval_standard_error_bits": None if error is None else error / math.log(2),
        "time": time.time(),
    }


def _recorded_line(run_id: str, step: RecordedStep) -> dict[str, Any]:
    """The line of a step whose answer was never seen. What the server does not record is null."""
    return {
        "run_id": run_id,
        "lineage": step.lineage,
        "step": step.step,
        **_losses(step.losses),
        **_finite(gradient_norm=step.gradient_norm, learning_rate=None, compute_seconds=None),
        "tokens": None,
        "outcome": step.outcome.name,
        "digest": step.digest.hex(),
        "time": None,
        "filled_in": True,
    }


def _restored_line(page: StepsPage) -> dict[str, Any]:
    """The line that marks the start of a lineage."""
    return {
        "run_id": page.run_id,
        "lineage": page.lineage,
        "step": page.start_step,
        "event": "restored",
        "parent_lineage": page.parent_lineage,
        "checkpoint": page.checkpoint or None,
        "time": time.time(),
    }


def _losses(losses: Losses) -> dict[str, float | None]:
    return _finite(loss=losses.loss, generator_loss=losses.generator_loss, critic_loss=losses.critic_loss)


def _finite(**numbers: float | None) -> dict[str, float | None]:
    return {k: v if v is not None and math.isfinite(v) else None for k, v in numbers.items()}


def _order(place: Place) -> tuple[int, int]:
    return place.lineage, place.step


def _repair(file: IO[bytes], path: str | Path) -> tuple[dict[str, Any], bool]:
    """Remove a partial last line. A file that contains something else is left unchanged.

    Returns the last line with a step, or {}, and whether the last line lacks only its newline.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _BLOCK))
    whole, newline, torn = file.read().rpartition(b"\n")
    unended = bool(torn) and _object(torn) is not None
    if unended:
        whole += newline + torn
    lines = [line for line in whole.splitlines() if line.strip(b" \r\0")]
    if lines:
        _require("step" in (_object(lines[-1]) or {}), path, lines[-1])
    if torn and not unended:
        # A full disk or a power loss leaves the beginning of a line, or zeros. If it is all that the file
        # has, it must be the beginning of one of our lines, or as short as one.
        ours = torn.startswith((b'{"run_id": ', b'{"step": ')) or b'{"run_id": '.startswith(torn)
        zeros = not torn.strip(b"\0")
        known = torn.startswith(b"{") or zeros if lines else ours or (zeros and size < _LONGEST_LINE)
        _require(known, path, torn)
        file.truncate(size - len(torn))
    for line in _objects(reversed(lines)):
        if "step" in line and ("run_id" in line or "digest" in line):
            return line, unended
    return {}, unended


def _objects(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    return (found for line in lines if (found := _object(line)) is not None)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _require(holds: bool, path: str | Path, line: bytes) -> None:
    if not holds:
        raise ValueError(f"{path} is not a metrics file: its last line is {line[:40]!r}; choose another file")
