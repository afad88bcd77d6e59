"""P4, P5 and P6: a training step beside x-transformers' wrapper, and beside what the machine can multiply."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from statistics import median

from bench.harness import Row, module, ratio

SIZES = {  # rows, columns, dim, depth, heads, vocabulary, target
    "vocabulary 257": (32, 128, 256, 4, 4, 257, 1.15),
    "vocabulary 8,193": (32, 128, 256, 4, 4, 8193, 1.8),
    "vocabulary 32,769": (16, 128, 256, 4, 4, 32769, 2.2),
    "6 × 512, rows of 512": (4, 512, 512, 6, 8, 257, 1.25),
}
LARGE, WIDE = "vocabulary 32,769", "6 × 512, rows of 512"


def measure(quick: bool) -> list[Row]:
    """The rows of P4, P5 and P6."""
    there = importlib.util.find_spec("x_transformers") is not None
    rows: list[Row] = []
    for name, (count, columns, dim, depth, heads, tokens, target) in SIZES.items():
        speed = Row("P4", f"tokens per second trained ÷ x-transformers', {name}", f"≥ {target}", None)
        memory = Row("P5", f"peak resident memory ÷ x-transformers', {name}", "≤ 0.6", None)
        mine, theirs, products = [], [], []
        steps = 4 if quick else 12
        for _ in range(1 if quick else 4):
            settings = [
                f"model.dim={dim}", f"model.depth={depth}", f"model.heads={heads}",
                f"model.max_seq_len={columns}", f"model.num_tokens={tokens}", f"model.mask_id={tokens - 1}",
            ]  # fmt: skip
            mine.append(run("inprocess", steps, count, columns, *settings))
            if there:
                theirs.append(run("peer_inprocess", steps, count, columns, dim, depth, heads, tokens))
            if name == WIDE:
                products.append(product_rate())
        if theirs:
            ratio(speed, speeds(mine), speeds(theirs), at_least=target)
            speed.parts = {
                "tokens/s": median(speeds(mine)) * count * columns,
                "tokens/s, x-transformers": median(speeds(theirs)) * count * columns,
            }
            ratio(memory, peaks(mine), peaks(theirs), at_most=0.6)
            memory.parts = {"MiB": median(peaks(mine)), "MiB, x-transformers": median(peaks(theirs))}
        else:
            speed.note = memory.note = 'not measured: pip install "maskwire[bench]"'
        if name != LARGE:
            memory.target, memory.met = "", None
        rows += [speed, memory]
        if products:
            flops = [
                found["steps_per_second"]
                * step_flops(count, columns, dim, depth, heads, tokens, found["masked"])
                for found in mine
            ]
            row = Row(
                "P6", f"FLOP/s of a whole step ÷ the machine's fp32 matrix products, {name}", "≥ 0.85", None
            )
            row.parts = {"GFLOP/s": median(flops) / 1e9, "GFLOP/s, products": median(products) / 1e9}
            rows.append(ratio(row, flops, products, at_least=0.85))
    return rows


def run(name: str, *arguments: object) -> dict[str, float]:
    """What a process of its own measured."""
    done = subprocess.run(module(name, *arguments), capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def speeds(found: list[dict[str, float]]) -> list[float]:
    """Steps per second."""
    return [each["steps_per_second"] for each in found]


def peaks(found: list[dict[str, float]]) -> list[float]:
    """MiB."""
    return [each["peak_mib"] for each in found]


def step_flops(
    rows: int, columns: int, dim: int, depth: int, heads: int, tokens: int, masked: float
) -> float:
    """Multiplications and additions of a step: forward once, backward twice as much.

    A block of width d and inner width i = 64 h has 4 d i weights of attention and 8 d² of feed-forward: 2
    FLOP each and a token. Scores and their use take 4 n i a token. The projection's d V are only computed
    where something is masked.
    """
    inner = 64 * heads
    per_token = depth * (2 * (4 * dim * inner + 8 * dim * dim) + 4 * columns * inner)
    return 3 * (rows * columns * per_token + masked * 2 * dim * tokens)


def product_rate() -> float:
    """FLOP/s of large fp32 matrix products."""
    code = (
        "import time, torch; n = 2048; a, b = torch.rand(n, n), torch.rand(n, n); a @ b;"
        "t = time.perf_counter(); [a @ b for _ in range(20)];"
        "print(20 * 2 * n ** 3 / (time.perf_counter() - t))"
    )
    done = subprocess.run([*module("x")[:1], "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)
