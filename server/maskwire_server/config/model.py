"""The section [model]."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from maskwire_server.config.base import Section


class ModelConfig(Section):
    """[model]: the encoder. Fixed once the run exists."""

    num_tokens: int = Field(257, ge=2, le=2**24)
    """Vocabulary size, including the mask id. The default is 256 byte values and a mask id."""
    mask_id: int = Field(256, ge=0)
    """The id at masked positions. Batches that contain it are rejected."""
    pad_id: int | None = Field(None, ge=0)
    """The id that marks padding in batches without lengths. Leave it out if the data has none."""
    max_seq_len: int = Field(512, ge=1, le=2**20)
    """Maximum row length, in tokens."""
    dim: int = Field(256, ge=1)
    """Width of the residual stream."""
    depth: int = Field(4, ge=1)
    """Number of transformer blocks (attention and feed-forward)."""
    heads: int = Field(4, ge=1)
    """Number of attention heads."""
    dim_head: int = Field(64, ge=1)
    """Width of one attention head."""
    ff_mult: float = Field(4, gt=0)
    """Inner width of the feed-forward layers, as a multiple of dim."""
    emb_dim: int | None = Field(None, ge=1)
    """Width of the embeddings. Default: dim."""
    dropout: float = Field(0, ge=0, lt=1)
    """Dropout rate in training, for the embeddings, the attention weights and output, and the feed-forward's
    inner activations and output. The random draws depend on serve.micro_batch_tokens."""
    positions: Literal["learned", "rotary"] = "learned"
    """Position encoding: learned embeddings, or rotary."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before each sub-layer and after the last block."""
    feed_forward: Literal["gelu", "swiglu"] = "gelu"
    """Activation of the feed-forward layers."""
    qk_norm: bool = False
    """Apply RMS normalisation with a learned gain to queries and keys."""
    tied_embeddings: bool = False
    """Use the token embeddings, scaled by dim^-1/2, as the output projection."""

    @model_validator(mode="after")
    def _ids_fit(self) -> ModelConfig:
        for name in ("mask_id", "pad_id"):
            value = getattr(self, name)
            if value is not None and value >= self.num_tokens:
                raise ValueError(f"{name} must be below num_tokens = {self.num_tokens}, got {value}")
        if self.pad_id is not None and self.pad_id == self.mask_id:
            raise ValueError(f"pad_id must differ from mask_id, got {self.pad_id} for both")
        if self.num_tokens - 1 - (self.pad_id is not None) < 1:
            raise ValueError(f"num_tokens must leave at least one id for data, got {self.num_tokens}")
        if self.positions == "rotary" and self.dim_head % 2:
            raise ValueError(f"dim_head must be even with rotary positions, got {self.dim_head}")
        if self.tied_embeddings and self.emb_dim not in (None, self.dim):
            raise ValueError(f"emb_dim must equal dim = {self.dim} with tied_embeddings, got {self.emb_dim}")
        return self
