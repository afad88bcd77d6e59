"""Runs reads, which are evaluations and generations, on the executor's thread."""

from __future__ import annotations

from contextlib import suppress

from maskwire.v1.values import RunState
from maskwire_server.config import ServeConfig
from maskwire_server.engine import admission_rules
from maskwire_server.engine.commits import RevealCommit
from maskwire_server.engine.committer import Committer
from maskwire_server.engine.entries import Evaluation, SessionOpening
from maskwire_server.engine.futures import refuse
from maskwire_server.engine.generation_stream import Generation
from maskwire_server.engine.read_commits import EvaluationCommit, GenerationCommit
from maskwire_server.engine.sessions import Sessions
from maskwire_server.engine.shared_state import Run
from maskwire_server.engine.trainer_interface import Trainer, guarded
from maskwire_server.errors import DeviceLost, Refused, StateLost, Unwanted
from maskwire_server.results import EvalAnswer, GenerationState


def refuse_waiting_reads(run: Run, serve: ServeConfig, credential: str) -> None:
    """Raise Refused (QUEUE_FULL) if the queue is full, or has too many reads of the credential.

    Called under the run's mutex. Without a credential (""), only the length of the queue is limited.
    """
    run.queue.forget_abandoned_reads()
    try:
        admission_rules.refuse_full(len(run.queue), serve.queue_limit)
        if credential:
            admission_rules.refuse_many_reads(run.queue.reads(credential), serve.max_reads_per_credential)
    except Refused:
        run.share.refused_reads += 1
        raise


class Reads:
    """Runs reads: evaluations and generations. No step is trained while a read runs.

    A read is computed in parts, with the weights of one step. It is stopped between two parts if its client
    has disconnected, or if it has kept a training step or a save waiting for longer than
    `serve.max_read_seconds`. Sessions are opened between two parts, so that a client can start while a read
    runs.
    """

    def __init__(
        self, run: Run, committer: Committer, trainer: Trainer, sessions: Sessions, serve: ServeConfig
    ) -> None:
        self._run = run
        self._committer = committer
        self._trainer = trainer
        self._sessions = sessions
        self._serve = serve

    def run(self, entry: Evaluation | Generation) -> None:
        """Compute an evaluation or generation taken from the queue. Raises StateLost or DeviceLost."""
        self._run.share.begin_read()
        try:
            if isinstance(entry, Evaluation):
                self._evaluate(entry)
            else:
                self._generate(entry)
        finally:
            self._run.queue.reading = None
            self._run.share.end_read()

    def _evaluate(self, entry: Evaluation) -> None:
        request, future = entry.request, entry.future
        try:
            if future.done():
                return
            with guarded(self._trainer):
                result = self._trainer.eval_loss(
                    request.batch, request.options, lambda: self._may_continue(entry)
                )
        except Unwanted:
            return
        except (DeviceLost, StateLost):
            raise
        except Exception as error:
            with self._run.mutex:
                refuse(future, self._run.conditions.failed("the evaluation", error))
            return
        here = self._run.head.computed
        if not future.done():
            answered = EvalAnswer(result, here.step, here.digest)
            self._committer.append(
                EvaluationCommit(
                    future, answered, self._run.events, request.options, here, self._run.share.reading_seconds
                )
            )

    def _generate(self, generation: Generation) -> None:
        here, request = self._run.head.computed, generation.request
        last: GenerationState | None = None
        self._committer.append(RevealCommit(generation, here))
        try:
            if not generation.over:
                with guarded(self._trainer), suppress(Unwanted):
                    for state in self._trainer.generate(
                        request.prompts, request.options, lambda: self._may_continue(generation)
                    ):
                        last = state
                        if not generation.put(state):
                            break
        except (DeviceLost, StateLost):
            raise
        except Exception as error:
            with self._run.mutex:
                refuse(generation.future, self._run.conditions.failed("the generation", error))
        else:
            seconds = self._run.share.reading_seconds
            self._committer.append(
                GenerationCommit(generation.future, None, self._run.events, request, last, here, seconds)
            )

    def _may_continue(self, entry: Evaluation | Generation) -> bool:
        """Open the sessions that wait. Returns whether to compute the next part of the read.

        Refuses the read if a training step or a save has waited for it for too long.
        """
        run = self._run
        run.computing.beat()
        openings: list[SessionOpening] = []
        with run.mutex:
            while not run.conditions.holds(RunState.HELD) and (opening := run.queue.pop_session_opening()):
                openings.append(opening)
            overdue = run.share.read_is_overdue(run.queue.first_arrived)
        for opening in openings:
            self._sessions.record(opening)
        if overdue and not entry.future.done():
            run.share.ended_reads += 1
            what = "evaluation" if isinstance(entry, Evaluation) else "generation"
            refuse(entry.future, admission_rules.read_too_long(what, self._serve.max_read_seconds))
        return not entry.future.done()
