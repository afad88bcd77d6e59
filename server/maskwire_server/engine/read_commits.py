"""Commits that answer an evaluation or generation once the step whose weights it used is durable."""

from __future__ import annotations

import time
from dataclasses import dataclass

from maskwire_server.engine.commits import AnswerCommit
from maskwire_server.engine.event_publisher import Publisher
from maskwire_server.events import MOST_SAMPLES, Evaluated, Generated
from maskwire_server.position import HistoryPosition
from maskwire_server.requests import GenerateRequest
from maskwire_server.results import EvalAnswer, EvalOptions, GenerationState


@dataclass(eq=False)
class EvaluationCommit(AnswerCommit[EvalAnswer]):
    """Answers an evaluation of the weights after the step `seen`, once that step is durable."""

    publisher: Publisher
    options: EvalOptions
    seen: HistoryPosition
    seconds: float

    def committed(self) -> None:
        """Answer the caller, and publish the event `Evaluated`."""
        super().committed()
        if not self.publisher.wanted(Evaluated):
            return
        result, seen = self.value.result, self.seen
        self.publisher.publish(
            Evaluated(
                time.time(),
                seen.run_id,
                seen.lineage,
                seen.step,
                self.seconds,
                result.nats_per_token,
                result.bits_per_byte,
                result.accuracy,
                result.tokens,
                result.draws,
                self.options.chain_rule,
            )
        )


@dataclass(eq=False)
class GenerationCommit(AnswerCommit[None]):
    """Answers a generation from the weights after the step `seen`, once that step is durable.

    `last` is the last state of the generation; None if it ended before its first state.
    """

    publisher: Publisher
    request: GenerateRequest
    last: GenerationState | None
    seen: HistoryPosition
    seconds: float

    def committed(self) -> None:
        """Answer the caller, and publish the event `Generated` if the generation finished."""
        super().committed()
        last, seen, lengths = self.last, self.seen, self.request.prompts.lengths
        if last is None or not last.done or not self.publisher.wanted(Generated):
            return
        rows = last.ids[:MOST_SAMPLES]
        samples = [row if lengths is None else row[: lengths[index]] for index, row in enumerate(rows)]
        self.publisher.publish(
            Generated(
                time.time(),
                seen.run_id,
                seen.lineage,
                seen.step,
                self.seconds,
                len(last.ids),
                last.unmasking_step,
                tuple(sample.copy() for sample in samples),
            )
        )
