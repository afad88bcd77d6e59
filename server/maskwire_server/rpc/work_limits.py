"""The work of an evaluation or generation, in positions sent through the model, and the limit on it.

The device executes one request at a time: while an evaluation runs for an hour, no step is trained. The
work is therefore computed before a request is queued, with a formula that clients know too (Limits in the
proto): passes times columns, summed over the rows, and multiplied by the number of network calls per pass
(one, and one each for self-conditioning and for the critic).
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
    """The positions that an evaluation sends through the model."""
    passes = rows * draws * (columns if chain_rule else 1)
    critic = info.has_critic and not (chain_rule or only_train_generator)
    return passes * max(columns, MIN_COLUMNS) * (1 + info.self_cond + critic)


def generation_tokens(unknown: list[int], columns: int, options: GenerateOptions, info: ModelInfo) -> int:
    """The positions that a generation sends through the model; `unknown`: how many each row lacks."""
    passes = sum(min(options.steps or count, count) for count in unknown)
    first_pass = info.self_cond and options.self_cond_mode is SelfCondMode.TWO_PASS
    return passes * max(columns, MIN_COLUMNS) * (1 + first_pass + (options.order is Order.CRITIC))


def check(field: str, what: str, tokens: int, limits: Limits, remedy: str) -> None:
    """Raise Refused if `tokens` positions exceed the limit. `what` describes the work in the message."""
    if tokens <= limits.max_read_tokens:
        return
    raise invalid_field(
        field,
        f"{field}: one call may send at most {limits.max_read_tokens} positions through the model "
        f"(serve.max_read_tokens), got {tokens} for {what}; {remedy}, or raise the setting",
        positions=tokens,
        max_read_tokens=limits.max_read_tokens,
    )
