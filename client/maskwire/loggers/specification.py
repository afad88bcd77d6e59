"""Create the logger that a command-line argument such as `tensorboard:runs` describes."""

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
"""What `open_logger` accepts before the colon. A file, a folder or a project's name follows the colon."""


def open_logger(specification: str) -> Logger:
    """Return the logger that KIND:PLACE, such as `csv:a.csv`, describes. Raises ValueError if invalid."""
    kind, _, place = specification.partition(":")
    if kind not in KINDS or not place:
        raise ValueError(
            f"a log must be KIND:PLACE, where KIND is one of {', '.join(KINDS)}, for example "
            f"tensorboard:runs; got {specification!r}"
        )
    return KINDS[kind](place)
