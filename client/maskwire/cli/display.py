"""Show results: tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from maskwire.results import CheckpointInfo, EvalResult, MirrorStatus, RunFigures, Status


class OutputError(Exception):
    """A result could not be printed in the requested form, or written to a file or a logger."""


def eval_table(found: EvalResult, chain_rule: str | None = None) -> Table:
    """The table of an evaluation. For an exact likelihood, `chain_rule` describes the order of the tokens."""
    what = "order" if chain_rule else "draw"
    draws = f" x {found.draws} {what}{'' if found.draws == 1 else 's'}"
    weights = ", moving average" if found.ema_weights else ""
    table = Table(
        title=f"step {found.step}{weights}: {len(found.rows):,} rows, {found.tokens:,} tokens{draws}",
        show_header=False,
    )
    error = "" if found.standard_error is None else f" ± {found.standard_error / math.log(2):.4f}"
    kind = (chain_rule or "negative ELBO") + (", ± standard error over rows" if error else "")
    table.add_row("bits per token", f"{found.bits_per_token:.4f}{error} ({kind})")
    table.add_row("nats per token", f"{found.nats_per_token:.4f}")
    if found.monte_carlo_error is not None:
        source = "± from the random orders" if chain_rule else "± from the random masks"
        table.add_row(source, f"{found.monte_carlo_error / math.log(2):.4f} bits per token")
    if found.bits_per_byte is not None:
        table.add_row("bits per byte", f"{found.bits_per_byte:.4f}")
    table.add_row("perplexity", f"{found.perplexity:.3f}")
    table.add_row("training loss", f"{found.loss:.4f}")
    table.add_row("accuracy" if chain_rule else "accuracy at masked positions", f"{found.accuracy:.1%}")
    if found.losses.critic_loss is not None and found.critic_accuracy is not None:
        table.add_row("critic", f"loss {found.losses.critic_loss:.4f}, {found.critic_accuracy:.1%} correct")
    for part in found.by_masked_fraction:
        if part.accuracy is not None and part.nats_per_masked_token is not None:
            table.add_row(
                f"masked {part.low:.0%} – {part.high:.0%}",
                f"{part.nats_per_masked_token / math.log(2):.3f} bits per masked token, "
                f"{part.accuracy:.1%} correct",
            )
    return table


def checkpoint_table(found: list[CheckpointInfo]) -> Table:
    """The table of checkpoints, one per row."""
    table = Table("name", "step", "lineage", "size", "saved (UTC)", "score")
    for info in found:
        size, saved = f"{info.size_bytes / 1e6:.1f} MB", f"{info.created:%Y-%m-%d %H:%M:%S}"
        score = "" if info.score is None else f"{info.score:.4f}"
        table.add_row(info.name, str(info.step), str(info.lineage), size, saved, score)
    return table


def seconds_left(found: Status, until_step: int | None) -> float | None:
    """Estimate the seconds until a step, at the speed of the last minute; None if that is not possible."""
    if until_step is None:
        return None
    steps = max(0, until_step - found.step)
    return steps / found.steps_per_second if found.steps_per_second else (None if steps else 0.0)


def status_table(found: Status, until_step: int | None = None) -> Table:
    """The table of a run's status; with `until_step`, also the estimated time until that step."""
    table = Table(show_header=False)
    waiting = f", waiting for {found.waiting_for}" if found.waiting_for else ""
    table.add_row("state", f"{found.state.name} since {found.state_since:%Y-%m-%d %H:%M:%S} UTC{waiting}")
    table.add_row("run", f"{found.run_id}, lineage {found.lineage}")
    table.add_row("step", f"{found.step} ({found.durable_step} durable), digest {found.digest.hex()[:16]}")
    speed = f"{found.steps_per_second:.2f} steps/s, {found.tokens_per_second:,.0f} tokens/s"
    table.add_row("speed (last minute)", speed)
    if until_step is not None:
        left = seconds_left(found, until_step)
        words = "unknown: nothing was trained in the last minute" if left is None else f"{left:,.0f} s"
        table.add_row(f"time to step {until_step}", words)
    _add_figures(table, found.figures)
    table.add_row("queue", f"{found.queue_length} of {found.queue_limit} requests")
    sessions = f"{found.epoch} session{'' if found.epoch == 1 else 's'} so far"
    table.add_row("writer", f"{found.writer} (epoch {found.epoch})" if found.writer else f"none ({sessions})")
    if found.model is not None:
        table.add_row("model", f"{found.model.parameters:,} parameters, {found.model.objective}")
    if found.tokenizer:
        table.add_row("tokenizer", found.tokenizer)
    if found.data:
        parts = (f"{name} {value}" for name, value in sorted(found.data.items()) if name != "content")
        table.add_row("data", ", ".join(parts))
    if found.newest_checkpoint is not None:
        table.add_row("checkpoint", f"{found.newest_checkpoint.name}, step {found.newest_checkpoint.step}")
    if found.inexact_replays:
        table.add_row("inexact replays", _inexact(found))
    if found.mirror is not None:
        table.add_row("mirror", _mirror(found.mirror))
    if found.last_error:
        table.add_row("last error", found.last_error)
    if found.versions.get("world_size", "1") != "1":
        table.add_row("ranks", f"{found.versions['world_size']} (copies x ranks of each)")
    table.add_row("versions", ", ".join(f"{name} {value}" for name, value in sorted(found.versions.items())))
    return table


def _add_figures(table: Table, figures: RunFigures) -> None:
    """Add the rows of a run's counters and times; those without a value are left out."""
    newest = figures.newest_step
    if newest is not None:
        norm = "" if newest.gradient_norm is None else f", gradient norm {newest.gradient_norm:.3g}"
        words = f"loss {newest.losses.loss:.4f}{norm}, learning rate {newest.learning_rate:.3g}"
        table.add_row(f"step {newest.step}", words)
    times = {
        "in the queue": figures.queue_seconds,
        "computed": figures.compute_seconds,
        "until durable": figures.commit_seconds,
    }
    shown = [f"{1000 * value:.1f} ms {what}" for what, value in times.items() if value is not None]
    if shown:
        table.add_row("times (last minute)", ", ".join(shown))
    lost = {outcome: count for outcome, count in figures.steps.items() if outcome != "APPLIED"}
    for name, counts in (
        ("steps not applied", lost),
        ("refused calls", figures.refused_calls),
        ("telemetry lost", {key: count for key, count in figures.events_dropped.items() if count}),
    ):
        if counts:
            table.add_row(name, ", ".join(f"{count} {key}" for key, count in sorted(counts.items())))


def _mirror(mirror: MirrorStatus) -> str:
    words = f"step {mirror.step} in {mirror.address}, {mirror.seconds_since_segment:,.0f} s ago"
    words += f", checkpoint {mirror.checkpoint}" if mirror.checkpoint else ""
    words += f"; cannot be written: {mirror.problem}" if mirror.problem else ""
    return words + (f"; restored at {mirror.restored}" if mirror.restored else "")


def _inexact(found: Status) -> str:
    newest = found.inexact_replays[-3:]
    words = [
        f"steps {replay.first_step} to {replay.last_step} (lineage {replay.lineage}"
        f"{', accepted' if replay.accepted else ''})"
        for replay in newest
    ]
    more = len(found.inexact_replays) - len(newest)
    return ", ".join(words) + (f", and {more} earlier" if more else "")


def show(value: Any, as_json: bool, words: Callable[[], str | Table]) -> None:
    """Print a value as JSON, or as the text or table that `words` returns.

    If formatting fails, the value is printed in plain form and OutputError is raised.
    """
    failure: Exception | None = None
    try:
        text = json.dumps(to_json(value)) if as_json else _text(words())
    except Exception as error:  # whatever failed, the result exists and must be printed
        text, failure = _plain(value), error
    print(text, flush=True)
    if failure is not None:
        raise OutputError(
            f"the result above is printed in plain form, because formatting it failed "
            f"({type(failure).__name__}: {failure}); please report this"
        ) from failure


def _text(shown: str | Table) -> str:
    if isinstance(shown, str):
        return shown
    console = Console(highlight=False)
    with console.capture() as captured:
        console.print(shown)
    return captured.get().rstrip("\n")


def _plain(value: Any) -> str:
    try:
        return json.dumps(to_json(value), default=str)
    except Exception:
        return repr(value)


def to_json(value: Any) -> Any:
    """Convert a value for JSON: bytes to hex, enums to names, non-finite numbers to null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
