"""G1: Generate through the server, compared with x-transformers' `generate` in this process."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import maskwire
from bench.harness import Row, in_turn, process, ratio
from bench.training import SERVER

NUM_TOKENS, LENGTH, ROWS, STEPS = 8193, 128, 4, 18  # 18 steps are x-transformers' default
DIM, DEPTH, HEADS = 256, 4, 4
MODEL = (
    f"model.num_tokens={NUM_TOKENS}", f"model.mask_id={NUM_TOKENS - 1}", f"model.max_seq_len={LENGTH}",
    f"model.dim={DIM}", f"model.depth={DEPTH}", f"model.heads={HEADS}",
)  # fmt: skip
ORDERS = {"confidence": "in confidence order, as it does", "random": "in random order, the default"}


def measure(quick: bool) -> list[Row]:
    """The rows of G1."""
    rows = {
        order: Row("G1", f"tokens per second generated ÷ x-transformers', vocabulary {NUM_TOKENS:,}, {words}",
                   "≥ 1.5", None)
        for order, words in ORDERS.items()
    }  # fmt: skip
    try:
        theirs = reference()
    except ImportError:
        for row in rows.values():
            row.note = 'not measured: pip install "maskwire[bench]"'
        return list(rows.values())
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"--set={setting}" for setting in (*MODEL, "serve.address=127.0.0.1:0")]
        command = [SERVER, "serve", f"--run-dir={folder}/run", *settings]
        with process(*command, log=Path(folder) / "log") as target, maskwire.attach(target) as client:
            measures = [lambda order=order: ours(client, order) for order in ORDERS]
            in_turn(1, *measures, theirs)  # warm
            *found, reference_rate = in_turn(2 if quick else 7, *measures, theirs)
    for row, rates in zip(rows.values(), found, strict=True):
        ratio(row, rates, reference_rate, at_least=1.5)
        row.parts = {"tokens/s": max(rates), "tokens/s, x-transformers": max(reference_rate)}
    return list(rows.values())


def ours(client: maskwire.Client, order: str) -> float:
    """Tokens per second through the server, in as many passes as x-transformers."""
    began = time.perf_counter()
    found = client.generate(count=ROWS, length=LENGTH, steps=STEPS, order=order)
    seconds = time.perf_counter() - began
    if found.unmasking_step != STEPS:
        raise RuntimeError(f"{STEPS} passes were asked for, {found.unmasking_step} made")
    return ROWS * LENGTH / seconds


def reference() -> Callable[[], float]:
    """The same model size in x-transformers; ImportError without it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import x_transformers
        from x_transformers.nonautoregressive_wrapper import NonAutoregressiveWrapper

    layers = x_transformers.Encoder(dim=DIM, depth=DEPTH, heads=HEADS, attn_flash=True)
    net = x_transformers.TransformerWrapper(num_tokens=NUM_TOKENS, max_seq_len=LENGTH, attn_layers=layers)
    wrapper: Any = NonAutoregressiveWrapper(net, mask_id=NUM_TOKENS - 1, steps=STEPS)

    def theirs() -> float:
        began = time.perf_counter()
        wrapper.generate(batch_size=ROWS)
        return ROWS * LENGTH / (time.perf_counter() - began)

    return theirs
