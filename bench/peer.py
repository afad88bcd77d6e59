"""P4, P5 and P6: a training step, compared with x-transformers' wrapper and with matrix products."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from statistics import median

from bench.harness import Row, module, ratio

SIZES = {  # rows, columns, dim, depth, heads, vocabulary, target of P4
    "vocabulary 257": (32, 128, 256, 4, 4, 257, 1.15),
    "vocabulary 8,193": (32, 128, 256, 4, 4, 8193, 1.8),
    "vocabulary 32,769": (16, 128, 256, 4, 4, 32769, 2.2),
    "6 × 512, rows of 512": (4, 512, 512, 6, 8, 257, 1.25),
}
LENGTHS = {  # the same for memory alone
    "vocabulary 257, rows of 1,024": (4, 1024, 256, 4, 4, 257),
    "vocabulary 8,193, rows of 1,024": (4, 1024, 256, 4, 4, 8193),
    "vocabulary 32,769, rows of 1,024": (4, 1024, 256, 4, 4, 32769),
}
LARGE, WIDE = "vocabulary 32,769", "6 × 512, rows of 512"
Found = dict[str, float]
NO_PEER = 'not measured: pip install "maskwire[bench]"'


def measure(quick: bool) -> list[Row]:
    """The rows of P4, P5 and P6."""
    rows: list[Row] = []
    for name, (*size, target) in SIZES.items():
        count, columns, dim, depth, heads, tokens = (int(number) for number in size)
        mine, theirs, products = pairs(quick, *size, products=name == WIDE)
        speed = Row("P4", f"tokens per second trained ÷ x-transformers', {name}", f"≥ {target}", None)
        rows += [compared(speed, mine, theirs, count * columns, target), memory(name, mine, theirs)]
        if products:
            flops = [
                found["median_steps_per_second"]
                * step_flops(count, columns, dim, depth, heads, tokens, found["masked"])
                for found in mine
            ]
            row = Row(
                "P6", f"FLOP/s of a whole step ÷ the machine's fp32 matrix products, {name}", "≥ 0.85", None
            )
            row.parts = {"GFLOP/s": median(flops) / 1e9, "GFLOP/s, products": median(products) / 1e9}
            rows.append(ratio(row, flops, products, at_least=0.85))
    for name, lengths in {} if quick else LENGTHS.items():
        mine, theirs, _ = pairs(True, *lengths)
        rows.append(memory(name, mine, theirs))
    return rows


def pairs(quick: bool, *size: float, products: bool = False) -> tuple[list[Found], list[Found], list[float]]:
    """Measure maskwire, the peer if it is installed, and the rate of matrix products, in turn."""
    count, columns, dim, depth, heads, tokens = size
    settings = [
        f"model.dim={dim}", f"model.depth={depth}", f"model.heads={heads}",
        f"model.max_seq_len={columns}", f"model.num_tokens={tokens}", f"model.mask_id={tokens - 1}",
    ]  # fmt: skip
    steps = 4 if quick else 9
    mine, theirs, rates = [], [], []
    for _ in range(1 if quick else 5):
        mine.append(run("inprocess", steps, count, columns, *settings))
        if importlib.util.find_spec("x_transformers") is not None:
            theirs.append(run("peer_inprocess", steps, *size))
        if products:
            rates.append(product_rate())
    return mine, theirs, rates


def compared(row: Row, mine: list[Found], theirs: list[Found], tokens: int, target: float) -> Row:
    """The row of P4."""
    if not theirs:
        row.note = NO_PEER
        return row
    ours, others = ([each["median_steps_per_second"] for each in found] for found in (mine, theirs))
    row.parts = {"tokens/s": median(ours) * tokens, "tokens/s, x-transformers": median(others) * tokens}
    return ratio(row, ours, others, at_least=target)


def memory(name: str, mine: list[Found], theirs: list[Found]) -> Row:
    """The row of P5; only one size has a target."""
    row = Row("P5", f"peak resident memory ÷ x-transformers', {name}", "≤ 0.6", None)
    if not theirs:
        row.note = NO_PEER
        return row
    ours, others = ([each["peak_mib"] for each in found] for found in (mine, theirs))
    ratio(row, ours, others, at_most=0.6)
    row.parts = {"MiB": median(ours), "MiB, x-transformers": median(others)}
    if name != LARGE:
        row.target, row.met = "", None
    return row


def run(name: str, *arguments: object) -> Found:
    """Run a module in its own process, and return what it measured."""
    done = subprocess.run(module(name, *arguments), capture_output=True, text=True, check=True)
    found: Found = json.loads(done.stdout)
    return found


def step_flops(
    rows: int, columns: int, dim: int, depth: int, heads: int, tokens: int, masked: float
) -> float:
    """The multiplications and additions that a step needs: forward once, backward twice as many.

    A block of width d and inner width i = 64 h has 4 d i weights of attention and 8 d² of feed-forward: 2
    FLOP per weight and token. Scores and their use take 4 n i per token. At positions that are not masked,
    the last block needs keys and values only (2 d i weights), and the projection's d V are not needed.
    """
    inner = 64 * heads
    block = 2 * (4 * dim * inner + 8 * dim * dim) + 4 * columns * inner
    keys_and_values = 4 * dim * inner
    everywhere = (depth - 1) * block + keys_and_values
    where_masked = block - keys_and_values + 2 * dim * tokens
    return 3 * (rows * columns * everywhere + masked * where_masked)


def product_rate() -> float:
    """FLOP/s of the median large fp32 matrix product."""
    code = (
        "import statistics, time, torch; n = 4096; a, b = torch.rand(n, n), torch.rand(n, n); c = a @ b\n"
        "def once():\n  t = time.perf_counter(); torch.mm(a, b, out=c); return time.perf_counter() - t\n"
        "print(2 * n ** 3 / statistics.median(once() for _ in range(9)))"
    )
    done = subprocess.run([*module("x")[:1], "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)
