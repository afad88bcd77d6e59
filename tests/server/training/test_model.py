"""The encoder computes what x-transformers' TransformerWrapper(Encoder) computes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from maskwire_server.config import ModelConfig
from maskwire_server.training.models.encoder import Encoder, x_transformers_names

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    x_transformers = pytest.importorskip("x_transformers")


def both(**options: Any) -> tuple[Encoder, Any]:
    """Our encoder with the weights of theirs, gains and all moved away from their start."""
    torch.manual_seed(0)
    config = ModelConfig(num_tokens=100, mask_id=99, max_seq_len=32, dim=64, depth=3, heads=4, **options)
    extra = {}
    if config.emb_dim is not None:
        extra["emb_dim"] = config.emb_dim
    if config.tied_embeddings:
        extra["tie_embedding"] = True
    layers = x_transformers.Encoder(dim=64, depth=3, heads=4)
    theirs = x_transformers.TransformerWrapper(num_tokens=100, max_seq_len=32, attn_layers=layers, **extra)
    weights = theirs.state_dict()
    for name, weight in weights.items():
        if "gamma" in name:
            weight.normal_(0, 0.1)
    names = x_transformers_names(config)
    assert {n for group in names.values() for n in group} == set(weights), "every weight has its place"
    ours = Encoder(config, 100)
    ours.load_state_dict({name: torch.cat([weights[n] for n in group]) for name, group in names.items()})
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("options", [{}, {"emb_dim": 48}, {"tied_embeddings": True}], ids=str)
def test_logits_equal_those_of_x_transformers_with_and_without_padding(options: dict[str, Any]) -> None:
    ours, theirs = both(**options)
    ids = torch.randint(0, 99, (4, 20))
    valid = torch.arange(20) < torch.tensor([20, 12, 1, 7])[:, None]
    with torch.no_grad():
        assert (ours.project(ours(ids, None)) - theirs(ids)).abs().max() < 1e-5
        padded = ours.project(ours(ids, valid)) - theirs(ids, mask=valid)
        assert padded[valid].abs().max() < 1e-5
        assert (ours.project(ours(ids[:, :7], None)) - theirs(ids[:, :7])).abs().max() < 1e-5


def test_gradients_equal_those_of_x_transformers() -> None:
    ours, theirs = both()
    ids = torch.randint(0, 99, (4, 20))
    target = torch.randint(0, 99, (80,))
    for model in (ours, theirs):
        logits = ours.project(ours(ids, None)) if model is ours else theirs(ids)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), target).backward()
    weights = dict(theirs.named_parameters())
    for name, group in x_transformers_names(
        ModelConfig(num_tokens=100, mask_id=99, max_seq_len=32, dim=64, depth=3, heads=4)
    ).items():
        expected = torch.cat([weights[n].grad for n in group])
        assert torch.allclose(ours.get_parameter(name).grad, expected, rtol=1e-4, atol=1e-6), name


def test_padding_does_not_change_the_outputs() -> None:
    ours, _ = both()
    ids = torch.randint(0, 99, (2, 20))
    valid = torch.arange(20) < torch.tensor([20, 9])[:, None]
    other = torch.where(valid, ids, 5)
    with torch.no_grad():
        assert torch.equal(ours(ids, valid)[valid], ours(other, valid)[valid])


def test_initial_weights_have_the_documented_scales() -> None:
    torch.manual_seed(0)
    model = Encoder(
        ModelConfig(num_tokens=4000, mask_id=0, max_seq_len=2000, dim=128, depth=1, heads=2), 4000
    )
    assert float(model.token_emb.weight.detach().std()) == pytest.approx((2 / 128) ** 0.5, rel=0.01)
    assert model.pos_emb is not None
    assert float(model.pos_emb.weight.detach().std()) == pytest.approx(1, rel=0.01)
    up = model.blocks[0].feed_forward.up.weight.detach()
    assert float(up.abs().max()) <= 128**-0.5
    assert float(up.std()) == pytest.approx(128**-0.5 / 3**0.5, rel=0.02)
    assert all(float(p.detach().abs().max()) == 0 for n, p in model.named_parameters() if "gamma" in n)


def test_rotary_positions_depend_only_on_distance() -> None:
    config = ModelConfig(
        num_tokens=9, mask_id=8, max_seq_len=64, dim=32, depth=2, heads=2, dim_head=16, positions="rotary"
    )
    torch.manual_seed(0)
    model = Encoder(config, 9).eval()
    ids = torch.randint(0, 8, (1, 12))
    shifted = torch.cat((torch.zeros(1, 5, dtype=torch.int64), ids), dim=1)
    valid = torch.arange(17) >= 5
    with torch.no_grad():
        assert torch.allclose(model(ids, None), model(shifted, valid[None])[:, 5:], atol=1e-5)
        assert not torch.allclose(model(ids, None), model(ids.flip(1), None).flip(1), atol=1e-3)
