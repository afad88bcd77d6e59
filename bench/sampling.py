"""Compare samplers: text that a small model writes, and answers that it works out.

python -m bench.sampling [addition] [sorting] [text] [--steps N]

One model is trained for each task, and every sampler is run on it. Answers are exact or wrong. Text is scored
by a 4-gram model of held-out files, and by how many of its 4-grams are different: a sampler that repeats
itself scores well on the first alone. Results are kept in docs/sampling.json; the tables of docs/generate.md
are made from them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from demo.fourgram import FourGram
from demo.library import python_sources
from maskwire.data.file_data import ByteData
from maskwire_server import config
from maskwire_server.batch import Batch, Modes, Prompts
from maskwire_server.cli.init import RECIPE
from maskwire_server.results import GenerateOptions, Order
from maskwire_server.training.trainer import TorchTrainer

DOCS = Path(__file__).resolve().parent.parent / "docs"
KEPT, PAGE = DOCS / "sampling.json", DOCS / "generate.md"
BEGIN, END = "<!-- tables of bench/sampling.py -->\n", "<!-- end -->\n"
Rows = npt.NDArray[np.int64]

SYMBOLS = "0123456789+=."  # the last one ends an answer; the mask id follows
MASK_ID = len(SYMBOLS)
ADDENDS, ANSWER = 6, 4  # "12+34=" and up to three digits with an end
DIGITS, LISTS = 8, 500
LENGTH, SAMPLES, HELD_OUT = 128, 48, 0.05


@dataclass(frozen=True)
class Task:
    """What is learned, how it is trained, and the numbers of passes to sample in."""

    model: dict[str, Any]
    rows: int
    rate: float
    steps: int
    passes: tuple[int, ...]


SMALL = {"num_tokens": MASK_ID + 1, "mask_id": MASK_ID, "dim": 64, "depth": 4, "heads": 2, "dim_head": 32}
TASKS = {
    "addition": Task({**SMALL, "max_seq_len": ADDENDS + ANSWER}, 128, 8e-3, 900, (4, 2, 1)),
    "sorting": Task({**SMALL, "max_seq_len": 2 * DIGITS + 1}, 128, 8e-3, 400, (8, 4, 2, 1)),
    "text": Task(
        {**SMALL, "num_tokens": 257, "mask_id": 256, "max_seq_len": LENGTH}, 8, 8e-3, 1500, (128, 32, 8)
    ),
}
SURE = GenerateOptions((), temperature=0.0)
SAMPLED = GenerateOptions(())
CONFIDENT = replace(SAMPLED, order=Order.CONFIDENCE)
ANSWERS = {
    "random order, the most probable token": SURE,
    "random order, temperature 1": SAMPLED,
    "confidence, the most probable token": replace(SURE, order=Order.CONFIDENCE),
    "confidence, temperature 1": CONFIDENT,
    "margin, the most probable token": replace(SURE, order=Order.MARGIN),
    "entropy, the most probable token": replace(SURE, order=Order.ENTROPY),
}
TEXTS = {
    "random order, temperature 1 (the default)": SAMPLED,
    "random order, top_p 0.9": replace(SAMPLED, top_p=0.9),
    "random order, temperature 0.7": replace(SAMPLED, temperature=0.7),
    "confidence, temperature 1": CONFIDENT,
    "confidence, choice_temperature 4.5": replace(CONFIDENT, choice_temperature=4.5),
    "confidence, choice_temperature 4.5, remasking": replace(
        CONFIDENT, choice_temperature=4.5, remasking=True
    ),
    "confidence, temperature 0.7": replace(CONFIDENT, temperature=0.7),
    "margin, temperature 1": replace(SAMPLED, order=Order.MARGIN),
    "entropy, temperature 1": replace(SAMPLED, order=Order.ENTROPY),
}


def main() -> int:
    """Measure the tasks, keep the results, and rewrite the page's tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.sampling")
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []], help="default: all of them")
    parser.add_argument("--steps", type=int, help="training steps per task, instead of the task's own number")
    chosen = parser.parse_args()
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for name in chosen.tasks or TASKS:
        task = TASKS[name]
        kept[name] = measure(name, replace(task, steps=chosen.steps or task.steps))
        KEPT.write_text(json.dumps(kept, indent=0) + "\n")
        PAGE.write_text(with_tables(PAGE.read_text(), kept))
    return 0


def measure(name: str, task: Task) -> dict[str, Any]:
    """Train a model of a task, and run every sampler: {sampler: a result for each of `task.passes`}."""
    if name == "text":
        sources = ByteData(python_sources(), length=LENGTH, batch_size=task.rows)
        training, held_out = sources.split(HELD_OUT)
        trainer = trained(task, lambda step: text_batch(list(training.batch(step))))
        return {"steps": task.steps, "found": ask_for_text(trainer, task, held_out)}
    questions, batch_of = addition() if name == "addition" else sorting()
    rng = np.random.default_rng(0)
    trainer = trained(task, lambda _: batch_of(rng, task.rows))
    return {"steps": task.steps, "rows": len(questions.tokens), "found": ask(trainer, task, questions)}


def trained(task: Task, batch_of: Callable[[int], Batch]) -> TorchTrainer:
    """A model after the steps of a task, by the recipe that `maskwire-server init` writes."""
    whole = config.load(
        None,
        model={**task.model, **RECIPE["model"]},
        objective=RECIPE["objective"],
        optimizer={
            **RECIPE["optimizer"], "learning_rate": task.rate, "ema_decay": 0.99, "schedule": "cosine",
            "warmup_steps": min(50, task.steps // 10), "total_steps": task.steps,
        },
    )  # fmt: skip
    trainer = TorchTrainer(whole.model, whole.objective, whole.optimizer, whole.serve, whole.run.seed)
    for step in range(1, task.steps + 1):
        trainer.train_step(1, step, batch_of(step), Modes())
    return trainer


@dataclass(frozen=True)
class Questions:
    """Held-out rows, and which of their positions are the question."""

    tokens: Rows
    """int64 [b, n]."""
    given_n: npt.NDArray[np.bool_]
    """bool [n]."""


def encode(texts: list[str]) -> Rows:
    """Rows of symbols, int64 [b, n]."""
    return np.array([[SYMBOLS.index(symbol) for symbol in text] for text in texts])


def prompted(tokens: Rows, given_n: npt.NDArray[np.bool_]) -> Batch:
    """A batch whose questions are prompts."""
    bits = np.packbits(np.broadcast_to(given_n, tokens.shape), bitorder="little").tobytes()
    return Batch(tokens.astype(np.uint8), len(tokens), tokens.shape[1], prompt_bits=bits)


BatchOf = Callable[[np.random.Generator, int], Batch]


def addition() -> tuple[Questions, BatchOf]:
    """Sums of two numbers of two digits; 500 are held out, each with its mirror image."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, a + 1)]
    np.random.default_rng(0).shuffle(pairs)
    held_out = {pair for a, b in pairs[:252] for pair in ((a, b), (b, a))}
    training = sorted({pair for a, b in pairs[252:] for pair in ((a, b), (b, a))})

    def rows(sums: list[tuple[int, int]]) -> Rows:
        return encode([f"{a}+{b}={str(a + b).ljust(ANSWER, '.')}" for a, b in sums])

    given_n = np.arange(ADDENDS + ANSWER) < ADDENDS
    every = rows(training)
    return Questions(rows(sorted(held_out)), given_n), lambda rng, count: prompted(
        every[rng.integers(0, len(every), count)], given_n
    )


def sorting() -> tuple[Questions, BatchOf]:
    """Lists of digits, then the same in order."""
    given_n = np.arange(2 * DIGITS + 1) <= DIGITS

    def rows(rng: np.random.Generator, count: int) -> Rows:
        digits = rng.integers(0, 10, (count, DIGITS))
        equals = np.full((count, 1), SYMBOLS.index("="))
        return np.concatenate([digits, equals, np.sort(digits, 1)], 1)

    return Questions(rows(np.random.default_rng(1), LISTS), given_n), lambda rng, count: prompted(
        rows(rng, count), given_n
    )


def ask(trainer: TorchTrainer, task: Task, questions: Questions) -> dict[str, list[float]]:
    """The share of exact answers, by sampler, for each number of passes."""
    tokens = questions.tokens
    known = np.broadcast_to(questions.given_n, tokens.shape)
    prompts = Prompts(np.where(known, tokens, 0), np.ones_like(known), known)
    found: dict[str, list[float]] = {}
    for name, options in ANSWERS.items():
        found[name] = []
        for passes in task.passes:
            *_, last = trainer.generate(
                prompts, replace(options, steps=passes, row_seeds=tuple(range(len(tokens))))
            )
            found[name].append(float((last.ids == tokens).all(1).mean()))
    return found


def text_batch(texts: list[Any]) -> Batch:
    """Rows of bytes that may differ in length."""
    lengths = np.array([len(text) for text in texts], np.int32)
    return Batch(np.concatenate(texts), len(texts), int(lengths.max()), lengths)


def ask_for_text(trainer: TorchTrainer, task: Task, held_out: ByteData) -> dict[str, list[list[float]]]:
    """[bits per byte of the 4-gram model, different 4-grams / all 4-grams] by sampler; and of real text."""
    model = FourGram(path.read_bytes() for path in held_out.files)
    real = ByteData(python_sources(), length=LENGTH, batch_size=1).split(HELD_OUT)[0].spread(SAMPLES)
    found = {"text of the training files": [scores(model, [bytes(row) for row in real])]}
    for name, options in TEXTS.items():
        found[name] = []
        for passes in task.passes:
            *_, last = trainer.generate(
                Prompts.nothing(SAMPLES, LENGTH),
                replace(options, steps=passes, row_seeds=tuple(range(SAMPLES))),
            )
            found[name].append(scores(model, [bytes(map(int, row)) for row in last.ids]))
    return found


def scores(model: FourGram, texts: list[bytes]) -> list[float]:
    """Bits per byte, and the number of different 4-grams divided by that of all."""
    grams = [text[i : i + 4] for text in texts for i in range(len(text) - 3)]
    return [model.bits_per_byte(texts), len(set(grams)) / len(grams)]


def with_tables(page: str, kept: dict[str, Any]) -> str:
    """The page with the tables of the kept results."""
    lines = []
    for name, titles in (("addition", "exact sums"), ("sorting", "lists in order"), ("text", "text")):
        if name not in kept:
            continue
        passes = TASKS[name].passes
        lines += [
            f"**{name.capitalize()}**, {caption(name, kept[name])}:\n",
            "| sampler | " + " | ".join(f"{titles}, {n} pass{'es' * (n > 1)}" for n in passes) + " |",
            "|---" * (1 + len(passes)) + "|",
        ]
        for sampler, found in kept[name]["found"].items():
            cells = [cell(each) for each in found] + [""] * (len(passes) - len(found))
            lines.append(f"| {sampler} | " + " | ".join(cells) + " |")
        lines.append("")
    text = "\n".join(lines)
    head, _, rest = page.partition(BEGIN)
    return f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"


def caption(name: str, result: dict[str, Any]) -> str:
    """What a table shows."""
    if name == "text":
        return (
            f"a model of bytes, {result['steps']:,} steps: bits per byte under the 4-gram model (less is "
            "more like held-out text) / different 4-grams"
        )
    return f"{result['rows']} held-out questions, a model after {result['steps']:,} steps: exact answers"


def cell(found: Any) -> str:
    """A share in percent, or the scores of text."""
    return f"{found:.1%}" if isinstance(found, float) else f"{found[0]:.2f} / {found[1]:.0%}"


if __name__ == "__main__":
    sys.exit(main())
