"""What one call may ask of a server, and how much of it a row takes: how calls are split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maskwire.errors import RequestError
from maskwire.results import Limits, ModelInfo

_DRAWS = 16  # the server's default
_LEAST_COLUMNS = 64  # that a pass over a row counts; see Limits.max_read_tokens in the proto


@dataclass(frozen=True)
class Bounds:
    """A server's limits, and what it serves. A limit of 0 is one that the server does not tell."""

    limits: Limits
    model: ModelInfo

    def rows(self, columns: int, work: int) -> int | None:
        """The most rows per call (at least 1), given the columns and work of each row; None: no limit."""
        bounds = ((self.limits.max_batch_tokens, columns), (self.limits.max_read_tokens, work))
        return min((max(1, most // max(1, each)) for most, each in bounds if most), default=None)

    def passes(self, columns: int, options: Mapping[str, Any]) -> int:
        """The passes over a row in an evaluation, self-conditioning and the critic aside."""
        draws = int(options.get("draws") or 0)
        if options.get("estimator") == "chain_rule":
            return columns * max(1, draws)
        return draws or min(_DRAWS, self.limits.max_draws or _DRAWS)

    def evaluation_work(self, columns: int, options: Mapping[str, Any]) -> int:
        """What a row of an evaluation counts against `max_read_tokens`."""
        plain = options.get("estimator") == "chain_rule" or bool(options.get("only_train_generator"))
        factor = 1 + self.model.self_cond + (self.model.has_critic and not plain)
        return self.passes(columns, options) * max(columns, _LEAST_COLUMNS) * factor

    @staticmethod
    def generation_work(passes: int, columns: int, *, first_pass: bool, critic: bool) -> int:
        """What a row of a generation counts against `max_read_tokens`."""
        return passes * max(columns, _LEAST_COLUMNS) * (1 + first_pass + critic)

    def takes(self, request: Any) -> bool:
        """Whether the server takes a message of this size."""
        return not self.limits.max_message_bytes or request.ByteSize() <= self.limits.max_message_bytes


def too_long(what: str, size: int, limit: int, cure: str) -> RequestError:
    """The error for a message that is larger than the server takes."""
    return RequestError(
        f"{what} makes a message of {size:,} bytes, and the server takes {limit:,}: {cure}, or raise "
        "serve.max_message_bytes",
        reason="RESOURCE_EXHAUSTED",
    )
