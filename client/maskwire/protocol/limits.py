"""The server's limits on one call, and the share of them that a row uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maskwire.errors import RequestError
from maskwire.results import Limits, ModelInfo

_DEFAULT_DRAWS = 16  # the server's default
_MIN_COLUMNS = 64  # a pass over a shorter row counts as this many; see Limits.max_read_tokens in the proto


@dataclass(frozen=True)
class Bounds:
    """A server's limits and its model. A limit of 0 means that the server states none."""

    limits: Limits
    model: ModelInfo

    def rows(self, columns: int, work: int) -> int | None:
        """Return how many rows a call may have, at least 1; None if there is no limit.

        columns: The number of positions of each row.
        work: How much of `max_read_tokens` each row uses.
        """
        bounds = ((self.limits.max_batch_tokens, columns), (self.limits.max_read_tokens, work))
        return min((max(1, most // max(1, each)) for most, each in bounds if most), default=None)

    def passes(self, columns: int, options: Mapping[str, Any]) -> int:
        """Return how many times an evaluation passes a row of `columns` positions through the model.

        Passes for self-conditioning and for the critic are not counted.
        """
        draws = int(options.get("draws") or 0)
        if options.get("estimator") == "chain_rule":
            return columns * max(1, draws)
        return draws or min(_DEFAULT_DRAWS, self.limits.max_draws or _DEFAULT_DRAWS)

    def evaluation_work(self, columns: int, options: Mapping[str, Any]) -> int:
        """Return how much of `max_read_tokens` one row of an evaluation uses, in positions computed."""
        plain = options.get("estimator") == "chain_rule" or bool(options.get("only_train_generator"))
        factor = 1 + self.model.self_cond + (self.model.has_critic and not plain)
        return self.passes(columns, options) * max(columns, _MIN_COLUMNS) * factor

    @staticmethod
    def generation_work(passes: int, columns: int, *, first_pass: bool, critic: bool) -> int:
        """Return how much of `max_read_tokens` one row of a generation uses, in positions computed."""
        return passes * max(columns, _MIN_COLUMNS) * (1 + first_pass + critic)

    def takes(self, request: Any) -> bool:
        """Whether the server accepts a message of the size of `request`."""
        return not self.limits.max_message_bytes or request.ByteSize() <= self.limits.max_message_bytes


def too_long(what: str, size: int, limit: int, cure: str) -> RequestError:
    """Return the error for a message of `size` bytes, where the server accepts at most `limit` bytes."""
    return RequestError(
        f"{what} makes a message of {size:,} bytes, but the server accepts at most {limit:,}: {cure}, or "
        "raise serve.max_message_bytes",
        reason="RESOURCE_EXHAUSTED",
    )
