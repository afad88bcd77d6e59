"""The work limit of evaluations and generations: it counts what the model computes, before it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.values import Limits, ModelInfo
from maskwire_server.batch import Batch, Prompts
from maskwire_server.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ServeConfig
from maskwire_server.errors import Refused
from maskwire_server.results import EvalOptions, GenerateOptions, Order, SelfCondMode
from maskwire_server.rpc import decoding, error_status, generate, token_batch, work_limits
from maskwire_server.training.models.generator_critic import Networks
from maskwire_server.training.trainer import TorchTrainer

PLAIN = ModelInfo(257, 256, None, 8192, 1, "", True, False)
BOTH = ModelInfo(257, 256, None, 8192, 1, "", True, True, self_cond=True)
LIMITS = Limits(2**20, 2**26, 8, 1024, 8192)
COLUMNS = 64


def batch(rows: int, columns: int) -> pb.TokenBatch:
    return pb.TokenBatch(data=bytes(rows * columns), shape=[rows, columns], dtype=pb.DATA_TYPE_UINT8)


@pytest.fixture(scope="module")
def trainer() -> TorchTrainer:
    model = ModelConfig(num_tokens=17, mask_id=16, max_seq_len=COLUMNS, dim=16, depth=1, heads=1, dim_head=16)
    objective = ObjectiveConfig(self_cond=True, critic="token")
    return TorchTrainer(model, objective, OptimizerConfig(), ServeConfig(device="cpu", threads=1), 0)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of positions in each pass through the generator or the critic."""
    seen: list[int] = []

    def counting(name: str) -> None:
        whole = getattr(Networks, name)

        def count(self: Networks, ids: Any, *arguments: Any, **options: Any) -> Any:
            seen.append(ids.numel())
            return whole(self, ids, *arguments, **options)

        monkeypatch.setattr(Networks, name, count)

    counting("embed")
    counting("criticize")
    return seen


@pytest.mark.parametrize("changes", [
    {}, {"only_train_generator": True}, {"chain_rule": True}, {"chain_rule": True, "random_order": True},
], ids=str)  # fmt: skip
def test_the_work_of_an_evaluation_is_the_positions_that_the_model_computes(
    trainer: TorchTrainer, computed: list[int], changes: dict[str, Any]
) -> None:
    ids = np.random.default_rng(0).integers(0, 16, (3, COLUMNS))
    draws = 1 if changes == {"chain_rule": True} else 2
    trainer.eval_loss(Batch(ids, 3, COLUMNS), EvalOptions((0, 1, 2), draws, **changes))
    assert sum(computed) == work_limits.evaluation_tokens(
        3, COLUMNS, draws, trainer.info, chain_rule=bool(changes.get("chain_rule")),
        only_train_generator=bool(changes.get("only_train_generator")),
    )  # fmt: skip


@pytest.mark.parametrize("changes", [
    {}, {"steps": 4}, {"self_cond_mode": SelfCondMode.CARRY, "steps": 5},
    {"order": Order.CONFIDENCE, "steps": 3},
], ids=str)  # fmt: skip
def test_the_work_of_a_generation_is_the_positions_that_the_model_computes(
    trainer: TorchTrainer, computed: list[int], changes: dict[str, Any]
) -> None:
    known = np.zeros((3, COLUMNS), dtype=bool)
    known[1, 3:] = True
    known[2] = True
    prompts = Prompts(np.zeros((3, COLUMNS), dtype=np.int64), np.ones((3, COLUMNS), dtype=bool), known)
    options = GenerateOptions((0, 1, 2), **changes)
    list(trainer.generate(prompts, options))
    unknown = prompts.unknown.sum(-1).tolist()
    assert sum(computed) == work_limits.generation_tokens(unknown, COLUMNS, options, trainer.info)


def test_the_order_critic_adds_a_critic_pass_to_each_pass(trainer: TorchTrainer, computed: list[int]) -> None:
    options = GenerateOptions((0, 1), steps=4, order=Order.CRITIC)
    list(trainer.generate(Prompts.nothing(2, COLUMNS), options))
    counted = work_limits.generation_tokens([COLUMNS] * 2, COLUMNS, options, trainer.info)
    assert sum(computed) == counted - 2 * COLUMNS, "the last pass needs no critic: nothing stays masked"


TOO_MUCH: dict[str, tuple[str, Any, str]] = {
    "a chain rule of one column": (
        "batch.shape",
        pb.EvalLossRequest(batch=batch(2**20, 1), draws=1024, estimator=2, chain_order=2),
        "got 68719476736 for 1048576 x 1 tokens with 1024 draws by the chain rule",
    ),
    "draws of one column": (
        "batch.shape",
        pb.EvalLossRequest(batch=batch(2**20, 1), draws=2),
        "got 134217728 for 1048576 x 1 tokens with 2 draws",
    ),
    "rows, columns and draws that are each allowed": (
        "batch.shape",
        pb.EvalLossRequest(batch=batch(2**10, 2**10), draws=1024),
        "got 1073741824 for 1024 x 1024 tokens with 1024 draws",
    ),
    "a chain rule over long rows": (
        "batch.shape",
        pb.EvalLossRequest(batch=batch(2, 8192), estimator=2),
        "got 134217728 for 2 x 8192 tokens with 1 draws by the chain rule",
    ),
    "a generation": (
        "count",
        pb.GenerateRequest(count=128, length=8192, steps=8192),
        "got 8589934592 for 128 x 8192 tokens with 8192 unmasking passes",
    ),
    "prompts": (
        "count",
        pb.GenerateRequest(
            prompts=pb.TokenBatch(data=b"\0\1" * 2**18, shape=[32, 8192], dtype=pb.DATA_TYPE_UINT16)
        ),
        "got 2147483648 for 32 x 8192 tokens with 8192 unmasking passes",
    ),
}  # fmt: skip


def read(request: Any, info: ModelInfo) -> Any:
    reader = decoding.read_eval if isinstance(request, pb.EvalLossRequest) else generate.read_generate
    return reader(request, info, LIMITS)


@pytest.mark.parametrize("case", TOO_MUCH, ids=str)
def test_a_call_over_the_work_limit_is_refused_with_its_work_and_the_limit(case: str) -> None:
    field, request, words = TOO_MUCH[case]
    with pytest.raises(Refused) as raised:
        read(request, PLAIN)
    assert raised.value.metadata["field"] == field
    assert raised.value.metadata["max_read_tokens"] == "67108864"
    assert words in raised.value.message
    assert "at most 67108864 positions through the model (serve.max_read_tokens)" in raised.value.message
    assert "fewer rows, shorter ones or fewer" in raised.value.message


def test_a_pass_over_a_short_row_counts_64_columns() -> None:
    request = pb.GenerateRequest(count=2**20, length=1)
    read(request, PLAIN)
    with pytest.raises(Refused, match="got 134217728 for 1048576 x 1 tokens with 1 unmasking passes"):
        read(request, BOTH)


def test_the_default_limit_permits_the_calls_in_the_documentation() -> None:
    for request in (
        pb.EvalLossRequest(batch=batch(2**10, 2**10)),  # the largest batch, with the default draws
        pb.EvalLossRequest(batch=batch(1, 4096), estimator=2),
        pb.GenerateRequest(count=128, length=512),
    ):
        read(request, BOTH)
    read(pb.GenerateRequest(count=256, length=512), PLAIN)
    read(pb.EvalLossRequest(batch=batch(1, 8192), estimator=2), PLAIN)


def test_the_default_draws_are_lowered_to_the_servers_maximum() -> None:
    few = Limits(2**20, 2**26, 8, 4)
    assert decoding.read_eval(pb.EvalLossRequest(batch=batch(1, 4)), PLAIN, few).options.draws == 4
    assert decoding.read_eval(pb.EvalLossRequest(batch=batch(1, 4)), PLAIN, LIMITS).options.draws == 16
    with pytest.raises(Refused, match=r"draws must be 1 to 4 .*, or 0 for the default of 4, got 5"):
        decoding.read_eval(pb.EvalLossRequest(batch=batch(1, 4), draws=5), PLAIN, few)


class HugeField:
    """A repeated field with very many numbers, which must not be copied."""

    def __len__(self) -> int:
        return 10**7


LISTS: dict[str, Callable[[], Any]] = {
    "batch.shape": lambda: token_batch._shape("batch", HugeField(), PLAIN, LIMITS),  # type: ignore[arg-type]
    "batch.lengths": lambda: token_batch._lengths("batch", HugeField(), 2, 3),  # type: ignore[arg-type]
    "row_ids": lambda: read(pb.EvalLossRequest(batch=batch(1, 4), row_ids=[1] * 10**7), PLAIN),
    "row_seeds": lambda: read(pb.GenerateRequest(count=2, length=4, row_seeds=[1] * 10**7), PLAIN),
}


@pytest.mark.parametrize("field", LISTS)
def test_the_length_of_a_list_is_checked_before_it_is_copied(field: str) -> None:
    with pytest.raises(Refused, match=rf"{field} must .* got 10000000"):
        LISTS[field]()


def test_quoted_client_input_is_shortened_in_a_refusal() -> None:
    with pytest.raises(Refused) as raised:
        decoding.read_save(pb.CheckpointRequest(name="step-" + "1" * 10**6))
    for refused in (
        raised.value,
        Refused("WRONG_RUN", "ä" * 10**6, fields={"name": "b" * 10**6}, c="c" * 10**6),
    ):
        assert error_status.to_status(refused).ByteSize() < 5000
