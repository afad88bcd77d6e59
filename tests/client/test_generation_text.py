"""Prompts with gaps, and sampled rows as a terminal shows them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from maskwire.cli.generation_text import MASKED, decode_row, plain_rows, read_prompts, render_rows
from maskwire.data.tokenizer_codec import ByteCodec, FileCodec
from maskwire.results import GenerateResult, ModelInfo
from maskwire.v1.values import TokenizerDescription

BYTES = ModelInfo(257, 256, None, 64, 1, "", True, False)
WORDS = ModelInfo(1000, 999, None, 64, 1, "", True, False)


def test_a_gap_is_one_token_and_text_becomes_its_bytes() -> None:
    (prompt,) = read_prompts(["é~a~~"], [], gap="~", length=8, model=BYTES, codec=ByteCodec())
    assert prompt.ids == (0xC3, 0xA9, 256, 97, 256, 256, 256, 256)
    for length, words in (
        (2, "at least 3, the length of the longest prompt, got 2"),
        (65, "1 to 64"),
        (0, "1 to 64"),
    ):
        with pytest.raises(ValueError, match=words):
            read_prompts(["abc"], [], gap="~", length=length, model=BYTES, codec=ByteCodec())


def test_models_without_bytes_take_prompts_of_ids() -> None:
    (prompt,) = read_prompts([], ["1,~ , 7"], gap="~", length=None, model=WORDS, codec=None)
    assert prompt.ids == (1, 999, 7)
    with pytest.raises(ValueError, match="num_tokens 1000, mask_id 999, and the run keeps no tok"):
        read_prompts(["a"], [], gap="~", length=None, model=WORDS, codec=None)
    assert decode_row(np.array([1]), WORDS, None) is None


def shown(rows: list[list[int]], model: ModelInfo) -> str:
    mask = tuple(row.count(model.mask_id) for row in rows)
    arrays = [np.array(row) for row in rows]
    found = GenerateResult(arrays, 2, not any(mask), mask, 0, b"", False)
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    codec = ByteCodec() if model is BYTES else None
    prompts = read_prompts(
        ["a~~~"] * len(rows) if codec else [], [], gap="~", length=None, model=model, codec=codec
    )
    console.print(render_rows(found, prompts, model, codec))
    out: str = console.file.getvalue()  # type: ignore[attr-defined]
    return out


def test_masked_tokens_are_shown_as_blocks() -> None:
    out = shown([[97, 256, 98, 256], [97, 99, 100, 101]], BYTES)
    assert out.splitlines() == [f"a{MASKED}b{MASKED}", "acde", "pass 2, 2 masked"]
    assert shown([[7, 999, 8]], WORDS).splitlines()[0].split() == ["7", MASKED, "8"]


def test_rows_of_several_lines_are_told_apart() -> None:
    assert plain_rows(["a\nb", "c"]) == "--- row 1 ---\na\nb\n--- row 2 ---\nc"
    assert plain_rows(["a", "b"]) == "a\nb", "so that scripts read one row per line"
    assert plain_rows(["a\nb"]) == "a\nb"
    out = shown([[97, 10, 98, 99], [97, 99, 100, 101]], BYTES)
    assert out.splitlines()[:5] == ["--- row 1 ---", "a", "bc", "--- row 2 ---", "acde"]


def test_a_sampled_escape_sequence_does_not_reach_the_terminal() -> None:
    out = shown([[97, 0x1B, 0x5B, 0x48]], BYTES)
    assert "\x1b" not in out
    assert out.startswith("a·[H")


def test_bytes_that_are_not_utf8_are_replaced() -> None:
    assert decode_row(np.array([97, 0xC3, 256, 0xA9]), BYTES, ByteCodec()) == f"a\ufffd{MASKED}\ufffd"


def codec_of_words(words: list[str], decoder: str) -> FileCodec:
    """A codec of these tokens, each with its place as its id."""
    tokenizers = pytest.importorskip("tokenizers")
    loaded = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: id_ for id_, word in enumerate(words)}, unk_token=words[0])
    )
    loaded.decoder = getattr(tokenizers.decoders, decoder)()
    return FileCodec(TokenizerDescription("words.json", loaded.to_str().encode()))


@pytest.mark.parametrize(
    ("decoder", "words"),
    [
        ("Metaspace", ["▁the", "▁cat", "s", "▁sat"]),
        ("WordPiece", ["the", "cat", "##s", "sat"]),
        ("ByteLevel", ["the", "Ġcat", "s", "Ġsat"]),
    ],
)
def test_spaces_before_words_are_shown_wherever_a_part_begins(decoder: str, words: list[str]) -> None:
    text = f"the cats{MASKED} sats{MASKED}s"
    codec = codec_of_words(words, decoder)
    row = np.array([0, 1, 2, 999, 3, 2, 999, 2])
    assert decode_row(row, WORDS, codec) == text
    found = GenerateResult([row], 1, False, (2,), 0, b"", False)
    (prompt,) = read_prompts([], ["0,1,~,~,3,~,~,2"], gap="~", length=None, model=WORDS, codec=None)
    console = Console(file=io.StringIO(), width=80)
    console.print(render_rows(found, [prompt], WORDS, codec))
    assert console.file.getvalue().splitlines()[0] == text  # type: ignore[attr-defined]
