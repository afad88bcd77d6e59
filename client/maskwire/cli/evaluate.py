"""`maskwire eval`: evaluate the model on files."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from maskwire.cli.display import eval_table, show
from maskwire.cli.options import (
    DATA_PANEL,
    AnyFormat,
    Dtype,
    Json,
    Length,
    Paths,
    Pattern,
    PromptField,
    ResponseField,
    ServerConnection,
    TextField,
    length_of_paths,
    row_length,
    with_server,
)
from maskwire.cli.train import check_tokenizer
from maskwire.client import Client
from maskwire.data.file_data import open_data
from maskwire.data.token_data import TokenData
from maskwire.errors import UnavailableError
from maskwire.nonfatal_output import on_terminal, tell
from maskwire.protocol.option_types import EvalOptions
from maskwire.results import EvalResult


@with_server(retry_for=60.0)
def evaluate(
    server: ServerConnection,
    paths: Paths,
    length: Length = None,
    rows: Annotated[
        int | None,
        typer.Option(
            help="Evaluate only this many rows, evenly spread over the data. By default every token.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    draws: Annotated[
        int,
        typer.Option(
            help="Random masks per row. 0 means 16, or fewer if the server limits them; with --chain-rule, "
            "the number of orders, where 0 means 1."
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed for the random masks and orders.")] = 0,
    chain_rule: Annotated[
        bool,
        typer.Option(
            "--chain-rule",
            help="Compute the exact likelihood under an order of the tokens. Slow: one pass per token.",
        ),
    ] = False,
    order: Annotated[
        Literal["left_to_right", "random"] | None,
        typer.Option(help="Order of the tokens for --chain-rule. By default left_to_right."),
    ] = None,
    raw_weights: Annotated[
        bool,
        typer.Option(
            "--raw-weights", help="Evaluate the trained weights, even if the run keeps a moving average."
        ),
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows per call to the server. The result does not depend on it.")
    ] = None,
    pattern: Pattern = "*",
    dtype: Dtype = None,
    any_format: AnyFormat = False,
    text_field: TextField = None,
    prompt_field: PromptField = None,
    response_field: ResponseField = None,
    as_json: Json = False,
) -> None:
    """Evaluate the model on files: the negative ELBO with error bars, or an exact likelihood.

    The run is not changed.
    """
    for option, value in (("--rows", rows), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    if order is not None and not chain_rule:
        raise ValueError(
            "--order needs --chain-rule: an evaluation without --chain-rule averages over all orders; leave "
            "out --order, or add --chain-rule"
        )
    data = open_data(
        paths, length=length_of_paths(length, paths), batch_size=1, pattern=pattern, dtype=dtype,
        any_format=any_format, text_field=text_field, prompt_field=prompt_field,
        response_field=response_field,
    )  # fmt: skip
    options: EvalOptions = {"draws": draws, "seed": seed, "raw_weights": raw_weights}
    if chain_rule:
        options["estimator"] = "chain_rule"
        options["chain_order"] = order or "left_to_right"
    with server.attach() as client:
        status = client.status()
        if status.model is None:
            raise UnavailableError("the server is still building the model; run the command again later")
        check_tokenizer(status.tokenizer, data.tokenizer, "the run")
        data = data.cropped(row_length(length, status.model, data))
        found = _evaluate(client, data, rows, shown=not as_json, batch_size=batch_size, **options)
    words = None if not chain_rule else f"chain rule, {(order or 'left_to_right').replace('_', ' ')}"
    show(found, as_json, lambda: eval_table(found, words))


def _evaluate(
    client: Client, data: TokenData, rows: int | None, *, shown: bool, **options: Any
) -> EvalResult:
    """Evaluate the model. Report the progress on stderr, and the rows done if Ctrl-C ends it."""
    from maskwire.progress_bar import row_progress

    done, total = 0, data.rows if rows is None else rows
    if shown and not on_terminal():  # the first call can take long, and shows no progress
        tell(
            f"evaluating {total:,} rows"
            + ("" if rows is not None else ", all of the data; limit it with --rows")
        )
    try:
        with row_progress("evaluating", shown=shown) as progress:

            def count(answered: int, of: int, nats: float) -> None:
                nonlocal done
                done = answered
                progress(answered, of, nats)

            return client.evaluate(data, rows=rows, on_progress=count, **options)
    except KeyboardInterrupt:
        if shown:
            tell(f"interrupted after {done:,} of {total:,} rows; the run was not changed")
        raise
