"""Stores the tokenizer of a training loop's data with the run."""

from __future__ import annotations

import logging
from collections.abc import Generator
from functools import partial
from typing import Any

from maskwire.errors import RequestError, ServerError, UnimplementedError
from maskwire.v1.values import TokenizerDescription

log = logging.getLogger(__name__)


def keep_tokenizer(trainer: Any, data: Any) -> Generator[Any, Any, None]:
    """Store the data's `tokenizer_description` with the run, if prompts need it.

    Training does not need it on the server, so a failure is only reported.
    """
    found: TokenizerDescription | None = getattr(data, "tokenizer_description", None)
    if found is None or not (found.file or found.document_end):  # a run of plain bytes needs none
        return
    try:
        yield partial(trainer.keep_tokenizer, found)
    except UnimplementedError:
        log.info("the server is too old to keep the tokenizer of the data")
    except (RequestError, ServerError) as error:
        log.warning("the run does not keep the tokenizer of the data (%s); training is not affected", error)
