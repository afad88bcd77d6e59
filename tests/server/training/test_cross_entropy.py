"""The chunked cross-entropy and a last block at chosen positions agree with the full computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from maskwire_server.config import ModelConfig, ObjectiveConfig
from maskwire_server.training import cross_entropy, objective
from maskwire_server.training.corruption import Vocabulary
from maskwire_server.training.head import Head
from maskwire_server.training.models.generator_critic import Networks

VOCABULARY = Vocabulary(11, 10, 4)
IDS = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, 9])  # neither the mask nor the pad id


def positions(m: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """x [m, 6], w [11, 6], targets and weights."""
    generator = torch.Generator().manual_seed(m)
    x, w = (torch.randn(*shape, 6, dtype=dtype, generator=generator) for shape in ((m,), (11,)))
    target = IDS[torch.randint(0, 9, (m,), generator=generator)]
    weight = torch.rand(m, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), w.requires_grad_(), target, weight


def dense(
    x: torch.Tensor,
    w: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    logits = (x @ w.t() + bias).index_fill(-1, torch.tensor(VOCABULARY.special), float("-inf"))
    return (F.cross_entropy(logits, target, reduction="none").double() * weight).sum()


@pytest.mark.parametrize("m", [0, 1, 4, 9])
@pytest.mark.parametrize("chunk", [1, 22, 33, 10**6])
def test_the_chunked_sum_and_its_gradients_equal_those_of_all_logits(
    m: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK, "cpu", chunk)
    x, w, target, weight = positions(m)
    seen: list[int] = []

    def look(rows: slice, logits: torch.Tensor) -> None:
        assert rows.stop - rows.start == len(logits)
        seen.append(len(logits))

    total = cross_entropy.weighted_sum(Head(x, w), target, weight, VOCABULARY, look)
    expected = dense(x, w, target, weight)
    assert total.item() == pytest.approx(expected.item(), abs=1e-12)
    assert sum(seen) == m
    assert max(seen, default=0) <= max(1, chunk // 11)
    wanted = torch.autograd.grad(3 * expected, (x, w))
    for found, exact in zip(torch.autograd.grad(3 * total, (x, w)), wanted, strict=True):
        assert torch.allclose(found, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [22, 10**6])
def test_a_bias_and_a_model_without_a_linear_output_give_the_same_sums_and_gradients(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK, "cpu", chunk)
    x, w, target, weight = positions(9)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    expected = dense(x, w, target, weight, bias)
    wanted = torch.autograd.grad(3 * expected, (x, w, bias))
    for head in (Head(x, w, bias), Head(x @ w.t() + bias, None)):
        seen = torch.zeros(9, 11, dtype=torch.float64)
        total = cross_entropy.weighted_sum(head, target, weight, VOCABULARY, seen.__setitem__)
        assert total.item() == pytest.approx(expected.item(), abs=1e-12)
        assert torch.allclose(seen[:, IDS], (x @ w.t() + bias)[:, IDS])
        for found, exact in zip(torch.autograd.grad(3 * total, (x, w, bias)), wanted, strict=True):
            assert torch.allclose(found, exact, rtol=1e-12, atol=1e-12)


def test_fp32_gradients_are_within_rounding_of_the_exact_ones() -> None:
    x, w, target, weight = positions(50, torch.float32)
    found = torch.autograd.grad(
        cross_entropy.weighted_sum(Head(x, w), target, weight, VOCABULARY, None), (x, w)
    )
    exact = torch.autograd.grad(dense(x.double(), w.double(), target, weight), (x, w))
    for a, b in zip(found, exact, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_under_bf16_autocast_gradients_are_fp32_and_close() -> None:
    x, w, target, weight = positions(50, torch.float32)
    exact = torch.autograd.grad(dense(x, w, target, weight), (x, w))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = cross_entropy.weighted_sum(Head(x, w), target, weight, VOCABULARY, None)
    for found, wanted in zip(torch.autograd.grad(total, (x, w)), exact, strict=True):
        assert found.dtype == torch.float32
        assert (found - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_without_gradients_none_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, target, weight = positions(5)

    def refuse(*_: object) -> None:
        raise AssertionError("a gradient's room was taken")

    with torch.no_grad():
        monkeypatch.setattr(torch, "zeros_like", refuse)
        total = cross_entropy.weighted_sum(Head(x, w), target, weight, VOCABULARY, None)
        monkeypatch.undo()
    assert not total.requires_grad
    assert total.item() == pytest.approx(dense(x, w, target, weight).item())


def test_a_second_backward_pass_is_an_error() -> None:
    x, w, target, weight = positions(5)
    total = cross_entropy.weighted_sum(Head(x, w), target, weight, VOCABULARY, None)
    total.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="can run only once"):
        total.backward()  # type: ignore[no-untyped-call]


def networks(**model: Any) -> Networks:
    config = ModelConfig(
        num_tokens=11, mask_id=10, max_seq_len=8, dim=16, depth=2, heads=2, dim_head=8, **model
    )
    torch.manual_seed(0)
    return Networks(config, ObjectiveConfig(self_cond=True)).double()


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"positions": "rotary", "norm": "rmsnorm", "feed_forward": "swiglu", "qk_norm": True},
        {"kv_heads": 1, "feed_forward": "geglu", "ff_bias": False},
        {
            "positions": "rotary",
            "rotary_dim": 4,
            "rotary_pairs": "interleaved",
            "qk_norm": True,
            "qk_norm_gain": "per_head",
            "kv_heads": 1,
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_outputs_and_gradients_at_chosen_positions_equal_those_of_all_positions(
    model: dict[str, Any], padded: bool, activation_checkpointing: bool
) -> None:
    nets = networks(**model)
    ids = torch.randint(0, 10, (3, 8), generator=torch.Generator().manual_seed(1))
    valid = (torch.arange(8) < torch.tensor([[8], [5], [3]])) if padded else None
    read = objective.positions(torch.rand(3, 8, generator=torch.Generator().manual_seed(2)) < 0.4)
    upstream = torch.randn(read.numel(), 16, dtype=torch.float64)
    cond = nets.conditioning(None)

    def gradients(found: torch.Tensor) -> list[torch.Tensor]:
        learning = [weight for name, weight in nets.generator.named_parameters() if "to_logits" not in name]
        return list(torch.autograd.grad(found, learning, upstream, allow_unused=False))

    whole = nets.embed(ids, valid, cond).flatten(0, 1)[read]
    nets.generator.activation_checkpointing = activation_checkpointing
    there = nets.embed(ids, valid, cond, read)
    assert torch.allclose(there, whole, rtol=1e-12, atol=1e-12)
    for found, exact in zip(gradients(there), gradients(whole), strict=True):
        assert torch.allclose(found, exact, rtol=1e-10, atol=1e-12)
