"""Reads the description of a masked language model from its folder, without torch or transformers.

The run records the model's config.json, so that a restarted server needs neither the folder nor the network.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from maskwire_server.config import HuggingFaceConfig, ModelConfig
from maskwire_server.errors import ConfigError

_FIRST_POSITION_AFTER_PAD = (
    "roberta",
    "xlm-roberta",
    "camembert",
    "roberta-prelayernorm",
    "xlm-roberta-xl",
    "data2vec-text",
    "esm",
    "mpnet",
    "ibert",
    "longformer",
    "xmod",
)
"""Model types whose positions begin after the padding id."""


def filled_from_folder(model: ModelConfig) -> ModelConfig:
    """Complete the [model] section from the model's folder, and return it.

    The folder provides config.json, the size of the vocabulary, the ids of the mask and pad tokens, and the
    length of the longest row. Settings in the section take precedence. Raises ConfigError if one is missing.
    """
    source = model.huggingface
    if source is None or source.config:
        return model
    folder = _folder(source)
    config = _json(folder if folder.is_file() else folder / "config.json")
    tokens = {} if folder.is_file() else _special_tokens(folder)
    found: dict[str, Any] = {
        "num_tokens": config.get("vocab_size"),
        "mask_id": tokens.get("mask_token"),
        "pad_id": tokens.get("pad_token", config.get("pad_token_id")),
        "max_seq_len": _longest(config),
    }
    said = {key: getattr(model, key) for key in found if key in model.model_fields_set}
    found |= said
    for key, where in (
        ("num_tokens", "config.json has no vocab_size"),
        ("mask_id", "there is no tokenizer with a mask token beside config.json"),
        ("max_seq_len", "config.json has no max_position_embeddings"),
    ):
        if found[key] is None:
            raise ConfigError(f"model.{key}: must be set, because {where}")
    others = [found["mask_id"]]
    for key in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        ids = config.get(key)
        others += ids if isinstance(ids, list) else [ids]
    if "pad_id" not in said and found["pad_id"] in others:
        found["pad_id"] = None  # padding must then come from lengths, because this id also occurs in the data
    if "num_tokens" not in said and found["mask_id"] >= found["num_tokens"]:
        found["num_tokens"] = found["mask_id"] + 1
    fields = {key: getattr(model, key) for key in model.model_fields_set}
    known: dict[str, Any] = {"config": config}
    if folder.is_file():
        known["pretrained"] = False  # a config.json alone has no weights beside it
    return ModelConfig(**{**fields, **found, "huggingface": source.model_copy(update=known)})


def _folder(source: HuggingFaceConfig) -> Path:
    """The path of the model's local folder or config.json. A model on the hub is downloaded first."""
    path = Path(os.path.expanduser(source.path))  # noqa: PTH111 - an unknown user is no error
    if path.exists():
        return path
    if path.is_absolute() or source.path.startswith((".", "~")) or source.path.count("/") > 1:
        raise ConfigError(
            f"model.huggingface.path: must be a folder or the name of a model on the hub, got {str(path)!r}"
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ConfigError(
            f"model.huggingface.path: {source.path!r} is not a folder here; to load it from the hub, run: "
            'pip install "maskwire[huggingface]"'
        ) from error
    try:
        wanted = ["*.json", "*.txt", "*.model"] + ["*.safetensors"] * source.pretrained
        return Path(snapshot_download(source.path, revision=source.revision, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ConfigError(
            f"model.huggingface.path: {source.path} is not a folder here and cannot be loaded from "
            f"the hub; check the name and the connection: {error}"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.huggingface.path: {path} must be a readable JSON file: {error}") from error
    if not isinstance(found, dict) or "model_type" not in found:
        raise ConfigError(f"model.huggingface.path: {path} must be a transformers config with model_type")
    return found


def _special_tokens(folder: Path) -> dict[str, int]:
    """Read the ids of the mask and pad tokens from the tokenizer's files. Omits a token without an id."""
    contents: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in _optional_json(folder / name).items():
            if key in ("mask_token", "pad_token") and value:
                contents[key] = value["content"] if isinstance(value, dict) else value
    tokenizer = _optional_json(folder / "tokenizer.json")
    ids: dict[str, int] = {}
    vocabulary = folder / "vocab.txt"
    if vocabulary.is_file():
        lines = vocabulary.read_text(encoding="utf-8").splitlines()
        ids = {token: number for number, token in enumerate(lines)}
    own = tokenizer.get("model", {}).get("vocab", {})
    for more in (_optional_json(folder / "vocab.json"), own if isinstance(own, dict) else {}):
        ids |= more
    decoder = _optional_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    ids |= {each["content"]: int(number) for number, each in decoder.items()}
    ids |= {each["content"]: each["id"] for each in tokenizer.get("added_tokens", [])}
    return {key: ids[token] for key, token in contents.items() if token in ids}


def _optional_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.huggingface.path: {path} must be a readable JSON file: {error}") from error
    return found if isinstance(found, dict) else {}


def _longest(config: dict[str, Any]) -> int | None:
    longest = config.get("max_position_embeddings")
    if longest is not None and config["model_type"] in _FIRST_POSITION_AFTER_PAD:
        pad_id = config.get("pad_token_id")
        longest -= (1 if pad_id is None else pad_id) + 1
    return longest
