"""Copies the tokenizer files of a Hugging Face model into the run directory, from where an export takes them.

A restarted server and an export then need neither the model's folder nor the network.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from maskwire_server.config import Config, HuggingFaceConfig

log = logging.getLogger(__name__)

FOLDER = "tokenizer"
"""The name of the folder in the run directory."""
_PATTERNS = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "chat_template*",
)  # fmt: skip


def keep(config: Config) -> None:
    """Copy the model's tokenizer files into the run directory if it has none yet and the model has some.

    A failed copy is only logged, because the run does not need the files.
    """
    source, folder = config.model.huggingface, config.run.dir / FOLDER
    if source is None or folder.exists():
        return
    draft = folder.with_suffix(".part")
    try:
        found = files(_local(source))
        if found:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            copy(found, draft)
            draft.rename(folder)
    except OSError as error:
        log.warning("the tokenizer of %s could not be copied to %s: %s", source.path, folder, error)


def files(folder: Path | None) -> list[Path]:
    """The paths of the tokenizer files in a folder, sorted; empty if the folder does not exist."""
    if folder is None or not folder.is_dir():
        return []
    return sorted({path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()})


def copy(found: list[Path], to: Path) -> None:
    """Copy the files `found` into the folder `to`. Raises OSError."""
    for path in found:
        shutil.copyfile(path, to / path.name)


def _local(source: HuggingFaceConfig) -> Path | None:
    """The model's folder, or its folder in the hub's cache; None if neither exists. Uses no network."""
    path = Path(os.path.expanduser(source.path))  # noqa: PTH111 - an unknown user is no error
    if path.exists():
        return path
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        return None
    try:
        return Path(snapshot_download(source.path, revision=source.revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return None
