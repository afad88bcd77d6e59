"""Calls the callbacks of a training loop. Training continues if a callback fails."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from maskwire.arguments import call_back, check_function
from maskwire.callbacks import HOOKS, StopTraining
from maskwire.errors import MaskwireError
from maskwire.loggers.logger import Logger
from maskwire.loggers.progress import TrainingProgress, warn
from maskwire.protocol.fit_actions import Fitting
from maskwire.protocol.fit_result import FitResult
from maskwire.results import CheckpointInfo, EvalResult, StepResult

log = logging.getLogger(__name__)

_NEAR = 0.8  # how similar a method's name must be to a hook's to count as mistyped


@dataclass(eq=False)
class _Entry:
    """A callback, the name that messages give it, and whether it is still called."""

    callback: Any
    name: str
    required: bool
    """Whether an error of the callback ends `fit`."""
    failed: bool = False
    stopped: bool = False
    """Whether the callback raised StopTraining: its `on_step` is not called again."""


class Callbacks:
    """The callbacks of one call of `fit`, which are called in their order."""

    def __init__(
        self,
        trainer: Any,
        result: FitResult,
        progress: TrainingProgress,
        callbacks: Sequence[Any],
        on_step: Callable[[StepResult], object] | None,
    ) -> None:
        self._trainer, self._result, self._progress = trainer, result, progress
        self._entries = [_Entry(one, type(one).__name__, required=False) for one in callbacks]
        if on_step is not None:
            self._entries.append(_Entry(_OnStep(on_step), "", required=True))
        self._stop: StopTraining | None = None
        self._ended = False
        self.stopping = False
        """Whether `fit` is ending: another StopTraining is ignored."""

    def start(self) -> Fitting[None]:
        """Call `on_start` of every callback, before the first step."""
        yield from self._call_all("on_start", self._trainer)
        self.raise_stop()

    def step(self, answer: StepResult) -> Fitting[None]:
        """Call `on_step` of every callback, after a step."""
        for entry in self._entries:
            if not entry.stopped:
                yield from self._call(entry, "on_step", answer)
        self.raise_stop()

    def evaluated(self, found: EvalResult) -> Fitting[None]:
        """Call `on_evaluate` of every callback, after an evaluation.

        Does not raise StopTraining: the caller calls `raise_stop` once the evaluation is marked as finished.
        """
        yield from self._call_all("on_evaluate", found)

    def saved(self, info: CheckpointInfo) -> Fitting[None]:
        """Report a saved checkpoint, and call `on_checkpoint` of every callback."""
        self._progress.say(f"step {self._result.step}: checkpoint {info.name}")
        yield from self._call_all("on_checkpoint", info)

    def end(self) -> Fitting[None]:
        """Call `on_end` of every callback. Errors are only reported, so that `fit` returns its result."""
        self.stopping = self._ended = True
        yield from self._call_all("on_end", self._result)

    def raise_stop(self) -> None:
        """Raise the StopTraining that a callback raised. Called once the other callbacks were called too."""
        stop, self._stop = self._stop, None
        if stop is not None and not self.stopping:
            self.stopping = True
            raise stop

    def _call_all(self, hook: str, argument: object) -> Fitting[None]:
        for entry in self._entries:
            yield from self._call(entry, hook, argument)

    def _call(self, entry: _Entry, hook: str, argument: object) -> Fitting[None]:
        """Call the method `hook` of a callback, unless it has no such method or has failed before."""
        method = getattr(entry.callback, hook, None)
        if method is None or entry.failed:
            return
        name = f"{entry.name}.{hook}" if entry.name else hook
        try:
            found = yield partial(call_back, name, method, argument)
            if inspect.isgenerator(found):  # a callback of this package, for both clients
                found = yield from found
        except StopTraining as stop:
            entry.stopped = True
            self._stop = self._stop or stop
        except Exception as error:
            # A MaskwireError concerns the run and not the callback.
            if entry.required or (isinstance(error, MaskwireError) and not self._ended):
                raise
            entry.failed = True
            self._report(name, error)
        else:
            if isinstance(found, CheckpointInfo) and hook != "on_checkpoint":
                yield from self.saved(found)

    def _report(self, name: str, error: Exception) -> None:
        words = (
            f"{name} raised {type(error).__name__}: {error}; this callback is not called again, and "
            "training continues"
        )
        self._result.failures.append(words)
        warn(self._progress, words)
        log.warning("%s failed at step %d", name, self._result.step, exc_info=error)


class _OnStep:
    """A callback that calls the function passed to `fit` as `on_step`."""

    def __init__(self, function: Callable[[StepResult], object]) -> None:
        self.on_step = function


def check_callbacks(callbacks: Iterable[Any], *, awaited: bool) -> list[Any]:
    """Return the callbacks as a list. Raises TypeError for other objects, naming what was probably meant.

    If `awaited` is True, the methods may be coroutine functions.
    """
    if not isinstance(callbacks, Iterable) or isinstance(callbacks, str | bytes):
        raise TypeError(
            f"callbacks must be a list of objects, got {type(callbacks).__name__}: write [callback]"
        )
    found = list(callbacks)
    for position, callback in enumerate(found):
        where = f"callbacks[{position}]"
        if isinstance(callback, Logger):
            continue
        if isinstance(callback, type):
            raise TypeError(
                f"{where} is the class {callback.__name__}: pass an object, {callback.__name__}()"
            )
        if inspect.isroutine(callback):
            raise TypeError(f"{where} is a function: pass it as on_step=, or make it a method of an object")
        known = [hook for hook in HOOKS if callable(getattr(callback, hook, None))]
        others = [name for name in dir(callback) if name.startswith("on_") and name not in HOOKS]
        for name in others:
            near = difflib.get_close_matches(name, HOOKS, n=1, cutoff=_NEAR)
            if near and near[0] not in known:
                raise TypeError(
                    f"{where}, a {type(callback).__name__}, has a method {name!r}, which is never called: "
                    f"did you mean {near[0]!r}? fit calls {', '.join(HOOKS)}"
                )
        if not known:
            raise TypeError(
                f"{where}, a {type(callback).__name__}, has no method that fit calls: give it one of "
                f"{', '.join(HOOKS)}"
            )
        for hook in known:
            name = f"{where}, a {type(callback).__name__}: {hook}"
            check_function(name, getattr(callback, hook), awaited=awaited)
    return found
