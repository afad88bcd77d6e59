"""Progress output of training, and loggers that record a run's history."""

from maskwire.loggers.csv_file import CsvFile
from maskwire.loggers.json_lines import JsonLines
from maskwire.loggers.logger import Logger
from maskwire.loggers.tensorboard import TensorBoard
from maskwire.loggers.trackio import Trackio
from maskwire.loggers.wandb import WandB

__all__ = ["CsvFile", "JsonLines", "Logger", "TensorBoard", "Trackio", "WandB"]
