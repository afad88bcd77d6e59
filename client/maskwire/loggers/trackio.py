"""Trackio, which keeps its curves on this machine. Needs the package `trackio`.

A maskwire run is a trackio run whose name is the run's id. Each lineage after a restore is another trackio
run in the same group, with the lineage's number appended to the name.
"""

from __future__ import annotations

from typing import Any

from maskwire.loggers.logger import Logger, check_further, needs
from maskwire.loggers.records import Place, Record, is_evaluation, scalars
from maskwire.nonfatal_output import tell
from maskwire.signatures import refuse_unknown_keywords

_START = "start"
"""A curve of one point, at the step after which a log begins."""
_SET_HERE = ("project", "name", "group", "resume")
"""The arguments of `trackio.init` that this logger sets."""


@refuse_unknown_keywords
class Trackio(Logger):
    """Writes the curves of a run to a trackio project, for `trackio show --project PROJECT`."""

    open_seconds = 120.0  # its import takes seconds, and a remote trackio server is reached over the network
    close_seconds = 60.0

    def __init__(self, project: str, **options: Any) -> None:
        """Log to a project.

        project: Its name.
        options: Further arguments of `trackio.init`, such as `space_id`.

        Raises ImportError without the package trackio, and TypeError for an unknown option.
        """
        needs("trackio", "trackio")
        if options:
            import trackio

            check_further("Trackio", options, trackio.init, _SET_HERE, ("project",))
        self._project, self._options = project, options
        self._run: Any = None
        self._evaluated = (0, 0)  # lineage and step

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"trackio {self._project}"

    def open(self, place: Place) -> Place | None:
        """Resume the trackio run of the newest lineage that has one, or begin one."""
        try:
            return self._resume(place)
        except OSError as error:  # a network error: training can start without this logger
            raise RuntimeError(f"trackio failed: {error}") from error

    def _resume(self, place: Place) -> Place | None:
        import trackio
        from trackio import run, utils

        for module in (trackio, run, utils):  # they print to stdout, where a command prints its result
            module.print = _tell
        try:
            names = {one.name for one in trackio.Api().runs(self._project)}
        except OSError:
            raise  # some of those of huggingface_hub are ValueErrors too
        except ValueError:  # no such project yet
            names = set()
        for lineage in range(place.lineage, 0, -1):
            if _name(place.run_id, lineage) in names:
                last = self._begin(Place(place.run_id, lineage, place.step))
                if last is not None:
                    return last
        self._begin(place)
        return None

    def write(self, record: Record) -> None:
        """Log the numbers of a record at its step."""
        place = Place(record["run_id"], record["lineage"], record["step"])
        if record.get("event") == "restored":
            self._run.finish()
            self._begin(place)
        if is_evaluation(record):
            if self._evaluated == place.order:
                return
            self._evaluated = place.order
        if numbers := scalars(record):
            self._run.log(numbers, step=place.step)

    def close(self) -> None:
        """Finish the run: wait until what was logged is stored."""
        if self._run is not None:
            self._run.finish()

    def _begin(self, place: Place) -> Place | None:
        """Begin or resume the run of a lineage; return its last place if it has one."""
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        name = _name(place.run_id, place.lineage)
        options = {"auto_log_cpu": False, "auto_log_gpu": False, "embed": False, **self._options}
        self._run = trackio.init(self._project, name=name, group=place.run_id, resume="allow", **options)
        step = self._run._next_step - 1
        if step < 0:
            self._run.log({_START: place.step}, step=place.step)
            return None
        if SQLiteStorage.get_metric_values(self._project, name, "eval/bits_per_token", step=step):
            self._evaluated = (place.lineage, step)
        return Place(place.run_id, place.lineage, step)


def _name(run_id: str, lineage: int) -> str:
    """The name of a lineage's run."""
    return run_id if lineage == 1 else f"{run_id}-{lineage}"


def _tell(*words: object, **_: object) -> None:
    tell(" ".join(map(str, words)))
