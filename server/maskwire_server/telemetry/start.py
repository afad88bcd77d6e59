"""Starts the telemetry that the settings request."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from maskwire.v1 import tracing
from maskwire.v1.values import TokenizerDescription
from maskwire_server.config import TelemetryConfig
from maskwire_server.errors import ConfigError
from maskwire_server.events import Subscriber
from maskwire_server.run_status import RunStatus
from maskwire_server.telemetry import log_formats
from maskwire_server.telemetry.metrics import Reading
from maskwire_server.telemetry.sample_text import decoder

log = logging.getLogger(__name__)


class Sources:
    """Reads the data about the run and the server's machine that telemetry needs."""

    def __init__(
        self,
        run_dir: Path,
        journal_file: str,
        tokenizer_folder: str,
        status: Callable[[], RunStatus],
        device_memory: Callable[[], Mapping[str, int]],
        tokenizer_of_data: Callable[[], TokenizerDescription | None],
    ) -> None:
        self.run_dir = run_dir
        self.status = status
        self._journal_file = journal_file
        self._tokenizer = run_dir / tokenizer_folder
        self._device_memory = device_memory
        self._tokenizer_of_data = tokenizer_of_data

    def read(self) -> Reading:
        """Read the data for all metrics."""
        return Reading(self.status(), self._journal_bytes(), self._free_bytes(), self._memory())

    def decoder(self) -> Callable[[Sequence[int]], str]:
        """Return a function that decodes ids of the run to text."""
        return decoder(self.status().model, self._tokenizer, self._tokenizer_of_data)

    def _journal_bytes(self) -> int | None:
        """The size of the journal's database and its write-ahead log, in bytes; None if it cannot be read."""
        try:
            return sum(path.stat().st_size for path in self.run_dir.glob(f"{self._journal_file}*"))
        except OSError:
            return None

    def _memory(self) -> Mapping[str, int]:
        try:
            return self._device_memory()
        except RuntimeError:  # the device has failed; the process is about to exit
            return {}

    def _free_bytes(self) -> int | None:
        try:
            found = os.statvfs(self.run_dir)
        except OSError:
            return None
        return found.f_bavail * found.f_frsize


def start(config: TelemetryConfig, sources: Sources, subscribe: Callable[[Subscriber], None]) -> None:
    """Start the configured telemetry, which runs until the process ends. Raises ConfigError."""
    log_formats.show_run(sources.status)
    if config.tensorboard:
        require("tensorboard", "tensorboard")
        from maskwire_server.telemetry.tensorboard_files import TensorBoardFiles

        subscribe(TensorBoardFiles(sources.run_dir, sources.decoder))
    if tracing.configured():
        if missing := tracing.missing():
            log.warning("%s; no step is traced", missing)
        else:
            from maskwire_server.telemetry.traces import Traces

            subscribe(Traces(tracing.exporting_provider("maskwire-server")))
    if config.metrics_address is not None:
        require("metrics_address", "prometheus_client")
        from maskwire_server.telemetry.prometheus import serve_metrics

        serve_metrics(config.metrics_address, sources.read)


def require(setting: str, package: str) -> None:
    """Raise ConfigError unless the package that a setting needs is installed."""
    if find_spec(package) is None:
        raise ConfigError(
            f"telemetry.{setting}: needs the package {package}, which is not installed; install it with: "
            'pip install "maskwire[telemetry]"'
        )
