"""Options of x-transformers that the built-in encoder does not have, recognised by names in a state dict.

Checked with x-transformers 2.31.10. docs/importing.md lists the options that no name shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_LAYER = r"attn_layers\.layers\.\d+\."

# The pattern of a name, the option, and what can be imported. The first pattern that matches applies.
_BY_NAME: tuple[tuple[str, str, str], ...] = (
    (r"attn_layers\.rel_pos\.relative_attention_bias", "rel_pos_bias", "rel_pos_bias=False"),
    (r"attn_layers\.rel_pos\.", "dynamic_pos_bias", "dynamic_pos_bias=False"),
    (r"attn_layers\.polar_pos_emb\.", "polar_pos_emb", "learned or rotary positions"),
    (r"pos_emb\.scale$", "scaled_sinu_pos_emb", "learned or rotary positions"),
    (rf"{_LAYER}0\.0\.pre_tanh_scale$", "use_dynamic_tanh", "layernorm and rmsnorm"),
    (rf"{_LAYER}0\.0\.(alpha|s)$", "use_derf", "layernorm and rmsnorm"),
    (rf"{_LAYER}0\.0\.to_gamma\.", "use_adaptive_layernorm or use_adaptive_rmsnorm", "layernorm and rmsnorm"),
    (rf"{_LAYER}0\.1\.", "sandwich_norm", "sandwich_norm=False"),
    (rf"{_LAYER}0\.2\.", "pre_norm=False or pre_and_post_norm", "pre_norm=True alone"),
    (rf"{_LAYER}2\.gru\.", "gate_residual", "gate_residual=False"),
    (rf"{_LAYER}2\.residual_scale$", "scale_residual", "scale_residual=False"),
    (rf"{_LAYER}2\.(alpha|beta)$", "mv_split_residual", "mv_split_residual=False"),
    (rf"{_LAYER}2\.|attn_layers\.stream_emb$", "num_residual_streams", "num_residual_streams=1"),
    (rf"{_LAYER}1\.(gamma|to_gamma.*)$", "use_layerscale", "use_layerscale=False"),
    (rf"{_LAYER}1\.fn\.", "shift_tokens, macaron or use_layerscale", "none of them"),
    (r"attn_layers\.skip_combines\.", "unet_skips", "unet_skips=False"),
    (r"attn_layers\.reinject_input", "reinject_input", "reinject_input=False"),
    (r"attn_layers\.layer_integrators\.", "integrate_layers", "integrate_layers=False"),
    (r"attn_layers\.adaptive_mlp\.", "adaptive_condition_mlp", "adaptive_condition_mlp=False"),
    (rf"{_LAYER}1\.to_value_residual_mix\.", "add_value_residual", "add_value_residual=False"),
    (rf"{_LAYER}1\.mem_[kv]$", "attn_num_mem_kv", "attn_num_mem_kv=0"),
    (rf"{_LAYER}1\.to_v_gate\.", "attn_gate_values", "attn_gate_values=False"),
    (rf"{_LAYER}1\.head_scale_params$", "attn_head_scale", "attn_head_scale=False"),
    (rf"{_LAYER}1\.to_out\.0\.", "attn_on_attn", "attn_on_attn=False"),
    (rf"{_LAYER}1\.value_rmsnorm\.", "attn_value_rmsnorm", "attn_value_rmsnorm=False"),
    (rf"{_LAYER}1\.to_output_gate\.", "attn_output_gate", "attn_output_gate=False"),
    (rf"{_LAYER}1\.to_v_head_gate\.", "attn_gate_value_heads", "attn_gate_value_heads=False"),
    (rf"{_LAYER}1\.to_latent_q\.", "attn_use_latent_q", "attn_use_latent_q=False"),
    (rf"{_LAYER}1\.to_latent_kv\.", "attn_use_latent_kv", "attn_use_latent_kv=False"),
    (rf"{_LAYER}1\.attend\.head_attn_sink$", "attn_head_learned_sink", "attn_head_learned_sink=False"),
    (rf"{_LAYER}1\.data_dependent_alibi\.", "attn_data_dependent_alibi", "attn_data_dependent_alibi=False"),
    (rf"{_LAYER}1\.ff\.0\.mult_bias$", "ff_glu_mult_bias", "ff_glu_mult_bias=False"),
    (rf"{_LAYER}1\.ff\.(1\.|3\.)", "ff_post_act_ln", "ff_post_act_ln=False"),
    (r"post_emb_norm\.", "post_emb_norm", "post_emb_norm=False"),
    (r"memory_tokens$", "num_memory_tokens", "num_memory_tokens=0"),
    (r"embeds\.", "embed_num_tokens", "one kind of token"),
    (r"cls_token$", "use_cls_token", "use_cls_token=False"),
    (r"recycled_proj\.", "recycling", "recycling=False"),
    (r"to_mixture\.|combine_mixture\.", "mixture_of_softmax", "mixture_of_softmax=False"),
    (r"to_next_embed_pred\.", "add_continuous_pred_head", "add_continuous_pred_head=False"),
    (r"to_logits\.\d+\.", "num_output_heads", "num_output_heads=1"),
    (r"to_logits\.bias$", "to_logits", "the default projection without a bias"),
    (r"ff_deep_embed$", "ff_deep_embed", "ff_deep_embed=False"),
    (r"token_emb\.weight$", "token_emb", "the default token embedding"),
)

# The pattern of a missing name, the option, and what can be imported.
_BY_ABSENCE: tuple[tuple[str, str, str], ...] = (
    (r"pos_emb\.emb\.weight$", "use_abs_pos_emb=False", "learned or rotary positions"),
    (rf"{_LAYER}1\.(to_|ff\.)", "only_attn, sandwich_coef, par_ratio or custom_layers", "attention and "
     "feed-forward in turn"),
    (rf"{_LAYER}0\.0\.gamma$|attn_layers\.final_norm\.gamma$", "use_simple_rmsnorm or pre_norm=False",
     "layernorm and rmsnorm with pre_norm=True"),
)  # fmt: skip


HOSTED = 'use model.source = "x-transformers", which imports the model unchanged'
"""What to do with a model that the built-in encoder cannot represent."""


def named(names: Iterable[str], where: str) -> list[str]:
    """One line of error text for each unsupported option that the names in a state dict show.

    `where` is the prefix of the names in the file.
    """
    first: dict[tuple[str, str], str] = {}
    for name in sorted(names):
        for pattern, option, right in _BY_NAME:
            if re.match(pattern, name):
                first.setdefault((option, right), name)
                break
    return [message(option, f"{where}{name}", right) for (option, right), name in first.items()]


def message(option: str, sign: str, right: str) -> str:
    """The error message for an unsupported option.

    `sign` says how the state dict shows the option, and `right` says what can be imported instead.
    """
    return f"{option} is not supported ({sign}); the built-in encoder supports {right}; {HOSTED}"


def missing(names: Iterable[str], where: str) -> list[str]:
    """One line of error text for each unsupported option that missing names show, or for the name itself."""
    lines: dict[str, str] = {}
    for name in sorted(names):
        for pattern, option, right in _BY_ABSENCE:
            if re.match(pattern, name):
                lines.setdefault(option, message(option, f"{where}{name} is missing", right))
                break
        else:
            lines[name] = f"{where}{name} is missing: the state dict is incomplete"
    return list(lines.values())
