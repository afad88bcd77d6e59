"""`maskwire generate`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.live import Live

from maskwire.cli.display import show, to_json
from maskwire.cli.generation_text import Prompt, read_prompts, rows_of, text_of, to_display
from maskwire.cli.options import Json, Server, with_server
from maskwire.errors import UnavailableError
from maskwire.output import tell
from maskwire.results import GenerateResult, ModelInfo

_FRAMES_A_SECOND = 12


@with_server(retry_for=60.0)
def generate(
    server: Server,
    count: Annotated[int, typer.Option(help="Rows; with prompts, rows of each.")] = 1,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens a row, the model's longest by default; a prompt that is shorter goes on in gaps."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Text with gaps, for a model of bytes; give it again for more.", show_default=False
        ),
    ] = None,
    prompt_ids: Annotated[
        list[str] | None,
        typer.Option(help="The same for any model: ids and gaps, with commas.", show_default=False),
    ] = None,
    gap: Annotated[str, typer.Option(help="What stands for one unknown token in prompts.")] = "~",
    steps: Annotated[int, typer.Option(help="Unmasking passes; 0 for one token a pass.")] = 0,
    order: Annotated[str, typer.Option(help="random, confidence, margin, entropy or critic.")] = "random",
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample among so many most probable tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among those of this total probability.")] = 1.0,
    choice_temperature: Annotated[
        float | None, typer.Option(help="Of the noise on the order; the preset's by default.")
    ] = None,
    remasking: Annotated[
        bool, typer.Option("--remasking", help="Mask again what ranks lowest; with confidence or critic.")
    ] = False,
    self_cond_mode: Annotated[str, typer.Option(help="two_pass, as evaluated, or carry.")] = "two_pass",
    raw_weights: Annotated[
        bool, typer.Option("--raw-weights", help="Not the moving average's, if one is kept.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the first row; the next has the next.")] = 0,
    row_seed: Annotated[
        list[int] | None, typer.Option(help="One a row, in place of --seed.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Sample rows, or fill gaps in; on a terminal the text fills in as it is unmasked. Changes nothing.

    Only the defaults of --order, --steps, --temperature, --top-k and --top-p sample the model that `eval`
    evaluates; everything else is a heuristic.
    """
    if count < 1:
        raise ValueError(f"--count must be at least 1, got {count}")
    with server.attach() as client:
        status = client.status()
        if status.model is None:
            raise UnavailableError("the server is building the model; run the command again in a moment")
        model = status.model
        given = read_prompts(prompt or [], prompt_ids or [], gap=gap, length=length, model=model)
        rows = [each for each in given for _ in range(count)]
        options: dict[str, Any] = {
            "steps": steps,
            "order": order,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "choice_temperature": choice_temperature,
            "remasking": remasking,
            "self_cond_mode": self_cond_mode,
            "raw_weights": raw_weights,
            "seed": seed,
            "row_seeds": row_seed or [],
        }
        prompts = None if not rows else [np.array(row.ids) for row in rows]
        if not rows:
            options |= {"count": count, "length": length or 0}
        console = Console(highlight=False)
        if as_json or not console.is_terminal:
            found, seen = client.generate(prompts, **options), False
        else:
            found, seen = _live(client.generate_steps(prompts, **options), rows, model, console)
        _show(found, model, as_json, seen=seen)


def _live(
    states: Iterator[GenerateResult], rows: list[Prompt], model: ModelInfo, console: Console
) -> tuple[GenerateResult, bool]:
    """Show the rows filling in; the last state, and whether it was shown."""
    shown, seen = 0.0, True
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for found in states:
            now = time.monotonic()
            if seen and (found.done or now - shown >= 1 / _FRAMES_A_SECOND):
                shown = now
                try:
                    live.update(to_display(found, rows, model), refresh=True)
                except Exception:  # the rows are sampled all the same, and then printed
                    seen = False
    return found, seen


def _show(found: GenerateResult, model: ModelInfo, as_json: bool, *, seen: bool) -> None:
    def texts() -> list[str | None]:
        return [text_of(row, model) for row in rows_of(found)]

    def words() -> str:
        return "\n".join(
            " ".join(map(str, row)) if text is None else text
            for row, text in zip(rows_of(found), texts(), strict=True)
        )

    if as_json:
        show(to_json(found) | {"text": texts()}, True, words)
        return
    if not seen:
        show(found, False, words)
    weights = "moving average" if found.ema_weights else "trained weights"
    tell(f"step {found.step} ({weights}), {found.unmasking_step} passes, digest {found.digest.hex()[:16]}")
