"""Holds back commits and answers, durable on this machine, until they are in the mirror."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from maskwire_server.engine import admission_rules
from maskwire_server.engine.futures import answer, refuse

C = TypeVar("C")


class Withheld(Generic[C]):
    """Commits and answers that wait until the mirror reaches their mark in the journal's outbox.

    Used under the run's mutex. If answers do not wait for the mirror (`waits` is False), nothing is held
    back.
    """

    def __init__(self, *, waits: bool) -> None:
        self.waits = waits
        self.problem = ""
        """Why the mirror cannot be written, as a text; empty if it can."""
        self._through = 0
        self._commits: deque[tuple[int, list[C]]] = deque()
        self._answers: deque[tuple[int, Future[Any], Any]] = deque()

    def mirrored(self, position: int) -> None:
        """Note that the mirror has all changes up to the mark `position`."""
        self._through = max(self._through, position)

    def holds_back(self, position: int) -> bool:
        """Whether the changes up to the mark `position` must wait for the mirror."""
        return self.waits and position > self._through

    @property
    def holds_commits(self) -> bool:
        """Whether any commits are held back. Later commits must then wait too."""
        return bool(self._commits)

    def add_commits(self, position: int, commits: list[C]) -> None:
        """Hold back commits until the mirror reaches the mark `position`."""
        self._commits.append((position, commits))

    def add_answer(self, position: int, future: Future[Any], value: Any) -> None:
        """Hold back an answer read from the journal, or refuse the call if the mirror cannot be written."""
        if self.problem:
            refuse(future, admission_rules.mirror_fails())
        else:
            self._answers.append((position, future, value))

    @property
    def due(self) -> bool:
        """Whether `release` would return anything."""
        return any(each and each[0][0] <= self._through for each in (self._commits, self._answers))

    def release(self) -> tuple[list[C], list[tuple[Future[Any], Any]]]:
        """Remove and return the commits and answers that are in the mirror by now."""
        commits: list[C] = []
        answers = []
        while self._commits and self._commits[0][0] <= self._through:
            commits += self._commits.popleft()[1]
        while self._answers and self._answers[0][0] <= self._through:
            answers.append(self._answers.popleft()[1:])
        return commits, answers

    def refuse_answers(self) -> None:
        """Refuse the calls whose answers are held back. Their callers can retry."""
        while self._answers:
            refuse(self._answers.popleft()[1], admission_rules.mirror_fails())


def answer_all(answers: list[tuple[Future[Any], Any]]) -> None:
    """Set the result of each future."""
    for future, value in answers:
        answer(future, value)
