"""Load a checkpoint as a plain torch module, without a server.

Letters: b rows, n positions, v vocabulary.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from maskwire_server.config import ModelConfig, ObjectiveConfig, recorded_sections
from maskwire_server.errors import ConfigError
from maskwire_server.manifest import MANIFEST, Manifest
from maskwire_server.results import WEIGHT_FILES
from maskwire_server.training.corruption import Vocabulary
from maskwire_server.training.cross_entropy import forbid_special
from maskwire_server.training.models.networks import Networks

RAW, EMA = WEIGHT_FILES
_INSTEAD = ", or use the trained weights with weights = 'raw'"


class MaskedModel(nn.Module):
    """The generator, as it is used in evaluation. It maps ids with masks to logits.

    Put `mask_id` at the positions to predict. With self-conditioning, `forward` computes both passes.
    """

    def __init__(self, model: ModelConfig, objective: ObjectiveConfig) -> None:
        super().__init__()
        self.networks = Networks(model, objective)
        self.config = model
        """The model's configuration."""
        self.objective = objective
        """The objective of its training."""
        self.mask_id = model.mask_id
        self._vocabulary = Vocabulary.of(model)

    def forward(self, ids_bn: Tensor, valid_bn: Tensor | None = None) -> Tensor:
        """Logits, fp32 [b, n, v], for ids, int64 [b, n]. The mask id and the pad id have logit -inf.

        `valid_bn` is False at padding. By default, padding is where the ids equal the model's pad id, if any.
        """
        if valid_bn is None and self.config.pad_id is not None:
            valid_bn = ids_bn != self.config.pad_id
        if valid_bn is not None:
            ids_bn = torch.where(valid_bn, ids_bn, 0)
            valid_bn = None if bool(valid_bn.all()) else valid_bn
        networks, cond = self.networks, None
        if self.objective.self_cond:
            start = networks.conditioning(None) if self.objective.self_cond_start == "null" else None
            cond = networks.conditioning(networks.embed(ids_bn, valid_bn, start))
        return forbid_special(networks.project(networks.embed(ids_bn, valid_bn, cond)), self._vocabulary)


def load(
    path: str | Path,
    *,
    weights: Literal["auto", "ema", "raw"] = "auto",
    device: str | torch.device = "cpu",
) -> MaskedModel:
    """Load the model from the folder of a checkpoint, downloaded or in a run directory. In evaluation mode.

    `weights` is "ema" for the moving average, "raw" for the trained weights, or "auto" for those that the
    server evaluates: the moving average if the run keeps one. No file in the folder can run code. Raises
    ValueError for files that are missing, damaged or do not fit the configuration in the folder.
    """
    folder = Path(path)
    manifest = _manifest(folder)
    names = {"auto": (EMA, RAW), "ema": (EMA,), "raw": (RAW,)}
    if weights not in names:
        raise ValueError(f"weights must be auto, ema or raw, got {weights!r}")
    hashes = {file.name: file.sha256 for file in manifest.info.files}
    name = next((name for name in names[weights] if name in hashes), None)
    if name is None:
        raise ValueError(f"{folder}: the run keeps no moving average; use weights = 'raw'")
    if not (folder / name).is_file():
        raise ValueError(
            f"{folder} has no {name}; download it" + _INSTEAD * (name == EMA and weights == "auto")
        )
    with (folder / name).open("rb") as file:
        if hashlib.file_digest(file, "sha256").digest() != hashes[name]:
            raise ValueError(f"{folder / name} does not match the manifest's SHA-256; download it again")
    try:
        model, objective = recorded_sections(manifest.configuration)
        tensors = load_file(folder / name)
    except (ConfigError, SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: this version cannot read the checkpoint ({error})") from error
    with torch.device("meta"):
        module = MaskedModel(model, objective)
    try:
        module.networks.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{folder / name} does not fit the configuration in {MANIFEST}: {error}") from error
    return module.to(device).eval()


def _manifest(folder: Path) -> Manifest:
    try:
        return Manifest.from_json((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise ValueError(
            f"{folder} is not a complete checkpoint: {MANIFEST} cannot be read ({error.strerror})"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / MANIFEST} is not a valid manifest: {error}") from error
