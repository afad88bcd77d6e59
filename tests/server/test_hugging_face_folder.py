"""A model's folder read without torch and transformers: what is downloaded, and what is refused."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from maskwire_server.config import ModelConfig
from maskwire_server.errors import ConfigError
from maskwire_server.hugging_face_folder import filled_from_folder

CONFIG = {"model_type": "bert", "vocab_size": 30, "max_position_embeddings": 64, "pad_token_id": 0}


def write(folder: Path, **files: Any) -> Path:
    """A folder with files of JSON; a string is written as it is."""
    for name, content in {"config": CONFIG, **files}.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text)
    return folder


def filled(path: object, **table: Any) -> ModelConfig:
    own = {key: table.pop(key) for key in ("mask_id", "num_tokens", "pad_id") if key in table}
    return filled_from_folder(
        ModelConfig(source="huggingface", huggingface={"path": str(path), **table}, **own)
    )


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config": "{"}, "config.json must be a readable JSON file: Expecting property name"),
        ({"config": "[]"}, "config.json must be a transformers config with model_type"),
        ({"config": {"vocab_size": 30}}, "config.json must be a transformers config with model_type"),
        ({"tokenizer": "{"}, "tokenizer.json must be a readable JSON file: Expecting property name"),
        ({"tokenizer_config": "["}, "tokenizer_config.json must be a readable JSON file: Expecting value"),
        (
            {},
            "model.mask_id: must be set, because there is no tokenizer with a mask token beside config.json",
        ),
    ],
    ids=str,
)
def test_files_that_cannot_be_read_or_lack_something_are_named(
    tmp_path: Path, files: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        filled(write(tmp_path, **files))
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("vocab_size", "model.num_tokens: must be set"),
        ("max_position_embeddings", "model.max_seq_len: must be"),
    ],
)
def test_a_size_that_the_folder_does_not_have_must_be_set(tmp_path: Path, missing: str, words: str) -> None:
    config = {key: value for key, value in CONFIG.items() if key != missing}
    with pytest.raises(ConfigError, match=words):
        filled(write(tmp_path, config=config), mask_id=4)


def test_a_mask_token_beyond_the_vocabulary_makes_room_for_itself(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        tokenizer={"added_tokens": [{"content": "[MASK]", "id": 31}]},
        special_tokens_map={"mask_token": {"content": "[MASK]"}},
    )
    model = filled(folder)
    assert (model.mask_id, model.num_tokens, model.pad_id, model.max_seq_len) == (31, 32, 0, 64)


@pytest.mark.parametrize("path", ["./none", "../none", "a/b/c", "~unknown-user/bert"])
def test_a_path_that_no_model_of_the_hub_can_have_is_not_looked_up(path: str) -> None:
    with pytest.raises(ConfigError, match="must be a folder or the name of a model on the hub"):
        filled(path, mask_id=4)


class HfHubHTTPError(OSError):
    """As huggingface_hub names it."""


class LocalEntryNotFoundError(FileNotFoundError):
    """As huggingface_hub names it."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for huggingface_hub; the test sets `snapshot_download`."""
    package, errors = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
    vars(errors).update(HfHubHTTPError=HfHubHTTPError, LocalEntryNotFoundError=LocalEntryNotFoundError)
    vars(package)["errors"] = errors
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return package


@pytest.mark.parametrize("pretrained", [True, False])
def test_of_a_model_of_the_hub_only_what_is_needed_is_downloaded(
    tmp_path: Path, hub: Any, pretrained: bool
) -> None:
    asked: list[Any] = []

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision, allow_patterns))
        return str(write(tmp_path))

    hub.snapshot_download = snapshot_download
    model = filled("some/bert", mask_id=4, revision="v1", pretrained=pretrained)
    weights = ["*.safetensors"] if pretrained else []
    assert asked == [("some/bert", "v1", ["*.json", "*.txt", "*.model", *weights])]
    assert (model.num_tokens, model.max_seq_len, model.pad_id) == (30, 64, 0)


@pytest.mark.parametrize(
    "error",
    [HfHubHTTPError("404"), LocalEntryNotFoundError("offline"), OSError("no route"), ValueError("name")],
)
def test_a_model_that_the_hub_does_not_give_is_named_with_the_reason(hub: Any, error: Exception) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    hub.snapshot_download = fail
    with pytest.raises(
        ConfigError, match=f"some/bert is not a folder here and cannot be loaded .*: {error}$"
    ):
        filled("some/bert", mask_id=4)


def test_the_stand_in_for_the_hub_is_as_the_real_one() -> None:
    """Read, not imported: the import takes seconds."""
    spec = importlib.util.find_spec("huggingface_hub")
    if spec is None or spec.origin is None:
        pytest.skip("needs the extra huggingface")
    folder = Path(spec.origin).parent
    classes = {
        node.name: [ast.unparse(base) for base in node.bases]
        for node in ast.parse((folder / "errors.py").read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    for one in (HfHubHTTPError, LocalEntryNotFoundError):
        assert {base.__name__ for base in one.__bases__} <= set(classes[one.__name__]), one
    functions = [
        {each.arg for each in (*node.args.args, *node.args.kwonlyargs)}
        for node in ast.parse((folder / "_snapshot_download.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "snapshot_download"
    ]
    assert {"repo_id", "revision", "allow_patterns"} <= functions[-1]
