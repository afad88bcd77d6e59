"""A CUDA device computes what the CPU computes, and the same bits again where it promises them."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from source_models import (
    MODERN_ENCODER,
    PLAIN_ENCODER,
    TIED_ENCODER,
    of_folder,
    of_x_transformers,
    ragged_batch,
    write_folder,
)
from torch import Tensor

from maskwire.v1.values import Outcome
from maskwire_server import config
from maskwire_server.batch import Batch, Modes, Prompts
from maskwire_server.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ServeConfig
from maskwire_server.results import EvalOptions, GenerateOptions, Order, SelfCondMode
from maskwire_server.training import optimizers
from maskwire_server.training.corruption import StepKey
from maskwire_server.training.snapshot import live_tensors
from maskwire_server.training.trainer import TorchTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
COMPILES = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
"""torch.compile warns about itself."""
DEVICE = "cuda"
ENCODER = {
    "num_tokens": 41, "mask_id": 40, "pad_id": 39, "max_seq_len": 20,
    "dim": 64, "depth": 2, "heads": 4, "dim_head": 16,
}  # fmt: skip
BATCH = ragged_batch()
STEPS = 5


def make(
    device: str = DEVICE,
    objective: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    model: dict[str, Any] | ModelConfig | None = None,
    **serve: Any,
) -> TorchTrainer:
    """A trainer that has begun, in fp32 unless told otherwise."""
    chosen = model if isinstance(model, ModelConfig) else ModelConfig(**{**ENCODER, **(model or {})})
    trainer = TorchTrainer(
        chosen,
        ObjectiveConfig(**(objective or {})),
        OptimizerConfig(**{"learning_rate": 0.003, "warmup_steps": 0, "ema_decay": 0.9, **(optimizer or {})}),
        ServeConfig(**{"device": device, "precision": "fp32", "threads": 1, **serve}),
        seed=3,
    )
    trainer.begin()
    return trainer


def train(trainer: TorchTrainer, steps: int = STEPS, first: int = 1, **modes: Any) -> list[Any]:
    return [trainer.train_step(1, step, BATCH, Modes(**modes)) for step in range(first, first + steps)]


def state(trainer: TorchTrainer) -> dict[str, Tensor]:
    return {
        f"{file}/{name}": tensor.detach().cpu().clone()
        for file, tensors in live_tensors(trainer._groups()).items()
        for name, tensor in tensors.items()
    }


def different(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def assert_close(found: list[Any], expected: list[Any], tolerance: float) -> None:
    """Losses and gradient norms of steps, relative to their size."""
    for index, (one, other) in enumerate(zip(found, expected, strict=True), 1):
        assert one.outcome == other.outcome
        assert (one.masked_tokens, one.maskable_tokens) == (other.masked_tokens, other.maskable_tokens)
        pairs = [(one.gradient_norm, other.gradient_norm)]
        pairs += zip(vars(one.losses).values(), vars(other.losses).values(), strict=True)
        for left, right in pairs:
            if left is None or right is None:
                assert left is right
            else:
                assert left == pytest.approx(right, rel=tolerance, abs=tolerance), f"step {index}"


OBJECTIVES: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked mean": {"weighting": "masked_mean", "masking": "bernoulli"},
    "maskgit": {"preset": "maskgit"},
    "self conditioning": {"self_cond": True, "self_cond_prob": 1.0},
    "self critic": {"critic": "self", "self_cond": True},
    "token critic": {"critic": "token", "critic_labels": "token_critic"},
}
MODELS: dict[str, dict[str, Any]] = {
    "learned": {"positions": "learned"},
    "grouped": {"kv_heads": 2, "qk_norm": True, "norm": "rmsnorm", "feed_forward": "swiglu"},
    "narrow": {"emb_dim": 32, "positions": "rotary", "rotary_dim": 8, "rotary_pairs": "interleaved"},
    "untied": {"tied_embeddings": False, "feed_forward": "relu_squared"},
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_objective_is_that_of_the_cpu(objective: dict[str, Any]) -> None:
    found, expected = (train(make(device, objective)) for device in (DEVICE, "cpu"))
    assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_encoder_is_that_of_the_cpu(model: dict[str, Any]) -> None:
    found, expected = (train(make(device, model=model)) for device in (DEVICE, "cpu"))
    assert_close(found, expected, 1e-4)


def test_muon_is_that_of_the_cpu() -> None:
    muon = {"name": "muon"}
    found, expected = (train(make(device, optimizer=muon)) for device in (DEVICE, "cpu"))
    assert_close(found, expected, 1e-3)


@COMPILES
@pytest.mark.parametrize(
    "serve",
    [{"micro_batch_tokens": 40}, {"activation_checkpointing": True}, {"compile": "default"}],
    ids=str,
)
def test_how_a_step_is_computed_changes_only_its_rounding(serve: dict[str, Any]) -> None:
    objective = {"critic": "self", "self_cond": True}
    found, expected = train(make(objective=objective, **serve)), train(make(objective=objective))
    assert_close(found, expected, 1e-3)


@COMPILES
@pytest.mark.parametrize("compile", ["off", "default", "reduce-overhead"])
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_lower_precision_learns_the_same(precision: str, compile: str) -> None:
    objective = {"critic": "self", "self_cond": True}
    found = train(make(objective=objective, precision=precision, compile=compile))
    expected = train(make(objective=objective))
    assert_close(found, expected, 0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_deterministic_kernels_give_the_same_bits_after_a_restart(
    objective: dict[str, Any], precision: str, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"objective": objective, "precision": precision, "deterministic": True}
    how["model"] = {"dropout": 0.1}
    first, second = make(**how), make(**how)
    assert train(first) == train(second)
    assert not different(state(first), state(second))
    second.snapshot().write(tmp_path)
    third = make(**how)
    third.load(tmp_path)
    assert train(third, first=STEPS + 1) == train(first, first=STEPS + 1)
    assert not different(state(first), state(third))


@pytest.mark.parametrize("rows", [1, 300])
def test_deterministic_samples_are_those_of_the_cpu(rows: int) -> None:
    """The inverse CDF needs prefix sums of floats, for which torch has no deterministic kernel."""
    options = GenerateOptions(tuple(range(rows)), top_p=0.9)
    prompts = Prompts.nothing(rows, 20)
    found, expected = (
        list(make(device, deterministic=True).generate(prompts, options))[-1].ids
        for device in (DEVICE, "cpu")
    )
    assert (found == expected).all(-1).mean() >= 0.99


@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize("how", [{}, {"top_k": 5}, {"remasking": True, "steps": 6}], ids=str)
def test_generation_is_that_of_the_cpu(order: Order, how: dict[str, Any]) -> None:
    objective = {"critic": "self", "self_cond": True}
    if how.get("remasking") and order is Order.RANDOM:
        pytest.skip("random order has nothing to mask again")
    options = GenerateOptions(tuple(range(64)), order=order, **{"steps": 8, **how})
    rows = []
    for device in (DEVICE, "cpu"):
        states = list(make(device, objective).generate(Prompts.nothing(64, 20), options))
        rows.append(states[-1].ids)
    assert (rows[0] == rows[1]).all(-1).mean() >= 0.9, "a rounded tie may fall otherwise"


def test_carried_embeddings_are_those_of_the_cpu() -> None:
    options = GenerateOptions(tuple(range(64)), steps=8, self_cond_mode=SelfCondMode.CARRY)
    found, expected = (
        list(make(device, {"self_cond": True}).generate(Prompts.nothing(64, 20), options))[-1].ids
        for device in (DEVICE, "cpu")
    )
    assert (found == expected).all(-1).mean() >= 0.9


@pytest.mark.parametrize("chain_rule", [False, True])
def test_evaluation_is_that_of_the_cpu(chain_rule: bool) -> None:
    options = EvalOptions(tuple(range(6)), draws=4, chain_rule=chain_rule)
    found, expected = (
        make(device, {"critic": "self", "self_cond": True}).eval_loss(BATCH, options)
        for device in (DEVICE, "cpu")
    )
    assert found.nats_per_token == pytest.approx(expected.nats_per_token, rel=1e-5)
    assert found.tokens == expected.tokens


@pytest.mark.parametrize(
    "options", [PLAIN_ENCODER, MODERN_ENCODER, TIED_ENCODER], ids=["plain", "modern", "tied"]
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_x_transformers_on_a_gpu(options: dict[str, Any], deterministic: bool) -> None:
    pytest.importorskip("x_transformers")
    model = of_x_transformers(**options)
    objective = {"critic": "token"}
    found = train(make(DEVICE, objective, model=model, deterministic=deterministic))
    assert_close(found, train(make("cpu", objective, model=model)), 1e-3)


@pytest.mark.parametrize("architecture", ["BertConfig", "ModernBertConfig", "RobertaConfig"])
@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["whole", "lora"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_hugging_face_on_a_gpu(
    architecture: str, lora: dict[str, Any] | None, deterministic: bool, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    if lora is not None:
        pytest.importorskip("peft")
    more = {} if lora is None else {"lora": lora}
    model = of_folder(write_folder(tmp_path / "model", architecture), **more)
    gpu, cpu = (make(device, model=model, deterministic=deterministic) for device in (DEVICE, "cpu"))
    assert_close(train(gpu), train(cpu), 1e-3)
    gpu.snapshot().write(tmp_path)
    cpu.load(tmp_path)
    assert not different(state(gpu), state(cpu)), "a snapshot moves between devices"


def test_a_step_without_memory_changes_nothing_and_the_next_one_trains() -> None:
    wide = {"dim": 1024, "depth": 8, "heads": 16, "max_seq_len": 512, "num_tokens": 4097, "mask_id": 4096}
    trainer = make(model=wide, micro_batch_tokens=2**22)
    ids = np.random.default_rng(0).integers(0, 39, (512, 512))
    before = state(trainer)
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 4 * 2**30 / total))
    try:
        result = trainer.train_step(1, 1, Batch(ids, 512, 512), Modes())
        assert result.outcome is Outcome.OUT_OF_MEMORY
        assert not different(before, state(trainer))
        small = trainer.train_step(1, 1, Batch(ids[:2, :64], 2, 64), Modes())
        assert small.outcome is Outcome.APPLIED
        assert math.isfinite(small.losses.loss)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


OBJECTIVES: dict[str, dict[str, Any]] = {
    "plain": {},
    "critic": {"critic": "self", "self_cond": True, "self_cond_prob": 1.0},
    "augmented": {"augment_prob": 1.0, "random_token_prob": 0.4, "no_replace_prob": 0.3},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_reads_nothing_from_the_gpu_before_its_losses(objective: str) -> None:
    trainer = make(objective=OBJECTIVES[objective], micro_batch_tokens=32)
    train(trainer)
    host = trainer._host(BATCH)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = trainer._gradients(trainer._prepared(host, Modes(), StepKey(0, 1, STEPS + 1)))
        copy = sums.begin_read(optimizers.clip(trainer._learners(Modes()), 1.0, trainer._ranks))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    losses, norm = sums.read(copy, 1.0, Modes())
    assert math.isfinite(losses.loss)
    assert math.isfinite(norm)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_steps_that_are_prepared_ahead_give_the_same_bits(objective: str) -> None:
    ahead, alone = (make(objective=OBJECTIVES[objective], deterministic=True) for _ in range(2))
    called = []

    def prepare(step: int) -> None:
        called.append(step)
        ahead.prepare_step(1, step, BATCH, Modes())

    for step in range(1, 1 + STEPS):
        found = ahead.train_step(1, step, BATCH, Modes(), partial(prepare, step + 1))
        assert found == alone.train_step(1, step, BATCH, Modes())
    assert called == list(range(2, 2 + STEPS))
    assert not different(state(ahead), state(alone))


LOST = """
import torch
from maskwire_server.training import device_errors
device = torch.device("cuda")
try:
    torch.zeros(3, device=device)[torch.tensor([7], device=device)].cpu()
except Exception as error:
    print("usable" if device_errors.usable_after(error, device) else "lost", type(error).__name__, error)
"""


def test_a_device_side_assertion_is_recognised_as_fatal() -> None:
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("lost"), done.stdout + done.stderr[-500:]


def test_a_refused_product_leaves_the_device_usable() -> None:
    from maskwire_server.training import device_errors

    device = torch.device(DEVICE)
    with pytest.raises(RuntimeError) as refused:
        torch.ones(2, 3, device=device) @ torch.ones(2, 3, device=device)
    assert device_errors.usable_after(refused.value, device)


def test_the_fingerprint_names_the_device() -> None:
    versions = make().versions
    assert torch.cuda.get_device_name() in versions["device"]
    assert versions["deterministic"] == "no"


def test_configuration_as_users_write_it_trains_in_bf16() -> None:
    whole = config.load(None, model={**ENCODER})
    trainer = TorchTrainer(whole.model, whole.objective, whole.optimizer, whole.serve, whole.run.seed)
    trainer.warm_up()
    assert trainer.versions["precision"] == "bf16"
    assert all(each.outcome is Outcome.APPLIED for each in train(trainer))
