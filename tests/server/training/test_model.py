"""The encoder computes what x-transformers' TransformerWrapper(Encoder) computes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from maskwire_server.config import ModelConfig
from maskwire_server.training.models import encoder, x_transformers_export
from maskwire_server.training.models.encoder import Encoder
from maskwire_server.training.models.x_transformers_names import from_x_transformers, x_transformers_names

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    x_transformers = pytest.importorskip("x_transformers")
    from x_transformers.x_transformers import RotaryEmbedding, apply_rotary_pos_emb


ALL: dict[str, Any] = {
    "kv_heads": 2, "positions": "rotary", "rotary_dim": 32, "rotary_pairs": "interleaved",
    "rotary_base": 50_000.0, "norm": "rmsnorm", "rms_norm_eps": 1e-24, "feed_forward": "swiglu",
    "ff_down_bias": False, "qk_norm": True, "qk_norm_gain": "per_head", "tied_embeddings": True,
}  # fmt: skip
QK_NORM: dict[str, Any] = {"qk_norm": True, "rms_norm_eps": 1e-24}
OPTIONS: list[dict[str, Any]] = [
    {}, {"emb_dim": 48}, {"tied_embeddings": True}, {"kv_heads": 2}, {"kv_heads": 1}, {"kv_heads": 4},
    {"positions": "rotary"}, {"positions": "rotary", "rotary_dim": 32},
    {"positions": "rotary", "rotary_pairs": "interleaved"},
    {"positions": "rotary", "rotary_pairs": "interleaved", "rotary_dim": 32, "rotary_base": 500.0},
    {"norm": "rmsnorm", "rms_norm_eps": 1e-24}, {"ff_bias": False},
    {"feed_forward": "silu"}, {"feed_forward": "relu_squared"}, {"feed_forward": "geglu"},
    {"feed_forward": "swiglu"}, {"feed_forward": "swiglu", "ff_down_bias": False},
    {**QK_NORM, "qk_norm_gain": "none"}, {**QK_NORM, "qk_norm_gain": "none", "qk_norm_scale": 10.0},
    {**QK_NORM, "qk_norm_gain": "per_head"}, {**QK_NORM, "qk_norm_gain": "per_head", "kv_heads": 2},
    {**QK_NORM, "qk_norm_gain": "per_head", "qk_norm_scale": 64**-0.5}, ALL,
]  # fmt: skip


def both(**options: Any) -> tuple[Encoder, Any, ModelConfig]:
    """Our encoder with the weights of theirs, all of them moved away from their start."""
    torch.manual_seed(0)
    config = ModelConfig(num_tokens=100, mask_id=99, max_seq_len=32, dim=64, depth=3, heads=4, **options)
    theirs = x_transformers.TransformerWrapper(
        **x_transformers_export.wrapper_options(config),
        attn_layers=x_transformers.Encoder(**x_transformers_export.encoder_options(config)),
    )
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    names = {n for group in x_transformers_names(config).values() for n in group}
    assert names == set(dict(theirs.named_parameters())), "every weight has its place"
    ours = Encoder(config, 100)
    ours.load_state_dict(from_x_transformers(theirs.state_dict(), config))
    return ours.eval(), theirs.eval(), config


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_equal_those_of_x_transformers_with_and_without_padding(options: dict[str, Any]) -> None:
    ours, theirs, _ = both(**options)
    ids = torch.randint(0, 99, (4, 20))
    valid = torch.arange(20) < torch.tensor([20, 12, 1, 7])[:, None]
    with torch.no_grad():
        assert (ours.project(ours(ids, None)) - theirs(ids)).abs().max() < 1e-5
        padded = ours.project(ours(ids, valid)) - theirs(ids, mask=valid)
        assert padded[valid].abs().max() < 1e-5
        assert (ours.project(ours(ids[:, :7], None)) - theirs(ids[:, :7])).abs().max() < 1e-5


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2}, ALL], ids=str)
def test_gradients_equal_those_of_x_transformers(options: dict[str, Any]) -> None:
    ours, theirs, config = both(**options)
    ids = torch.randint(0, 99, (4, 20))
    target = torch.randint(0, 99, (80,))
    for model in (ours, theirs):
        logits = ours.project(ours(ids, None)) if model is ours else theirs(ids)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), target).backward()
    expected = from_x_transformers({name: weight.grad for name, weight in theirs.named_parameters()}, config)
    for name, gradient in expected.items():
        assert torch.allclose(ours.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("options", [{}, ALL], ids=str)
def test_initial_outputs_have_the_same_scale_as_those_of_x_transformers(options: dict[str, Any]) -> None:
    config = both(**options)[2]
    torch.manual_seed(1)
    ours, ids = Encoder(config, 100), torch.randint(0, 99, (8, 32))
    fresh = x_transformers.TransformerWrapper(
        **x_transformers_export.wrapper_options(config),
        attn_layers=x_transformers.Encoder(**x_transformers_export.encoder_options(config)),
    )
    with torch.no_grad():
        found, expected = ours.project(ours(ids, None)).std(), fresh(ids).std()
    assert float(found) == pytest.approx(float(expected), rel=0.2)


def test_partial_interleaved_rotation_equals_that_of_x_transformers_in_long_rows() -> None:
    config = ModelConfig(positions="rotary", rotary_dim=32, rotary_pairs="interleaved", rotary_base=10_000.0)
    x_bhnc = torch.randn(1, 2, 4096, 64, generator=torch.Generator().manual_seed(0))
    freqs, _ = RotaryEmbedding(32)(torch.arange(4096))
    found = encoder._rotate(x_bhnc, encoder._rotation(4096, config, x_bhnc.device), interleaved=True)
    assert (found - apply_rotary_pos_emb(x_bhnc, freqs)).abs().max() < 1e-5


def test_grouped_heads_have_the_same_shapes_on_devices_that_repeat_them() -> None:
    with torch.device("meta"):
        attention = encoder.Attention(ModelConfig(dim=32, heads=4, kv_heads=2, dim_head=8))
        keep = torch.ones(2, 1, 1, 5, dtype=torch.bool)
        assert attention(torch.zeros(2, 5, 32), keep, None).shape == (2, 5, 32)


def test_padding_does_not_change_the_outputs() -> None:
    ours, _, _ = both()
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


@pytest.mark.parametrize(
    "options", [{}, {"rotary_pairs": "interleaved"}, {"rotary_dim": 8}, {"kv_heads": 1}], ids=str
)
def test_rotary_positions_depend_only_on_distance(options: dict[str, Any]) -> None:
    config = ModelConfig(
        num_tokens=9, mask_id=8, max_seq_len=64, dim=32, depth=2, heads=2, dim_head=16, positions="rotary",
        **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Encoder(config, 9).eval()
    ids = torch.randint(0, 8, (1, 12))
    shifted = torch.cat((torch.zeros(1, 5, dtype=torch.int64), ids), dim=1)
    valid = torch.arange(17) >= 5
    with torch.no_grad():
        assert torch.allclose(model(ids, None), model(shifted, valid[None])[:, 5:], atol=1e-5)
        assert not torch.allclose(model(ids, None), model(ids.flip(1), None).flip(1), atol=1e-3)
