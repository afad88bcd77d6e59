"""Stores with the run the tokenizer of the data that a training loop uses."""

from __future__ import annotations

import logging
from collections.abc import Generator
from functools import partial
from typing import Any

from maskwire.errors import RequestError, ServerError, UnimplementedError
from maskwire.v1.values import TokenizerDescription

log = logging.getLogger(__name__)


def keep_tokenizer(trainer: Any, data: Any) -> Generator[Any, Any, None]:
    """Store the data's `tokenizer_description` with the run, unless its tokens are plain bytes.

    Prompts are encoded with the stored tokenizer. Training does not need it, so a failure is only logged.
    """
    found: TokenizerDescription | None = getattr(data, "tokenizer_description", None)
    if found is None or not (found.file or found.document_end):  # plain bytes need no tokenizer
        return
    try:
        yield partial(trainer.keep_tokenizer, found)
    except UnimplementedError:
        log.info("the server is too old to store the data's tokenizer")
    except (RequestError, ServerError) as error:
        log.warning("the server did not store the data's tokenizer (%s); training is not affected", error)
