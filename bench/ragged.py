"""P11: rows of different lengths compared with full rows, and packed rows compared with padded ones.

x-transformers' wrapper takes rows of one length, so it also trains on the padding.
"""

from __future__ import annotations

import importlib.util
from statistics import median

from bench.harness import Row, ratio
from bench.peer import NO_PEER, Found, run

ROWS, COLUMNS, DIM, DEPTH, HEADS, TOKENS = 128, 512, 256, 4, 4, 8193
SETTINGS = [
    f"model.dim={DIM}", f"model.depth={DEPTH}", f"model.heads={HEADS}", f"model.max_seq_len={COLUMNS}",
    f"model.num_tokens={TOKENS}", f"model.mask_id={TOKENS - 1}",
]  # fmt: skip


def measure(quick: bool) -> list[Row]:
    """The rows of P11."""
    found: dict[str, list[Found]] = {name: [] for name in ("ragged", "packed", "padded", "full", "peer")}
    steps = 1 if quick else 3
    for _ in range(1 if quick else 3):
        for name in ("ragged", "packed", "padded", "full"):
            found[name].append(run("inprocess", steps, ROWS, COLUMNS, *SETTINGS, f"batch.rows={name}"))
        if importlib.util.find_spec("x_transformers") is not None:
            found["peer"].append(run("peer_inprocess", steps, ROWS, COLUMNS, DIM, DEPTH, HEADS, TOKENS))
    speed = {name: [each["median_steps_per_second"] for each in runs] for name, runs in found.items()}
    real = found["ragged"][0]["tokens"]
    words = f"{ROWS} rows of 1 to {COLUMNS} tokens"
    ragged = Row(
        "P11", f"{words}: tokens per second trained ÷ x-transformers', padded", "≥ 1.8 × full rows", None
    )
    if not speed["peer"]:
        ragged.note = NO_PEER
    else:
        full = median(speed["full"]) / median(speed["peer"])
        ragged.parts = {
            "tokens/s": median(speed["ragged"]) * real,
            "tokens/s, x-transformers": median(speed["peer"]) * real,
            "the same ratio, full rows": full,
        }
        ratio(ragged, speed["ragged"], speed["peer"], at_least=1.8 * full)
    packed = Row("P11", f"{words}, packed ÷ the same padded, in one part", "≥ 1.6", None)
    packed.parts = {
        "tokens/s": median(speed["packed"]) * real,
        "tokens/s, padded": median(speed["padded"]) * real,
    }
    return [ragged, ratio(packed, speed["packed"], speed["padded"], at_least=1.6)]
