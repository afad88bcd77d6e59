"""The section [model]."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from maskwire_server.config.base import Section


class ModelConfig(Section):
    """[model]: the encoder. It belongs to the run and cannot change."""

    num_tokens: int = Field(257, ge=2, le=2**24)
    """The vocabulary's size, the mask id included. 257 is bytes and a mask id."""
    mask_id: int = Field(256, ge=0)
    """The id that stands for a masked position. Data must not use it: a batch that has it is refused."""
    pad_id: int | None = Field(None, ge=0)
    """The id that stands for padding in batches without lengths, if the data has one."""
    max_seq_len: int = Field(512, ge=1, le=2**20)
    """The longest row, in tokens."""
    dim: int = Field(256, ge=1)
    """The width of the residual stream."""
    depth: int = Field(4, ge=1)
    """The number of blocks, each attention and feed-forward."""
    heads: int = Field(4, ge=1)
    """Attention heads."""
    dim_head: int = Field(64, ge=1)
    """The width of one head."""
    ff_mult: float = Field(4, gt=0)
    """The feed-forward's inner width, as a multiple of dim."""
    emb_dim: int | None = Field(None, ge=1)
    """The embeddings' width, when it differs from dim."""
    dropout: float = Field(0, ge=0, lt=1)
    """In training: of the embeddings, of the attention weights and attention's output, of the feed-forward's
    inner activations and its output. Draws depend on serve.micro_batch_tokens."""
    positions: Literal["learned", "rotary"] = "learned"
    """How positions enter."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """The normalisation before each sub-layer and at the end."""
    feed_forward: Literal["gelu", "swiglu"] = "gelu"
    """The feed-forward's nonlinearity."""
    qk_norm: bool = False
    """Normalise queries and keys to unit root mean square, with a learned gain."""
    tied_embeddings: bool = False
    """Use the token embedding as the output projection, scaled by dim^-1/2."""

    @model_validator(mode="after")
    def _ids_fit(self) -> ModelConfig:
        for name in ("mask_id", "pad_id"):
            value = getattr(self, name)
            if value is not None and value >= self.num_tokens:
                raise ValueError(f"{name} must be below num_tokens = {self.num_tokens}, got {value}")
        if self.pad_id is not None and self.pad_id == self.mask_id:
            raise ValueError(f"pad_id must differ from mask_id, got {self.pad_id} for both")
        if self.num_tokens - 1 - (self.pad_id is not None) < 1:
            raise ValueError(f"num_tokens must leave an id for data, got {self.num_tokens}")
        if self.positions == "rotary" and self.dim_head % 2:
            raise ValueError(f"dim_head must be even with rotary positions, got {self.dim_head}")
        if self.tied_embeddings and self.emb_dim not in (None, self.dim):
            raise ValueError(f"emb_dim must equal dim = {self.dim} with tied_embeddings, got {self.emb_dim}")
        return self
