"""What a model is conditioned on besides its ids: the embeddings of a first pass, or a learned stand-in."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Conditioning = Tensor | Literal["null"] | None
"""The embeddings of a first pass, [b, n, d]; the null embedding in their place; or no self-conditioning."""
