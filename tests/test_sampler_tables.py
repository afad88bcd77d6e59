"""The comparison of samplers: its tasks, its scores and its tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from bench import sampling
from demo.fourgram import FourGram
from maskwire_server.batch import Prompts
from maskwire_server.results import GenerateOptions, GenerationState, Order


def test_held_out_sums_and_their_mirror_images_are_not_trained_on() -> None:
    questions, batch_of = sampling.addition()
    texts = ["".join(sampling.SYMBOLS[symbol] for symbol in row) for row in questions.tokens]
    sums = set()
    for text in texts:
        one, _, two = text[: sampling.ADDENDS - 1].partition("+")
        assert text == f"{one}+{two}={str(int(one) + int(two)).ljust(sampling.ANSWER, '.')}"
        sums.add((one, two))
    assert {(two, one) for one, two in sums} == sums
    seen = batch_of(np.random.default_rng(0), 20_000)
    assert len(np.unique(seen.ids, axis=0)) > 7000
    assert not {row.tobytes() for row in questions.tokens.astype(np.uint8)} & {
        row.tobytes() for row in seen.ids
    }
    _, _, prompt = seen.dense(None)
    assert prompt[0].tolist() == [True] * sampling.ADDENDS + [False] * sampling.ANSWER


def test_a_sorted_list_is_behind_its_list() -> None:
    questions, batch_of = sampling.sorting()
    rows = np.concatenate([questions.tokens, batch_of(np.random.default_rng(5), 10).dense(None)[0]])
    assert (np.sort(rows[:, : sampling.DIGITS], 1) == rows[:, sampling.DIGITS + 1 :]).all()


def test_exact_answers_are_counted_and_repetition_is_seen() -> None:
    questions, _ = sampling.sorting()

    class Knows:
        def generate(self, prompts: Prompts, options: GenerateOptions) -> Iterator[GenerationState]:
            ids = questions.tokens.copy()
            if options.order is Order.RANDOM:
                ids[::4, -1] += 1
            assert (prompts.ids[:, sampling.DIGITS + 1 :] == 0).all(), "the answer is not told"
            yield GenerationState(ids, (0,) * len(ids), options.steps)

    found = sampling.ask(Knows(), sampling.TASKS["sorting"], questions)  # type: ignore[arg-type]
    assert found["random order, temperature 1"] == [0.75] * 4
    assert found["confidence, temperature 1"] == [1.0] * 4
    model = FourGram([b"for name in names:\n" * 9])
    same, other = (
        sampling.scores(model, [b"for name"] * 8),
        sampling.scores(model, [b"for name", b"#~{}!?@^"]),
    )
    assert same[0] < other[0]
    assert (same[1], other[1]) == (5 / 40, 1.0)


def test_each_task_fills_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    files = sampling.python_sources()[:30]
    monkeypatch.setattr(sampling, "python_sources", lambda: files)
    monkeypatch.setattr(sampling, "TEXTS", dict(list(sampling.TEXTS.items())[::4]))
    for name, passes in (("sorting", (2, 1)), ("text", (2,))):
        monkeypatch.setattr(sampling, "SAMPLES", 2)
        monkeypatch.setattr(sampling, "LISTS", 4)
        task = replace(sampling.TASKS[name], steps=2, rows=4, passes=passes)
        monkeypatch.setitem(sampling.TASKS, name, task)
        result = sampling.measure(name, task)
        page = sampling.with_tables(f"head\n{sampling.BEGIN}old\n{sampling.END}tail\n", {name: result})
        assert page.startswith(f"head\n{sampling.BEGIN}")
        assert page.endswith(f"{sampling.END}tail\n")
        rows = [line for line in page.splitlines() if line.startswith("| ")]
        assert len(rows) == 1 + len(result["found"])
        assert {row.count("|") for row in rows} == {2 + len(passes)}
        assert "old" not in page
