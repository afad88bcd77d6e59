"""Write a loaded model in the format of the library that it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskwire.v1.values import unsharded_name
from maskwire_server.manifest import Manifest
from maskwire_server.results import FROZEN_FILE, WEIGHT_FILES
from maskwire_server.training import shards
from maskwire_server.training.models import transformer_wrapper, weight_files, x_transformers_export
from maskwire_server.training.models.masked_lm import MaskedLM
from maskwire_server.training.models.standalone_model import MaskedModel, read_weights


def write_state_dict(module: MaskedModel, out: Path) -> str:
    """Write the state dict of a `NonAutoregressiveWrapper` as safetensors.

    Returns the Python expression of the network that it fits. Raises ValueError and OSError.
    """
    weights = module.networks.state_dict()
    if module.config.source == "encoder":
        state = x_transformers_export.export_state_dict(module.config, module.objective, weights)
        network = x_transformers_export.constructor(module.config)
    else:
        state = x_transformers_export.renamed(weights)
        network = transformer_wrapper.constructor(module.config)
    weight_files.write(out, state)
    return network


def write_whole(folder: Path, manifest: Manifest, out: Path) -> list[str]:
    """Join the weights of a checkpoint that several ranks wrote, and write them to the folder `out`.

    Returns the names of the files. Raises ValueError if a file is missing or was changed, and OSError.
    """
    found = {unsharded_name(file.name) for file in manifest.info.files}
    written = sorted(found & {*WEIGHT_FILES, FROZEN_FILE})
    for file in written:
        shards.save(read_weights(folder, manifest, file), out / file)
    return written


def write_folder(module: MaskedModel, folder: Path, *, merged: bool) -> None:
    """Write the model with its weights, for `AutoModelForMaskedLM.from_pretrained`. Raises OSError.

    `merged` adds the product of the adapters to the matrices.
    """
    model: Any = _masked_lm(module).model
    (model.merge_and_unload() if merged else model).save_pretrained(folder)


def write_adapters(module: MaskedModel, folder: Path) -> None:
    """Write the adapters alone, for `PeftModel.from_pretrained`. Raises OSError."""
    model: Any = _masked_lm(module).model
    source = module.config.huggingface
    assert source is not None
    for settings in model.peft_config.values():
        base = Path(source.path)  # a name on the hub stays as it is
        settings.base_model_name_or_path = str(base.absolute()) if base.exists() else source.path
        settings.revision = source.revision
    # The default would ask the hub whether the base has another vocabulary.
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty template of a model card


def left_out(module: MaskedModel) -> list[str]:
    """The parts of the model that a Hugging Face folder cannot hold."""
    objective = module.objective
    return ["the weights of self-conditioning"] * objective.self_cond + ["the critic"] * (
        objective.critic != "none"
    )


def _masked_lm(module: MaskedModel) -> MaskedLM:
    generator = module.networks.generator
    if not isinstance(generator, MaskedLM):
        raise TypeError(f"generator must be a MaskedLM, got {type(generator).__name__}")
    return generator
