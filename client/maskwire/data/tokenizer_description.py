"""What a run keeps of the tokenizer of its data, so that prompts are encoded as the data was."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenizerDescription:
    """A tokenizer, and the ids that its documents begin and end with."""

    name: str
    """"bytes", or "sha256:" and the hash of the tokenizer's file."""
    file: bytes = b""
    """The content of the tokenizer's file, a tokenizer.json; empty for bytes."""
    document_start: tuple[int, ...] = ()
    """The special ids that each document begins with, such as BOS."""
    document_end: tuple[int, ...] = ()
    """The special ids that each document ends with, such as EOS."""

    @property
    def digest(self) -> str:
        """A hash by which a client sees whether the run keeps the same description."""
        parts = [self.name, list(self.document_start), list(self.document_end)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
