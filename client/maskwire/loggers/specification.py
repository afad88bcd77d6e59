"""Open the logger that an argument of a command describes, such as `tensorboard:runs`."""

from __future__ import annotations

from collections.abc import Callable

from maskwire.loggers.csv_file import CsvFile
from maskwire.loggers.json_lines import JsonLines
from maskwire.loggers.logger import Logger
from maskwire.loggers.tensorboard import TensorBoard
from maskwire.loggers.trackio import Trackio
from maskwire.loggers.wandb import WandB

KINDS: dict[str, Callable[[str], Logger]] = {
    "jsonl": JsonLines,
    "csv": CsvFile,
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}
"""What `open_logger` accepts before the colon; after it comes a file, a folder or a project's name."""


def open_logger(specification: str) -> Logger:
    """Return the logger that KIND:PLACE describes. ValueError if it describes none."""
    kind, _, place = specification.partition(":")
    if kind not in KINDS or not place:
        raise ValueError(
            f"a log is KIND:PLACE with KIND one of {', '.join(KINDS)}, for example tensorboard:runs, got "
            f"{specification!r}"
        )
    return KINDS[kind](place)
