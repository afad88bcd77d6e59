"""How many positions one evaluation or generation pushes through the model, and the bound on them.

The device does one thing after another, so that a read that takes an hour holds training up for an hour.
Work is counted before the device hears of a request, by a formula that clients know too (Limits in the
proto): the sum over rows of passes times columns, times the model's passes for one.
"""

from __future__ import annotations

from maskwire_server.errors import invalid_field
from maskwire_server.results import GenerateOptions, Limits, ModelInfo, Order, SelfCondMode

LEAST_COLUMNS = 64
"""A pass over a row counts at least so many: it has costs, in time and memory, however short the row is."""


def evaluation_tokens(
    rows: int, columns: int, draws: int, info: ModelInfo, *, chain_rule: bool, only_train_generator: bool
) -> int:
    """The positions of an evaluation."""
    passes = rows * draws * (columns if chain_rule else 1)
    critic = info.has_critic and not (chain_rule or only_train_generator)
    return passes * max(columns, LEAST_COLUMNS) * (1 + info.self_cond + critic)


def generation_tokens(unknown: list[int], columns: int, options: GenerateOptions, info: ModelInfo) -> int:
    """The positions of a generation of rows with so many unknown positions."""
    passes = sum(min(options.steps or count, count) for count in unknown)
    first_pass = info.self_cond and options.self_cond_mode is SelfCondMode.TWO_PASS
    return passes * max(columns, LEAST_COLUMNS) * (1 + first_pass + (options.order is Order.CRITIC))


def check(field: str, what: str, tokens: int, limits: Limits, cure: str) -> None:
    """Raise Refused for more positions than one call may have; `what` says in words what takes them."""
    if tokens <= limits.max_read_tokens:
        return
    raise invalid_field(
        field,
        f"{field}: {what} push {tokens} positions through the model, at most {limits.max_read_tokens} "
        f"(serve.max_read_tokens) in one call: {cure}, or raise the setting",
        positions=tokens,
        max_read_tokens=limits.max_read_tokens,
    )
