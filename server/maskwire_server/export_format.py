"""The formats in which weights can be exported, and which models fit each format."""

from __future__ import annotations

from typing import Literal

from maskwire_server.config import ModelConfig

Format = Literal["maskwire", "x-transformers", "huggingface", "peft"]

_FITTING: dict[str, str] = {
    "encoder": "--to x-transformers or --to maskwire",
    "x-transformers": "--to x-transformers or --to maskwire",
    "huggingface": "--to huggingface or --to maskwire",
    "lora": "--to peft (the adapters), --to huggingface --merged (the whole model) or --to maskwire",
    "python": "--to maskwire: in the module that maskwire_server.load(FOLDER, factory=...) returns, "
    "networks.generator holds the model that your factory built",
}


def check(model: ModelConfig, to: Format, *, merged: bool) -> None:
    """Raise ValueError if a model cannot be exported in a format. The message names formats that fit."""
    if merged and (model.lora is None or to != "huggingface"):
        why = "the run trains no adapters ([model.lora])" if model.lora is None else f"--to is {to!r}"
        raise ValueError(f"--merged is for adapters exported with --to huggingface, but {why}; omit --merged")
    source = "lora" if model.lora is not None else model.source
    fits = {
        "maskwire": True,
        "x-transformers": source in ("encoder", "x-transformers"),
        "huggingface": source == "huggingface" or (source == "lora" and merged),
        "peft": source == "lora",
    }
    if not fits[to]:
        what = "adapters ([model.lora])" if source == "lora" else f"model.source = {model.source!r}"
        raise ValueError(f"--to {to} does not fit a run with {what}; use {_FITTING[source]}")
