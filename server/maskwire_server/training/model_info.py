"""The description of the model that clients receive."""

from __future__ import annotations

from maskwire.v1.values import ModelInfo
from maskwire_server.config import ModelConfig, ObjectiveConfig


def described(model: ModelConfig, objective: ObjectiveConfig, parameters: int) -> ModelInfo:
    """Describe a model to clients. `parameters` is the number of its parameters."""
    words = f"{objective.preset}: {objective.schedule} schedule, {objective.masking} masking, "
    words += objective.weighting
    if objective.augments:
        words += ", augmented (the training loss is not a bound; the evaluation is)"
    if objective.critic != "none":
        words += f", {objective.critic} critic"
    return ModelInfo(
        num_tokens=model.num_tokens,
        mask_id=model.mask_id,
        pad_id=model.pad_id,
        max_seq_len=model.max_seq_len,
        parameters=parameters,
        objective=words,
        loss_is_bound=objective.loss_is_bound,
        has_critic=objective.critic != "none",
        self_cond=objective.self_cond,
    )
