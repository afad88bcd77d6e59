"""Text for generation: parse prompts with gaps, and render sampled rows for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.console import Group
from rich.text import Text

from maskwire.cli.options import row_length
from maskwire.data.tokenizer_codec import TextCodec
from maskwire.results import GenerateResult, ModelInfo

MASKED = "░"


@dataclass(frozen=True)
class Prompt:
    """A row to fill: its ids, with the mask id in the gaps."""

    ids: tuple[int, ...]


def read_prompts(
    texts: Sequence[str],
    lists: Sequence[str],
    *,
    gap: str,
    length: int | None,
    model: ModelInfo,
    codec: TextCodec | None,
) -> list[Prompt]:
    """Parse texts and lists of ids as prompts, and extend each with gaps up to `length` tokens.

    If no length is given, a text without a gap is extended to the longest row of the model. Raises ValueError
    for a text if `codec` is None, for a length that the model does not take or that is too short for a
    prompt, and for a malformed list of ids.
    """
    if len(gap) != 1:
        state = "be one character" if gap else "not be empty"
        raise ValueError(f"--gap must {state}, got {gap!r}: give the character that marks a token to fill")
    if texts and codec is None:
        raise ValueError(
            "--prompt needs a model of bytes (num_tokens 257, mask_id 256) or a run that keeps its "
            f"tokenizer, but the model has num_tokens {model.num_tokens}, mask_id {model.mask_id}, and the "
            "run keeps no tokenizer; give token ids with --prompt-ids"
        )
    longest_row = row_length(length, model)
    rows = [] if codec is None else [_from_text(text, gap, model.mask_id, codec) for text in texts]
    for row in rows:
        if length is None and model.mask_id not in row:
            row += [model.mask_id] * (longest_row - len(row))
    rows += [_from_list(words, gap, model.mask_id) for words in lists]
    longest = max((len(row) for row in rows), default=0)
    if length is not None and longest > length:
        raise ValueError(
            f"--length must be at least {longest}, the length of the longest prompt, got {length}"
        )
    return [Prompt((*row, *[model.mask_id] * ((length or 0) - len(row)))) for row in rows]


def _from_text(text: str, gap: str, mask_id: int, codec: TextCodec) -> list[int]:
    if not text:
        raise ValueError("--prompt must not be empty; leave out --prompt to sample without a prompt")
    ids = list(codec.start)
    for place, part in enumerate(text.split(gap)):
        ids += [mask_id] * bool(place)
        ids += codec.encode(part, continued=place > 0) if part else []
    return ids


def _from_list(words: str, gap: str, mask_id: int) -> list[int]:
    try:
        ids = [mask_id if word.strip() == gap else int(word) for word in words.split(",")]
        if max(map(abs, ids)) >= 2**63:
            raise ValueError
        return ids
    except ValueError:
        raise ValueError(
            f"--prompt-ids must be comma-separated ids and gaps ({gap}), such as '7,{gap},9', got {words!r}"
        ) from None


def decode_row(row: npt.NDArray[np.int64], model: ModelInfo, codec: TextCodec | None) -> str | None:
    """Decode a row of ids as text, up to the id that ends a text. Returns None if `codec` is None."""
    if codec is None:
        return None
    begin = len(codec.start) if tuple(row[: len(codec.start)]) == codec.start else 0
    row = row[begin:]
    if codec.end and (ends := np.flatnonzero(row == codec.end[-1])).size:
        row = row[: ends[0]]
    parts, start = [], 0
    for place in [*np.flatnonzero(row == model.mask_id), len(row)]:
        parts.append(codec.decode(row[start:place].tolist(), continued=start > 0))
        start = place + 1
    return MASKED.join(parts)


def _printable(text: str) -> str:
    """Replace unprintable characters, because a sampled escape sequence must not reach the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)


def plain_rows(rows: Sequence[str]) -> str:
    """Join sampled rows for printing. If a row has several lines, each row gets a heading."""
    if len(rows) > 1 and any("\n" in row for row in rows):
        rows = [f"{_heading(place)}\n{row}" for place, row in enumerate(rows)]
    return "\n".join(rows)


def _heading(place: int) -> str:
    return f"--- row {place + 1} ---"


def render_rows(
    found: GenerateResult, prompts: Sequence[Prompt], model: ModelInfo, codec: TextCodec | None
) -> Group:
    """Render unfinished rows: masked tokens dim, prompt tokens plain, sampled tokens bright."""
    lines = []
    first = len(codec.start) if codec is not None else 0
    for place, row in enumerate(found.tokens):
        given = np.zeros(len(row), dtype=bool)
        if prompts:
            given = np.array(prompts[place].ids) != model.mask_id
        masked = row == model.mask_id
        style = np.where(masked, 0, np.where(given, 1, 2))
        line = Text(no_wrap=False)
        ends = [*(np.flatnonzero(np.diff(style)) + 1), len(row)]
        start = 0
        for end in ends:
            part = row[start:end]
            if style[start] == 0:
                words = f"{MASKED} " * len(part) if codec is None else MASKED * len(part)
            elif codec is None:
                words = "".join(f"{id_} " for id_ in part)
            else:
                words = _printable(codec.decode(part.tolist(), continued=start > first))
            line.append(words, style=("dim", "", "bold green")[style[start]])
            start = end
        lines.append(line)
    if len(lines) > 1 and any("\n" in line.plain for line in lines):
        lines = [each for place, line in enumerate(lines) for each in (Text(_heading(place), "dim"), line)]
    left = sum(found.still_masked)
    lines.append(Text(f"pass {found.unmasking_step}, {left} masked", style="dim"))
    return Group(*lines)
