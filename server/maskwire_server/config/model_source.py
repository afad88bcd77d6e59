"""The tables [model.huggingface], [model.lora] and [model.python] of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from maskwire_server.config.base import Section


def _text(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


class HuggingFaceConfig(Section):
    """[model.huggingface]: a masked language model of the transformers library."""

    path: Annotated[str, BeforeValidator(_text)] = ""
    """A folder with config.json, a config.json alone, or the name of a model on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    pretrained: bool = True
    """Start from the weights beside config.json. false: random weights, drawn from run.seed."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models that you trust like your own code."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The model's config.json. The server reads it when it creates the run, and the run records it."""


class LoraConfig(Section):
    """[model.lora]: train low-rank adapters of the model's matrices (peft) and freeze the model's weights."""

    rank: int = Field(8, ge=1)
    """Rank of each adapter."""
    alpha: int = Field(16, ge=1)
    """The adapters' product is scaled by alpha / rank."""
    dropout: float = Field(0, ge=0, lt=1)
    """Dropout rate of the adapters' inputs in training."""
    target_modules: tuple[str, ...] | None = None
    """Names, or endings of names, of the linear maps to adapt. Default: all except the output layer."""


class FactoryConfig(Section):
    """[model.python]: a model that is built by your own code on the server."""

    factory: str = ""
    """package.module:function. It is called with the [model] section and `options`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the factory."""
