"""One rank of a group that trains beside one process, and compares: losses, norms, gradients, samples.

    python parity_worker.py RANK SIZE STORE SCENARIOS.json OUT.json

Every rank holds the whole trainer beside its part of the divided one. Each step of the divided one begins
from the state of the whole one. Everything is computed in fp64, or in fp32 with `serve.precision` bf16. The
leader writes the largest differences.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from maskwire_server.batch import Batch, Modes
from maskwire_server.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ServeConfig
from maskwire_server.results import EvalOptions
from maskwire_server.training import checkpoint_tensors, objective, optimizers, snapshot
from maskwire_server.training.corruption import StepKey
from maskwire_server.training.models import sources
from maskwire_server.training.models.backbone import Backbone
from maskwire_server.training.models.generator_critic import Networks
from maskwire_server.training.ranks_interface import Ranks, assign, own_part, whole
from maskwire_server.training.sharding import ManyRanks
from maskwire_server.training.trainer import TorchTrainer

EPS = 0.01
"""AdamW's first update is lr g / (|g| + eps): a difference of a gradient changes it by at most lr / eps times
as much, here once. With the default of 1e-8, rounding could reverse the update of a tiny gradient."""
COLUMNS, ROWS = 20, 13
SMALLEST = 1e-12
"""A tensor without a larger number is compared as if it had this one."""
ENCODER = {
    "num_tokens": 257, "mask_id": 256, "max_seq_len": COLUMNS, "dim": 32, "depth": 2, "heads": 2,
    "dim_head": 16,
}  # fmt: skip


def batch(step: int, rows: int = ROWS, prompts: float = 0.3) -> Batch:
    """Rows of different lengths with prompts; if there are several, the last has nothing else."""
    random = np.random.default_rng(step)
    lengths = random.integers(1, COLUMNS + 1, rows).astype(np.int32)
    valid = np.arange(COLUMNS) < lengths[:, None]
    ids = random.integers(0, 256, (rows, COLUMNS))[valid]
    prompt = random.random((rows, COLUMNS)) < prompts
    prompt[1:][-1:] = True
    return Batch(ids, rows, COLUMNS, lengths, np.packbits(prompt, bitorder="little").tobytes())


def make(scenario: dict[str, Any], ranks: Ranks | None) -> TorchTrainer:
    model = scenario.get("model", {})
    optimizer = {
        "learning_rate": 0.01,
        "warmup_steps": 0,
        "ema_decay": 0.9,
        "eps": EPS,
        **scenario.get("optimizer", {}),
    }
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
    """The ids that were sampled for the critic, each with the random number that chose it."""

    def __init__(self) -> None:
        self.ids: list[tuple[float, int]] = []
        self._sample = objective.sample
        objective.sample = self.sample  # type: ignore[assignment]

    def sample(self, logits_mv: Tensor, u_m: Tensor, *rest: Any) -> Tensor:
        found = self._sample(logits_mv, u_m, *rest)
        self.ids += zip(u_m.tolist(), found.tolist(), strict=True)
        return found

    def take(self) -> list[tuple[float, int]]:
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


BUGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "null embedding as an input": lambda patch: (
        patch.setattr(Networks, "conditioning", _null_embedding_as_an_input),
        patch.setattr(Backbone, "conditioning", lambda self, cond: self.to_self_cond(cond)),
    ),
    "no reshard": lambda patch: patch.setattr(ManyRanks, "release", lambda *_: None),
    "divided by the ranks": lambda patch: patch.setattr(
        FSDPModule, "set_gradient_divide_factor", lambda self, _: _set_factor(self, dist.get_world_size())
    ),
    "rows from 0": lambda patch: patch.setattr(ManyRanks, "parts", _rows_from_0),
    "no empty part": lambda patch: patch.setattr(
        ManyRanks, "parts", lambda *given: [part for part in _parts(*given) if part]
    ),
    "no agreement": lambda patch: patch.setattr(ManyRanks, "agree", lambda *_: None),
    "the average stands still": lambda patch: patch.setattr(optimizers.Group, "update", _without_average),
    "three times the rate": lambda patch: patch.setattr(optimizers.Group, "update", _times(3)),
    "a negative rate": lambda patch: patch.setattr(optimizers.Group, "update", _times(-1)),
}
"""Mistakes that were made while this was built, or could be: each must be found."""
_parts, _set_factor = ManyRanks.parts, FSDPModule.set_gradient_divide_factor
_update = optimizers.Group.update


def _is_divided(group: optimizers.Group) -> bool:
    return isinstance(group.module, FSDPModule)


def _without_average(group: optimizers.Group, rate: float) -> None:
    average = group.ema
    if _is_divided(group):
        group.ema = None
    _update(group, rate)
    group.ema = average


def _times(factor: float) -> Callable[[optimizers.Group, float], None]:
    return lambda group, rate: _update(group, factor * rate if _is_divided(group) else rate)


def _null_embedding_as_an_input(networks: Networks, e_bnd: Tensor | None) -> Tensor | None:
    if e_bnd is None:
        if isinstance(networks.generator, FSDPModule):
            networks.generator.unshard()
        return networks.generator.null_embed
    return e_bnd


def _rows_from_0(ranks: ManyRanks, lengths: Sequence[int], *others: Any) -> list[Any]:
    numbers = itertools.count()
    found: list[Any] = []
    for part in _parts(ranks, lengths, *others):
        rows = [next(numbers) for _ in part[0]] if part else []
        found.append((rows, max(lengths[row] for row in rows)) if rows else None)
    return found


class Comparison:
    """A whole trainer and a divided one, and how far they are apart."""

    def __init__(self, scenario: dict[str, Any], samples: Samples) -> None:
        self._scenario, self._samples = scenario, samples
        self.ranks = ManyRanks(
            torch.device("cpu"), replicate=scenario["replicate"], timeout=timedelta(seconds=60)
        )
        self.alone, self.divided = make(scenario, None), make(scenario, self.ranks)
        if "loaded_after" in scenario:
            self._load(scenario["loaded_after"])
        samples.take()
        self.worst: dict[str, float] = {}
        self.wrong: list[str] = []

    def _load(self, steps: int) -> None:
        """Give the divided trainer a checkpoint from after some steps, with other frozen weights."""
        for number in range(1, steps + 1):
            self.alone.train_step(1, number, self._batch(number), Modes())
        with torch.no_grad():
            for group in self.alone._groups().values():
                for weight in group.frozen.values():
                    weight += 0.1
        with shared_folder() as folder:
            if self.ranks.is_leader:
                self.alone.snapshot().write(folder)
            self.divided.receive(self.divided.read(folder) if self.ranks.is_leader else None)

    def step(self, number: int) -> None:
        """Compare one step, and train both."""
        modes = Modes(**self._scenario.get("modes", {}))
        copy_state(self.alone, self.divided)
        alone, ids = self._gradients(self.alone, number, modes), self._samples.take()
        divided = self._gradients(self.divided, number, modes)
        found: list[Any] = [None] * self.ranks.size
        dist.all_gather_object(found, self._samples.take())
        if sorted(each for of_rank in found for each in of_rank) != sorted(ids):
            self.wrong.append(f"step {number}: other ids were sampled")
        if alone.keys() != divided.keys():
            self.wrong.append(f"step {number}: gradients of {alone.keys() ^ divided.keys()}")
        for name in alone.keys() & divided.keys():
            self._note(name, divided[name], alone[name])
        if "disagree" in self._scenario and self.ranks.rank:
            self.ranks.record(b"an order that the others did not get")
        if "diverged" in self._scenario and self.ranks.rank:
            with torch.no_grad():
                own_part(self.divided.generator.weights[0]).mul_(1.5)
        results = []
        for trainer in (self.alone, self.divided):
            result = trainer.train_step(1, number, self._batch(number), modes)
            numbers = (result.losses.loss, result.gradient_norm or 0.0)
            results.append(torch.tensor(numbers, dtype=torch.float64))
        self._samples.take()
        self._note("result", results[1], results[0])
        given = snapshot.live_tensors(self.alone._groups())
        for file, tensors in snapshot.live_tensors(self.divided._groups()).items():
            for name, tensor in tensors.items():
                self._note(f"{file} {name}", whole(tensor.detach()), given[file][name].detach())
        if self._scenario.get("ahead"):  # the state changes while the divided one holds gathered weights
            self.alone.train_step(2, number, self._batch(number), Modes())
            self._samples.take()

    def evaluate(self, number: int) -> None:
        """Compare the evaluations with the averages and with the weights, and all tensors of the averages."""
        copy_state(self.alone, self.divided)
        given = dict(self.alone._averaged.named_parameters())
        for name, tensor in self.divided._averaged.named_parameters():
            self._note(f"average of {name}", whole(tensor.detach()), given[name].detach())
        given_batch = self._batch(number)
        for raw in (False, True):
            self.divided.gather(averaged=not raw)
            if self.ranks.is_leader:
                options = EvalOptions(tuple(range(given_batch.rows)), draws=4, raw_weights=raw)
                both = (each.eval_loss(given_batch, options) for each in (self.divided, self.alone))
                self._note(f"evaluation, raw {raw}", *(torch.tensor(each.losses.loss) for each in both))
            self._samples.take()

    def save(self, folder: Path) -> None:
        """Note whether what all ranks save, each its part, is the state of the divided trainer."""
        self.divided.copy_shards().write(folder, with_frozen=True)
        state = self.divided.snapshot()
        dist.barrier()
        if self.ranks.is_leader:
            for file, tensors in state.files.items():
                paths = checkpoint_tensors.files_of(folder, file)
                found = checkpoint_tensors.read(checkpoint_tensors.find(paths, file))
                same = found.keys() == tensors.keys() and all(
                    torch.equal(found[name], tensor) for name, tensor in tensors.items()
                )
                if not same or len(paths) < self.ranks.size:
                    self.wrong.append(f"{file} as saved by all ranks is another state")

    def _batch(self, number: int) -> Batch:
        shape = {name: self._scenario[name] for name in ("rows", "prompts") if name in self._scenario}
        return batch(number, **shape)

    def _gradients(self, trainer: TorchTrainer, number: int, modes: Modes) -> dict[str, Tensor]:
        host = trainer._host(self._batch(number))
        sums = trainer._gradients(trainer._prepared(host, modes, StepKey(3, 1, number)))
        trainer._ranks.add(sums.sums)
        trainer._ranks.agree(f"gradients of step {number}")
        norm = optimizers.clip(trainer._learners(modes), None, trainer._ranks)
        losses, norm_value = sums.read(sums.begin_read(norm), 1.0, modes)
        figures = [losses.loss, losses.generator_loss or 0.0, losses.critic_loss or 0.0, norm_value]
        found = {
            f"{part}.{name}": whole(weight.grad).clone()
            for part, group in trainer._groups().items()
            for name, weight in zip(group.names, group.weights, strict=True)
            if weight.grad is not None
        }
        trainer._clear_gradients()
        return found | {"losses and norm": torch.tensor(figures, dtype=torch.float64)}

    def _note(self, what: str, found: Tensor, expected: Tensor) -> None:
        """Note a difference, relative to the largest number of a tensor."""
        found, expected = found.detach().double(), expected.detach().double()
        largest = max(SMALLEST, float(expected.abs().max()))
        difference = float((found - expected).abs().max()) / largest
        self.worst[what] = max(self.worst.get(what, 0.0), difference if difference == difference else 1e9)


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """A new folder that all ranks see."""
    name: list[Any] = [tempfile.mkdtemp() if not dist.get_rank() else ""]
    dist.broadcast_object_list(name)
    yield Path(name[0])
    dist.barrier()
    if not dist.get_rank():
        shutil.rmtree(name[0])


def compare(scenario: dict[str, Any], steps: int, samples: Samples) -> dict[str, Any]:
    """The largest differences, what else was wrong, and the hash of the last state."""
    bf16 = scenario.get("serve", {}).get("precision") == "bf16"
    torch.set_default_dtype(torch.float32 if bf16 else torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        if scenario.get("bug"):
            BUGS[scenario["bug"]](patch)
        error = ""
        try:
            both = Comparison(scenario, samples)
            for number in range(1, steps + 1):
                both.step(number)
            unlike = {"bug", "disagree"} & scenario.keys() or scenario.get("prompts") == 1.0
            if not unlike and (steps > 2 or "loaded_after" in scenario):  # in the campaign, all
                both.evaluate(steps)
        except Exception as raised:
            if not {"bug", "disagree", "diverged", "refused"} & scenario.keys():
                raise
            if "refused" in scenario:
                return {"worst": {}, "wrong": [], "error": str(raised), "hash": ""}
            error = f"{type(raised).__name__}: {raised}"
            samples.take()
        state = None
        if scenario.get("saved"):
            state = both.divided.snapshot()
            with shared_folder() as folder:
                both.save(folder)
    leads = state is not None and both.ranks.is_leader
    return {
        "worst": both.worst, "wrong": both.wrong, "error": error,
        "hash": snapshot_hash(state) if leads and state is not None else "",
    }  # fmt: skip


def snapshot_hash(state: snapshot.Snapshot) -> str:
    files = state.files.items()
    return sources.sha256({f"{file}/{name}": each for file, named in files for name, each in named.items()})


def main() -> None:
    rank, size, store, scenarios, out = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(size))
    given = json.loads(Path(scenarios).read_text())
    samples = Samples()
    found = {}
    for name, scenario in given["scenarios"].items():
        found[name] = compare(scenario, scenario.get("steps", given["steps"]), samples)
        if int(rank) == 0:
            Path(out).write_text(json.dumps(found))
            worst = max(found[name]["worst"].values(), default=0.0)
            print(name, worst, found[name]["wrong"][:1], found[name]["error"][:200], flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
