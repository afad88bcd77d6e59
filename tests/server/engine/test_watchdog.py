"""When a thread's work counts as hung."""

from __future__ import annotations

import statistics

import pytest

from maskwire_server.config import ServeConfig
from maskwire_server.engine.progress import Progress
from maskwire_server.engine.step_timeout import LEAST_SECONDS, StepTimeout
from maskwire_server.engine.watchdog import Watchdog

SHAPE, OTHER = (4, 16), (4, 32)


class Watched:
    """A watchdog that looks once a second of a clock."""

    def __init__(self, *, limit: float) -> None:
        self.now = 0.0
        self.progress = Progress(lambda: self.now)
        self.limit = limit
        self.dog = Watchdog([Progress(), self.progress], 10.0, lambda: self.now, lambda _: None)

    def begin(self) -> None:
        self.progress.begin("step 7", self.limit)

    def after(self, seconds: int, *, beats: bool = False) -> str:
        words = ""
        for _ in range(seconds):
            self.now += 1
            if beats:
                self.progress.beat()
            words = words or self.dog.look()
        return words


def test_work_without_progress_is_hung_after_its_limit() -> None:
    watched = Watched(limit=30)
    watched.begin()
    assert watched.after(30) == ""
    assert watched.after(1) == "step 7 has made no progress for 30 s"


def test_parts_ends_and_beginnings_are_progress_and_waiting_for_work_is_no_hang() -> None:
    watched = Watched(limit=30)
    assert watched.after(1000) == "", "idle"
    watched.begin()
    assert watched.after(1000, beats=True) == ""
    assert watched.after(29) == ""
    watched.progress.end()
    watched.begin()
    assert watched.after(29) == "", "the same words, another step"
    watched.progress.end()
    assert watched.after(1000) == ""


def test_the_time_without_progress_is_that_of_the_work_under_way() -> None:
    watched = Watched(limit=300)
    watched.after(50)
    assert watched.progress.seconds_without == 0.0, "idle"
    watched.begin()
    watched.after(20)
    assert watched.progress.seconds_without == 20.0
    watched.progress.beat()
    watched.after(5)
    assert watched.progress.seconds_without == 5.0
    watched.progress.end()
    assert watched.progress.seconds_without == 0.0


def test_time_in_which_the_process_was_stopped_does_not_count() -> None:
    watched = Watched(limit=30)
    watched.begin()
    watched.after(20)
    watched.now += 3600  # SIGSTOP, or a machine that was suspended
    assert watched.after(5) == ""
    assert watched.after(10) != ""


def test_the_timeout_is_20_medians_of_the_last_100_steps_and_at_least_600_seconds() -> None:
    timeout = StepTimeout(ServeConfig().step_timeout_seconds)
    assert timeout.seconds == LEAST_SECONDS == 600
    for _ in range(1000):
        timeout.add(SHAPE, 1.0)
    assert timeout.seconds == 600
    lately = [50.0 + step for step in range(100)]
    for seconds in lately:
        timeout.add(SHAPE, seconds)
    assert timeout.seconds == pytest.approx(20 * statistics.median(lately))
    assert timeout.of_shape(OTHER) == timeout.of_shape(SHAPE) == timeout.unknown_seconds == timeout.seconds
    for _ in range(60):
        timeout.add(SHAPE, 1.0)
    assert timeout.seconds == 600


def test_the_setting_overrides_it_but_not_for_what_may_compile_kernels() -> None:
    timeout = StepTimeout(ServeConfig(step_timeout_seconds=5).step_timeout_seconds)
    assert timeout.seconds == 5
    assert timeout.of_shape(SHAPE) == timeout.unknown_seconds == 600
    timeout.add(SHAPE, 100.0)
    assert (timeout.of_shape(SHAPE), timeout.of_shape(OTHER)) == (5, 600)
    assert StepTimeout(1000).of_shape(SHAPE) == 1000
