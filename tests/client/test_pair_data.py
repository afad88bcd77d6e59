"""Prompts with responses: rows, masks, the end of a response, and what is sent to the server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import maskwire
from maskwire.data.file_data import FileTokens, open_data
from maskwire.data.prepare import prepare
from maskwire.protocol.evaluation_plan import EvaluationPlan
from maskwire.v1.values import TokenizerDescription

PAIRS = [("1+1=", "2"), ("12+34=", "46"), ("99+99=", "198"), ("", "none"), ("é", "e")]
FIELDS = {"prompt_field": "q", "response_field": "a"}
END = 257


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in PAIRS))
    return path


def row(pair: tuple[str, str], length: int) -> tuple[list[int], list[bool]]:
    """The ids and the prompt mask that a pair must have."""
    prompt, response = (part.encode() for part in pair)
    ids = [*prompt, *response]
    return [*ids, *[END] * (length - len(ids))], [place < len(prompt) for place in range(length)]


@pytest.mark.parametrize("prepared", [False, True])
def test_a_row_is_prompt_response_and_the_end_up_to_its_length(
    pairs: Path, tmp_path: Path, prepared: bool
) -> None:
    options: dict[str, Any] = {"length": 10, "batch_size": 8, "seed": 1}
    if prepared:
        meta = prepare(pairs, tmp_path / "out", **FIELDS)  # type: ignore[arg-type]
        assert (meta.num_tokens, meta.mask_id, meta.end_id, meta.longest) == (258, 256, END, 10)
        data = open_data(tmp_path / "out", **options)
        with pytest.raises(
            ValueError, match=r"holds prompts with responses; open it with maskwire\.open_data"
        ):
            FileTokens(tmp_path / "out", **options)
    else:
        data = open_data(pairs, **options, **FIELDS)
    assert isinstance(data, maskwire.PairData)
    assert data.tokenizer_description == TokenizerDescription("bytes", document_end=(END,))
    everything = data.evaluation_rows(None)
    expected = [row(pair, 10) for pair in PAIRS]
    assert [each.tolist() for each in everything.tokens] == [ids for ids, _ in expected]
    assert [each.tolist() for each in everything.prompt_mask] == [mask for _, mask in expected]
    seen = set()
    for step in range(1, 9):
        batch = data.batch(step)
        assert batch.tokens.shape == batch.prompt_mask.shape == (8, 10)
        for ids, mask in zip(batch.tokens.tolist(), batch.prompt_mask.tolist(), strict=True):
            assert (ids, mask) in expected
            seen.add(tuple(ids))
        again = data.batch(step)
        assert (again.tokens == batch.tokens).all()
    assert len(seen) == len(PAIRS)


def test_pairs_that_do_not_fit_are_left_out_and_reported(
    pairs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = open_data(pairs, length=1, batch_size=64, **FIELDS)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="none of the 5 pairs fits into rows of length 1: the shortest pair has 4 "
    ):
        data.batch(1)
    short = data.cropped(9)
    assert isinstance(short, maskwire.PairData)
    assert (short.too_long, short.rows) == (1, 4)
    assert not (short.batch(1).tokens == ord("9")).any()
    short.batch(2)
    assert caplog.text.count("1 of 5 pairs are longer than length 9, and are left out") == 1
    first, second = open_data(pairs, length=9, batch_size=2, **FIELDS).split(0.5)  # type: ignore[arg-type]
    assert first.documents + second.documents == 5
    assert first.batch(1).tokens.shape == (2, 9)


def test_the_prompts_are_part_of_the_fingerprint(pairs: Path, tmp_path: Path) -> None:
    data = open_data(pairs, length=10, batch_size=2, **FIELDS)  # type: ignore[arg-type]
    other = tmp_path / "b.jsonl"
    other.write_text("".join(json.dumps({"q": (q + a)[:1], "a": (q + a)[1:]}) + "\n" for q, a in PAIRS))
    moved = open_data(other, length=10, batch_size=2, **FIELDS)  # type: ignore[arg-type]
    ours, theirs = data.fingerprint(), moved.fingerprint()
    assert {name for name in ours if ours[name] != theirs[name]} == {"prompts"}


def test_an_evaluation_sends_the_prompt_mask(pairs: Path) -> None:
    data = open_data(pairs, length=10, batch_size=4, seed=3, **FIELDS)  # type: ignore[arg-type]
    plan = EvaluationPlan(data, rows=None, batch_size=None)
    request = plan._request([1, 2])
    assert np.frombuffer(request.batch.data, dtype="<u2").reshape(2, 10).tolist() == [
        row(PAIRS[number], 10)[0] for number in (1, 2)
    ]
    bits = np.unpackbits(np.frombuffer(request.batch.prompt_mask, np.uint8), bitorder="little")[:20]
    assert bits.reshape(2, 10).astype(bool).tolist() == [row(PAIRS[number], 10)[1] for number in (1, 2)]


def test_a_response_needs_an_end(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--no-special-tokens\) cannot be used with prompts and responses"):
        prepare(pairs, tmp_path / "out", special_tokens=False, **FIELDS)  # type: ignore[arg-type]


def test_a_tokenizer_puts_its_start_before_the_prompt_and_the_end_after_the_response(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<s>", "</s>", "[MASK]", *"0123456789+="]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.add_special_tokens(words[:3])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    made.save(str(tmp_path / "t.json"))
    (tmp_path / "a.jsonl").write_text('{"q": "1+2=", "a": "3"}\n{"q": "", "a": "0"}\n')
    meta = prepare(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=tmp_path / "t.json", **FIELDS)  # type: ignore[arg-type]
    assert (meta.mask_id, meta.num_tokens, meta.end_id) == (2, 15, 1)
    data = open_data(tmp_path / "out", length=8, batch_size=1)
    rows = data.evaluation_rows(None)
    assert [each.tolist() for each in rows.tokens] == [[0, 4, 13, 5, 14, 6, 1, 1], [0, 3, 1, 1, 1, 1, 1, 1]]
    assert [int(each.sum()) for each in rows.prompt_mask] == [5, 1]
