"""The result of a training loop."""

from __future__ import annotations

from dataclasses import dataclass, field

from maskwire.results import EvalResult, StepResult


@dataclass
class FitResult:
    """The result of a call of `fit`: the steps trained, evaluations, times and failures."""

    first_step: int
    """The first step that this call was to train."""
    step: int
    """The last step trained."""
    seconds: float = 0.0
    """The duration of the call, including evaluations, checkpoints and waits."""
    seconds_waited: float = 0.0
    """Part of `seconds`: waits that `on_wait` reported, when the server did not answer or refused to work."""
    tokens: int = 0
    """The number of tokens sent, including prompts but not padding."""
    interrupted: bool = False
    """Whether Ctrl-C ended the call."""
    stopped: bool = False
    """Whether StopTraining ended the call."""
    stop_reason: str = ""
    """The text of the StopTraining that ended the call; empty if none did."""
    last: StepResult | None = None
    """The result of the last step; None if no step was trained."""
    evaluations: list[EvalResult] = field(default_factory=list)
    """The results of the evaluations, in order."""
    metrics_failure: str = ""
    """Why lines of the metrics file are missing, such as a full disk; empty if none is missing."""
    failures: list[str] = field(default_factory=list)
    """Failures of callbacks and loggers, including the metrics file's, that did not stop training."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens sent per second of the call; the time includes evaluations and checkpoints, but no waits."""
        seconds = self.seconds - self.seconds_waited
        return self.tokens / seconds if seconds > 0 else 0.0
