"""`maskwire train`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from maskwire.cli import exit_codes
from maskwire.cli.display import OutputError, show
from maskwire.cli.options import AnyFormat, Dtype, Json, Length, Paths, Pattern, Server, with_server
from maskwire.client import Trainer
from maskwire.data.file_data import holds_tokens, open_data
from maskwire.data.token_data import TokenData
from maskwire.errors import TokenizerError
from maskwire.results import EvalResult


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
    any_format: AnyFormat = False,
    held_out: Annotated[float, typer.Option(help="Share of the documents kept for evaluation.")] = 0.05,
    eval_data: Annotated[
        Path | None, typer.Option(help="Evaluate on this data instead of a share held out.")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Evaluate every so many steps.")] = None,
    eval_rows: Annotated[int, typer.Option(help="Rows of an evaluation.")] = 64,
    checkpoint_every: Annotated[int | None, typer.Option(help="Save every so many steps.")] = None,
    save_best: Annotated[
        bool,
        typer.Option(
            "--save-best", help="Save each best evaluation, with --eval-every; the server keeps the best."
        ),
    ] = False,
    metrics: Annotated[Path | None, typer.Option(help="A file for one JSON line a step.")] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="This job, under a scheduler: the same name takes its session over at once, from whichever "
            "machine. By default the process's own."
        ),
    ] = None,
    takeover: Annotated[
        bool, typer.Option("--takeover", help="Take over from another writer, or from HALTED.")
    ] = False,
    allow_changed_data: Annotated[
        bool,
        typer.Option("--allow-changed-data", help="Continue although the data is not what it was."),
    ] = False,
    window: Annotated[int, typer.Option(help="Steps in flight.")] = 4,
    as_json: Json = False,
) -> None:
    """Train until a step. Run again, the same command goes on where the run is, or finds nothing to do."""

    if until_step < 0:
        raise ValueError(f"--until-step must be at least 0, got {until_step}")
    for option, value in (
        ("--eval-every", eval_every), ("--checkpoint-every", checkpoint_every), ("--eval-rows", eval_rows)
    ):  # fmt: skip
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    if eval_data is not None and not eval_every:
        raise ValueError("--eval-data needs --eval-every, which says when to evaluate")
    if save_best and not eval_every:
        raise ValueError("--save-best needs --eval-every, which says when to evaluate")
    options: dict[str, Any] = {
        "length": 1 if length is None else length,
        "batch_size": batch_size,
        "seed": seed,
        "pattern": pattern,
        "any_format": any_format,
    }
    # What is wrong with the data is said before anything is waited for.
    data, apart = open_data(paths, dtype=dtype, **options), None
    if eval_data is not None:
        apart = open_data(eval_data, dtype=None if holds_tokens(eval_data) else dtype, **options)
        check_tokenizer(data.tokenizer, apart.tokenizer, "the training data's")
    elif eval_every:
        data, apart = data.split(held_out)
    with server.connect(name=name, takeover=takeover, window=window) as trainer:
        rows = length or trainer.model.max_seq_len
        data = data.cropped(rows)
        evaluate = None if apart is None else _evaluation(apart.cropped(rows), eval_rows)
        result = trainer.fit(
            data,
            until_step=until_step,
            evaluate=evaluate,
            eval_every=eval_every,
            checkpoint_every=checkpoint_every,
            save_best=save_best,
            metrics=metrics,
            allow_changed_data=allow_changed_data,
            progress=not as_json,
        )
        steps = result.step + 1 - result.first_step
        summary = {
            "step": trainer.step,
            "digest": trainer.digest.hex(),
            "loss": None if result.last is None else result.last.loss,
            "steps": steps,
            "seconds": result.seconds,
            "tokens_per_second": result.tokens_per_second,
            "interrupted": result.interrupted,
        }
        show(
            summary,
            as_json,
            lambda: (
                f"nothing to train: the run is at step {trainer.step} and --until-step {until_step} is "
                "absolute; give a larger one to train on"
                if trainer.step >= until_step and not steps
                else f"step {trainer.step}"
                + ("" if result.last is None else f"  loss {result.last.loss:.4f}")
                + f"  {result.tokens_per_second:,.0f} tokens/s  digest {trainer.digest.hex()[:16]}"
            ),
        )
        if result.interrupted:
            trainer.close(grace=0)
            raise exit_codes.interrupted()
        if result.metrics_failure:
            raise OutputError(result.metrics_failure)


def check_tokenizer(ours: str, theirs: str, whose: str) -> None:
    """Refuse ids that stand for something else, where both sides say what they stand for."""
    if ours and theirs and ours != theirs:
        raise TokenizerError(
            f"{whose} ids are of {ours}, the data's of {theirs}: prepare the data with the same tokenizer",
            reason="TOKENIZER_MISMATCH",
        )


def _evaluation(data: TokenData, rows: int) -> Callable[[Trainer], EvalResult]:
    return lambda trainer: trainer.evaluate(data, rows=rows)
