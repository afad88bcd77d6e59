"""Models of x-transformers: a bidirectional `TransformerWrapper(attn_layers=Encoder(...))`.

Checked with x-transformers 2.31.10. Nearly every keyword of both classes works. A keyword is refused if
it makes the model causal, keeps state between calls, draws random numbers outside torch, needs inputs that
training does not have, or changes the number or meaning of the outputs.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch import Tensor, nn

from maskwire_server.config import ModelConfig
from maskwire_server.errors import ConfigError
from maskwire_server.training.conditioning_type import Conditioning
from maskwire_server.training.head import Head
from maskwire_server.training.models.backbone import Backbone, attended, mark_fused_maps, packed
from maskwire_server.training.user_code import one_line

_CAUSAL = "only makes sense for causal attention"
_STATE = "keeps state between calls"
_OUTPUTS = "changes what the model outputs"
_MODULE = 'takes a Python object; use source = "python"'
_INPUT = "needs an input that training does not have"
_RANDOM = "draws random numbers outside torch, so that steps could not be computed again"
REFUSED: dict[str, str] = {
    "causal": _CAUSAL, "rotary_xpos": _CAUSAL, "rotary_xpos_scale_base": _CAUSAL,
    "attn_max_attend_past": _CAUSAL, "attn_selective": _CAUSAL, "attn_causal": _CAUSAL,
    "max_mem_len": _STATE, "shift_mem_down": _STATE, "input_not_include_cache": _STATE,
    "memory_tokens_interspersed_every": "is for decoders",
    "logits_dim": _OUTPUTS, "return_only_embed": _OUTPUTS, "num_output_heads": _OUTPUTS,
    "average_pool_embed": _OUTPUTS, "use_cls_token": _OUTPUTS, "num_cls_tokens": _OUTPUTS,
    "attn_pool": _OUTPUTS, "num_pooled_tokens": _OUTPUTS, "attn_pool_depth": _OUTPUTS,
    "dim_pooled_tokens": _OUTPUTS,
    "squeeze_out_last_dim": _OUTPUTS, "mixture_of_softmax": _OUTPUTS, "mixture_of_softmax_k": _OUTPUTS,
    "sigsoftmax_logits": _OUTPUTS, "add_continuous_pred_head": _OUTPUTS, "looped": _OUTPUTS,
    "max_looped_steps": _OUTPUTS,
    "token_emb": _MODULE, "to_logits": _MODULE, "attn_custom_attn_fn": _MODULE, "attn_hybrid_module": _MODULE,
    "attn_hybrid_mask_kwarg": _MODULE, "attn_hybrid_fold_axial_dim": _MODULE,
    "attn_hybrid_learned_mix": _MODULE, "ff_custom_activation": _MODULE,
    "embed_num_tokens": _INPUT, "cross_attend": _INPUT, "only_cross": _INPUT, "cross_residual_attn": _INPUT,
    "cross_attn_tokens_dropout": _INPUT, "attn_dim_context": _INPUT, "dim_condition": _INPUT,
    "use_adaptive_layernorm": _INPUT, "use_adaptive_rmsnorm": _INPUT, "use_adaptive_layerscale": _INPUT,
    "adaptive_condition_mlp": _INPUT, "adaptive_condition_mlp_expansion": _INPUT,
    "attn_z_loss_weight": "adds a loss that training does not use",
    "layer_dropout": _RANDOM, "recycling": _RANDOM, "train_max_recycle_steps": _RANDOM,
    "attn_gumbel_softmax": "draws random numbers in evaluation too",
    "attn_gumbel_softmax_temp": "draws random numbers in evaluation too",
    "attn_gumbel_softmax_hard": "draws random numbers in evaluation too",
    "attn_dim": "is set by dim", "attn_heads": "is set by heads", "ff_dim": "is set by dim",
    "ff_dim_out": "is set by dim", "attn_dim_out": "is set by dim",
    "num_tokens": "is model.num_tokens", "max_seq_len": "is model.max_seq_len",
    "attn_layers": "is made from the other keywords",
}  # fmt: skip
"""Keywords that are refused, each with the reason."""


UNDECAYED = (
    "qk_norm_q_scale", "qk_norm_k_scale", "head_scale_params", "memory_tokens", "mem_k", "mem_v",
    "ff_deep_embed", "stream_emb",
)  # fmt: skip
"""Gains and embeddings that are parameters without a module of their own. They get no weight decay."""


class XTransformers(Backbone):
    """A `TransformerWrapper` of x-transformers with an `Encoder`.

    The names of its weights begin with `net.`, as in `NonAutoregressiveWrapper`.
    """

    def __init__(self, model: ModelConfig, outputs: int, *, self_cond: bool) -> None:
        super().__init__()
        library = _library()
        wrapper, layers = keywords(model.x_transformers)
        if outputs != model.num_tokens:
            wrapper = {key: value for key, value in wrapper.items() if not key.startswith("tie_embedding")}
            wrapper["logits_dim"] = outputs
        try:
            self.net = library.TransformerWrapper(
                num_tokens=model.num_tokens,
                max_seq_len=model.max_seq_len,
                attn_layers=library.Encoder(**layers),
                **wrapper,
            )
        except Exception as error:
            raise ConfigError(
                f"model.x_transformers: x-transformers cannot build this model: {one_line(error)}; correct "
                "the keywords"
            ) from error
        self.undecayed = UNDECAYED
        self.dim = self.net.attn_layers.dim
        mark_fused_maps(self.net, {"GLU": {"proj": 2}})
        self.blocks = [layer[1] for layer in self.net.attn_layers.layers]
        if self_cond:
            self.condition_itself(self.dim, self.net.emb_dim)

    def forward(
        self,
        ids_bn: Tensor,
        valid_bn: Tensor | None,
        cond: Conditioning = None,
        read_m: Tensor | None = None,
    ) -> Tensor:
        """Return the embeddings after the final norm, [b, n, d], or only those at `read_m`, [m, d]."""
        e_bnd: Tensor = self.net(
            ids_bn, mask=attended(valid_bn), sum_embeds=self.conditioning(cond), return_embeddings=True
        )
        return e_bnd if read_m is None else packed(e_bnd, read_m)

    def head(self, e_md: Tensor) -> Head:
        """Return the input, weight and bias of the output layer for the embeddings of m positions.

        With tie_embedding, this scales the embeddings instead of the weight.
        """
        if isinstance(self.net.to_logits, nn.Linear):
            return Head(e_md, self.net.to_logits.weight, self.net.to_logits.bias)
        return Head(e_md * self.net.tie_embedding_scale, self.net.token_emb.emb.weight)

    def checkpoint_activations(self, on: bool) -> None:
        """Raise ConfigError if `on` is set: x-transformers has no activation checkpointing."""
        if on:
            raise ConfigError(
                "serve.activation_checkpointing: must be false, got true: x-transformers does not support it"
            )


def keywords(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split [model.x_transformers] into the keywords of TransformerWrapper and those of Encoder.

    Raises ConfigError, with a line for each keyword that is refused, does not exist, or is missing.
    """
    library = _library()
    of_wrapper = _names(library.TransformerWrapper)
    of_layers = _names(library.AttentionLayers)
    of_layers |= {f"attn_{name}" for name in _names(library.Attention)}
    of_layers |= {f"ff_{name}" for name in _names(library.FeedForward)}
    problems = []
    defaults = _defaults(library.TransformerWrapper) | _defaults(library.AttentionLayers)
    options = {
        key: value
        for key, value in options.items()
        if not (key in REFUSED and key in defaults and value == defaults[key])
    }
    for key in options:
        if key in REFUSED:
            problems.append(f"model.x_transformers.{key}: not supported: it {REFUSED[key]}")
        elif key not in of_wrapper | of_layers:
            near = difflib.get_close_matches(key, sorted((of_wrapper | of_layers) - REFUSED.keys()), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(
                f"model.x_transformers.{key}: neither TransformerWrapper nor Encoder has this keyword{hint}"
            )
    problems += [
        f"model.x_transformers.{key}: must be set, got none" for key in ("dim", "depth") if key not in options
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    wrapper = {key: value for key, value in options.items() if key in of_wrapper}
    layers = {key: value for key, value in options.items() if key not in of_wrapper}
    if isinstance(layers.get("custom_layers"), list):
        layers["custom_layers"] = tuple(layers["custom_layers"])
    return wrapper, {"verbose": False, **layers}


def constructor(model: ModelConfig) -> str:
    """The Python expression that builds the network for an exported state dict."""
    wrapper, layers = keywords(model.x_transformers)
    outer = {"num_tokens": model.num_tokens, "max_seq_len": model.max_seq_len, **wrapper}
    inner = {key: value for key, value in layers.items() if key != "verbose"}
    return f"TransformerWrapper({_written(outer)}, attn_layers=Encoder({_written(inner)}))"


def _written(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _defaults(kind: type) -> dict[str, Any]:
    """The default values of a class's keywords, without the keywords that have no default."""
    parameters = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


def _names(kind: type) -> set[str]:
    return set(inspect.signature(kind.__init__).parameters) - {"self", "kwargs"}  # type: ignore[misc]


def _library() -> Any:
    try:
        from x_transformers import x_transformers
    except ImportError as error:
        raise ConfigError(
            'model.source = "x-transformers" needs the x-transformers library; install it with: '
            'pip install "maskwire[x-transformers]"'
        ) from error
    return x_transformers
