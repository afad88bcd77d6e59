"""What a model is conditioned on besides its ids: the embeddings of a first pass, or a null embedding."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Conditioning = Tensor | Literal["null"] | None
"""The embeddings of a first pass, of shape [b, n, d]; "null" for the null embedding; None for neither."""
