"""Importing x-transformers models keeps logits, critics and evaluations; unsupported options are named."""

from __future__ import annotations

import math
import random
import re
import warnings
from pathlib import Path
from typing import Any

import dense
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from maskwire_server.batch import Batch, Modes
from maskwire_server.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ServeConfig
from maskwire_server.results import EvalOptions
from maskwire_server.training.models import weight_files, x_transformers_export, x_transformers_import
from maskwire_server.training.models.generator_critic import Networks
from maskwire_server.training.trainer import TorchTrainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    xt = pytest.importorskip("x_transformers")

V, N, MASK_ID = 12, 6, 11
MODEL = {"mask_id": MASK_ID}


def transformer(wrapper: dict[str, Any] | None = None, **encoder: Any) -> Any:
    layers = xt.Encoder(**{"dim": 16, "depth": 2, "heads": 2, **encoder})
    return xt.TransformerWrapper(**{"num_tokens": V, "max_seq_len": N, **(wrapper or {})}, attn_layers=layers)


def wrapped(kind: str = "none", self_cond: bool = False, **options: Any) -> Any:
    """A wrapper whose weights are all away from their start."""
    torch.manual_seed(0)
    shape = options.pop("wrapper", {})
    net = transformer(shape, **options)
    critic: dict[str, Any] = {}
    if kind == "self":
        critic = {"self_token_critic": True}
    elif kind == "token":
        apart = {key: value for key, value in shape.items() if key != "tie_embedding"}
        critic = {"token_critic": transformer({**apart, "logits_dim": 1}, **options)}
    model = xt.NonAutoregressiveWrapper(net, mask_id=MASK_ID, self_cond=self_cond, **critic)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def brought(state: Any, **said: Any) -> tuple[x_transformers_import.Imported, Networks]:
    found = x_transformers_import.import_state_dict(
        state,
        ModelConfig(**MODEL, **said.pop("model", {})),
        ObjectiveConfig(**said.pop("objective", {})),
        **said,
    )
    networks = Networks(found.model, found.objective)
    networks.load_state_dict(found.weights)
    return found, networks.eval()


def trainer_of(found: x_transformers_import.Imported, **optimizer: Any) -> TorchTrainer:
    serve = ServeConfig(device="cpu", threads=1)
    trainer = TorchTrainer(found.model, found.objective, OptimizerConfig(**optimizer), serve, seed=1)
    trainer.adopt(found.weights)
    return trainer


IDS = torch.randint(0, V - 1, (5, N), generator=torch.Generator().manual_seed(1))
MASKED = torch.where(torch.rand(IDS.shape, generator=torch.Generator().manual_seed(2)) < 0.5, MASK_ID, IDS)


ROTARY = {"rotary_pos_emb": True}
COSINE = {"qk_norm": True, "qk_norm_gain": "none"}
DIM_SCALE = {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True}
MODERN: tuple[dict[str, Any], dict[str, Any]] = (
    {
        **ROTARY, "use_rmsnorm": True, "ff_glu": True, "ff_swish": True, "ff_no_bias": True,
        "attn_qk_norm": True, "attn_kv_heads": 2, "heads": 4, "wrapper": {"tie_embedding": True},
    },
    {**COSINE, "feed_forward": "swiglu", "max_seq_len": N},
)  # fmt: skip
# Options of their model, and what the configuration must say because no weight shows it.
COVERED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}), ({"wrapper": {"tie_embedding": True}}, {}), ({"wrapper": {"emb_dim": 8}}, {}),
    ({"attn_dim_head": 8}, {"dim_head": 8}), ({"ff_mult": 2.6}, {}),
    ({"attn_kv_heads": 1}, {}), ({"attn_one_kv_head": True}, {}), ({"attn_kv_heads": 2, "heads": 4}, {}),
    ({"attn_kv_heads": 2, "heads": 4, "attn_flash": True}, {}),
    (ROTARY, {"max_seq_len": N}), ({**ROTARY, "rotary_emb_dim": 64}, {"max_seq_len": N}),
    ({**ROTARY, "rotary_base_rescale_factor": 3.7}, {"max_seq_len": N}),
    (ROTARY, {"max_seq_len": N, "rotary_pairs": "halves"}),
    ({"use_rmsnorm": True}, {}), ({"ff_no_bias": True}, {}),
    ({"ff_swish": True}, {"feed_forward": "silu"}),
    ({"ff_relu_squared": True}, {"feed_forward": "relu_squared"}),
    ({"ff_glu": True}, {"feed_forward": "geglu"}),
    ({"ff_glu": True, "ff_swish": True}, {"feed_forward": "swiglu"}),
    ({"ff_glu": True, "ff_no_bias": True}, {"feed_forward": "geglu"}),
    ({"attn_qk_norm": True}, COSINE),
    ({"attn_qk_norm": True, "attn_qk_norm_scale": 7}, {**COSINE, "qk_norm_scale": 7.0}),
    (DIM_SCALE, {}), ({"attn_qk_rmsnorm": True}, {}),
    ({"attn_qk_rmsnorm": True, "attn_kv_heads": 2, "heads": 4, "attn_dim_head": 32}, {}),
    ({**ROTARY, **DIM_SCALE, "attn_kv_heads": 2, "heads": 4}, {"max_seq_len": N, "rotary_pairs": "halves"}),
    MODERN,
]  # fmt: skip


def critic_scores(theirs: Any, kind: str, keep: torch.Tensor | None) -> Any:
    """Their critic's scores. Their self critic takes no mask, but its trunk does."""
    if kind == "token":
        return theirs.token_critic(IDS, mask=keep)[..., 0]
    return theirs.token_critic.to_logits(theirs.net(IDS, mask=keep, return_embeddings=True))[..., 0]


@pytest.mark.parametrize(("options", "said"), COVERED, ids=str)
@pytest.mark.parametrize("kind", ["none", "self", "token"])
def test_logits_and_critic_scores_equal_those_of_the_source(
    kind: str, options: dict[str, Any], said: dict[str, Any]
) -> None:
    theirs = wrapped(kind, **options)
    found, ours = brought(theirs.state_dict(), model=said)
    assert found.objective.critic == kind
    valid = torch.arange(N) < torch.tensor([N, 3, 1, N, 2])[:, None]
    with torch.no_grad():
        for keep in (None, valid):
            apart = ours.project(ours.embed(MASKED, keep, None)) - theirs.net(MASKED, mask=keep)
            assert apart[valid].abs().max() < 1e-5
            if kind != "none":
                expected = critic_scores(theirs, kind, keep)
                apart = ours.criticize(IDS, keep, train_trunk=False) - expected
                assert apart[valid].abs().max() < 1e-5


@pytest.mark.parametrize(("options", "said"), COVERED, ids=str)
@pytest.mark.parametrize("kind", ["none", "self", "token"])
def test_an_imported_model_is_exported_with_the_weights_and_options_of_the_source(
    kind: str, options: dict[str, Any], said: dict[str, Any]
) -> None:
    theirs = wrapped(kind, self_cond="emb_dim" not in options.get("wrapper", {}), **options)
    found, _ = brought(theirs.state_dict(), model=said)
    back = x_transformers_export.export_state_dict(found.model, found.objective, found.weights)
    state = theirs.state_dict()
    shared = {name for name in state if name.startswith("token_critic.net.")}
    assert back.keys() == state.keys() - shared
    assert all(torch.allclose(back[name], state[name], rtol=1e-6, atol=1e-7) for name in back)
    exact = "attn_qk_norm_dim_scale" in options or "rotary_base_rescale_factor" in options
    assert exact or all(torch.equal(back[name], state[name]) for name in back)
    again = xt.TransformerWrapper(
        **x_transformers_export.wrapper_options(found.model),
        attn_layers=xt.Encoder(**x_transformers_export.encoder_options(found.model)),
    ).eval()
    again.load_state_dict(
        {name.removeprefix("net."): t for name, t in back.items() if name.startswith("net.")}
    )
    with torch.no_grad():
        assert (again(MASKED) - theirs.net(MASKED)).abs().max() < 1e-5


@pytest.mark.parametrize("model", [
    {"qk_norm": True, "kv_heads": 2}, {"qk_norm": True, "qk_norm_gain": "per_head", "qk_norm_scale": 3.0},
    {"feed_forward": "swiglu", "ff_bias": False}, {"ff_down_bias": False},
    {"ff_bias": False, "ff_down_bias": True},
    {"positions": "rotary", "rotary_dim": 4, "rotary_base": 500.0, "qk_norm": True, "kv_heads": 2},
], ids=str)  # fmt: skip
def test_a_model_that_was_trained_here_is_exported_with_equal_logits(model: dict[str, Any]) -> None:
    config = ModelConfig(
        num_tokens=V,
        max_seq_len=N,
        dim=16,
        depth=2,
        heads=4,
        dim_head=8,
        rms_norm_eps=1e-24,
        **MODEL,
        **model,
    )
    torch.manual_seed(0)
    ours = Networks(config, ObjectiveConfig()).eval()
    with torch.no_grad():
        for weight in ours.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    state = x_transformers_export.export_state_dict(config, ObjectiveConfig(), ours.state_dict())
    constructor = x_transformers_export.constructor(config)
    theirs = eval(constructor, vars(xt)).eval()
    theirs.load_state_dict({name.removeprefix("net."): tensor for name, tensor in state.items()})
    with torch.no_grad():
        assert (ours.project(ours.embed(MASKED, None, None)) - theirs(MASKED)).abs().max() < 1e-5


@pytest.mark.parametrize(("options", "model"), [({}, {}), MODERN], ids=["default", "modern"])
def test_both_passes_of_self_conditioning_equal_those_of_the_source(
    options: dict[str, Any], model: dict[str, Any]
) -> None:
    theirs = wrapped("self", self_cond=True, **options)
    found, ours = brought(theirs.state_dict(), model=model)
    assert (found.objective.self_cond, found.objective.self_cond_start) == (True, "none")
    with torch.no_grad():
        first = theirs.net(MASKED, return_embeddings=True)
        expected = theirs.net(MASKED, sum_embeds=theirs.to_self_cond(first))
        cond = ours.conditioning(ours.embed(MASKED, None, None))
        assert (ours.project(ours.embed(MASKED, None, cond)) - expected).abs().max() < 1e-5
        expected = theirs.net(MASKED, sum_embeds=theirs.to_self_cond(theirs.null_embed))
        cond = ours.conditioning(None)
        assert (ours.project(ours.embed(MASKED, None, cond)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, 0.75),
        ({"preset": "x-transformers"}, 0.75),
        ({"preset": "maskgit"}, 0.75),
        ({"self_cond_prob": 0.5}, 0.5),
        ({"preset": "x-transformers", "self_cond_prob": 0.1}, 0.1),
    ],
    ids=str,
)
def test_self_conditioning_gets_the_probability_of_the_source(said: dict[str, Any], expected: float) -> None:
    found, _ = brought(wrapped(self_cond=True).state_dict(), objective=said)
    assert (found.objective.self_cond_prob, found.objective.self_cond_start) == (expected, "none")
    assert found.objective.augments == (said.get("preset") == "x-transformers")


@pytest.mark.parametrize("options", [{}, {"use_rmsnorm": True, "attn_qk_rmsnorm": True}], ids=str)
def test_a_bare_transformer_and_plain_gains_are_imported(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    theirs = transformer(norm_add_unit_offset=False, **options).eval()
    with pytest.raises(ValueError, match="set --gains plain"):
        brought(theirs.state_dict())
    _, ours = brought(theirs.state_dict(), gains="plain")
    with torch.no_grad():
        assert (ours.project(ours.embed(MASKED, None, None)) - theirs(MASKED)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_base_of_rotary_positions_is_recognised_in_half_precision(dtype: torch.dtype) -> None:
    state = {name: t.to(dtype) for name, t in wrapped(**ROTARY, **DIM_SCALE).state_dict().items()}
    state["net.attn_layers.layers.0.1.qk_norm_q_scale"] *= 0.1  # a subtraction in half precision would round
    found, _ = brought(state, model={"max_seq_len": N})
    assert (found.model.rotary_base, found.model.rotary_dim) == (10_000.0, 32)
    gain = state["net.attn_layers.layers.0.1.qk_norm_q_scale"].float().flatten() - 1
    assert torch.equal(found.weights["generator.blocks.0.attention.q_norm.gamma"], gain)


def test_the_constructor_of_an_exported_model_has_the_dropout_rates() -> None:
    rates = {"dropout": 0.1, "emb_dropout": 0.2, "ff_dropout": 0.0}
    constructor = x_transformers_export.constructor(ModelConfig(num_tokens=V, **MODEL, **rates))
    net = eval(constructor, vars(xt))
    assert net.emb_dropout.p == 0.2
    for attention, feed_forward in zip(
        net.attn_layers.layers[::2], net.attn_layers.layers[1::2], strict=True
    ):
        assert (attention[1].attend.dropout, attention[1].sublayer_dropout.p) == (0.1, 0.1)
        assert all(part.p == 0 for part in feed_forward[1].ff if isinstance(part, nn.Dropout))


def test_a_single_head_is_not_exported() -> None:
    config = ModelConfig(num_tokens=V, heads=1, **MODEL)
    with pytest.raises(ValueError, match=r"model\.heads must be at least 2 for this format, got 1"):
        x_transformers_export.export_state_dict(config, ObjectiveConfig(), {})


UNSUPPORTED: list[tuple[str, dict[str, Any]]] = [
    *((name, {name: True}) for name in (
        "rel_pos_bias", "dynamic_pos_bias", "polar_pos_emb", "use_scalenorm",
        "use_simple_rmsnorm", "use_dynamic_tanh", "use_derf", "use_adaptive_layernorm", "sandwich_norm",
        "pre_and_post_norm", "gate_residual", "scale_residual", "mv_split_residual", "use_layerscale",
        "macaron", "unet_skips", "reinject_input", "integrate_layers", "add_value_residual",
        "attn_gate_values", "attn_head_scale", "attn_on_attn", "attn_data_dependent_alibi",
        "ff_post_act_ln", "only_attn", "attn_value_rmsnorm", "attn_k_rmsnorm", "attn_output_gate",
        "attn_gate_value_heads", "attn_head_learned_sink",
    )),
    ("pre_norm=False", {"pre_norm": False}),
    ("num_residual_streams", {"num_residual_streams": 2}),
    ("shift_tokens", {"shift_tokens": 1}),
    ("attn_num_mem_kv", {"attn_num_mem_kv": 2}),
    ("ff_glu_mult_bias", {"ff_glu": True, "ff_glu_mult_bias": True}),
    ("attn_use_latent_q", {"attn_use_latent_q": True, "attn_dim_latent_q": 8}),
    ("attn_use_latent_kv", {"attn_use_latent_kv": True, "attn_dim_latent_kv": 8}),
    ("disable_abs_pos_emb=False", {"rotary_pos_emb": True, "disable_abs_pos_emb": False}),
    ("attn_value_dim_head", {"attn_value_dim_head": 32}),
    ("sandwich_coef", {"sandwich_coef": 1}),
    *((name, {"wrapper": {name: True}}) for name in (
        "post_emb_norm", "scaled_sinu_pos_emb", "use_cls_token", "recycling", "mixture_of_softmax",
        "add_continuous_pred_head", "ff_deep_embed",
    )),
    ("use_abs_pos_emb=False", {"wrapper": {"use_abs_pos_emb": False}}),
    ("num_memory_tokens", {"wrapper": {"num_memory_tokens": 2}}),
    ("embed_num_tokens", {"wrapper": {"embed_num_tokens": {"kinds": 3}}}),
    ("num_output_heads", {"wrapper": {"num_output_heads": 2}}),
    ("logits_dim", {"wrapper": {"logits_dim": 5}}),
    ("to_logits", {"wrapper": {"to_logits": nn.Linear(16, V)}}),
    ("token_emb", {"wrapper": {"token_emb": nn.Embedding(V, 16)}}),
]  # fmt: skip


@pytest.mark.parametrize(("option", "settings"), UNSUPPORTED, ids=[name for name, _ in UNSUPPORTED])
def test_an_unsupported_option_is_rejected_by_name(option: str, settings: dict[str, Any]) -> None:
    state = {f"net.{name}": tensor for name, tensor in transformer(**settings).state_dict().items()}
    with pytest.raises(ValueError, match=rf"\b{option}\b.*(not supported)") as raised:
        brought(state)
    assert "net." in str(raised.value) or "generator." in str(raised.value)
    assert 'model.source = "x-transformers"' in str(raised.value)


def broken(change: Any, kind: str = "none", **options: Any) -> dict[str, Any]:
    state = dict(wrapped(kind, **options).state_dict())
    change(state)
    return state


@pytest.mark.parametrize(("state", "said", "words"), [
    (lambda: broken(lambda s: s.update(extra=torch.zeros(1))), {}, "extra is not a weight of a Non"),
    (lambda: broken(lambda s: s.update({"net.extra": torch.zeros(1)})), {}, "net.extra is not a weight of"),
    (lambda: broken(lambda s: s.pop("net.attn_layers.layers.2.1.to_q.weight")), {}, r"2.1.to_q.weight"),
    (lambda: broken(lambda s: s.pop("null_embed"), self_cond=True), {}, "null_embed is missing"),
    (lambda: broken(lambda s: s["net.to_logits.weight"].fill_(math.nan)), {}, "non-finite"),
    (lambda: broken(lambda s: s.update({"token_critic.net.to_logits.weight": torch.zeros(V, 16)}), "self"),
     {}, "differs from net.to_logits.weight"),
    (lambda: {"layer.weight": torch.zeros(3)}, {}, "not the weights of a TransformerWrapper"),
    (lambda: wrapped(self_cond=True, wrapper={"emb_dim": 8}).state_dict(), {}, "emb_dim other than dim"),
    (lambda: wrapped().state_dict(), {"model": {"depth": 4}}, "depth is 4 in the configuration, 2 in"),
    (lambda: wrapped().state_dict(), {"model": {"qk_norm": True}}, "model.qk_norm is True"),
    (lambda: wrapped(ff_glu=True).state_dict(), {}, "model.feed_forward must be set.*swiglu"),
    (lambda: wrapped(ff_glu=True).state_dict(), {"model": {"feed_forward": "silu"}}, "'geglu' in the state"),
    (lambda: wrapped(ff_swish=True).state_dict(), {"model": {"feed_forward": "swiglu"}}, "'gelu' in the sta"),
    (lambda: wrapped(**ROTARY).state_dict(), {}, "model.max_seq_len must be set"),
    (lambda: wrapped().state_dict(), {"model": {"positions": "rotary"}}, "positions is 'rotary' in the conf"),
    (lambda: broken(lambda s: s["net.attn_layers.rotary_pos_emb.inv_freq"].mul_(1.1), **ROTARY), {},
     "not the powers of one base"),
    (lambda: wrapped(attn_kv_heads=1).state_dict(), {"model": {"kv_heads": 2}}, "kv_heads is 2 in the conf"),
    (lambda: wrapped().state_dict(), {"model": {"dim_head": 48}}, "not a multiple of model.dim_head = 48"),
    (lambda: wrapped("self").state_dict(), {"objective": {"critic": "token"}}, "objective.critic is 'token'"),
    (lambda: wrapped().state_dict(), {"objective": {"self_cond": True}}, "objective.self_cond is True"),
    (lambda: wrapped(self_cond=True).state_dict(), {"objective": {"self_cond_start": "null"}}, "_start"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_weights_that_do_not_fit_are_rejected_by_name(state: Any, said: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        brought(state(), **said)


def test_a_critic_of_other_sizes_and_a_missing_mask_id_are_rejected() -> None:
    other = transformer({"logits_dim": 1}, depth=3)
    model = xt.NonAutoregressiveWrapper(transformer(), mask_id=MASK_ID, token_critic=other)
    with pytest.raises(ValueError, match="token_critic: depth is 3, but the generator's is 2"):
        brought(model.state_dict())
    with pytest.raises(ValueError, match=r"model.mask_id must be set"):
        x_transformers_import.import_state_dict(model.state_dict(), ModelConfig(), ObjectiveConfig())
    with pytest.raises(ValueError, match="mask_id must be below num_tokens = 12, got 99"):
        x_transformers_import.import_state_dict(
            wrapped().state_dict(), ModelConfig(mask_id=99), ObjectiveConfig()
        )


def test_files_are_read_without_running_their_code(tmp_path: Path) -> None:
    state = wrapped("self", self_cond=True).state_dict()
    torch.save(state, tmp_path / "model.pt")
    torch.save({f"module._orig_mod.{name}": t for name, t in state.items()}, tmp_path / "parallel.pt")
    alone = {name: t for name, t in state.items() if not name.startswith("token_critic.net.")}
    save_file(alone, tmp_path / "model.safetensors")
    for name in ("model.pt", "parallel.pt", "model.safetensors"):
        read = weight_files.read(tmp_path / name)
        assert torch.equal(read["net.to_logits.weight"], state["net.to_logits.weight"])
        found, _ = brought(read)
        assert found.objective.critic == "self"
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    torch.save({"model": state, "step": 3}, tmp_path / "nested.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    for name, words in (
        ("evil.pt", "weights_only=True"),
        ("nested.pt", "got 'model', 'step'"),
        ("list.pt", "got list"),
        ("noise.pt", "cannot be read"),
        ("noise.safetensors", "cannot be read as safetensors"),
    ):
        with pytest.raises(ValueError, match=words):
            weight_files.read(tmp_path / name)
    assert not marker.exists()
    with pytest.raises(OSError, match="nothing"):
        weight_files.read(tmp_path / "nothing.pt")


def renamed(state: dict[str, Any], pattern: str, by: str) -> dict[str, Any]:
    return {re.sub(pattern, by, name): tensor for name, tensor in state.items()}


WRAPPED = {
    "compiled": lambda s: renamed(s, "^", "_orig_mod."),
    "the net compiled": lambda s: renamed(s, r"\bnet\.", "net._orig_mod."),
    "the layers compiled": lambda s: renamed(s, r"layers\.(\d+)\.1\.", r"layers.\1.1._orig_mod."),
    "compiled and parallel": lambda s: renamed(s, "^", "module._orig_mod."),
    "the net parallel, all compiled": lambda s: renamed(
        renamed(s, r"\bnet\.", "net.module."), "^", "_orig_mod."
    ),
    "checkpointed": lambda s: renamed(s, r"layers\.(\d+)\.", r"layers.\1._checkpoint_wrapped_module."),
    "averaged": lambda s: {
        **renamed(s, "^", "ema_model."), "initted": torch.tensor(True), "step": torch.tensor(3),
    },
    "averaged beside what is trained": lambda s: {
        **renamed(s, "^", "online_model."), **renamed(s, "^", "ema_model."), "initted": torch.tensor([True]),
        "step": torch.tensor([3]),
    } | {f"online_model.{name}": tensor + 1 for name, tensor in s.items()},
    "averaged, parallel, the net compiled": lambda s: renamed(
        renamed(s, r"\bnet\.", "net._orig_mod."), "^", "module.ema_model."
    ) | {"module.initted": torch.tensor(True), "module.step": torch.tensor(3)},
    "Lightning's": lambda s: renamed(s, "^", "model."),
    "Lightning's, by a strategy": lambda s: renamed(s, "^", "_forward_module.model."),
    "Lightning's, the net compiled": lambda s: renamed(
        renamed(s, r"\bnet\.", "net._orig_mod."), "^", "_forward_module.module.model."
    ),
    "torch's average": lambda s: renamed(s, "^", "module.") | {"n_averaged": torch.tensor(3)},
}  # fmt: skip


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("kind", ["none", "self", "token"])
def test_the_parts_of_names_that_wrappers_add_are_removed_anywhere(
    how: str, kind: str, tmp_path: Path
) -> None:
    state = wrapped(kind, self_cond=True).state_dict()
    torch.save(WRAPPED[how](state), tmp_path / "model.pt")
    read = weight_files.read(tmp_path / "model.pt")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)
    assert brought(read)[0].objective.critic == kind


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_real_wrappers_add_the_parts_of_names_that_are_removed(tmp_path: Path) -> None:
    model = wrapped()
    expected = model.state_dict()
    model.net = torch.compile(model.net)
    for name, module in (("net.pt", model), ("all.pt", torch.compile(model)),
                         ("mean.pt", torch.optim.swa_utils.AveragedModel(model))):  # fmt: skip
        torch.save(module.state_dict(), tmp_path / name)
        assert weight_files.read(tmp_path / name).keys() == expected.keys()


def test_the_prefixes_of_lightning_stay_if_removing_them_does_not_help(tmp_path: Path) -> None:
    state = renamed(wrapped().state_dict(), "^", "model.") | {"criterion.weight": torch.ones(2)}
    torch.save(state, tmp_path / "more.pt")
    assert weight_files.read(tmp_path / "more.pt").keys() == state.keys()


def test_two_models_in_one_file_and_counters_without_an_average_are_rejected(tmp_path: Path) -> None:
    state = wrapped().state_dict()
    torch.save({**state, **{f"module.{n}": t + 1 for n, t in state.items()}}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match="twice with different values"):
        weight_files.read(tmp_path / "two.pt")
    torch.save({**state, "step": torch.tensor(3.0)}, tmp_path / "step.pt")
    with pytest.raises(ValueError, match="step is not a weight"):
        brought(weight_files.read(tmp_path / "step.pt"))


@pytest.fixture(scope="module")
def trained() -> Any:
    """A model that its own library trained on pairs; its weighted loss diverges, the other one does not."""
    torch.set_num_threads(1)  # two that wait for each other crawl on a busy machine
    torch.manual_seed(4)
    random.seed(4)  # where its coins come from
    model = xt.NonAutoregressiveWrapper(
        transformer(),
        mask_id=MASK_ID,
        self_cond=True,
        self_token_critic=True,
        use_simple_mdlm_loss_weight=False,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        ids = torch.randint(0, V - 1, (32, N // 2)).repeat_interleave(2, 1)
        model(ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def theirs_predict(model: Any) -> dense.Predict:
    """x-transformers' own distribution, both passes, the mask id's probability taken away."""

    def predict(seen: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            first = model.net(seen[None], return_embeddings=True)
            logits = model.net(seen[None], sum_embeds=model.to_self_cond(first))[0].double()
        log_p = logits.log_softmax(-1)
        # log p(x | not the mask id) = log p(x) - log(1 - p(mask id))
        return log_p - torch.log1p(-log_p[:, MASK_ID].exp())[:, None]

    return predict


def test_an_imported_model_has_the_same_evaluation_and_trains_on(trained: Any) -> None:
    found, _ = brought(trained.state_dict())
    trainer = trainer_of(found, learning_rate=3e-3, warmup_steps=0, ema_decay=0.9)
    rng = np.random.default_rng(0)
    ids = np.repeat(rng.integers(0, V - 1, (4, N // 2)), 2, axis=1)
    predict = theirs_predict(trained)
    rows = [torch.from_numpy(row) for row in ids]
    left_to_right = [dense.chain(predict, row, MASK_ID, range(N)) for row in rows]
    chained = trainer.eval_loss(Batch(ids, 4, N), EvalOptions((0, 1, 2, 3), 1, chain_rule=True))
    assert [row.nats for row in chained.rows] == pytest.approx(left_to_right, rel=1e-4)
    exact = [dense.nelbo(predict, row, MASK_ID) for row in rows]
    for row in range(4):
        many = Batch(np.repeat(ids[row][None], 64, axis=0), 64, N)
        result = trainer.eval_loss(many, EvalOptions(tuple(range(64)), 30))
        nats = np.array([r.nats for r in result.rows])
        assert abs(nats.mean() - exact[row]) < 4 * nats.std(ddof=1) / 8

    held_out = np.repeat(rng.integers(0, V - 1, (64, N // 2)), 2, axis=1)
    before = trainer.eval_loss(Batch(held_out, 64, N), EvalOptions(tuple(range(64)), 16))
    assert before.ema_weights, "the moving average begins at the weights that came"
    for step in range(1, 101):
        batch = np.repeat(rng.integers(0, V - 1, (32, N // 2)), 2, axis=1)
        trainer.train_step(1, step, Batch(batch, 32, N), Modes())
    after = trainer.eval_loss(Batch(held_out, 64, N), EvalOptions(tuple(range(64)), 16))
    assert after.nats_per_token < before.nats_per_token
    assert before.nats_per_token < math.log(V - 1), "it was trained when it came"
