"""The tokenizer of the run's data, kept in the run directory for clients that send prompts."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import logging
import os
import threading
from pathlib import Path

from maskwire.v1.values import TokenizerDescription
from maskwire_server.engine.shared_state import Run
from maskwire_server.errors import Refused, invalid_field
from maskwire_server.journal.fsync import flush_folder

log = logging.getLogger(__name__)

NAME = "data-tokenizer.json"
"""The name of the file in the run directory."""
_BYTES = "bytes"


class KeptTokenizer:
    """The file with the tokenizer of a run's data, replaced atomically. Safe to use from several threads."""

    def __init__(self, run_dir: Path, run: Run) -> None:
        self._path = run_dir / NAME
        self._run = run
        self._lock = threading.Lock()
        self._digest: str | None = None

    @property
    def digest(self) -> str:
        """The digest of the kept tokenizer; empty if none is kept."""
        if self._digest is None:
            found = self.read()
            self._digest = "" if found is None else found.digest
        return self._digest

    def read(self) -> TokenizerDescription | None:
        """Read the kept tokenizer; None if none is kept, or if its file is damaged.

        In both cases, the next client that trains sends the tokenizer again.
        """
        try:
            fields = json.loads(self._path.read_bytes())
            return TokenizerDescription(
                fields["name"],
                base64.b64decode(fields["file"]),
                tuple(fields["document_start"]),
                tuple(fields["document_end"]),
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read (%s): prompts have no tokenizer until training starts again",
                        self._path, error)  # fmt: skip
            return None

    def of_run(self) -> TokenizerDescription | None:
        """The kept tokenizer; None if none is kept, or if the run's ids were encoded with another one."""
        found = self.read()
        return None if found is None or found.name != self._name else found

    @property
    def _name(self) -> str:
        with self._run.mutex:
            return self._run.head.tokenizer

    def keep(self, given: TokenizerDescription) -> None:
        """Store the tokenizer with which the run's ids were encoded.

        Raises Refused if `given` is another tokenizer, and OSError if it cannot be written.
        """
        of_run = self._name
        if given.name != of_run:
            raise Refused(
                "TOKENIZER_MISMATCH",
                f"the run uses tokenizer {of_run or '(none yet)'}, got {given.name}: first train on data "
                f"that is encoded with {given.name}",
                tokenizer=of_run,
                client_tokenizer=given.name,
            )
        name = f"sha256:{hashlib.sha256(given.file).hexdigest()}" if given.file else _BYTES
        if name != given.name:
            raise invalid_field(
                "tokenizer.file",
                f"tokenizer.file must have the hash in tokenizer.name, {given.name}, got a file with {name}; "
                "send the file with the hash in tokenizer.name, or correct the name",
            )
        fields = dataclasses.asdict(given) | {"file": base64.b64encode(given.file).decode()}
        with self._lock:
            draft = self._path.with_suffix(".part")
            with draft.open("w") as file:
                json.dump(fields, file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._path)
            flush_folder(self._path.parent)
            self._digest = given.digest
