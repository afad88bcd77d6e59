"""M1 and M2: models of other libraries, trained by maskwire and as their libraries' users train them."""

from __future__ import annotations

import importlib.util
from statistics import median

from bench.harness import Row, ratio
from bench.peer import Found, run

LIBRARIES = {
    "x-transformers": (
        "x_transformers",
        "an x-transformers encoder ÷ its NonAutoregressiveWrapper in a loop",
    ),
    "huggingface": ("transformers", "ModernBERT ÷ Hugging Face's Trainer with a masked diffusion loss"),
}
SIZES = {"vocabulary 257": (32, 128, 257), "vocabulary 30,000": (16, 128, 30_000)}  # rows, columns, ids
LARGE = "vocabulary 30,000"


def measure(quick: bool) -> list[Row]:
    """The rows of both libraries."""
    rows = []
    for library, (package, what) in LIBRARIES.items():
        for size, (count, columns, tokens) in SIZES.items():
            speed = Row("M1", f"tokens per second trained, {what}, {size}", "≥ 1.0", None)
            target = "≤ 0.8" if size == LARGE else ""
            memory = Row("M2", f"peak resident memory, {what}, {size}", target, None)
            rows += [speed, memory]
            if importlib.util.find_spec(package) is None:
                speed.note = memory.note = f'not measured: pip install "maskwire[{library}]"'
                continue
            arguments = (library, 3 if quick else 5, count, columns, tokens)
            mine: list[Found] = []
            theirs: list[Found] = []
            for _ in range(1 if quick else 3):
                mine.append(run("foreign_steps", "maskwire", *arguments))
                theirs.append(run("foreign_steps", "library", *arguments))
            ours, others = ([each["median_steps_per_second"] for each in found] for found in (mine, theirs))
            each_step = count * columns
            speed.parts = {
                "tokens/s": median(ours) * each_step,
                "tokens/s, theirs": median(others) * each_step,
            }
            ratio(speed, ours, others, at_least=1.0)
            ours, others = ([each["peak_mib"] for each in found] for found in (mine, theirs))
            memory.parts = {"MiB": median(ours), "MiB, theirs": median(others)}
            ratio(memory, ours, others, at_most=0.8)
            if not target:
                memory.met = None
    return rows
