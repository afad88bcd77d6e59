"""The result of a training loop."""

from __future__ import annotations

from dataclasses import dataclass, field

from maskwire.results import EvalResult, StepResult


@dataclass
class FitResult:
    """What a call of `fit` did."""

    first_step: int
    """The first step that this call was to train."""
    step: int
    """The last step trained."""
    seconds: float = 0.0
    """Duration of the call, with evaluations, checkpoints and waits."""
    seconds_waited: float = 0.0
    """Seconds of it spent in waits that `on_wait` reported: the server did not answer or refused to work."""
    tokens: int = 0
    """Tokens sent, prompts included and padding excluded."""
    interrupted: bool = False
    """Ctrl-C ended it."""
    stopped: bool = False
    """StopTraining ended it."""
    stop_reason: str = ""
    """The text of that StopTraining."""
    last: StepResult | None = None
    """The result of the last step; None: no step was trained."""
    evaluations: list[EvalResult] = field(default_factory=list)
    """The results of the evaluations, in order."""
    metrics_failure: str = ""
    """Why lines of the metrics file are missing, such as a full disk; empty: none is missing."""
    failures: list[str] = field(default_factory=list)
    """Failures of callbacks and loggers that did not stop training, the metrics file included."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens sent per second of the call, evaluations and checkpoints included, waits excluded."""
        seconds = self.seconds - self.seconds_waited
        return self.tokens / seconds if seconds > 0 else 0.0
