"""Masked language models of the transformers library: their architectures and initial weights."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import torch
from torch import nn

from maskwire_server.config import ModelConfig
from maskwire_server.errors import ConfigError
from maskwire_server.training.user_code import one_line

log = logging.getLogger(__name__)


def architecture(model: ModelConfig) -> nn.Module:
    """Build the model that [model.huggingface] describes, with random weights. Raises ConfigError."""
    source = model.huggingface
    assert source is not None
    transformers = _library()
    try:
        values = {key: value for key, value in source.config.items() if key != "model_type"}
        if source.trust_remote_code and "auto_map" in source.config:  # the run does not record the code
            config = transformers.AutoConfig.from_pretrained(
                source.path, revision=source.revision, trust_remote_code=True
            )
            config.update(values)
        else:
            config = transformers.AutoConfig.for_model(source.config["model_type"], **values)
        module: nn.Module = transformers.AutoModelForMaskedLM.from_config(
            config, trust_remote_code=source.trust_remote_code, dtype=torch.get_default_dtype()
        )
    except Exception as error:
        raise ConfigError(
            f"model.huggingface: transformers cannot build the model: {one_line(error)}; correct its "
            "config.json, or install the version of transformers that it needs"
        ) from error
    try:
        _fit_vocabulary(module, model.num_tokens)
    except Exception as error:
        raise ConfigError(
            f"model.num_tokens: the vocabulary of {type(module).__name__} cannot be extended, got "
            f"{model.num_tokens} ({one_line(error)}); use an id of its vocabulary as model.mask_id"
        ) from error
    return module


def load_pretrained(module: nn.Module, model: ModelConfig) -> None:
    """Load the weights of model.huggingface.path, a folder or a name on the hub. Raises ConfigError.

    Weights that are missing there, and embeddings of added ids, keep their random values, which were drawn
    with the run's seed.
    """
    source = model.huggingface
    assert source is not None
    transformers = _library()
    try:
        found, report = transformers.AutoModelForMaskedLM.from_pretrained(
            source.path,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            use_safetensors=True,  # the other format is a pickle
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:
        raise ConfigError(
            f"model.huggingface.path: the weights of {source.path} cannot be loaded: {one_line(error)}; they "
            "must be safetensors that fit config.json: save them again with save_pretrained()"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        log.warning(
            "%s has no weights for %s: they start from random values", source.path, ", ".join(missing)
        )
    own = {  # by the names from before peft wrapped the matrices
        name.replace(".base_layer.", "."): tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if ".lora_" not in name
    }
    with torch.no_grad():
        for name, tensor in found.state_dict().items():
            if name not in missing:  # `found` has other random values for it
                # Embeddings with added ids have more rows than the tensor.
                own[name][tuple(slice(size) for size in tensor.shape)].copy_(tensor)


def with_adapters(module: nn.Module, model: ModelConfig) -> nn.Module:
    """Add low-rank adapters to the model, and freeze its other weights. Raises ConfigError."""
    lora, source = model.lora, model.huggingface
    assert lora is not None
    assert source is not None
    own_ids = source.config.get("vocab_size", model.num_tokens)
    if model.num_tokens > own_ids:
        # peft could train the added rows alone, but version 0.21 then drops the bias of a tied output layer.
        raise ConfigError(
            f"model.num_tokens: must be at most the vocabulary of the model, {own_ids}, "
            f"with [model.lora], because adapters do not train added ids, got {model.num_tokens}; use an id "
            "of its vocabulary as model.mask_id, or train without [model.lora]"
        )
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            '[model.lora] needs the peft library; install it with: pip install "maskwire[huggingface]"'
        ) from error
    output = module.get_output_embeddings()  # type: ignore[operator]
    of_output = [
        name for name, each in module.named_modules() if getattr(each, "weight", None) is output.weight
    ]
    targets: list[str] | str = list(lora.target_modules or ()) or "all-linear"
    named = [
        target
        for target in lora.target_modules or ()
        if any(name == target or name.endswith(f".{target}") for name in of_output)
    ]
    if named:
        raise ConfigError(
            f"model.lora.target_modules: must not name the output layer or a layer that shares its weight, "
            f"got {named[0]!r}; remove it from the list"
        )
    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets
    )
    try:
        with warnings.catch_warnings():  # peft reads an attribute that transformers will remove
            warnings.filterwarnings("ignore", "`?is_gradient_checkpointing", FutureWarning)
            adapted: nn.Module = peft.get_peft_model(module, settings)
    except ValueError as error:
        raise ConfigError(
            f"model.lora.target_modules: peft cannot adapt these modules: {one_line(error)}"
        ) from error
    return adapted


def fill_id(model: ModelConfig) -> int:
    """The id that the model gets at padding: the padding id in its config.json, or 0 if it has none."""
    config = model.huggingface.config if model.huggingface else {}
    return int(config.get("pad_token_id") or 0)


def _fit_vocabulary(module: Any, num_tokens: int) -> None:
    """Add rows to the embeddings for ids beyond the model's vocabulary, with random values."""
    if module.get_input_embeddings().weight.shape[0] < num_tokens:
        module.resize_token_embeddings(num_tokens, mean_resizing=False)


_INSTALL = (
    'model.source = "huggingface" needs the transformers library; install it with: '
    'pip install "maskwire[huggingface]"'
)


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(_INSTALL) from error
    if not sys.stderr.isatty():  # each redraw of a progress bar would add to the log
        transformers.utils.logging.disable_progress_bar()
    return transformers
