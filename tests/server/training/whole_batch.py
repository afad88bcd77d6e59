"""A whole batch, masked at once, and its losses."""

from __future__ import annotations

from torch import Tensor

from maskwire_server.config import ObjectiveConfig
from maskwire_server.training import objective
from maskwire_server.training.corruption import Corruption, Masking, StepKey, Vocabulary
from maskwire_server.training.masking_schedule import Schedule
from maskwire_server.training.tensor_batch import TensorBatch


def corrupt(
    ids_bn: Tensor,
    valid_bn: Tensor,
    prompt_bn: Tensor,
    config: ObjectiveConfig,
    vocabulary: Vocabulary,
    step: StepKey,
    schedule: Schedule | None = None,
) -> Corruption:
    """Mask every row, as a part of its own."""
    batch = TensorBatch(ids_bn, valid_bn, prompt_bn)
    rows, columns = list(range(ids_bn.shape[0])), ids_bn.shape[1]
    parts = [(rows, batch.maskable_rn)]
    masking = Masking.of(batch.maskable_s, config, vocabulary, step, parts, schedule)
    return masking.corrupt(rows, *batch.take(rows, columns))


def losses(
    model: objective.Model,
    config: ObjectiveConfig,
    vocabulary: Vocabulary,
    whole: Corruption,
    maskable: int,
    plan: objective.StepPlan | None = None,
    critic_keys_b: Tensor | None = None,
) -> objective.PartLosses:
    """The losses of a masked batch, as one part."""
    weight_b = objective.position_weights(config, whole.n_b, whole.k_b)
    padded = not bool(whole.valid_bn.all())
    part = objective.TrainingPart.of(whole, weight_b, critic_keys_b, padded=padded)
    return objective.losses(model, config, vocabulary, part, maskable, plan or objective.StepPlan())
