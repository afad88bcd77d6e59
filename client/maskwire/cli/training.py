"""`maskwire train` and `maskwire eval`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from maskwire.cli import exits
from maskwire.cli.options import Dtype, Json, Length, Paths, Pattern, Server, with_server
from maskwire.client import Trainer
from maskwire.data import TokenData, open_data
from maskwire.errors import TokenizerError, UnavailableError
from maskwire.results import EvalResult
from maskwire.show import eval_table, show


@with_server(retry_for=300.0)
def train(
    server: Server,
    paths: Paths,
    until_step: Annotated[int, typer.Option(help="Train until the run is at this step; an absolute number.")],
    length: Length = None,
    batch_size: Annotated[int, typer.Option(help="Rows a batch.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the data's order.")] = 0,
    pattern: Pattern = "*",
    dtype: Dtype = None,
    held_out: Annotated[float, typer.Option(help="Share of the documents kept for evaluation.")] = 0.05,
    eval_data: Annotated[
        Path | None, typer.Option(help="Evaluate on this data instead of a share held out.")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Evaluate every so many steps.")] = None,
    eval_rows: Annotated[int, typer.Option(help="Rows of an evaluation.")] = 64,
    checkpoint_every: Annotated[int | None, typer.Option(help="Save every so many steps.")] = None,
    metrics: Annotated[Path | None, typer.Option(help="A file for one JSON line a step.")] = None,
    name: Annotated[
        str, typer.Option(help="This job: the same name takes its session over again.")
    ] = "maskwire-train",
    takeover: Annotated[
        bool, typer.Option("--takeover", help="Take over from another writer, or from HALTED.")
    ] = False,
    window: Annotated[int, typer.Option(help="Steps in flight.")] = 4,
    as_json: Json = False,
) -> None:
    """Train until a step. Run again, the same command goes on where the run is, or finds nothing to do."""

    def opened(source: list[Path], length: int) -> TokenData:
        return open_data(
            source, length=length, batch_size=batch_size, seed=seed, pattern=pattern, dtype=dtype
        )

    if until_step < 0:
        raise ValueError(f"--until-step must be at least 0, got {until_step}")
    for every, value in (("--eval-every", eval_every), ("--checkpoint-every", checkpoint_every)):
        if value is not None and value < 1:
            raise ValueError(f"{every} must be at least 1, got {value}")
    opened(paths, length or 1)  # what is wrong with it is said before anything is waited for
    with server.connect(name=name, takeover=takeover, window=window) as trainer:
        rows = length or trainer.model.max_seq_len
        data, evaluate = opened(paths, rows), None
        if eval_every:
            if eval_data is None:
                data, apart = data.split(held_out)
            else:
                apart = opened([eval_data], rows)
            evaluate = _evaluation(apart, eval_rows)
        result = trainer.fit(
            data,
            until_step=until_step,
            evaluate=evaluate,
            eval_every=eval_every,
            checkpoint_every=checkpoint_every,
            metrics=metrics,
            progress=not as_json,
        )
        if result.interrupted:
            trainer.close(grace=0)
        summary = {
            "step": result.step,
            "digest": trainer.digest.hex(),
            "loss": None if result.last is None else result.last.loss,
            "steps": result.step + 1 - result.first_step,
            "seconds": result.seconds,
            "tokens_per_second": result.tokens_per_second,
            "interrupted": result.interrupted,
        }
        show(
            summary,
            as_json,
            lambda: (
                f"step {result.step}"
                + ("" if result.last is None else f"  loss {result.last.loss:.4f}")
                + f"  {result.tokens_per_second:,.0f} tokens/s  digest {trainer.digest.hex()[:16]}"
            ),
        )
        if result.interrupted:
            raise exits.interrupted()


def _evaluation(data: TokenData, rows: int) -> Callable[[Trainer], EvalResult]:
    def evaluate(trainer: Trainer) -> EvalResult:
        chosen = data.spread(rows)
        return trainer.eval_loss(chosen, text_bytes=data.text_bytes(chosen))

    return evaluate


@with_server(retry_for=60.0)
def evaluate(
    server: Server,
    paths: Paths,
    length: Length = None,
    rows: Annotated[int, typer.Option(help="Rows, evenly spread over the data.")] = 64,
    draws: Annotated[int, typer.Option(help="Draws a row; 0 for the server's default.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    pattern: Pattern = "*",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Estimate the negative ELBO of data, with its standard error. Changes nothing."""
    if rows < 1:
        raise ValueError(f"--rows must be at least 1, got {rows}")
    options: dict[str, Any] = {"batch_size": 1, "pattern": pattern, "dtype": dtype}
    open_data(paths, length=length or 1, **options)
    with server.attach() as client:
        status = client.status()
        if status.model is None:
            raise UnavailableError("the server is building the model; ask again in a moment")
        data = open_data(paths, length=length or status.model.max_seq_len, **options)
        if data.tokenizer and status.tokenizer and data.tokenizer != status.tokenizer:
            raise TokenizerError(
                f"the run's ids are of {status.tokenizer}, the data's of {data.tokenizer}: prepare the data "
                "with the run's tokenizer"
            )
        chosen = data.spread(rows)
        found = client.eval_loss(chosen, draws=draws, seed=seed, text_bytes=data.text_bytes(chosen))
        show(found, as_json, lambda: eval_table(found))
