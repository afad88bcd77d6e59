"""The section [model] of the configuration."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from maskwire_server.config.base import Finite, Section
from maskwire_server.config.model_source import FactoryConfig, HuggingFaceConfig, LoraConfig

Source = Literal["encoder", "x-transformers", "huggingface", "python"]

TABLES: dict[str, str] = {"x_transformers": "x-transformers", "huggingface": "huggingface",
                          "lora": "huggingface", "python": "python"}  # fmt: skip
"""The tables within [model], and the source that each belongs to."""
SHARED = {"source", "num_tokens", "mask_id", "pad_id", "max_seq_len", "weights_sha256"}
"""The settings of [model] that every source has. All others, except the tables, belong to the encoder."""


class Dropouts(NamedTuple):
    """The dropout rates of the parts of the encoder."""

    embedding: float
    attention: float
    feed_forward: float


class ModelConfig(Section):
    """[model]: the model. Fixed once the run exists."""

    source: Source = "encoder"
    """encoder: the built-in encoder, described by the settings below. x-transformers: a TransformerWrapper.
    huggingface: a masked language model of the transformers library. python: your own factory."""
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
    kv_heads: int | None = Field(None, ge=1)
    """Number of key and value heads, which must divide heads: grouped-query attention, or multi-query
    attention with 1. Default: heads."""
    dim_head: int = Field(64, ge=1)
    """Width of one attention head."""
    ff_mult: float = Field(4, gt=0)
    """Inner width of the feed-forward layers, as a multiple of dim."""
    emb_dim: int | None = Field(None, ge=1)
    """Width of the embeddings. Default: dim."""
    dropout: float = Field(0, ge=0, lt=1)
    """Dropout rate in training, for the embeddings, the attention weights and output, and the feed-forward's
    inner activations and output. The random draws depend on serve.micro_batch_tokens."""
    emb_dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout rate of the embeddings. Default: dropout."""
    attn_dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout rate of the attention weights and output. Default: dropout."""
    ff_dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout rate of the feed-forward's inner activations and output. Default: dropout."""
    positions: Literal["learned", "rotary"] = "learned"
    """Position encoding: learned embeddings, or rotary."""
    rotary_dim: int | None = Field(None, ge=2)
    """Number of channels of each head that are rotated, from the first; must be even. Default: dim_head."""
    rotary_pairs: Literal["halves", "interleaved"] = "halves"
    """Channels that are rotated together: i and i + rotary_dim / 2 (halves, as in Hugging Face models), or 2i
    and 2i + 1 (interleaved, as in x-transformers)."""
    rotary_base: Finite = Field(10_000.0, gt=1)
    """Base of the rotary wavelengths (rope_theta)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before each sub-layer and after the last block."""
    rms_norm_eps: Finite = Field(1e-6, gt=0)
    """Number added to the mean square in RMS normalisation: rmsnorm and qk_norm."""
    feed_forward: Literal["gelu", "silu", "relu_squared", "geglu", "swiglu"] = "gelu"
    """Activation of the feed-forward layers. geglu and swiglu are gated: the product of one half of the inner
    values and the GELU or SiLU of the other."""
    ff_bias: bool = True
    """Whether the linear maps of the feed-forward layers have biases."""
    ff_down_bias: bool | None = None
    """Whether the second of these linear maps has a bias. Default: ff_bias."""
    qk_norm: bool = False
    """Apply RMS normalisation with a learned gain to queries and keys."""
    qk_norm_gain: Literal["shared", "per_head", "none"] = "shared"
    """Gains of qk_norm: one vector of width dim_head for all heads, one per head, or none."""
    qk_norm_scale: Finite | None = Field(None, gt=0)
    """With qk_norm: factor of the cosine of a query and a key, besides the gains. Default: dim_head^1/2."""
    tied_embeddings: bool = False
    """Use the token embeddings, scaled by dim^-1/2, as the output projection."""
    x_transformers: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of x-transformers' TransformerWrapper and Encoder, for source = "x-transformers"."""
    huggingface: HuggingFaceConfig | None = None
    """The model, for source = "huggingface"."""
    lora: LoraConfig | None = None
    """Train adapters only, for source = "huggingface"."""
    python: FactoryConfig | None = None
    """The factory, for source = "python"."""
    weights_sha256: str = ""
    """SHA-256 of the initial weights, if they are not drawn from run.seed. The server sets it."""

    @model_validator(mode="after")
    def _fits_the_source(self) -> ModelConfig:
        for table, source in TABLES.items():
            if getattr(self, table) and source != self.source:
                raise ValueError(
                    f'the table {table} needs source = "{source}", got source = "{self.source}"; remove the '
                    "table, or set this source"
                )
        if self.source == "encoder":
            return self
        own = sorted(self.model_fields_set - SHARED - TABLES.keys())
        defaults = type(self).model_fields
        own = [key for key in own if getattr(self, key) != defaults[key].default]
        if own:
            where = {
                "x-transformers": "[model.x_transformers]",
                "huggingface": "its config.json",
                "python": "[model.python.options]",
            }[self.source]
            raise ValueError(
                f'{own[0]} applies only to source = "encoder", got {getattr(self, own[0])!r}; remove it: '
                f"this model is described by {where}"
            )
        if self.source == "huggingface" and not (self.huggingface and self.huggingface.path):
            raise ValueError('model.huggingface.path must be set with source = "huggingface", got none')
        if self.source == "python" and not (self.python and self.python.factory):
            raise ValueError('model.python.factory must be set with source = "python", got none')
        return self

    @model_validator(mode="after")
    def _ids_fit(self) -> ModelConfig:
        for name in ("mask_id", "pad_id"):
            value = getattr(self, name)
            if value is not None and value >= self.num_tokens:
                raise ValueError(f"{name} must be below num_tokens = {self.num_tokens}, got {value}")
        if self.pad_id is not None and self.pad_id == self.mask_id:
            raise ValueError(f"pad_id must differ from mask_id, got {self.pad_id} for both")
        if self.num_tokens - 1 - (self.pad_id is not None) < 1:
            raise ValueError(
                "num_tokens must leave at least one id for data besides mask_id and pad_id, got "
                f"{self.num_tokens}"
            )
        if self.tied_embeddings and self.emb_dim not in (None, self.dim):
            raise ValueError(
                f"emb_dim must equal dim = {self.dim} with tied_embeddings = true, got {self.emb_dim}"
            )
        return self

    @model_validator(mode="after")
    def _attention_fits(self) -> ModelConfig:
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads must divide heads = {self.heads}, got {self.kv_heads}")
        if self.positions == "rotary" and self.dim_head % 2:
            raise ValueError(f'dim_head must be even with positions = "rotary", got {self.dim_head}')
        if self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim > self.dim_head):
            raise ValueError(
                f"rotary_dim must be even and at most dim_head = {self.dim_head}, got {self.rotary_dim}"
            )
        for key, needed, has in (
            ("rotary_dim", 'positions = "rotary"', self.positions == "rotary"),
            ("rotary_pairs", 'positions = "rotary"', self.positions == "rotary"),
            ("rotary_base", 'positions = "rotary"', self.positions == "rotary"),
            ("qk_norm_gain", "qk_norm = true", self.qk_norm),
            ("qk_norm_scale", "qk_norm = true", self.qk_norm),
        ):
            value = getattr(self, key)
            if not has and value != type(self).model_fields[key].default:
                raise ValueError(f"{key} needs {needed}, got {value} without it; set both or neither")
        return self

    @property
    def dropouts(self) -> Dropouts:
        """The dropout rates of the parts of the encoder. A rate that is not set is that of `dropout`."""
        rates = (self.emb_dropout, self.attn_dropout, self.ff_dropout)
        return Dropouts(*(self.dropout if rate is None else rate for rate in rates))

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """The widths of queries, keys and values over all heads: the rows of a block's `to_qkv` matrix."""
        shared = (self.kv_heads or self.heads) * self.dim_head
        return self.heads * self.dim_head, shared, shared

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layers are gated. The first linear map then has twice the inner width."""
        return self.feed_forward in ("geglu", "swiglu")

    @property
    def ff_biases(self) -> tuple[bool, bool]:
        """Whether the first and the second linear map of the feed-forward layers have biases."""
        return self.ff_bias, self.ff_bias if self.ff_down_bias is None else self.ff_down_bias
