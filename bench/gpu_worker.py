"""One arm of P10 in its own process, which reads commands from stdin: python -m bench.gpu_worker JSON.

The JSON names the arm, `ours` or `x-transformers`, and the fields of `Size`. Commands and replies are
JSON, one per line, replies marked by `REPLY`. After each command the process releases the device memory
that it does not use, so that the next process has space.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from maskwire.v1.values import Outcome
from maskwire_server import config
from maskwire_server.batch import Batch, Modes
from maskwire_server.training.trainer import TorchTrainer

REPLY = "bench: "


@dataclass(frozen=True)
class Size:
    """What is trained, and how."""

    rows: int
    columns: int
    dim: int
    depth: int
    heads: int
    tokens: int
    device: str
    precision: str
    compile: str
    """`serve.compile`; the peer's network is compiled unless it is `off`."""
    product: int
    """Rows and columns of the matrices that measure the device's peak."""
    parts: int = 1
    """How many parts a batch is computed in: more than one if the batch does not fit into memory."""

    def settings(self) -> dict[str, dict[str, Any]]:
        """The server's configuration."""
        positions = self.rows * self.columns
        return {
            "model": {
                "num_tokens": self.tokens, "mask_id": self.tokens - 1, "max_seq_len": self.columns,
                "dim": self.dim, "depth": self.depth, "heads": self.heads,
            },
            "serve": {
                "device": self.device, "precision": self.precision, "compile": self.compile,
                "micro_batch_tokens": max(self.columns, positions // self.parts),
            },
        }  # fmt: skip


class Arm(Protocol):
    """Runs training steps; the device may finish a step after the call."""

    def step(self, ids: Any) -> int:
        """Train on int64 [rows, columns]. Returns how many positions were masked, 0 if unknown."""


class Ours:
    """maskwire's trainer without a server."""

    def __init__(self, size: Size) -> None:
        whole = config.load(None, **size.settings())
        self._trainer = TorchTrainer(
            whole.model, whole.objective, whole.optimizer, whole.serve, whole.run.seed
        )
        self._number = 0

    def step(self, ids: Any) -> int:
        self._number += 1
        result = self._trainer.train_step(1, self._number, Batch(ids, *ids.shape), Modes())
        if result.outcome is Outcome.OUT_OF_MEMORY:
            raise torch.OutOfMemoryError("the trainer ran out of memory")
        return result.masked_tokens


class Peer:
    """x-transformers' wrapper at its fastest: flash attention, fused AdamW, the masked-mean loss."""

    def __init__(self, size: Size) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import x_transformers
            from x_transformers.nonautoregressive_wrapper import NonAutoregressiveWrapper
        torch.manual_seed(0)
        self._device = torch.device(size.device)
        self._parts, self._bf16 = size.parts, size.precision == "bf16"
        layers = x_transformers.Encoder(dim=size.dim, depth=size.depth, heads=size.heads, attn_flash=True)
        net: Any = x_transformers.TransformerWrapper(
            num_tokens=size.tokens, max_seq_len=size.columns, attn_layers=layers
        )
        self._wrapper: Any = NonAutoregressiveWrapper(
            net, mask_id=size.tokens - 1, no_replace_prob=0.0, random_token_prob=0.0,
            use_simple_mdlm_loss_weight=False,
        )  # fmt: skip
        self._wrapper.to(self._device)
        if size.compile != "off":
            net.compile(mode=size.compile)
        self._optimizer = torch.optim.AdamW(self._wrapper.parameters(), lr=1e-3, fused=True)

    def step(self, ids: Any) -> int:
        total = torch.zeros((), device=self._device)
        for part in torch.from_numpy(ids).chunk(self._parts):
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16):
                loss = self._wrapper(part.to(self._device, non_blocking=True)).loss / self._parts
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self._wrapper.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        total.item()
        return 0


ARMS: dict[str, Callable[[Size], Arm]] = {"ours": Ours, "x-transformers": Peer}


class Worker:
    """An arm, and the commands that it carries out."""

    def __init__(self, arm: str, size: Size) -> None:
        self._make, self._size, self._arm_name = ARMS[arm], size, arm
        self._device = torch.device(size.device)
        self._ids = np.random.default_rng(0).integers(0, size.tokens - 1, (size.rows, size.columns))
        self._why = ""
        self._arm: Arm | None = self._make(size)

    def execute(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command."""
        what, count = command["do"], int(command.get("count", 1))
        found = {"warm": self.warm, "steps": self.steps, "products": self.products}[what](count)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def warm(self, count: int) -> dict[str, Any]:
        """Compile, and find into how many parts a batch must be split to fit into memory."""
        while True:
            try:
                began = time.perf_counter()
                if self._arm is None:
                    self._arm = self._make(self._size)
                for _ in range(count):
                    self._arm.step(self._ids)
                self._synchronize()
                break
            except Exception as error:
                found = error.with_traceback(None)  # its frames hold the tensors of the failed step
                smaller = isinstance(error, torch.OutOfMemoryError) and self._size.parts < self._size.rows
            self._arm = None
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            if smaller:
                self._size = replace(self._size, parts=2 * self._size.parts)
            elif self._size.compile != "off":
                self._why = f"not compiled: {type(found).__name__}: {str(found).strip()[:200]}"
                self._size = replace(self._size, compile="off")
            else:
                raise found
        return {
            "seconds": time.perf_counter() - began, "parts": self._size.parts,
            "compile": self._size.compile, "why": self._why,
        }  # fmt: skip

    def steps(self, count: int) -> dict[str, Any]:
        """Steps per second; an untimed step before them allocates the memory again."""
        assert self._arm is not None
        self._arm.step(self._ids)
        self._synchronize()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        began = time.perf_counter()
        masked = sum(self._arm.step(self._ids) for _ in range(count))
        self._synchronize()
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated(self._device) / 2**30 if self._device.type == "cuda" else 0.0
        return {"steps_per_second": count / seconds, "masked": masked / count, "peak_gib": peak}

    def products(self, count: int) -> dict[str, Any]:
        """FLOP/s of large matrix products in bf16, or in fp32 on a CPU, where bf16 is emulated."""
        n = self._size.product
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        a, b = (torch.randn(n, n, device=self._device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        for _ in range(3):
            torch.mm(a, b, out=out)
        self._synchronize()
        began = time.perf_counter()
        for _ in range(count):
            torch.mm(a, b, out=out)
        self._synchronize()
        return {"flops": 2 * n**3 * count / (time.perf_counter() - began)}

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def main() -> None:
    """Carry out commands until stdin ends."""
    chosen = json.loads(sys.argv[1])
    arm = chosen.pop("arm")
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to the log

    def reply(found: dict[str, Any]) -> None:
        replies.write(f"{REPLY}{json.dumps(found)}\n")

    try:
        worker = Worker(arm, Size(**chosen))
        name = torch.cuda.get_device_name() if chosen["device"] != "cpu" else "cpu"
        reply({"device": name, "torch": torch.__version__, "cuda": torch.version.cuda or ""})
        for line in sys.stdin:
            reply(worker.execute(json.loads(line)))
    except Exception as error:
        reply({"error": f"{type(error).__name__}: {str(error).strip()[:300]}"})
        raise


if __name__ == "__main__":
    main()
