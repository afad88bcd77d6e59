"""Weights of x-transformers are imported as they are into the library's own model, whatever its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from maskwire_server.config import ModelConfig, ObjectiveConfig
from maskwire_server.training.models import x_transformers_import_unchanged
from maskwire_server.training.models.generator_critic import Networks

xt = pytest.importorskip("x_transformers")

V, N, MASK_ID = 12, 6, 11
LAYERS = {"dim": 16, "depth": 2, "heads": 2, "attn_dim_head": 8}


def transformer(wrapper: dict[str, Any], layers: dict[str, Any]) -> Any:
    """A model whose weights are all away from their start."""
    net = xt.TransformerWrapper(num_tokens=V, max_seq_len=N, attn_layers=xt.Encoder(**layers), **wrapper)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return net.eval()


def imported(state: Any, options: dict[str, Any], **said: Any) -> tuple[Any, Networks]:
    model = {"mask_id": MASK_ID, "max_seq_len": N, **said.pop("model", {})}
    section = ModelConfig(source="x-transformers", x_transformers=options, **model)
    found = x_transformers_import_unchanged.import_state_dict(state, section, ObjectiveConfig(**said))
    networks = Networks(found.model, found.objective)
    networks.load_state_dict(found.weights, strict=True)
    return found, networks.eval()


@pytest.mark.parametrize(
    ("wrapper", "layers"),
    [
        ({}, {}),
        ({"post_emb_norm": True, "num_memory_tokens": 2}, {"dynamic_pos_bias": True}),
        ({"tie_embedding": True}, {"alibi_pos_bias": True, "attn_num_mem_kv": 2}),
        ({"emb_dim": 8}, {"rotary_pos_emb": True, "use_rmsnorm": True, "ff_glu": True, "attn_qk_norm": True}),
        ({"scaled_sinu_pos_emb": True}, {"gate_residual": True, "sandwich_norm": True}),
        ({"l2norm_embed": True}, {"rel_pos_bias": True, "num_residual_streams": 2}),
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_options_that_the_built_in_encoder_lacks_are_imported_with_equal_logits(
    wrapper: dict[str, Any], layers: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    theirs = transformer(wrapper, {**LAYERS, **layers})
    found, networks = imported(theirs.state_dict(), {**LAYERS, **layers, **wrapper})
    assert (found.model.num_tokens, found.model.source) == (V, "x-transformers")
    ids = torch.randint(0, V, (3, N))
    with torch.no_grad():
        assert torch.equal(networks.project(networks.embed(ids, None, None)), theirs(ids))


@pytest.mark.parametrize("critic", ["self", "token"])
def test_critic_and_self_conditioning_are_read_from_the_state_dict(critic: str) -> None:
    torch.manual_seed(0)
    separate = transformer({"logits_dim": 1}, LAYERS) if critic == "token" else None
    wrapper = xt.NonAutoregressiveWrapper(
        transformer({}, LAYERS), mask_id=MASK_ID, self_cond=True, token_critic=separate,
        self_token_critic=critic == "self",
    ).eval()  # fmt: skip
    found, networks = imported(wrapper.state_dict(), LAYERS)
    objective = found.objective
    assert (objective.critic, objective.self_cond, objective.self_cond_start) == (critic, True, "none")
    assert objective.self_cond_prob == 0.75
    ids = torch.randint(0, V, (3, N))
    with torch.no_grad():
        expected = wrapper.token_critic(ids)[..., 0]
        assert torch.allclose(networks.criticize(ids, None, train_trunk=False), expected, atol=1e-6)
        first = wrapper.net(ids, return_embeddings=True)
        second = wrapper.net(ids, sum_embeds=wrapper.to_self_cond(first))
        ours = networks.project(networks.embed(ids, None, networks.embed(ids, None, None)))
        assert torch.allclose(ours, second, atol=1e-6)


def state(**layers: Any) -> Any:
    torch.manual_seed(0)
    return transformer({}, {**LAYERS, **layers}).state_dict()


@pytest.mark.parametrize(
    ("options", "said", "words"),
    [
        ({**LAYERS, "depth": 1}, {}, r"layers\.2\..* a model with these keywords does not have it"),
        ({**LAYERS, "depth": 3}, {}, r"layers\.4\..* is missing, but a model with these keywords has it"),
        ({**LAYERS, "attn_kv_heads": 1}, {}, r"to_k\.weight must have shape \(8, 16\), got \(16, 16\)"),
        (LAYERS, {"model": {"num_tokens": 13}}, r"model.num_tokens is 13 .*, 12 in the state dict"),
        (LAYERS, {"model": {"max_seq_len": 7}}, r"model.max_seq_len is 7 .*, 6 in the state dict"),
        (LAYERS, {"critic": "token"}, r"objective.critic is \'token\' .*, \'none\' in the state dict"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], said: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        imported(state(), options, **said)


def test_ids_and_lengths_that_no_weight_shows_must_be_set() -> None:
    layers = {**LAYERS, "rotary_pos_emb": True}
    section = ModelConfig(source="x-transformers", x_transformers=layers)
    with pytest.raises(ValueError, match=r"(?s)mask_id must be set.*max_seq_len must be set"):
        x_transformers_import_unchanged.import_state_dict(
            state(rotary_pos_emb=True), section, ObjectiveConfig()
        )


def test_names_are_those_of_the_file() -> None:
    found = state()
    del found["attn_layers.final_norm.gamma"]
    with pytest.raises(ValueError, match=r"(?m)^attn_layers\.final_norm\.gamma is missing"):
        imported(found, LAYERS)
    wrapped = {f"net.{name}": tensor for name, tensor in found.items()}
    with pytest.raises(ValueError, match=r"(?m)^net\.attn_layers\.final_norm\.gamma is missing"):
        imported(wrapped, LAYERS)
