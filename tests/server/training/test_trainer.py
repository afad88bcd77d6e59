"""The trainer: which networks each mode trains, what a step never changes, and saving and loading."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from maskwire.v1.values import Outcome
from maskwire_server import config
from maskwire_server.batch import Batch, Modes, Prompts
from maskwire_server.errors import ConfigError, StateLost, Unwanted
from maskwire_server.results import EvalOptions, GenerateOptions
from maskwire_server.training import optimizers
from maskwire_server.training.corruption import StepKey
from maskwire_server.training.micro_batch_split import split, split_by_length
from maskwire_server.training.models.generator_critic import Networks
from maskwire_server.training.numerics import choose_device
from maskwire_server.training.snapshot import Snapshot, live_tensors
from maskwire_server.training.tensor_batch import TensorBatch
from maskwire_server.training.trainer import TorchTrainer

IDS = np.random.default_rng(0).integers(0, 16, (6, 12))
BATCH = Batch(IDS, 6, 12)
HEAVY = {"learning_rate": 0.01, "weight_decay": 0.3, "warmup_steps": 0, "ema_decay": 0.9}


def make(
    objective: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **serve: Any,
) -> TorchTrainer:
    size = {
        "num_tokens": 17,
        "mask_id": 16,
        "max_seq_len": 12,
        "dim": 32,
        "depth": 2,
        "heads": 2,
        "dim_head": 16,
    }
    whole = config.load(
        None,
        model={**size, **(model or {})},
        objective=objective or {},
        optimizer=HEAVY if optimizer is None else optimizer,
        serve={"threads": 2, **serve},
    )
    return TorchTrainer(whole.model, whole.objective, whole.optimizer, whole.serve, seed=0)


def state(trainer: TorchTrainer, group: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of the trainer's state, or of one group's."""
    return {
        f"{file}/{name}": tensor.clone()
        for file, tensors in live_tensors(trainer._groups()).items()
        for name, tensor in tensors.items()
        if name.startswith(group)
    }


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("critic", ["self", "token"])
@pytest.mark.parametrize("self_cond", [False, True])
def test_training_the_critic_changes_no_bit_of_the_generator(critic: str, self_cond: bool) -> None:
    trainer = make({"critic": critic, "self_cond": self_cond})
    for step in range(1, 4):
        trainer.train_step(1, step, BATCH, Modes())  # so that there is momentum
    before = state(trainer)
    options = EvalOptions(tuple(range(6)), 4, only_train_generator=True)
    evaluated = trainer.eval_loss(BATCH, options)
    for step in range(4, 8):
        result = trainer.train_step(1, step, BATCH, Modes(only_train_critic=True))
        assert result.losses.generator_loss is None
        assert result.losses.loss == result.losses.critic_loss
    different = changed(before, state(trainer))
    assert different
    assert all("/critic." in name for name in different), different
    assert {name for name in before if "/critic." in name} - different <= {
        name for name in before if name.endswith(".num_batches_tracked")
    }, "all of the critic learns"
    assert trainer.eval_loss(BATCH, options) == evaluated


@pytest.mark.parametrize("critic", ["self", "token"])
def test_training_the_generator_changes_no_bit_of_the_critic(critic: str) -> None:
    trainer = make({"critic": critic})
    for step in range(1, 4):
        trainer.train_step(1, step, BATCH, Modes())
    before = state(trainer)
    for step in range(4, 8):
        result = trainer.train_step(1, step, BATCH, Modes(only_train_generator=True))
        assert result.losses.critic_loss is None
        assert result.losses.loss == result.losses.generator_loss
    different = changed(before, state(trainer))
    assert different
    assert not any("/critic." in name for name in different)


def test_both_learn_from_the_weighted_sum_when_no_flag_is_set() -> None:
    trainer = make({"critic": "self", "critic_loss_weight": 0.25})
    before = state(trainer)
    losses = trainer.train_step(1, 1, BATCH, Modes()).losses
    assert losses.generator_loss is not None
    assert losses.critic_loss is not None
    assert losses.loss == losses.generator_loss + 0.25 * losses.critic_loss
    assert any("/critic." in name for name in changed(before, state(trainer)))


@pytest.mark.parametrize("critic", ["none", "self", "token"])
@pytest.mark.parametrize("start", ["none", "null"])
def test_every_parameter_gets_the_gradient_in_bf16_that_it_gets_in_fp32(critic: str, start: str) -> None:
    """Also those that a first pass without gradients used: autocast could keep its bf16 copies of them."""
    objective = {"self_cond": True, "self_cond_prob": 1.0, "self_cond_start": start, "critic": critic}
    found = []
    for precision in ("fp32", "bf16"):
        trainer = make(objective, model={"depth": 1}, precision=precision)
        trainer._gradients(trainer._prepared(trainer._host(BATCH), Modes(), StepKey(0, 1, 1)))
        found.append({name: weight.grad for name, weight in trainer.networks.named_parameters()})
    for name, exact in found[0].items():
        rounded = found[1][name]
        assert exact is not None, name
        assert rounded is not None, name
        if name.startswith("generator"):  # other ids may be sampled for a separate critic
            assert torch.norm(rounded - exact) <= 0.1 * torch.norm(exact), name


def test_autocast_keeps_no_copies_of_weights_from_a_pass_without_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to torch 2.10 they have no graph, and the next pass would use them."""
    trainer = make({"self_cond": True, "self_cond_prob": 1.0}, precision="bf16")
    passes = []

    def embed(*given: Any) -> torch.Tensor:
        keeps = torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()
        passes.append((torch.is_grad_enabled(), *keeps))
        return Networks.embed(trainer.networks, *given)

    monkeypatch.setattr(trainer.networks, "embed", embed)
    trainer._gradients(trainer._prepared(trainer._host(BATCH), Modes(), StepKey(0, 1, 1)))
    assert passes == [(False, True, False), (True, True, True)]


def test_flags_that_exclude_each_other_are_rejected() -> None:
    with pytest.raises(ValueError, match="exclude"):
        make({"critic": "self"}).train_step(1, 1, BATCH, Modes(True, True))
    with pytest.raises(ValueError, match="needs a critic"):
        make().train_step(1, 1, BATCH, Modes(only_train_critic=True))


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_non_finite_step_changes_no_bit(kind: str) -> None:
    trainer = make({"critic": "token"})
    trainer.train_step(1, 1, BATCH, Modes())
    weight = trainer.networks.generator.blocks[0].feed_forward.up.weight
    hook = None
    if kind == "loss":
        spoiled = weight.detach().clone()
        with torch.no_grad():
            weight[0, 0] = math.nan
    else:
        hook = weight.register_hook(lambda gradient: gradient * math.inf)
    before = state(trainer)
    result = trainer.train_step(1, 2, BATCH, Modes())
    assert result.outcome is Outcome.SKIPPED_NON_FINITE
    after = state(trainer)
    assert all(torch.equal(before[n].nan_to_num(7), after[n].nan_to_num(7)) for n in before)
    if hook is not None:
        hook.remove()
    else:
        with torch.no_grad():
            weight.copy_(spoiled)
    assert trainer.train_step(1, 3, BATCH, Modes()).outcome is Outcome.APPLIED


def test_running_out_of_memory_before_the_update_is_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    before = state(trainer)

    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(trainer.networks, "head", exhausted)
    result = trainer.train_step(1, 1, BATCH, Modes())
    assert result.outcome is Outcome.OUT_OF_MEMORY
    assert not changed(before, state(trainer))


def test_an_update_that_fails_halfway_raises_state_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()

    def broken(rate: float) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(trainer.generator, "update", broken)
    with pytest.raises(StateLost, match="step 1 failed half-way"):
        trainer.train_step(1, 1, BATCH, Modes())


def test_the_warm_up_changes_nothing() -> None:
    trainer = make({"critic": "token", "self_cond": True}, model={"dropout": 0.1})
    before = state(trainer)
    random_state = torch.get_rng_state()
    trainer.warm_up()
    assert not changed(before, state(trainer))
    assert torch.equal(random_state, torch.get_rng_state())


def test_dropout_depends_only_on_the_step() -> None:
    model = {"dropout": 0.2}
    first = [make(model=model).train_step(1, step, BATCH, Modes()) for step in (1, 2)]
    torch.manual_seed(99)
    again = [make(model=model).train_step(1, step, BATCH, Modes()) for step in (1, 2)]
    assert first == again
    assert first[0].losses != make().train_step(1, 1, BATCH, Modes()).losses


def test_initial_weights_depend_only_on_the_seed() -> None:
    torch.manual_seed(1)
    first = state(make())
    torch.manual_seed(2)
    assert not changed(first, state(make()))


def test_the_state_is_saved_and_loaded_to_the_bit(tmp_path: Path) -> None:
    trainer = make({"critic": "token", "self_cond": True})
    for step in range(1, 4):
        trainer.train_step(1, step, BATCH, Modes())
    snapshot = trainer.snapshot()
    expected = state(trainer)
    following = [trainer.train_step(1, step, BATCH, Modes()) for step in range(4, 7)]
    snapshot.write(tmp_path)  # later, as the background thread does
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "ema.safetensors", "model.safetensors", "optimizer.safetensors",
    ]  # fmt: skip
    other = make({"critic": "token", "self_cond": True})
    other.load(tmp_path)
    assert not changed(expected, state(other))
    assert [other.train_step(1, step, BATCH, Modes()) for step in range(4, 7)] == following


def test_a_snapshot_reuses_memory_unless_the_last_one_is_in_use() -> None:
    def memory(copy: Snapshot) -> set[int]:
        return {tensor.data_ptr() for tensors in copy.files.values() for tensor in tensors.values()}

    trainer = make()
    first = memory(trainer.snapshot())
    held = trainer.snapshot()
    assert memory(held) == first
    before = [tensor.clone() for tensor in held.files["model.safetensors"].values()]
    trainer.train_step(1, 1, BATCH, Modes())
    assert not memory(trainer.snapshot()) & memory(held)
    assert all(map(torch.equal, held.files["model.safetensors"].values(), before))


def test_files_that_do_not_fit_are_rejected_by_name_and_change_nothing(tmp_path: Path) -> None:
    make().snapshot().write(tmp_path)
    other = make(model={"depth": 1})
    before = state(other)
    with pytest.raises(
        ValueError, match=r"model.safetensors: the tensor generator.blocks.1\S+ is not part of this model"
    ):
        other.load(tmp_path)
    wider = make(model={"ff_mult": 2})
    with pytest.raises(ValueError, match=r"must be torch.float32 of shape \(32, 64\), got .* \(32, 128\)"):
        wider.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="cannot be read"):
        make().load(tmp_path)
    assert not changed(before, state(other))


ROWS = tuple(range(6))
READS: dict[str, Callable[[TorchTrainer, Callable[[], bool]], object]] = {
    "evaluation": lambda trainer, wanted: trainer.eval_loss(
        BATCH, EvalOptions(ROWS, 1, raw_weights=True), wanted
    ),
    "chain rule": lambda trainer, wanted: trainer.eval_loss(
        BATCH, EvalOptions(ROWS, 1, raw_weights=True, chain_rule=True), wanted
    ),
    "one unmasking pass": lambda trainer, wanted: list(
        trainer.generate(Prompts.nothing(6, 12), GenerateOptions(ROWS, 1, raw_weights=True), wanted)
    ),
}


@pytest.mark.parametrize("read", READS)
def test_a_read_asks_before_each_part_whether_it_is_wanted(read: str) -> None:
    trainer = make(micro_batch_tokens=12, threads=1)  # a row in each part
    answers: list[bool] = []
    forwards: list[int] = []
    norm = trainer.networks.generator.final_norm
    norm.register_forward_pre_hook(lambda *_: forwards.append(len(answers)))

    def wanted() -> bool:
        answers.append(len(answers) < 3)
        return answers[-1]

    with pytest.raises(Unwanted, match="its client no longer waits for it"):
        READS[read](trainer, wanted)
    assert answers == [True, True, True, False]
    assert set(forwards) == {1, 2, 3}, "a part was computed after each answer but the last"
    READS[read](trainer, lambda: True)
    assert len(forwards) > 6


def test_the_average_is_evaluated_unless_raw_weights_are_requested() -> None:
    trainer = make()
    for step in range(1, 6):
        trainer.train_step(1, step, BATCH, Modes())
    averaged = trainer.eval_loss(BATCH, EvalOptions(tuple(range(6)), 4))
    raw = trainer.eval_loss(BATCH, EvalOptions(tuple(range(6)), 4, raw_weights=True))
    assert averaged.ema_weights
    assert not raw.ema_weights
    assert averaged.nats_per_token != raw.nats_per_token


def test_the_average_warms_up() -> None:
    trainer = make(optimizer={**HEAVY, "ema_decay": 0.5})
    weight = trainer.networks.generator.final_norm.gamma
    assert trainer.generator.ema is not None
    average = trainer.generator.ema.final_norm.gamma
    expected = average.clone()
    for step in range(1, 9):
        trainer.train_step(1, step, BATCH, Modes())
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
        assert torch.allclose(average, expected, atol=1e-7)


def test_the_learning_rate_warms_up_and_falls_as_configured() -> None:
    settings = config.OptimizerConfig(
        learning_rate=1.0, warmup_steps=10, schedule="cosine", total_steps=110, min_learning_rate=0.1
    )
    rates = [optimizers.learning_rate(settings, step) for step in range(1, 131)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1.0
    assert rates[59] == pytest.approx(0.55), "half-way down the cosine"
    assert rates[109] == pytest.approx(0.1)
    assert rates[129] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    constant = config.OptimizerConfig(learning_rate=0.5, warmup_steps=0)
    assert optimizers.learning_rate(constant, 1) == optimizers.learning_rate(constant, 9999) == 0.5


def test_a_step_can_set_its_learning_rate() -> None:
    trainer = make()
    before = state(trainer, "generator")
    result = trainer.train_step(1, 1, BATCH, Modes(learning_rate=0.0))
    assert result.learning_rate == 0.0
    weights = {name for name in changed(before, state(trainer, "generator")) if name.startswith("model.")}
    assert not weights
    assert trainer.train_step(1, 2, BATCH, Modes()).learning_rate == 0.01


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_does_not_load_torchs_compiler(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)  # importing it raises
    trainer = make({"critic": "token", "self_cond": True}, {**HEAVY, "name": name})
    assert trainer.train_step(1, 1, BATCH, Modes()).outcome is Outcome.APPLIED
    trainer.eval_loss(BATCH, EvalOptions(tuple(range(6)), 1))
    trainer.snapshot()


def decaying(group: optimizers.Group) -> set[str]:
    groups = group.optimizer.param_groups
    assert {part["weight_decay"] for part in groups} == {0.3, 0.0}
    decayed = [weight for part in groups if part["weight_decay"] for weight in part["params"]]
    return {
        name
        for name, weight in zip(group.names, group.weights, strict=True)
        if any(weight is other for other in decayed)
    }


@pytest.mark.parametrize(
    "model", [{}, {"emb_dim": 24}, {"tied_embeddings": True}, {"qk_norm": True}], ids=str
)
def test_only_linear_maps_have_weight_decay(model: dict[str, Any]) -> None:
    trainer = make({"self_cond": True, "critic": "token"}, model=model)
    for group, network in (
        (trainer.generator, trainer.networks.generator),
        (trainer.critic, trainer.networks.critic),
    ):
        assert group is not None
        assert network is not None
        linear = {f"{n}.weight" for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
        assert decaying(group) == linear
        assert ("project_emb.weight" in linear) == ("emb_dim" in model)
    head = make({"critic": "self"}).critic
    assert head is not None
    assert decaying(head) == {"weight"}


def test_a_checkpoint_of_numerics_version_1_loads_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"objective": {"critic": "token"}, "model": {"emb_dim": 24}}
    with monkeypatch.context() as patch:
        patch.setattr(  # the rule before: project_emb.weight was spared for its name
            optimizers,
            "_decayed",
            lambda module: {
                w for name, w in module.named_parameters() if w.ndim >= 2 and "_emb." not in name
            },
        )
        old = make(**options)
    assert "project_emb.weight" not in decaying(old.generator)
    for step in range(1, 4):
        old.train_step(1, step, BATCH, Modes())
    old.snapshot().write(tmp_path)
    new = make(**options)
    assert "project_emb.weight" in decaying(new.generator)
    new.load(tmp_path)
    assert not changed(state(old), state(new)), "the state is stored by weight, not by group"
    names = {name for name in state(new) if "project_emb.weight" in name}
    old.train_step(1, 4, BATCH, Modes())
    new.train_step(1, 4, BATCH, Modes())
    different = changed(state(old), state(new))
    assert different == {n for n in names if n.startswith(("model.", "ema."))}, "the decay of one weight"


def test_gradients_are_clipped_to_the_configured_norm() -> None:
    trainer = make(optimizer={**HEAVY, "clip_grad_norm": 0.01})
    seen: list[float] = []
    update = trainer.generator.update

    def spy(rate: float) -> None:
        seen.append(float(torch.nn.utils.get_total_norm(trainer.generator.gradients())))
        update(rate)

    trainer.generator.update = spy  # type: ignore[method-assign]
    result = trainer.train_step(1, 1, BATCH, Modes())
    assert result.gradient_norm is not None
    assert result.gradient_norm > 0.01, "reported before clipping"
    assert seen == [pytest.approx(0.01, rel=1e-3)]


def test_micro_batches_hold_whole_rows_within_the_budget() -> None:
    valid = torch.arange(10) < torch.tensor([10, 3, 3, 3, 9, 1])[:, None]
    lengths = TensorBatch(valid.long(), valid, ~valid).lengths
    assert lengths == [10, 3, 3, 3, 9, 1]
    assert list(split(lengths, 20)) == [([0, 1], 10), ([2, 3], 3), ([4, 5], 9)]
    assert list(split(lengths, 1)) == [([i], length) for i, length in enumerate(lengths)]
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    assert TensorBatch(nothing.long(), nothing, nothing).lengths == [1], "a row of padding alone"
    assert list(split([], 20)) == []


def test_micro_batches_hold_rows_of_similar_length() -> None:
    lengths, everything = [10, 3, 3, 3, 9, 1], range(6)
    assert list(split_by_length(lengths, everything, 100, 1)) == [([0, 4], 10), ([1, 2, 3], 3), ([5], 1)]
    assert list(split_by_length(lengths, everything, 100, 30)) == [([0, 4, 1], 10), ([2, 3, 5], 3)]
    assert list(split_by_length(lengths, everything, 9, 1)) == [([0], 10), ([4], 9), ([1, 2, 3], 3), ([5], 1)]
    assert list(split_by_length(lengths, [5, 2], 100, 1)) == [([2], 3), ([5], 1)]
    assert list(split_by_length([4] * 5, range(5), 8, 1)) == list(split([4] * 5, 8))


@pytest.mark.parametrize(
    "model",
    [
        {"positions": "rotary", "norm": "rmsnorm", "feed_forward": "swiglu", "qk_norm": True},
        {"tied_embeddings": True},
        {"emb_dim": 24},
        {"pad_id": 0},
    ],
    ids=str,
)
def test_every_option_of_the_encoder_trains(model: dict[str, Any]) -> None:
    trainer = make({"self_cond": True, "critic": "token"}, {"learning_rate": 3e-3, "warmup_steps": 0}, model)
    first = trainer.train_step(1, 1, BATCH, Modes()).losses.loss
    for step in range(2, 60):
        last = trainer.train_step(1, step, BATCH, Modes()).losses.loss
    assert last < first


def test_rows_that_are_all_padding_change_nothing() -> None:
    ids = IDS.copy()
    ids[2] = 15
    trainer = make(model={"pad_id": 15})
    ids[ids == 15] = 14
    ids[2] = 15
    result = trainer.train_step(1, 1, Batch(ids, 6, 12), Modes())
    assert result.outcome is Outcome.APPLIED
    assert result.maskable_tokens == 60


def test_a_missing_device_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ConfigError, match="has 0 CUDA devices, got 'cuda:1'"):
        choose_device("cuda:1")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own
def test_compiled_blocks_are_warm_before_the_first_step_and_compute_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The C++ compiler would take a minute. `test_a_compiled_run_comes_back` uses it.
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    small = {"depth": 1}
    plain, compiled = make(model=small), make(model=small, compile="default")
    compiled.warm_up()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, batch in enumerate((BATCH, Batch(IDS[:3, :7], 3, 7), BATCH), 1):
            found, expected = (
                trainer.train_step(1, step, batch, Modes()).losses.loss for trainer in (compiled, plain)
            )
            assert found == pytest.approx(expected, rel=1e-4)
    assert compiled.versions["compile"] == "default"


def test_dropout_applies_where_it_is_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    F = torch.nn.functional
    found: list[str] = []
    dropout, attend = F.dropout, F.scaled_dot_product_attention

    def spy(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
        if training and p == 0.2:
            found.append(f"values {x.shape[-1]}")
        return dropout(x, p, training)

    def spy_attend(*arguments: Any, dropout_p: float, **options: Any) -> torch.Tensor:
        if dropout_p == 0.2:
            found.append("attention weights")
        return attend(*arguments, dropout_p=dropout_p, **options)

    monkeypatch.setattr(F, "dropout", spy)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy_attend)
    trainer = make(model={"dropout": 0.2, "emb_dim": 24, "ff_mult": 3})
    trainer.train_step(1, 1, BATCH, Modes())
    block = ["attention weights", "values 32", "values 96", "values 32"]
    assert found == ["values 24", *block, *block]
    found.clear()
    trainer.eval_loss(BATCH, EvalOptions(tuple(range(6)), 1))
    assert not found


@pytest.mark.parametrize("part", ["emb", "attn", "ff"])
def test_each_part_can_have_its_own_dropout_which_the_seed_determines(part: str) -> None:
    def loss(**model: Any) -> float:
        return make(model=model).train_step(1, 1, BATCH, Modes()).losses.loss

    own = loss(**{f"{part}_dropout": 0.5})
    torch.rand(3)  # the draws depend on the run's seed alone
    assert loss(**{f"{part}_dropout": 0.5}) == own != loss()
    others = {f"{other}_dropout": 0.0 for other in {"emb", "attn", "ff"} - {part}}
    assert loss(dropout=0.5, **others) == own
    assert loss(dropout=0.5, emb_dropout=0.5, attn_dropout=0.5, ff_dropout=0.5) == loss(dropout=0.5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_only_with_dropout_does_the_loss_depend_on_the_split(dropout: float) -> None:
    def loss(**serve: Any) -> float:
        return make(model={"dropout": dropout}, **serve).train_step(1, 1, BATCH, Modes()).losses.loss

    whole, again, split_up = loss(), loss(), loss(micro_batch_tokens=24)
    assert again == whole
    assert (split_up == pytest.approx(whole, rel=1e-5)) == (dropout == 0)


@pytest.mark.parametrize("critic", ["none", "self", "token"])
def test_activation_checkpointing_changes_no_bit(critic: str) -> None:
    options: dict[str, Any] = {"critic": critic, "self_cond": True}
    plain, sparing = (
        make(options, model={"dropout": 0.2}, activation_checkpointing=on) for on in (False, True)
    )
    for step in range(1, 5):
        results = [trainer.train_step(1, step, BATCH, Modes()) for trainer in (plain, sparing)]
        assert results[0] == results[1]
    assert not changed(state(plain), state(sparing))


def test_a_cpu_accepts_deterministic_and_tf32() -> None:
    versions = make(precision="tf32", deterministic=True).versions
    assert (versions["precision"], versions["deterministic"]) == ("fp32", "yes")
    assert not torch.are_deterministic_algorithms_enabled(), "it costs a CPU, and gains nothing"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains_the_same_pairs() -> None:
    trainer = make(
        {"critic": "self", "self_cond": True}, {"learning_rate": 3e-3}, device="cuda", precision="bf16"
    )
    losses = [trainer.train_step(1, step, BATCH, Modes()).losses.loss for step in range(1, 30)]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
