"""Limits the work of an evaluation or generation, counted in positions that are sent through the model.

The device executes one request at a time: while a long evaluation runs, no step is trained. The work is
therefore computed before a request is queued, by a formula that the proto documents at Limits, so that
clients can use it too: passes times columns, summed over the rows, and multiplied by the number of network
calls per pass. This is one, plus one with self-conditioning, plus one with a critic.
"""

from __future__ import annotations

from maskwire.v1.values import Limits, ModelInfo
from maskwire_server.errors import invalid_field
from maskwire_server.results import GenerateOptions, Order, SelfCondMode

MIN_COLUMNS = 64
"""A pass over a shorter row counts as this many columns, because each pass has a fixed cost."""


def evaluation_tokens(
    rows: int, columns: int, draws: int, info: ModelInfo, *, chain_rule: bool, only_train_generator: bool
) -> int:
    """The number of positions that an evaluation of `rows` times `columns` positions computes."""
    passes = rows * draws * (columns if chain_rule else 1)
    critic = info.has_critic and not (chain_rule or only_train_generator)
    return passes * max(columns, MIN_COLUMNS) * (1 + info.self_cond + critic)


def generation_tokens(unknown: list[int], columns: int, options: GenerateOptions, info: ModelInfo) -> int:
    """The number of positions that a generation computes; `unknown` has each row's positions to sample."""
    passes = sum(min(options.steps or count, count) for count in unknown)
    first_pass = info.self_cond and options.self_cond_mode is SelfCondMode.TWO_PASS
    return passes * max(columns, MIN_COLUMNS) * (1 + first_pass + (options.order is Order.CRITIC))


def check(field: str, what: str, tokens: int, limits: Limits, remedy: str) -> None:
    """Raise Refused if `tokens` exceeds the limit. The message contains `what` (the work) and `remedy`."""
    if tokens <= limits.max_read_tokens:
        return
    raise invalid_field(
        field,
        f"{field}: one call may send at most {limits.max_read_tokens} positions through the model "
        f"(serve.max_read_tokens), got {tokens} for {what}; {remedy}, or raise the setting",
        positions=tokens,
        max_read_tokens=limits.max_read_tokens,
    )
