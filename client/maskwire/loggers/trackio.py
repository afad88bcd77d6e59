"""Logger for Trackio, which keeps curves on this machine. Needs the package `trackio`.

Each maskwire run becomes a trackio run whose name is the maskwire run's id. Each lineage after a restore
becomes another trackio run in the same group, with the lineage's number appended to the name.
"""

from __future__ import annotations

from typing import Any

from maskwire.loggers.logger import Logger, check_further, needs
from maskwire.loggers.records import Place, Record, is_evaluation, scalars
from maskwire.nonfatal_output import tell
from maskwire.signatures import refuse_unknown_keywords

_START = "start"
"""The name of a curve with one point, at the step after which a log begins."""
_SET_HERE = ("project", "name", "group", "resume")
"""The arguments of `trackio.init` that this logger sets."""


@refuse_unknown_keywords
class Trackio(Logger):
    """Logger that writes a run's curves to a trackio project. `trackio show --project NAME` shows them."""

    open_seconds = 120.0  # importing trackio takes seconds, and its server may be remote
    close_seconds = 60.0

    def __init__(self, project: str, **options: Any) -> None:
        """Log to a trackio project.

        project: The project's name.
        options: Further arguments of `trackio.init`, such as `space_id`.

        Raises ImportError if the package trackio is not installed, and TypeError for an unknown option.
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
        """The name of this log in messages."""
        return f"trackio {self._project}"

    def open(self, place: Place) -> Place | None:
        """Resume the trackio run of the newest lineage that has one, and return its last place.

        If no lineage has one, begins a trackio run and returns None.
        """
        try:
            return self._resume(place)
        except OSError as error:  # a network error: training can start without this logger
            raise RuntimeError(f"trackio failed: {error}; check the network and trackio's setup") from error

    def _resume(self, place: Place) -> Place | None:
        import trackio
        from trackio import run, utils

        for module in (trackio, run, utils):  # they print to stdout, which is for the command's result
            module.print = _tell
        try:
            names = {one.name for one in trackio.Api().runs(self._project)}
        except OSError:
            raise  # some network errors of huggingface_hub are also ValueErrors
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
        """Log the numbers of a record to trackio. A "restored" record begins another trackio run."""
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
        """Finish the trackio run: wait until all logged numbers are stored."""
        if self._run is not None:
            self._run.finish()

    def _begin(self, place: Place) -> Place | None:
        """Begin or resume the trackio run of a lineage. Returns its last place; None if it has no steps."""
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
    """Return the name of the trackio run that holds a lineage of a maskwire run."""
    return run_id if lineage == 1 else f"{run_id}-{lineage}"


def _tell(*words: object, **_: object) -> None:
    tell(" ".join(map(str, words)))
