"""Parts of the tests of `prepare`: a small tokenizer, a full disk, and the content of folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FIELDS = {"prompt_field": "q", "response_field": "a"}


def stop(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tokenizer_folder(
    folder: Path,
    name: str,
    words: str = "[MASK] <m> </s> <e> <pad> <p> x y",
    *,
    unknown: str = "x",
    special: bool = True,
    **roles: str,
) -> Path:
    """A Hugging Face tokenizer of words, whose `tokenizer_config.json` names the tokens of some roles.

    Unless `special`, the mask is an ordinary token too: a text that spells it out has its id.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words.split())}, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for word in (word for word in words.split() if not word.isalpha()):
        made.add_tokens([AddedToken(word, special=special or word != "[MASK]")])
    path = folder / name
    path.mkdir()
    made.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({f"{role}_token": token for role, token in roles.items()})
    )
    return path
