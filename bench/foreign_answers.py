"""M3: the sources of L1 with models of other libraries, through a real server that is killed twice.

A model is trained until its loss is about the entropy of the source, and sampled from. It is then exported,
and opened by its own library.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import maskwire
import maskwire_server
from bench.harness import Row
from bench.learning import FLIP_NATS, LENGTH
from bench.restart import SERVER, Started, start
from bench.sources import Ids, flip_chain, pairs

ROWS, WINDOW, KILLS = 128, 4, 2
MODERN_BERT: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 192,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "cls_token_id": None,
    "sep_token_id": None,
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "dim": 64, "depth": 2, "heads": 4, "attn_dim_head": 32, "rotary_pos_emb": True, "use_rmsnorm": True,
    "ff_glu": True, "attn_qk_norm": True, "attn_kv_heads": 1,
}  # fmt: skip
Opened = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Source:
    """Data whose entropy is known."""

    name: str
    symbols: int
    length: int
    entropy: float
    """Nats per symbol."""
    steps: int
    draw: Callable[[np.random.Generator, int], Ids]
    """Returns rows of symbols."""


PAIRS = Source("pairs", 4, 8, math.log(4) / 2, 2000, partial(pairs, n=8, symbols=4))
CHAIN = Source("a chain that flips with probability 0.1", 2, LENGTH, FLIP_NATS, 800, flip_chain)


def measure(quick: bool) -> list[Row]:
    """The rows of both libraries. Both are trained with Muon, which needs a third of AdamW's steps here."""
    rows = []
    for source in (PAIRS, CHAIN):
        steps = 60 if quick else source.steps
        rows += answer(source, "ModernBERT", "huggingface", modern_bert, open_hugging_face, steps)
        rows += answer(source, "x-transformers", "x-transformers", encoder, open_x_transformers, steps)
    return rows


def modern_bert(source: Source, folder: Path) -> dict[str, object]:
    """The settings of a ModernBERT, and its config.json in `folder`."""
    import transformers

    sizes: dict[str, Any] = {"vocab_size": source.symbols + 1, "max_position_embeddings": source.length}
    transformers.ModernBertConfig(**MODERN_BERT, **sizes).save_pretrained(folder / "model")
    return {
        "model.source": "huggingface", "model.huggingface.path": folder / "model" / "config.json",
        "model.mask_id": source.symbols,
    }  # fmt: skip


def encoder(source: Source, _: Path) -> dict[str, object]:
    """The settings of an x-transformers encoder with the features of current models."""
    options = {f"model.x_transformers.{key}": str(value).lower() for key, value in ENCODER.items()}
    sizes = {
        "num_tokens": source.symbols + 1, "mask_id": source.symbols, "max_seq_len": source.length,
    }  # fmt: skip
    return {"model.source": "x-transformers", **{f"model.{k}": v for k, v in sizes.items()}, **options}


def open_hugging_face(_: Source, path: Path) -> Opened:
    """The exported folder, opened by transformers."""
    import transformers

    model = transformers.AutoModelForMaskedLM.from_pretrained(path).eval()
    return lambda ids: model(input_ids=ids).logits


def open_x_transformers(source: Source, path: Path) -> Opened:
    """The exported state dict, loaded by x-transformers."""
    from safetensors.torch import load_file
    from x_transformers import x_transformers

    net = x_transformers.TransformerWrapper(
        num_tokens=source.symbols + 1,
        max_seq_len=source.length,
        attn_layers=x_transformers.Encoder(**ENCODER),
    )
    net.load_state_dict({name.removeprefix("net."): one for name, one in load_file(path).items()})
    net.eval()
    return lambda ids: net(ids)


def answer(
    source: Source, what: str, library: str, settings: Callable[[Source, Path], dict[str, object]],
    opened: Callable[[Source, Path], Opened], steps: int,
) -> list[Row]:  # fmt: skip
    """Train, kill, evaluate, generate, export; the rows of one model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = settings(source, folder) | {
            "run.dir": folder / "run", "serve.address": f"unix:{folder}/socket", "serve.threads": 1,
            "checkpoints.every_steps": 100, "optimizer.name": "muon", "optimizer.learning_rate": 5e-3,
            "optimizer.warmup_steps": 40, "optimizer.schedule": "cosine", "optimizer.total_steps": steps,
        }  # fmt: skip
        server = TrainedServer([SERVER, "serve", *(f"--set={k}={v}" for k, v in chosen.items())], folder)
        try:
            with maskwire.connect(server.address, window=WINDOW, on_wait=lambda _: None) as trainer:
                server.train(trainer, source, steps)
                ids = source.draw(np.random.default_rng(1), 1024)
                found = trainer.eval_loss(ids, estimator="chain_rule", draws=1)
                rows = trainer.generate(count=512, length=source.length, order="confidence").tokens
                saved = trainer.checkpoint("end").name
        finally:
            server.end()
        out = folder / ("exported" if library == "huggingface" else "exported.safetensors")
        command = [SERVER, "export", str(out), f"--run-dir={folder}/run", f"--to={library}"]
        subprocess.run(command, check=True, capture_output=True)
        ours = maskwire_server.load(folder / "run" / "checkpoints" / saved)
        error = difference(source, ours, opened(source, out))
    nats = found.nats_per_token
    where = f"{source.name}, {what}"
    learned = Row("M3", f"nats a symbol ÷ the entropy, server killed {KILLS} times, {where}", "≤ 1.03",
                  nats / source.entropy, met=nats / source.entropy <= 1.03)  # fmt: skip
    learned.parts = {"nats": nats, "entropy": source.entropy, "steps": steps}
    same = Row("M3", f"largest difference of the export's logits ÷ the largest, {where}", "≤ 1e-5", error,
               met=error <= 1e-5)  # fmt: skip
    if source is not PAIRS:
        return [learned, same]
    equal = float(np.mean(np.asarray(rows)[:, ::2] == np.asarray(rows)[:, 1::2]))
    made = Row("M3", f"equal pairs generated in order of confidence, {what}", "≥ 0.99", equal,
               met=equal >= 0.99, parts={"pairs": np.asarray(rows).size / 2})  # fmt: skip
    return [learned, made, same]


class TrainedServer:
    """A server that is killed during training, with steps in flight, and started again."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self._command, self._log = command, folder / "log"
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        self._process: Started = start(self._command, self._log)
        self.address = self._process.address

    def train(self, trainer: Any, source: Source, steps: int) -> None:
        """Train on new rows at every step."""
        random = np.random.default_rng(0)
        kill_after = [steps * (number + 1) // (KILLS + 1) for number in range(KILLS)]
        waiting: deque[Any] = deque()
        for _ in range(steps):
            waiting.append(trainer.submit(source.draw(random, ROWS)))
            if len(waiting) == WINDOW and waiting.popleft().result().step in kill_after:
                self._process.send_signal(signal.SIGKILL)
                self._process.wait()
                self._process = start(self._command, self._log)
        while waiting:
            waiting.popleft().result()

    def end(self) -> None:
        """Stop the server."""
        self._process.terminate()
        self._process.wait()


@torch.no_grad()
def difference(source: Source, ours: Any, theirs: Opened) -> float:
    """The largest difference of logits, relative to the largest; without the mask id, where ours are -inf."""
    ids = torch.from_numpy(source.draw(np.random.default_rng(2), 64))
    ids[:, ::3] = source.symbols
    mine, other = ours(ids)[..., : source.symbols], theirs(ids)[..., : source.symbols]
    return float((mine - other).abs().max() / other.abs().max())
