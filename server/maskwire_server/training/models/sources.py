"""Build the model that [model] describes, for any model.source. Nothing else builds models."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from maskwire_server.config import ModelConfig
from maskwire_server.errors import ConfigError
from maskwire_server.training import user_code
from maskwire_server.training.models import hugging_face
from maskwire_server.training.models.backbone import Backbone
from maskwire_server.training.models.encoder import Encoder
from maskwire_server.training.models.masked_lm import MaskedLM
from maskwire_server.training.models.transformer_wrapper import XTransformers

Factory = Callable[..., nn.Module]
"""A function that builds a user's own model. It is called with [model] and model.python.options."""


def generator(model: ModelConfig, factory: Factory | None = None, *, self_cond: bool) -> Backbone:
    """Build the generator of [model] with random weights. Raises ConfigError.

    torch's random number generator must be seeded. `factory`, if given, is called instead of the function
    that model.python.factory names.
    """
    return _backbone(model, None, factory, self_cond=self_cond)


def critic(model: ModelConfig, factory: Factory | None = None) -> Backbone:
    """Build a critic as a model of its own, with one score per position. Raises ConfigError."""
    return _backbone(model, 1, factory, self_cond=False)


def _backbone(
    model: ModelConfig, outputs: int | None, factory: Factory | None, *, self_cond: bool
) -> Backbone:
    if model.source == "encoder":
        if outputs is not None:
            model = model.model_copy(update={"tied_embeddings": False})
        return Encoder(model, outputs or model.num_tokens, self_cond=self_cond)
    if model.source == "x-transformers":
        return XTransformers(model, outputs or model.num_tokens, self_cond=self_cond)
    if model.source == "huggingface":
        module = hugging_face.architecture(model)
        if model.lora is not None and outputs is None:
            module = hugging_face.with_adapters(module, model)
        fill_id = hugging_face.fill_id(model)
        return MaskedLM(module, outputs, self_cond=self_cond, mask_id=model.mask_id, fill_id=fill_id)
    return _of_factory(model, outputs, factory, self_cond=self_cond)


def _of_factory(
    model: ModelConfig, outputs: int | None, factory: Factory | None, *, self_cond: bool
) -> Backbone:
    assert model.python is not None
    name = model.python.factory
    build = factory or user_code.import_object("model.python.factory", name)
    if not callable(build):
        raise ConfigError(f"model.python.factory: {name} must be a function, got {type(build).__name__}")
    try:
        found = build(model, **copy.deepcopy(model.python.options))
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"model.python.factory: {name} raised {user_code.one_line(error)}; correct it, or its options"
        ) from error
    if isinstance(found, Backbone):
        if outputs is not None or self_cond:
            raise ConfigError(
                f"model.python.factory: {name} returned a Backbone, which supports neither a token critic "
                "nor self-conditioning; to use them, return a torch module with get_output_embeddings()"
            )
        return found
    if not isinstance(found, nn.Module) or not hasattr(found, "get_output_embeddings"):
        raise ConfigError(
            f"model.python.factory: {name} must return a Backbone or a torch module with "
            f"get_output_embeddings(), got {type(found).__name__}"
        )
    lazy = next((key for key, each in found.named_parameters() if nn.parameter.is_lazy(each)), None)
    if lazy is not None:
        raise ConfigError(
            f"model.python.factory: {name} must return a module whose parameters have shapes, got {lazy} of "
            "a lazy layer; give the layer its sizes"
        )
    return MaskedLM(found, outputs, self_cond=self_cond, mask_id=model.mask_id, fill_id=model.pad_id or 0)


def load_initial_weights(model: ModelConfig, backbones: Iterable[Backbone]) -> None:
    """Load pretrained weights into new models, if model.huggingface.pretrained is set. Raises ConfigError."""
    if model.huggingface is None or not model.huggingface.pretrained:
        return
    for backbone in backbones:
        if isinstance(backbone, MaskedLM):
            hugging_face.load_pretrained(backbone.base, model)


def versions(model: ModelConfig) -> dict[str, str]:
    """The versions that a model's results depend on, by name, except that of torch.

    They are the versions of libraries, and the SHA-256 of the file that defines a user's factory.
    """
    packages = {
        "encoder": [],
        "x-transformers": ["x-transformers"],
        "huggingface": ["transformers"] + ["peft"] * (model.lora is not None),
        "python": [],
    }[model.source]
    found = {package: importlib.metadata.version(package) for package in packages}
    if model.python is not None:
        found["factory"] = user_code.file_sha256(model.python.factory)
    return found


def sha256(tensors: dict[str, Tensor]) -> str:
    """The SHA-256 of tensors, in hexadecimal.

    It covers each tensor's name, type, shape and little-endian content, in the order of the names.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return found.hexdigest()
