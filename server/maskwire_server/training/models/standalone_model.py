"""Load a checkpoint as a plain torch module, without a server.

Letters: b rows, n positions, v vocabulary.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from maskwire.v1.values import unsharded_name
from maskwire_server.config import ModelConfig, ObjectiveConfig, recorded_sections
from maskwire_server.errors import ConfigError
from maskwire_server.manifest import MANIFEST, Manifest
from maskwire_server.results import FROZEN_FILE, WEIGHT_FILES
from maskwire_server.training import checkpoint_tensors, module_state
from maskwire_server.training.corruption import Vocabulary
from maskwire_server.training.cross_entropy import forbid_special
from maskwire_server.training.models.generator_critic import Networks
from maskwire_server.training.models.sources import Factory

RAW, EMA = WEIGHT_FILES
_INSTEAD = ", or use the trained weights with weights = 'raw'"


class MaskedModel(nn.Module):
    """The generator as evaluation uses it. It maps ids, some of which are masked, to logits.

    Put `mask_id` at the positions to predict. With self-conditioning, `forward` computes the first pass too.
    """

    def __init__(
        self, model: ModelConfig, objective: ObjectiveConfig, factory: Factory | None = None
    ) -> None:
        super().__init__()
        self.networks = Networks(model, objective, factory)
        self.config = model
        """The model's configuration."""
        self.objective = objective
        """The objective of its training."""
        self.mask_id = model.mask_id
        self._vocabulary = Vocabulary.of(model)

    def forward(self, ids_bn: Tensor, valid_bn: Tensor | None = None) -> Tensor:
        """Return logits, fp32 [b, n, v], for ids, int64 [b, n]. The mask and pad ids have logits of -inf.

        `valid_bn` is False at padding. By default, padding is where the ids equal the model's pad id.
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
    factory: Factory | None = None,
) -> MaskedModel:
    """Load a model, in evaluation mode, from the folder of a checkpoint, downloaded or in a run directory.

    `weights` is "ema" for the moving average, "raw" for the trained weights, or "auto" for those that the
    server evaluates: the moving average if the run keeps one. No file in the folder can run code. If a
    function of your own built the model, pass it as `factory`; it is called as on the server. Raises
    ValueError if files are missing, are damaged, or do not fit the configuration in the folder.
    """
    folder = Path(path)
    found = manifest(folder)
    names = {"auto": (EMA, RAW), "ema": (EMA,), "raw": (RAW,)}
    if weights not in names:
        raise ValueError(f"weights must be auto, ema or raw, got {weights!r}")
    files = {unsharded_name(file.name) for file in found.info.files}
    name = next((name for name in names[weights] if name in files), None)
    if name is None:
        raise ValueError(f"{folder}: the run keeps no moving average; use weights = 'raw'")
    instead = _INSTEAD * (name == EMA and weights == "auto")
    try:
        model, objective = recorded_sections(found.configuration)
        tensors = read_weights(folder, found, name, instead)
        if FROZEN_FILE in files:
            tensors |= read_weights(folder, found, FROZEN_FILE)
    except (ConfigError, SafetensorError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"{folder}: the checkpoint cannot be read ({error}); use the version that wrote it"
        ) from error
    try:
        module = _build(model, objective, factory)
    except ConfigError as error:
        raise ValueError(f"{folder}: {error}") from error
    try:
        module_state.load(module.networks, tensors)
    except ValueError as error:
        raise ValueError(f"{folder / name} does not fit the configuration in {MANIFEST}: {error}") from error
    return module.to(device).eval()


def read_weights(folder: Path, found: Manifest, file: str, instead: str = "") -> dict[str, Tensor]:
    """Read the tensors of one file of weights, or of the files in which several ranks wrote its parts.

    Raises ValueError if a file is missing, was changed, or is not listed in the manifest.
    """
    listed = {each.name: each for each in found.info.files if unsharded_name(each.name) == file}
    for name, described in listed.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} has no {name}; download it{instead}")
        with path.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").digest() != described.sha256:
                raise ValueError(f"{path} does not match the manifest's SHA-256; download it again")
    for path in checkpoint_tensors.files_of(folder, file):
        if path.name not in listed:
            raise ValueError(f"{path} is not listed in {MANIFEST}; move it out of the folder")
    return checkpoint_tensors.read(checkpoint_tensors.find([folder / name for name in listed], file))


def _build(model: ModelConfig, objective: ObjectiveConfig, factory: Factory | None) -> MaskedModel:
    if model.source == "python" and factory is None:
        named = model.python.factory if model.python else ""
        raise ConfigError(f"the model was built by the function {named!r}; pass it as factory=")
    if model.huggingface is not None and model.huggingface.trust_remote_code:
        raise ConfigError(
            "the model needs code of its own (trust_remote_code), which is not run here; build the model "
            "with transformers, and load the weights into it"
        )
    return MaskedModel(model, objective, factory)


def manifest(folder: Path) -> Manifest:
    """Read the manifest in a checkpoint's folder. Raises ValueError if it is missing or not valid."""
    try:
        return Manifest.from_json((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise ValueError(
            f"{folder} is not a complete checkpoint: {MANIFEST} cannot be read "
            f"({error.strerror}); give the folder of a complete checkpoint"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{folder / MANIFEST} is not a valid manifest: {error}; copy the checkpoint again"
        ) from error
