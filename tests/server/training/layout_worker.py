"""One rank of a group that divides models, and measures the tensors that it holds.

    python layout_worker.py RANK SIZE STORE CASES.json OUT.json

CASES.json holds configurations by name, each with its `replicate`. Writes, for each, the numbers that this
rank holds, or the error of building the trainer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from maskwire_server import config
from maskwire_server.batch import Batch, Modes
from maskwire_server.config import ModelConfig
from maskwire_server.errors import ConfigError
from maskwire_server.training.corruption import StepKey
from maskwire_server.training.ranks_interface import own_part
from maskwire_server.training.sharding import ManyRanks
from maskwire_server.training.trainer import TorchTrainer


class WithoutBlocks(nn.Module):
    """A model with an output embedding layer and no list of layers."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.ids = nn.Embedding(model.num_tokens, 8)
        self.output = nn.Linear(8, model.num_tokens)

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def get_input_embeddings(self) -> nn.Module:
        return self.ids

    def forward(self, attention_mask: Tensor, input_ids: Tensor) -> Tensor:
        return self.output(self.ids(input_ids))


class WithScalar(WithoutBlocks):
    """The same with a scalar weight."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, attention_mask: Tensor, input_ids: Tensor) -> Tensor:
        return self.output(self.ids(input_ids) * self.scale)


class Sharing(WithoutBlocks):
    """The same with blocks: `share` names what two of them, or a block and the rest, have in common."""

    def __init__(self, model: ModelConfig, share: str) -> None:
        super().__init__(model)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        if share == "block":
            self.blocks[2] = self.blocks[0]
        elif share == "weight":
            self.blocks[2][0].weight = self.blocks[1][0].weight
        elif share == "layer":
            self.last = self.blocks[1][0]
        else:
            self.output.weight = self.ids.weight
            self.blocks[1][1] = self.blocks[0][1]  # it has no weights

    def forward(self, attention_mask: Tensor, input_ids: Tensor) -> Tensor:
        x = self.ids(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.output(x)


def numbers(tensors: Any) -> int:
    return sum(own_part(tensor).numel() for tensor in tensors)


def measured(chosen: config.Config, replicate: int) -> dict[str, int]:
    """The numbers that this rank holds after the backward pass of a step."""
    ranks = ManyRanks(torch.device("cpu"), replicate=replicate)
    trainer = TorchTrainer(
        chosen.model, chosen.objective, chosen.optimizer, chosen.serve, chosen.run.seed, ranks
    )
    trainer.begin()
    columns = chosen.model.max_seq_len
    ids = np.random.default_rng(0).integers(0, chosen.model.mask_id, (2, columns))
    batch = trainer._host(Batch(ids, 2, columns))
    trainer._gradients(trainer._prepared(batch, Modes(), StepKey(0, 1, 1), ranks))
    groups = trainer._groups().values()
    others = (".step", "updates")
    moments = [
        tensor for group in groups for name, tensor in group.state().items() if not name.endswith(others)
    ]
    weights = list(trainer.networks.parameters())
    return {
        "weights": numbers(weights),
        "allocated": sum(own_part(weight).untyped_storage().nbytes() // 4 for weight in weights),
        "gradients": numbers(gradient for group in groups for gradient in group.gradients()),
        "moments": numbers(moments),
        "average": numbers(w for group in groups if group.ema is not None for w in group.ema.parameters()),
    }


def main() -> None:
    rank, size, store, cases, out = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(size))
    found: dict[str, Any] = {}
    for name, case in json.loads(Path(cases).read_text()).items():
        replicate = case.pop("replicate")
        try:
            found[name] = measured(config.load(None, **case), replicate)
        except ConfigError as error:
            found[name] = str(error)
    Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
