"""One rank of a group that trains beside one process, and compares: losses, norms, gradients, samples.

    python rank_worker.py RANK SIZE STORE SCENARIOS.json OUT.json

Every rank holds the whole trainer beside its part of the divided one. Each step of the divided one begins
from the state of the whole one. Everything is computed in fp64. The leader writes the largest differences.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from maskwire_server.batch import Batch, Modes
from maskwire_server.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ServeConfig
from maskwire_server.training import objective, optim, snapshot
from maskwire_server.training.corruption import StepKey
from maskwire_server.training.ranks import Ranks, assign, whole
from maskwire_server.training.sharding import ManyRanks
from maskwire_server.training.trainer import TorchTrainer

COLUMNS, ROWS = 20, 13
ENCODER = {
    "num_tokens": 257, "mask_id": 256, "max_seq_len": COLUMNS, "dim": 32, "depth": 2, "heads": 2,
    "dim_head": 16,
}  # fmt: skip


def batch(step: int) -> Batch:
    """Rows of different lengths, the last with prompts alone, and prompts in the others."""
    random = np.random.default_rng(step)
    lengths = random.integers(1, COLUMNS + 1, ROWS).astype(np.int32)
    valid = np.arange(COLUMNS) < lengths[:, None]
    ids = random.integers(0, 256, (ROWS, COLUMNS))[valid]
    prompt = random.random((ROWS, COLUMNS)) < 0.3
    prompt[-1] = True
    return Batch(ids, ROWS, COLUMNS, lengths, np.packbits(prompt, bitorder="little").tobytes())


def make(scenario: dict[str, Any], ranks: Ranks | None) -> TorchTrainer:
    model = scenario.get("model", {})
    optimizer = {"learning_rate": 0.01, "warmup_steps": 0, "ema_decay": 0.9, **scenario.get("optimizer", {})}
    trainer = TorchTrainer(
        ModelConfig(**(model if "source" in model else {**ENCODER, **model})),
        ObjectiveConfig(**scenario.get("objective", {})),
        OptimizerConfig(**optimizer),
        ServeConfig(device="cpu", threads=1, **{"micro_batch_tokens": 64, **scenario.get("serve", {})}),
        3,
        ranks,
    )
    trainer.begin()
    return trainer


class Samples:
    """The ids that were sampled for the critic, in order."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._sample = objective.sample
        objective.sample = self.sample  # type: ignore[assignment]

    def sample(self, *given: Any) -> Tensor:
        found = self._sample(*given)
        self.ids += found.tolist()
        return found

    def take(self) -> list[int]:
        taken, self.ids = self.ids, []
        return taken


def copy_state(one: TorchTrainer, other: TorchTrainer) -> None:
    """Give the divided trainer the state of the whole one."""
    with torch.no_grad():
        for file, tensors in snapshot.live_tensors(other._groups()).items():
            given = snapshot.live_tensors(one._groups())[file]
            for name, tensor in tensors.items():
                assign(tensor, given[name].detach())
    for name, group in other._groups().items():
        group.updates = one._groups()[name].updates


def compare(scenario: dict[str, Any], steps: int, samples: Samples) -> dict[str, Any]:
    ranks = ManyRanks(torch.device("cpu"), replicate=scenario["replicate"])
    alone, divided = make(scenario, None), make(scenario, ranks)
    worst: dict[str, float] = {}
    wrong: list[str] = []

    def note(what: str, found: float, expected: float) -> None:
        difference = abs(found - expected) / max(1.0, abs(expected))
        worst[what] = max(worst.get(what, 0.0), difference if difference == difference else float("inf"))

    for step in range(1, steps + 1):
        modes = Modes(**scenario.get("modes", {}))
        copy_state(alone, divided)
        at = StepKey(3, 1, step)
        kept: dict[str, dict[str, Tensor]] = {}
        for kind, trainer in (("alone", alone), ("divided", divided)):
            sums = trainer._gradients(trainer._host(batch(step)), modes, at, trainer._ranks)
            trainer._ranks.add(sums.sums)
            norm = optim.clip(trainer._learners(modes), None, trainer._ranks)
            losses = sums.read(norm)
            kept[kind] = {
                f"{part}.{name}": whole(weight.grad).clone()
                for part, group in trainer._groups().items()
                for name, weight in zip(group.names, group.weights, strict=True)
                if weight.grad is not None
            }
            kept[kind]["losses"] = torch.tensor([each or 0.0 for each in losses], dtype=torch.float64)
            trainer._clear_gradients()
            if kind == "alone":
                expected_ids = samples.take()
        found_ids: list[Any] = [None] * ranks.size
        dist.all_gather_object(found_ids, samples.take())
        if [id_ for of_rank in found_ids for id_ in of_rank] != expected_ids:
            wrong.append(f"step {step}: other ids were sampled")
        if kept["alone"].keys() != kept["divided"].keys():
            wrong.append(f"step {step}: gradients of {kept['alone'].keys() ^ kept['divided'].keys()}")
        for name, expected in kept["alone"].items():
            found = kept["divided"].get(name)
            if found is not None:
                scale = max(1.0, float(expected.abs().max()))
                note(name, float((found - expected).abs().max()) / scale, 0.0)
        one, other = (
            trainer.train_step(1, step, batch(step), modes) for trainer in (alone, divided)
        )
        note("trained loss", other.losses.loss, one.losses.loss)
        note("trained norm", other.gradient_norm or 0.0, one.gradient_norm or 0.0)
        samples.take()
        given = snapshot.live_tensors(alone._groups())
        for file, tensors in snapshot.live_tensors(divided._groups()).items():
            for name, tensor in tensors.items():
                note(f"{file} {name}", float((whole(tensor).double() - given[file][name].double()).abs().max()), 0.0)
    state = divided.snapshot()
    return {
        "worst": worst,
        "wrong": wrong,
        "hash": snapshot_hash(state) if ranks.is_leader else "",
        "null_embed": any("null_embed" in name for name in worst),
    }


def snapshot_hash(state: snapshot.Snapshot) -> str:
    from maskwire_server.training.models import sources

    return sources.sha256({f"{file}/{name}": each for file, tensors in state.files.items() for name, each in tensors.items()})


def main() -> None:
    rank, size, store, scenarios, out = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(size))
    torch.set_default_dtype(torch.float64)
    given = json.loads(Path(scenarios).read_text())
    samples = Samples()
    found = {}
    for name, scenario in given["scenarios"].items():
        found[name] = compare(scenario, given["steps"], samples)
        if int(rank) == 0:
            Path(out).write_text(json.dumps(found))
            print(name, max(found[name]["worst"].values()), found[name]["wrong"][:1], flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
