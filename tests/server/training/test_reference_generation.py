"""Generation beside x-transformers' `NonAutoregressiveWrapper.generate`: temperatures, filter and noise."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1.values import Limits, ModelInfo
from maskwire_server.config import ObjectiveConfig
from maskwire_server.results import GenerateOptions, Order
from maskwire_server.rpc import generate
from maskwire_server.training import masking_schedule, sampling
from maskwire_server.training.corruption import Vocabulary
from maskwire_server.training.cross_entropy import forbid_special

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    xt = pytest.importorskip("x_transformers")
    from x_transformers import nonautoregressive_wrapper as module

N, V = 12, 17


class Spy:
    """What the reference does in each pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.temperatures: list[float] = []
        self.logits: list[Tensor] = []
        self.kept: list[Tensor] = []
        gumbel_sample, top_k = module.gumbel_sample, module.top_k

        def sample(logits: Tensor, temperature: float, **more: Any) -> Any:
            self.temperatures.append(temperature)
            return gumbel_sample(logits, temperature=temperature, **more)

        def keep(logits: Tensor, thres: float) -> Any:
            self.logits.append(logits.clone())
            filtered = top_k(logits, thres)
            self.kept.append(filtered > -math.inf)
            return filtered

        monkeypatch.setattr(module, "gumbel_sample", sample)
        monkeypatch.setattr(module, "top_k", keep)
        torch.manual_seed(0)
        net = xt.TransformerWrapper(
            num_tokens=V, max_seq_len=N, attn_layers=xt.Encoder(dim=32, depth=1, heads=2)
        )
        self.wrapper = module.NonAutoregressiveWrapper(net, mask_id=V - 1, **options)


def asked(**fields: Any) -> GenerateOptions:
    info = ModelInfo(
        num_tokens=V, mask_id=V - 1, pad_id=None, max_seq_len=N, parameters=1, objective="",
        loss_is_bound=True, has_critic=True, self_cond=False,
    )  # fmt: skip
    return generate.read_generate(pb.GenerateRequest(count=1, **fields), info, LIMITS).options


LIMITS = Limits(
    max_batch_tokens=2**20, max_message_bytes=2**20, max_draws=16, max_generation_steps=1024,
    max_read_tokens=2**30, window=4,
)  # fmt: skip


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("steps", "start"), [(1, 1.0), (4, 1.0), (12, 2.5), (5, 0.004), (3, 0.0)])
def test_each_pass_has_the_references_temperature(
    schedule: str, steps: int, start: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = Spy(monkeypatch, steps=steps, schedule=schedule)
    theirs.wrapper.generate(batch_size=1, start_temperature=start)
    options = asked(steps=steps, start_temperature=start)
    config, unknown = ObjectiveConfig(schedule=schedule), torch.tensor([N])
    left, temperatures = unknown, []
    for step in range(1, steps + 1):
        plan = sampling.plan_pass(config, options, unknown, left, step)
        assert plan.temperature_b is not None
        temperatures.append(float(plan.temperature_b))
        left = plan.stay_b
    # The reference raises temperatures below .001 to that, and ours are 0 there.
    assert [max(t, 1e-3) for t in temperatures] == pytest.approx(theirs.temperatures, rel=1e-12)
    assert all(t == 0 or t >= 1e-3 for t in temperatures)
    assert temperatures[-1] == 0


@pytest.mark.parametrize("thres", [0.0, 0.1, 0.5, 0.7, 0.9, 0.99])
def test_the_ids_that_filter_thres_keeps_are_the_references(
    thres: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = Spy(monkeypatch, steps=4)
    theirs.wrapper.generate(batch_size=3, filter_thres=thres)
    options = asked(filter_thres=thres, temperature=1000.0)  # hot: samples all that is kept
    u = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    mask_id, compared = V - 1, 0
    for logits, kept in zip(theirs.logits, theirs.kept, strict=True):
        for row, expected in zip(logits.flatten(0, 1), kept.flatten(0, 1), strict=True):
            allowed = forbid_special(row[None].clone(), Vocabulary(V, mask_id, None))
            ours = set(sampling.sample(allowed.expand(400, -1), u, options.temperature, options).tolist())
            reference = set(expected.nonzero()[:, 0].tolist())
            assert len(reference) == math.ceil((1 - thres) * V)
            assert mask_id not in ours
            if mask_id in reference and len(reference) < V:
                # The reference can emit the mask id; here the next most probable id has its place.
                assert len(ours - reference) == 1
                assert reference - ours == {mask_id}
            else:
                compared += 1
                assert ours == reference - {mask_id}
    assert compared > 0


def test_the_count_of_kept_ids_rounds_as_the_reference_does() -> None:
    for v in (2, 10, 17, 257, 30_522):
        for thres in (0.0, 0.1, 0.3, 0.7, 0.9, 0.999):
            theirs = int((module.top_k(torch.randn(1, 1, v), thres) > -math.inf).sum())
            assert generate.kept_by(thres, v) == theirs


def test_noise_on_the_critics_order_falls_as_noise_level_scale() -> None:
    # scores + noise_level_scale * gumbel_noise(scores) * steps_until_x0 / steps
    options = asked(steps=5, order=pb.GENERATION_ORDER_CRITIC, choice_temperature=1.0)
    assert options.order is Order.CRITIC
    scales = [
        float(sampling.plan_pass(ObjectiveConfig(), options, torch.tensor([N]), torch.tensor([N]), s).noise_b)
        for s in range(1, 6)
    ]
    assert scales == pytest.approx([until / 5 for until in reversed(range(5))])


def test_without_the_new_options_nothing_changes() -> None:
    options = asked()
    assert options == GenerateOptions((0,))
    plan = sampling.plan_pass(ObjectiveConfig(), options, torch.tensor([N]), torch.tensor([N]), 1)
    assert plan.temperature_b is None
    assert masking_schedule.named("linear") is masking_schedule.LINEAR
