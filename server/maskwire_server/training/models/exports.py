"""Write a model in the format of x-transformers, transformers or peft, or join files of several ranks."""

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
    """Write the model to a safetensors file, as the state dict of a `NonAutoregressiveWrapper`.

    Returns the Python expression that builds the network for it. Raises ValueError if x-transformers has no
    such network, and OSError if the file cannot be written.
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

    Returns the names of the written files. Raises ValueError if a file of the checkpoint is missing or was
    changed, and OSError if a file cannot be written.
    """
    found = {unsharded_name(file.name) for file in manifest.info.files}
    written = sorted(found & {*WEIGHT_FILES, FROZEN_FILE})
    for file in written:
        shards.save(read_weights(folder, manifest, file), out / file)
    return written


def write_folder(module: MaskedModel, folder: Path, *, merged: bool) -> None:
    """Write the model to a folder, for `AutoModelForMaskedLM.from_pretrained`. Raises OSError.

    With `merged`, the low-rank adapters are merged into the weights that they adapt.
    """
    model: Any = _masked_lm(module).model
    (model.merge_and_unload() if merged else model).save_pretrained(folder)


def write_adapters(module: MaskedModel, folder: Path) -> None:
    """Write only the low-rank adapters to a folder, for `PeftModel.from_pretrained`. Raises OSError."""
    model: Any = _masked_lm(module).model
    source = module.config.huggingface
    assert source is not None
    for settings in model.peft_config.values():
        base = Path(source.path)  # a name on the hub stays as it is
        settings.base_model_name_or_path = str(base.absolute()) if base.exists() else source.path
        settings.revision = source.revision
    # The default would ask the hub whether the base model has another vocabulary.
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
        raise TypeError(
            "only a MaskedLM can be exported for transformers or peft, got a generator of type "
            f"{type(generator).__name__}"
        )
    return generator
