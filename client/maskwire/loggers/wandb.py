"""Logger for Weights & Biases (W&B). Needs the package `wandb`.

Each maskwire run becomes a W&B run with the same id. Each lineage after a restore becomes another W&B run in
the same group, with the lineage's number appended to the id. The step in W&B is the training step.

Without a network, set `mode="offline"` (or WANDB_MODE=offline) and upload later with `wandb sync`.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any, Literal

from maskwire.loggers.logger import Logger, check_further, needs
from maskwire.loggers.records import Place, Record, is_evaluation, scalars
from maskwire.loggers.wandb_offline_reader import LINEAGE, START, is_finished, offline_log
from maskwire.signatures import refuse_unknown_keywords

_POLL_SECONDS = 0.05
_SET_HERE = ("project", "id", "group", "resume", "reinit", "mode", "dir", "settings")
"""The arguments of `wandb.init` that this logger sets."""


@refuse_unknown_keywords
class WandB(Logger):
    """Logger that writes a run's curves to a project of Weights & Biases."""

    open_seconds = 120.0  # it starts a process, and uses the network
    close_seconds = 60.0

    def __init__(
        self,
        project: str,
        *,
        mode: Literal["online", "offline"] | None = None,
        folder: str | Path | None = None,
        **options: Any,
    ) -> None:
        """Log to a W&B project.

        project: The project's name.
        mode: "online" or "offline"; None: the mode in W&B's own settings, such as WANDB_MODE.
        folder: The folder in which W&B creates its own folder `wandb`; None: the one in W&B's settings.
        options: Further arguments of `wandb.init`, such as `entity`, `name`, `tags` or `config`.

        Raises ImportError if the package wandb is not installed, ValueError for an unknown mode, and
        TypeError for an unknown option.
        """
        needs("wandb", "wandb")
        if mode not in (None, "online", "offline"):
            raise ValueError(f"mode must be 'online', 'offline' or None, got {mode!r}")
        if options:
            import wandb

            check_further("WandB", options, wandb.init, _SET_HERE, ("project", "mode", "folder"))
        self._project, self._mode, self._options = project, mode, options
        self._folder = None if folder is None else Path(folder)
        self._run: Any = None
        self._evaluated = (0, 0)  # lineage and step

    @property
    def label(self) -> str:
        """The name of this log in messages."""
        return f"wandb {self._project}"

    def open(self, place: Place) -> Place | None:
        """Resume the W&B run of the newest lineage, and return its last place.

        If there is none, begins a W&B run and returns None.
        """
        import wandb

        settings = wandb.setup().settings
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except FileExistsError as error:  # a file, and not a folder
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from None
        if (self._mode or settings.mode) == "offline":
            found = offline_log(_folder_of(self._folder or Path(settings.root_dir)), place.run_id)
            if found is None:
                self._begin(place)
                return None
            self._begin(found.place)
            self._evaluated = found.place.order if found.evaluated else (0, 0)
            return found.place
        self._begin(place)
        if not self._run.resumed:
            return None
        last = max(self._run.starting_step - 1, int(self._run.config.get(START, 0)))
        return Place(place.run_id, place.lineage, last)

    def write(self, record: Record) -> None:
        """Log the numbers of a record to W&B. A "restored" record begins another W&B run."""
        place = Place(record["run_id"], record["lineage"], record["step"])
        if record.get("event") == "restored":
            self._finish()
            self._begin(place)
        numbers: dict[str, Any] = scalars(record)
        if is_evaluation(record):
            if self._evaluated == place.order:
                return
            self._evaluated = place.order
        if numbers:
            self._run.log(numbers, step=place.step)

    def close(self) -> None:
        """Finish the W&B run: wait until it is uploaded, or written to disk in offline mode."""
        if self._run is not None:
            self._finish()

    def _finish(self) -> None:
        self._run.finish()
        folder = Path(self._run.dir).parent
        deadline = time.monotonic() + self.close_seconds
        # W&B's process may still be writing, and the next call of `fit` reads what it wrote.
        while self._run.offline and time.monotonic() < deadline and not is_finished(folder):
            time.sleep(_POLL_SECONDS)

    def _begin(self, place: Place) -> None:
        """Begin or resume the W&B run of a lineage."""
        import wandb

        settings = wandb.Settings(
            console="off",  # it would replace stdout
            disable_git=True,
            save_code=False,
            reinit="create_new",  # leaves the program's own W&B run alone
        )
        try:
            self._run = wandb.init(
                project=self._project,
                id=_name(place),
                group=place.run_id,
                resume="allow",
                mode=self._mode,
                dir=self._folder,
                settings=settings,
                **self._options,
            )
        except OSError as error:  # a network error: training can start without this logger
            raise RuntimeError(
                f"wandb.init failed: {error}; check the network, or log with mode='offline' and upload later "
                "with `wandb sync`"
            ) from error
        if not self._run.resumed:
            self._run.config.update({"run_id": place.run_id, "lineage": place.lineage, START: place.step})


def _name(place: Place) -> str:
    """Return the id of the W&B run that holds a lineage of a maskwire run."""
    return place.run_id if place.lineage == 1 else f"{place.run_id}{LINEAGE}{place.lineage}"


def _folder_of(root: Path) -> Path:
    """Return the folder in `root` in which W&B keeps its files: `.wandb` if it exists, or `wandb`."""
    hidden = root / ".wandb"
    return hidden if hidden.exists() else root / "wandb"
