"""`maskwire generate`: sample text, or fill gaps in a text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.live import Live

from maskwire.cli.display import show, to_json
from maskwire.cli.generation_text import Prompt, decode_row, plain_rows, read_prompts, render_rows
from maskwire.cli.options import Json, ServerConnection, with_server
from maskwire.data.tokenizer_codec import TextCodec, codec_of
from maskwire.errors import UnavailableError
from maskwire.nonfatal_output import tell
from maskwire.results import GenerateResult, ModelInfo

_FRAMES_PER_SECOND = 12


_PROMPTS = "What to generate"
_SAMPLING = "Sampling"


@with_server(retry_for=60.0)
def generate(
    server: ServerConnection,
    count: Annotated[
        int, typer.Option(help="Number of rows; with prompts, rows per prompt.", rich_help_panel=_PROMPTS)
    ] = 1,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens per row. By default the longest row that the model takes, or the length of a prompt "
            "with gaps. Shorter prompts are extended with gaps.",
            rich_help_panel=_PROMPTS,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Text with gaps to fill, such as 'once upon a ~~~~'; a text without a gap is continued. For "
            "models of bytes, and runs that keep their tokenizer. May be repeated.",
            show_default=False,
            rich_help_panel=_PROMPTS,
        ),
    ] = None,
    prompt_ids: Annotated[
        list[str] | None,
        typer.Option(
            help="Comma-separated token ids and gaps, such as '7,~,9'. For any model. May be repeated.",
            show_default=False,
            rich_help_panel=_PROMPTS,
        ),
    ] = None,
    gap: Annotated[
        str,
        typer.Option(
            help="The character that marks one token to fill, in prompts.", rich_help_panel=_PROMPTS
        ),
    ] = "~",
    steps: Annotated[
        int,
        typer.Option(
            help="Number of unmasking passes. 0 unmasks one token per pass.", rich_help_panel=_SAMPLING
        ),
    ] = 0,
    order: Annotated[
        str,
        typer.Option(
            help="Order in which tokens are unmasked: random, confidence, margin, entropy or critic.",
            rich_help_panel=_SAMPLING,
        ),
    ] = "random",
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Sampling temperature of every pass. 0 takes the most probable token. By default 1, without "
            "--start-temperature.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    start_temperature: Annotated[
        float | None,
        typer.Option(
            help="Sampling temperature that falls to 0 over the passes, in place of --temperature: it is "
            "multiplied by 1 - s/S in pass s of S.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    filter_thres: Annotated[
        float | None,
        typer.Option(
            help="Share of the vocabulary to drop: 0.7 samples from the most probable 30% of the tokens.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    top_k: Annotated[
        int,
        typer.Option(help="Sample from the k most probable tokens. 0 means all.", rich_help_panel=_SAMPLING),
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            help="Sample from the most probable tokens that have this total probability.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 1.0,
    choice_temperature: Annotated[
        float | None,
        typer.Option(
            help="Temperature of the noise on --order. By default the one of the objective's preset.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    remasking: Annotated[
        bool,
        typer.Option(
            "--remasking",
            help="Mask the lowest-ranked tokens again in each pass. Needs --order confidence or critic.",
            rich_help_panel=_SAMPLING,
        ),
    ] = False,
    self_cond_mode: Annotated[
        str,
        typer.Option(
            help="Self-conditioning: two_pass, as in training and evaluation, or carry, which reuses the "
            "previous pass.",
            rich_help_panel=_SAMPLING,
        ),
    ] = "two_pass",
    raw_weights: Annotated[
        bool,
        typer.Option(
            "--raw-weights",
            help="Use the trained weights, even if the run keeps a moving average.",
            rich_help_panel=_SAMPLING,
        ),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the first row; each further row uses the next number.", rich_help_panel=_SAMPLING
        ),
    ] = 0,
    row_seed: Annotated[
        list[int] | None,
        typer.Option(
            help="Seed of a row, in place of --seed. Repeat it once per row.",
            show_default=False,
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Sample text from the model, or fill the gaps in a prompt.

    The run is not changed. On a terminal, the text appears as it is unmasked.

    The default sampling options sample the distribution that `maskwire eval`
    evaluates. Other values of --order, --steps, --temperature,
    --start-temperature, --filter-thres, --top-k and --top-p are heuristics.
    """
    if count < 1:
        raise ValueError(f"--count must be at least 1, got {count}")
    with server.attach() as client:
        status = client.status()
        if status.model is None:
            raise UnavailableError("the server is still building the model; run the command again later")
        model = status.model
        codec = codec_of(model, client.tokenizer_of_run())
        given = read_prompts(prompt or [], prompt_ids or [], gap=gap, length=length, model=model, codec=codec)
        rows = [each for each in given for _ in range(count)]
        options: dict[str, Any] = {
            "steps": steps,
            "order": order,
            "temperature": temperature,
            "start_temperature": start_temperature,
            "filter_thres": filter_thres,
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
            states = client.generate_steps(prompts, **options)
            found, seen = _live(states, rows, model, codec, console)
        _show(found, model, codec, as_json, seen=seen)


def _live(
    states: Iterator[GenerateResult],
    rows: list[Prompt],
    model: ModelInfo,
    codec: TextCodec | None,
    console: Console,
) -> tuple[GenerateResult, bool]:
    """Show the rows while they are unmasked. Returns the final result, and whether it was shown."""
    shown, seen = 0.0, True
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for found in states:
            now = time.monotonic()
            if seen and (found.done or now - shown >= 1 / _FRAMES_PER_SECOND):
                shown = now
                try:
                    live.update(render_rows(found, rows, model, codec), refresh=True)
                except Exception:  # showing is optional: the rows are printed at the end instead
                    seen = False
    return found, seen


def _show(
    found: GenerateResult, model: ModelInfo, codec: TextCodec | None, as_json: bool, *, seen: bool
) -> None:
    def texts() -> list[str | None]:
        return [decode_row(row, model, codec) for row in found.tokens]

    def words() -> str:
        pairs = zip(found.tokens, texts(), strict=True)
        return plain_rows([" ".join(map(str, row)) if text is None else text for row, text in pairs])

    if as_json:
        show(to_json(found) | {"text": texts()}, True, words)
        return
    if not seen:
        show(found, False, words)
    weights = "moving average" if found.ema_weights else "trained weights"
    passes = "pass" if found.unmasking_step == 1 else "passes"
    digest = found.digest.hex()[:16]
    tell(f"step {found.step} ({weights}), {found.unmasking_step} {passes}, digest {digest}")
