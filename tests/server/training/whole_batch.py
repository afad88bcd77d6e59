"""A whole batch, masked at once."""

from __future__ import annotations

from torch import Tensor

from maskwire_server.config import ObjectiveConfig
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
    masking = Masking.of(batch, config, vocabulary, step, [(rows, columns)], schedule)
    return masking.corrupt(rows, *batch.take(rows, columns))
