"""The tokenizer's files of a Hugging Face model. The run directory keeps them, so that an export has them.

A restarted server and an export then need neither the model's folder nor the network.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from maskwire_server.config import Config, HuggingFaceConfig

log = logging.getLogger(__name__)

FOLDER = "tokenizer"
"""The folder in the run directory."""
_PATTERNS = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "chat_template*",
)  # fmt: skip


def keep(config: Config) -> None:
    """Copy the files into the directory of a run that has none yet. Does nothing if the model has none."""
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
    except OSError as error:  # the run does not need them
        log.warning("the tokenizer of %s could not be copied to %s: %s", source.path, folder, error)


def files(folder: Path | None) -> list[Path]:
    """The tokenizer's files in a folder."""
    if folder is None or not folder.is_dir():
        return []
    return sorted({path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()})


def copy(found: list[Path], to: Path) -> None:
    """Copy files into a folder. Raises OSError."""
    for path in found:
        shutil.copyfile(path, to / path.name)


def _local(source: HuggingFaceConfig) -> Path | None:
    """The model's folder, or the cached folder of a model from the hub. Uses no network."""
    path = Path(source.path).expanduser()
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
