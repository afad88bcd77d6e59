"""Import weights of x-transformers unchanged, for a model with `model.source = "x-transformers"`.

The keywords of the model are in [model.x_transformers]. The names and values of the weights do not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskwire_server.config import ModelConfig, ObjectiveConfig
from maskwire_server.training.models.generator_critic import Networks
from maskwire_server.training.models.x_transformers_export import their_name
from maskwire_server.training.models.x_transformers_names import Tensors
from maskwire_server.training.models.x_transformers_wrapper_parts import (
    Imported,
    Parts,
    contradictions,
    objective_of,
    said,
    take_apart,
    with_objective,
)

_MOST_LINES = 12


def import_state_dict(tensors: Tensors, model: ModelConfig, objective: ObjectiveConfig) -> Imported:
    """Import the state dict of a `NonAutoregressiveWrapper` or a `TransformerWrapper(Encoder)`.

    Vocabulary, row length, critic and self-conditioning are read from the state dict. Raises ValueError with
    one line for each problem, and ConfigError for keywords that are refused.
    """
    parts = take_apart(tensors, integers=True)
    shown = {
        key: parts.net[name].shape[0]
        for key, name in (("num_tokens", "token_emb.emb.weight"), ("max_seq_len", "pos_emb.emb.weight"))
        if name in parts.net
    }
    problems = contradictions("model", said(model), shown)
    problems += contradictions("objective", said(objective), objective_of(parts))
    settings = said(model) | shown
    if "mask_id" not in settings:
        problems.append("model.mask_id must be set to the mask_id of the NonAutoregressiveWrapper, got none")
    if "max_seq_len" not in settings:
        problems.append(
            "model.max_seq_len must be set to the max_seq_len of the TransformerWrapper, got none: a state "
            "dict without learned positions does not show it"
        )
    if problems:
        raise ValueError("\n".join(problems))
    model = ModelConfig(**settings)
    objective = with_objective(parts, objective)
    weights = _named(parts)
    with torch.device("meta"):
        wanted = Networks(model, objective).state_dict()
    _compare(weights, wanted, parts.where)
    return Imported(
        model,
        objective,
        {name: weights[name].to(wanted[name].dtype, copy=True).contiguous() for name in wanted},
    )


def _named(parts: Parts) -> dict[str, Tensor]:
    """Rename the weights to their names in `Networks`."""
    found = {f"generator.net.{name}": tensor for name, tensor in parts.net.items()}
    found |= {f"generator.{name}": tensor for name, tensor in parts.conditioning.items()}
    for name, tensor in parts.critic.items():
        ours = name.removeprefix("to_logits.") if parts.critic_kind == "self" else f"net.{name}"
        found[f"critic.{ours}"] = tensor
    return found


def _compare(weights: dict[str, Tensor], wanted: dict[str, Tensor], where: str) -> None:
    """Raise ValueError unless the weights have the wanted names and shapes. It shows the file's names."""

    def line(ours: str) -> str:
        name = their_name(ours)
        name = name if where else name.removeprefix("net.")
        if ours not in weights:
            return f"{name} is missing, but a model with these keywords has it"
        if ours not in wanted:
            return f"{name} is in the state dict, but a model with these keywords does not have it"
        return f"{name} must have shape {tuple(wanted[ours].shape)}, got {tuple(weights[ours].shape)}"

    names = weights.keys() | wanted.keys()
    wrong = sorted(
        name
        for name in names
        if name not in weights or name not in wanted or weights[name].shape != wanted[name].shape
    )
    if wrong:
        head = "the state dict does not fit [model.x_transformers]; set all keywords of the model"
        more = [f"and {len(wrong) - _MOST_LINES} more"] if len(wrong) > _MOST_LINES else []
        raise ValueError("\n".join([head, *map(line, wrong[:_MOST_LINES]), *more]))
