"""`maskwire train`: train on files until the run has reached a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from maskwire.cli import exit_codes
from maskwire.cli.display import OutputError, show
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
from maskwire.client import Trainer
from maskwire.data.file_data import holds_tokens, open_data, packed_length
from maskwire.data.token_data import TokenData
from maskwire.errors import TokenizerError
from maskwire.loggers.specification import open_logger
from maskwire.nonfatal_output import tell
from maskwire.results import EvalResult

_EVALUATION = "Evaluation"
_SAVING = "Checkpoints and metrics"
_SESSION = "Session"
_HELD_OUT = 0.05
_EVAL_ROWS = 64


@with_server(retry_for=300.0)
def train(
    server: ServerConnection,
    paths: Paths,
    until_step: Annotated[
        int | None,
        typer.Option(
            show_default=False,
            help="Train until the run has reached this step. An absolute number: a run at step 800 trains "
            "200 steps for --until-step 1000.",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            show_default=False,
            help="In place of --until-step: train on each row this many times, in a new random order each "
            "time. An absolute number too. Without it, rows are random crops of the texts.",
        ),
    ] = None,
    length: Length = None,
    batch_size: Annotated[int, typer.Option(help="Rows per batch.", rich_help_panel=DATA_PANEL)] = 32,
    seed: Annotated[
        int, typer.Option(help="Seed for the selection of rows.", rich_help_panel=DATA_PANEL)
    ] = 0,
    pattern: Pattern = "*",
    dtype: Dtype = None,
    any_format: AnyFormat = False,
    text_field: TextField = None,
    prompt_field: PromptField = None,
    response_field: ResponseField = None,
    held_out: Annotated[
        float | None,
        typer.Option(
            help="Share of the documents (files) to hold out for --eval-every and never train on. By default "
            f"{_HELD_OUT}.",
            rich_help_panel=_EVALUATION,
        ),
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(help="Evaluate on this data, and train on all of PATH.", rich_help_panel=_EVALUATION),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(help="Evaluate every this many steps. By default never.", rich_help_panel=_EVALUATION),
    ] = None,
    eval_rows: Annotated[
        int | None,
        typer.Option(
            help=f"Rows per evaluation. By default {_EVAL_ROWS}.",
            rich_help_panel=_EVALUATION,
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            help="Also save a checkpoint every this many steps. By default the server alone decides when.",
            rich_help_panel=_SAVING,
        ),
    ] = None,
    save_best: Annotated[
        bool,
        typer.Option(
            "--save-best",
            help="Save a checkpoint after each evaluation that is the best so far. Needs --eval-every.",
            rich_help_panel=_SAVING,
        ),
    ] = False,
    metrics: Annotated[
        Path | None,
        typer.Option(
            help="Append one JSON line per step and per evaluation to this file.", rich_help_panel=_SAVING
        ),
    ] = None,
    log: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND:PLACE",
            help="Also log to jsonl:FILE, csv:FILE, tensorboard:FOLDER, wandb:PROJECT or trackio:PROJECT. May"
            " be repeated. Steps that a log lacks, after an interruption, are filled in.",
            rich_help_panel=_SAVING,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of this job under a scheduler. A job restarted with the same name, on any machine, "
            "takes over its previous session at once. By default a name unique to this process, which is "
            "printed.",
            rich_help_panel=_SESSION,
        ),
    ] = None,
    takeover: Annotated[
        bool,
        typer.Option(
            "--takeover",
            help="Take the run over from another writer, or resume a run that is HALTED.",
            rich_help_panel=_SESSION,
        ),
    ] = False,
    allow_changed_data: Annotated[
        bool,
        typer.Option(
            "--allow-changed-data",
            help="Continue although the data differs from what the run was trained on so far.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = False,
    window: Annotated[
        int,
        typer.Option(
            help="Steps sent before the first answer arrives (hides network latency).",
            rich_help_panel=_SESSION,
        ),
    ] = 4,
    as_json: Json = False,
) -> None:
    """Train on files until the run has reached a step.

    After an interruption, run the same command again: training resumes.
    """
    if (until_step is None) == (epochs is None):
        given = "neither" if epochs is None else f"--until-step {until_step} and --epochs {epochs}"
        raise ValueError(f"give either --until-step or --epochs to say when to stop, got {given}")
    if until_step is not None and until_step < 0:
        raise ValueError(f"--until-step must be at least 0, got {until_step}")
    for option, value in (
        ("--eval-every", eval_every), ("--checkpoint-every", checkpoint_every), ("--eval-rows", eval_rows),
        ("--epochs", epochs),
    ):  # fmt: skip
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    for option, wanted in (
        ("--eval-data", eval_data is not None),
        ("--held-out", held_out is not None),
        ("--eval-rows", eval_rows is not None),
        ("--save-best", save_best),
    ):
        if wanted and not eval_every:
            raise ValueError(f"{option} needs --eval-every, the number of steps between evaluations")
    if eval_data is not None and held_out is not None:
        raise ValueError(
            f"--eval-data {eval_data} and --held-out {held_out:g} exclude each other: --eval-data "
            "evaluates on other data, and trains on all of PATH; leave one of them out"
        )
    callbacks: list[Any] = [open_logger(specification) for specification in log or []]
    options: dict[str, Any] = {
        "length": length_of_paths(length, paths),
        "batch_size": batch_size,
        "seed": seed,
        "pattern": pattern,
        "any_format": any_format,
        "text_field": text_field,
        "prompt_field": prompt_field,
        "response_field": response_field,
    }
    if epochs is not None:
        options["sampling"] = "epochs"
    # Report bad data before waiting for the server.
    data, apart = open_data(paths, dtype=dtype, **options), None
    if eval_data is not None:
        apart = _open_evaluation(eval_data, dtype, options | {"length": packed_length(eval_data) or 1})
        check_tokenizer(data.tokenizer, apart.tokenizer, "the training data")
    elif eval_every:
        data, apart = _split(data, _HELD_OUT if held_out is None else held_out)
    with server.connect(name=name, takeover=takeover, window=window) as trainer:
        columns = row_length(length, trainer.model, data)
        data = data.cropped(columns)
        target = data.steps_of(epochs) if epochs is not None else until_step or 0
        evaluate = (
            None
            if apart is None
            else _evaluation(apart, row_length(columns, trainer.model, apart), eval_rows or _EVAL_ROWS)
        )
        if trainer.step < target and not as_json:
            announcement = _Announcement(
                f"training from step {trainer.step} to {target}: {batch_size} rows of {columns} tokens "
                f"per step, as {trainer.name!r}"
            )
            callbacks.insert(0, announcement)
        result = trainer.fit(
            data,
            until_step=target,
            evaluate=evaluate,
            eval_every=eval_every,
            checkpoint_every=checkpoint_every,
            save_best=save_best,
            metrics=metrics,
            callbacks=callbacks,
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
            "name": trainer.name,
        }
        show(
            summary,
            as_json,
            lambda: (
                f"nothing to train: the run is at step {trainer.step} already, and "
                + (f"--until-step {target}" if epochs is None else f"--epochs {epochs} (step {target})")
                + " is an absolute number; give a larger one to train further"
                if trainer.step >= target and not steps
                else f"step {trainer.step}"
                + ("" if result.last is None else f"  loss {result.last.loss:.4f}")
                + f"  {result.tokens_per_second:,.0f} tokens/s  digest {trainer.digest.hex()[:16]}"
            ),
        )
        if result.interrupted:
            trainer.close(grace=0)
            raise exit_codes.interrupted()
        if result.failures:
            raise OutputError("; ".join(result.failures))


class _Announcement:
    """Prints a line when training begins, after `fit` has accepted the data."""

    def __init__(self, text: str) -> None:
        self._text = text

    def on_start(self, trainer: Trainer) -> None:  # noqa: ARG002
        tell(self._text)


def _open_evaluation(path: str, dtype: str | None, options: dict[str, Any]) -> TokenData:
    """Open the data of --eval-data. A file or folder of ids is opened without the options for texts."""
    if not holds_tokens(path):
        return open_data(path, dtype=dtype, **options)
    fields = ("text_field", "prompt_field", "response_field")
    return open_data(path, **{name: value for name, value in options.items() if name not in fields})


def check_tokenizer(ours: str, theirs: str, whose: str) -> None:
    """Raise TokenizerError if both tokenizers are known and differ: their ids have different meanings."""
    if ours and theirs and ours != theirs:
        raise TokenizerError(
            f"{whose} uses tokenizer {ours}, but this data uses {theirs}: prepare the data with "
            f"{whose}'s tokenizer",
            reason="TOKENIZER_MISMATCH",
        )


def _split(data: TokenData, held_out: float) -> tuple[TokenData, TokenData]:
    """Split data into (training, held out). The message of an error names the command's options."""
    try:
        return data.split(held_out)
    except ValueError as error:
        words = str(error).replace("held_out=", "--held-out ")
        raise ValueError(words.replace("evaluate on other data", "give --eval-data")) from None


def _evaluation(data: TokenData, length: int, rows: int) -> Callable[[Trainer], EvalResult]:
    data = data.cropped(length)
    return lambda trainer: trainer.evaluate(data, rows=rows)
