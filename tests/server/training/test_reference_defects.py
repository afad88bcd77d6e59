"""Defects in the training of x-transformers 2.31.10, which this objective does not have."""

from __future__ import annotations

import math
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import HEAVY, changed, make, state
from whole_batch import corrupt

from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.values import Limits, Outcome
from maskwire_server.batch import Batch, Modes, Prompts
from maskwire_server.config import ObjectiveConfig
from maskwire_server.errors import Refused
from maskwire_server.results import GenerateOptions, Order
from maskwire_server.rpc import token_batch
from maskwire_server.training import masking_schedule, objective
from maskwire_server.training.corruption import StepKey, Vocabulary

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    x_transformers = pytest.importorskip("x_transformers")
    from x_transformers.nonautoregressive_wrapper import NonAutoregressiveWrapper

IDS = np.random.default_rng(0).integers(0, 16, (8, 12))


def reference(**options: Any) -> Any:
    torch.manual_seed(0)
    random.seed(0)
    layers = x_transformers.Encoder(dim=32, depth=1, heads=2)
    net = x_transformers.TransformerWrapper(num_tokens=17, max_seq_len=12, attn_layers=layers)
    return NonAutoregressiveWrapper(net, mask_id=16, **options)


def test_the_elbo_weight_and_the_loss_are_positive() -> None:
    with torch.no_grad():
        theirs = [float(reference()(torch.from_numpy(IDS)).loss) for _ in range(3)]
    assert min(theirs) < 0, "the reference's weight m'/(1-m) is negative"
    trainer = make()
    ours = [trainer.train_step(1, step, Batch(IDS, 8, 12), Modes()).losses.loss for step in range(1, 20)]
    assert min(ours) > 0


def test_training_lowers_the_true_cross_entropy() -> None:
    pattern = np.tile(np.arange(12), (16, 1))
    trainer = make(optimizer={"learning_rate": 3e-3, "warmup_steps": 0})
    losses = [
        trainer.train_step(1, step, Batch(pattern, 16, 12), Modes()).losses.loss for step in range(1, 101)
    ]
    assert losses[0] > 2
    assert np.mean(losses[-10:]) < 0.1


def test_the_weight_is_finite_at_both_ends_of_time() -> None:
    n = torch.full((2,), 5)
    for name in masking_schedule.SCHEDULES:
        chosen = masking_schedule.SCHEDULES[name]
        k = masking_schedule.exact_counts(chosen, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64), n)
        assert k.tolist() == [5, 1]
        assert torch.isfinite(masking_schedule.elbo_weights(chosen, "exact", k, n)).all()


def test_critic_training_without_a_critic_and_both_flags_are_rejected() -> None:
    theirs = reference()(torch.from_numpy(IDS), only_train_critic=True)
    assert not theirs.loss.requires_grad if theirs.loss is not None else True
    for flags in ({"only_train_critic": True}, {"only_train_critic": True, "only_train_generator": True}):
        with pytest.raises(ValueError, match="only_train_critic"):
            make().train_step(1, 1, Batch(IDS, 8, 12), Modes(**flags))


def test_critic_labels_are_false_at_positions_that_show_the_truth() -> None:
    settings, vocabulary = ObjectiveConfig(critic="self"), Vocabulary(17, 16, None)
    ids = torch.from_numpy(IDS)
    every = torch.ones(ids.shape, dtype=torch.bool)
    whole = corrupt(ids, every, ~every, settings, vocabulary, StepKey(1, 1, 1))
    filled = torch.where(whole.mask_bn, (ids + 1) % 16, ids)
    labels = objective.critic_labels(settings, whole, filled)
    assert torch.equal(labels, whole.mask_bn), "wrong exactly where it was sampled wrongly"


def test_a_self_critic_trained_alone_sends_no_gradient_into_the_generator() -> None:
    theirs = reference(self_token_critic=True, use_simple_mdlm_loss_weight=False)
    theirs(torch.from_numpy(IDS), only_train_critic=True).loss.backward()
    assert any(w.grad is not None and w.grad.abs().max() > 0 for w in theirs.net.parameters())
    trainer = make({"critic": "self"}, HEAVY)
    before = state(trainer, "generator")
    trainer.train_step(1, 1, Batch(IDS, 8, 12), Modes(only_train_critic=True))
    assert not changed(before, state(trainer, "generator"))


def test_keeping_ids_does_not_leak_the_answer_of_a_single_masked_position() -> None:
    # Rounding up a share of one masked position keeps it always; a coin for each keeps 15%.
    settings, vocabulary = ObjectiveConfig(no_replace_prob=0.15), Vocabulary(17, 16, None)
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 16, (64, 1)))
    every = torch.ones(ids.shape, dtype=torch.bool)
    kept = [
        (corrupt(ids, every, ~every, settings, vocabulary, StepKey(1, 1, s)).input_bn == ids).float().mean()
        for s in range(60)
    ]
    assert float(torch.stack(kept).mean()) == pytest.approx(0.15, abs=0.02)


def test_no_draw_comes_from_a_global_generator() -> None:
    settings = {"self_cond": True, "random_token_prob": 0.3, "augment_prob": 0.5, "critic": "token"}
    results = []
    for seed in (1, 2):
        random.seed(seed)
        torch.manual_seed(seed)
        np.random.seed(seed)
        trainer = make(settings)
        results.append([trainer.train_step(1, step, Batch(IDS, 8, 12), Modes()) for step in range(1, 6)])
    assert results[0] == results[1]


def test_rows_may_be_shorter_and_padded() -> None:
    lengths = np.array([12, 3, 7], dtype=np.int32)
    ids = np.random.default_rng(2).integers(0, 16, 22)
    result = make().train_step(1, 1, Batch(ids, 3, 12, lengths), Modes())
    assert result.outcome is Outcome.APPLIED
    assert result.maskable_tokens == 22


def test_mask_ids_in_the_data_are_rejected() -> None:
    with torch.no_grad():
        assert math.isfinite(reference(use_simple_mdlm_loss_weight=False)(torch.full((2, 12), 16)).loss)
    info = make().info
    data = np.full((2, 12), 16, dtype=np.uint8)
    with pytest.raises(Refused, match="row 0, column 0 is 16"):
        token_batch.read_batch(
            pb.TokenBatch(data=data.tobytes(), shape=[2, 12], dtype=pb.DATA_TYPE_UINT8),
            info,
            Limits(2**20, 2**26, 8, 1024),
        )


def test_self_conditioning_works_with_another_embedding_width() -> None:
    trainer = make({"self_cond": True, "self_cond_prob": 1.0}, model={"emb_dim": 24})
    assert trainer.train_step(1, 1, Batch(IDS, 8, 12), Modes()).outcome is Outcome.APPLIED


def test_the_mask_id_is_never_generated() -> None:
    torch.manual_seed(1)
    assert bool((reference(steps=4).generate(batch_size=64) == 16).any()), "the reference emits it"
    for order in (Order.RANDOM, Order.CONFIDENCE):
        options = GenerateOptions(tuple(range(64)), steps=4, order=order)
        *_, last = make().generate(Prompts.nothing(64, 12), options)
        assert last.ids.max() < 16


def test_one_step_samples_at_its_temperature() -> None:
    theirs = reference(steps=1)
    found = set()
    for seed in range(3):
        torch.manual_seed(seed)
        found.add(tuple(theirs.generate(start_temperature=2.0).tolist()))
    assert len(found) == 1, "the reference's last step is greedy, and this is the last"
    options = GenerateOptions(tuple(range(16)), steps=1, temperature=2.0)
    *_, last = make().generate(Prompts.nothing(16, 12), options)
    assert len({tuple(row) for row in last.ids.tolist()}) == 16
