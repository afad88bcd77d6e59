"""AdamW, Muon and parameter groups: what each trains and computes, and what frozen parameters cost."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from source_models import MODERN_ENCODER, make_trainer, of_folder, of_x_transformers, write_folder
from torch import Tensor, nn

from maskwire.v1.values import Outcome
from maskwire_server import config
from maskwire_server.batch import Batch, Modes
from maskwire_server.errors import ConfigError
from maskwire_server.results import EvalOptions
from maskwire_server.training import cross_entropy, muon, optimizers
from maskwire_server.training.corruption import Vocabulary
from maskwire_server.training.footprint import footprint
from maskwire_server.training.head import Head
from maskwire_server.training.snapshot import live_tensors
from maskwire_server.training.trainer import TorchTrainer

BATCH = Batch(np.random.default_rng(0).integers(0, 16, (6, 12)), 6, 12)
MODEL = {"num_tokens": 17, "mask_id": 16, "max_seq_len": 12, "dim": 32, "depth": 2, "heads": 2, "dim_head": 8}
FROZEN = [{"match": "generator.blocks.0.*", "train": False}, {"match": "*token_emb*", "train": False}]
HEAVY = {"learning_rate": 0.01, "weight_decay": 0.3, "warmup_steps": 0, "ema_decay": 0.9}


def whole_config(
    objective: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **optimizer: Any
) -> config.Config:
    return config.load(
        None, model={**MODEL, **(model or {})}, objective=objective or {}, optimizer={**HEAVY, **optimizer},
        serve={"threads": 2, "device": "cpu"},
    )  # fmt: skip


def make(*args: Any, **optimizer: Any) -> TorchTrainer:
    whole = whole_config(*args, **optimizer)
    return TorchTrainer(whole.model, whole.objective, whole.optimizer, whole.serve, seed=0)


def train(trainer: TorchTrainer, first: int, last: int) -> list[Any]:
    return [trainer.train_step(1, step, BATCH, Modes()) for step in range(first, last + 1)]


def state(trainer: TorchTrainer) -> dict[str, Tensor]:
    return {
        f"{file}/{name}": tensor.clone()
        for file, tensors in live_tensors(trainer._groups()).items()
        for name, tensor in tensors.items()
    }


def different(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64), (1, 8)], ids=str)
def test_newton_schulz_brings_singular_values_close_to_1_and_keeps_the_vectors(
    shape: tuple[int, int],
) -> None:
    draw = torch.Generator().manual_seed(1)
    u, _, vt = torch.linalg.svd(torch.randn(shape, generator=draw, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(1, 0.02, len(vt), dtype=torch.float64)
    for scale in (1e-5, 1.0, 1e4):
        matrix = (scale * (u * values) @ vt).float()
        found = muon.orthogonalized(matrix)
        assert found.dtype == torch.float32
        inner = u.T @ found.double() @ vt.T
        assert inner.diagonal().min() > 0.68
        assert inner.diagonal().max() < 1.14
        assert (inner - inner.diagonal().diag()).abs().max() < 1e-4, "the singular vectors stay"
    assert not muon.orthogonalized(torch.zeros(shape)).any()


def test_the_bf16_iteration_is_close_to_the_fp32_one() -> None:
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    exact, short = muon.orthogonalized(matrix), muon.orthogonalized(matrix, torch.bfloat16)
    assert short.dtype == torch.bfloat16
    assert ((exact - short.float()).norm() / exact.norm()).item() < 0.05


def test_an_update_has_the_size_of_adamws() -> None:
    for rows, columns in ((64, 64), (256, 64), (32, 128)):
        matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        update = muon.update_scale(rows, columns) * muon.orthogonalized(matrix)
        assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


def test_a_muon_step_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    optimizer = muon.Muon({weight: (2,)}, momentum=0.5, dtype=torch.float32)
    optimizer.add_param_group({"params": [weight], "lr": 0.1, "weight_decay": 0.3})
    weight.grad = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["momentum"], torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    value = 0.5**0.5  # both singular values of the direction, which is diag(3, 3), at a norm of 1
    for _ in range(5):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    step = 0.1 * 0.2 * 2**0.5 * value
    expected = torch.tensor([[2 * 0.97 - step, 0.0], [0.0, 0.97 - step]])
    assert torch.allclose(weight.detach(), expected, atol=1e-6)


def test_a_fused_map_is_updated_as_its_matrices_one_by_one() -> None:
    draw = torch.Generator().manual_seed(0)
    parts = [nn.Parameter(torch.randn(rows, 8, generator=draw)) for rows in (16, 4, 4)]
    fused = nn.Parameter(torch.cat([part.detach() for part in parts]))
    together = muon.Muon({fused: (16, 4, 4)}, momentum=0.9, dtype=torch.float32)
    single = muon.Muon({part: part.shape[:1] for part in parts}, momentum=0.9, dtype=torch.float32)
    as_one = nn.Parameter(fused.detach().clone())
    whole = muon.Muon({as_one: (24,)}, momentum=0.9, dtype=torch.float32)
    for optimizer, weights in ((together, [fused]), (single, parts), (whole, [as_one])):
        optimizer.add_param_group({"params": weights, "lr": 0.1, "weight_decay": 0.1})
    for _ in range(3):
        fused.grad = torch.randn(24, 8, generator=draw)
        as_one.grad = fused.grad.clone()
        for part, gradient in zip(parts, fused.grad.split((16, 4, 4)), strict=True):
            part.grad = gradient.clone()
        for optimizer in (together, single, whole):
            optimizer.step()
    assert torch.equal(fused.detach(), torch.cat([part.detach() for part in parts]))
    assert not torch.allclose(fused.detach(), as_one.detach(), atol=1e-3)


def test_the_encoder_says_which_matrices_its_maps_stack() -> None:
    network = make(model={"feed_forward": "swiglu"}).networks.generator
    rows = {
        name: muon.hidden_matrices(network)[weight]
        for name, weight in network.named_parameters()
        if weight in muon.hidden_matrices(network)
    }
    block = {"attention.to_qkv.weight": (16, 16, 16), "attention.to_out.weight": (32,),
             "feed_forward.up.weight": (128, 128), "feed_forward.down.weight": (32,)}  # fmt: skip
    assert rows == {f"blocks.{n}.{name}": each for n in (0, 1) for name, each in block.items()}
    network.blocks[0].attention.stacked_rows = {"to_qkv": (16, 16)}
    with pytest.raises(ValueError, match=r"stacked_rows\['to_qkv'\] must sum to 48, got \(16, 16\)"):
        muon.hidden_matrices(network)


def stacks_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """The names of the weights that are several matrices in one."""
    rows = muon.hidden_matrices(network)
    return {
        name: rows[each] for name, each in network.named_parameters() if each in rows and len(rows[each]) > 1
    }


def test_the_fused_maps_of_x_transformers_are_several_matrices() -> None:
    pytest.importorskip("x_transformers", reason="needs the extra x-transformers")
    network = make_trainer(of_x_transformers(**MODERN_ENCODER)).networks.generator
    name = "net.attn_layers.layers.{}.1.ff.0.proj.weight"
    assert stacks_of(network) == {name.format(layer): (128, 128) for layer in (1, 3)}


def test_the_fused_maps_of_modern_bert_are_several_matrices(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra huggingface")
    folder = write_folder(tmp_path / "model", "ModernBertConfig")
    network = make_trainer(of_folder(folder)).networks.generator
    of_layer = {"attn.Wqkv.weight": (32, 32, 32), "mlp.Wi.weight": (48, 48)}
    assert stacks_of(network) == {
        f"model.model.layers.{layer}.{name}": rows for layer in (0, 1) for name, rows in of_layer.items()
    }


@pytest.mark.parametrize("critic", ["self", "token"])
@pytest.mark.parametrize("model", [{}, {"emb_dim": 24, "qk_norm": True}, {"tied_embeddings": True}], ids=str)
def test_muon_is_for_the_matrices_in_the_blocks_and_adamw_for_the_rest(
    critic: str, model: dict[str, Any]
) -> None:
    trainer = make({"critic": critic, "self_cond": True}, model, name="muon")
    matrices = {
        f"blocks.{layer}.{part}.weight"
        for layer in (0, 1)
        for part in ("attention.to_qkv", "attention.to_out", "feed_forward.up", "feed_forward.down")
    }
    for name, group in trainer._groups().items():
        by_muon = {each for each, rule in group.rules.items() if rule == "muon"}
        assert by_muon == (set() if (name, critic) == ("critic", "self") else matrices)
        assert {rule for each, rule in group.rules.items() if each not in by_muon} == {"adamw"}
        parts = {each: {n.rpartition(".")[2] for n in group.state() if n.startswith(f"{each}.")}
                 for each in group.names}  # fmt: skip
        for each, found in parts.items():
            assert found == ({"momentum"} if each in by_muon else {"step", "exp_avg", "exp_avg_sq"}), each
    before = state(trainer)
    results = train(trainer, 1, 3)
    assert all(result.outcome is Outcome.APPLIED for result in results)
    assert different(before, state(trainer)) == before.keys(), "every tensor of the state was in use"
    assert set(make().generator.rules.values()) == {"adamw"}


def test_adamw_computes_the_bits_of_torchs_own_with_two_groups() -> None:
    trainer = make({"self_cond": True}, {"emb_dim": 24}, ema_decay=0)
    group, network = trainer.generator, trainer.networks.generator
    copies = {name: nn.Parameter(w.detach().clone()) for name, w in network.named_parameters()}
    linear = {f"{name}.weight" for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    plain = torch.optim.AdamW(
        [{"params": [w for name, w in copies.items() if name in linear], "weight_decay": 0.3},
         {"params": [w for name, w in copies.items() if name not in linear], "weight_decay": 0.0}],
        lr=0.01, betas=(0.9, 0.99), eps=1e-8, fused=True,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    for step in range(1, 6):
        for name, weight in network.named_parameters():
            weight.grad = torch.randn(weight.shape, generator=draw)
            copies[name].grad = weight.grad.clone()
        for part in plain.param_groups:
            part["lr"] = 0.01 / step
        plain.step()
        group.update(0.01 / step)
    assert all(torch.equal(w, copies[name]) for name, w in network.named_parameters())


def test_muon_learns() -> None:
    trainer = make(name="muon", learning_rate=0.01, weight_decay=0.0)
    options = EvalOptions(tuple(range(6)), 8, raw_weights=True)
    before = trainer.eval_loss(BATCH, options).nats_per_token
    train(trainer, 1, 60)
    assert trainer.eval_loss(BATCH, options).nats_per_token < 0.5 * before


@pytest.mark.parametrize(
    "optimizer", [{"name": "muon"}, {"name": "muon", "groups": FROZEN}, {"groups": FROZEN}], ids=str
)
def test_resuming_from_a_snapshot_gives_the_same_bits_as_going_on(
    optimizer: dict[str, Any], tmp_path: Path
) -> None:
    trainer = make({"critic": "token", "self_cond": True}, **optimizer)
    train(trainer, 1, 3)
    trainer.snapshot().write(tmp_path)
    following = train(trainer, 4, 7)
    other = make({"critic": "token", "self_cond": True}, **optimizer)
    other.load(tmp_path)
    assert train(other, 4, 7) == following
    assert not different(state(trainer), state(other))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_frozen_parameter_keeps_its_bits_and_costs_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make({"critic": "token"}, name=name, groups=FROZEN)
    group = trainer.generator
    names = [name for name, _ in trainer.networks.generator.named_parameters()]
    frozen = {each for each in names if each.startswith("blocks.0.") or each == "token_emb.weight"}
    assert {each for each, rule in group.rules.items() if rule == "frozen"} == frozen
    assert {n for n, rule in trainer.critic.rules.items() if rule == "frozen"} == {"token_emb.weight"}  # type: ignore[union-attr]
    weights = dict(zip(group.names, group.weights, strict=True)) | group.frozen
    assert not any(weights[each].requires_grad for each in frozen)
    assert not any(n.startswith(f"{each}.") for each in frozen for n in group.state())
    assert group.ema is not None
    averages = dict(group.ema.named_parameters())
    assert {each for each in names if averages[each] is weights[each]} == frozen
    before = state(trainer)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_clear_gradients", lambda: None)
        train(trainer, 1, 1)
        assert {each for each in names if weights[each].grad is None} == frozen
    train(trainer, 2, 5)
    same = before.keys() - different(before, state(trainer))
    expected = {f"frozen.safetensors/generator.{each}" for each in frozen}
    assert same == expected | {"frozen.safetensors/critic.token_emb.weight"}


def test_a_frozen_generator_lets_the_critic_train_alone() -> None:
    trainer = make({"critic": "self"}, groups=[{"match": "generator.*", "train": False}])
    before = state(trainer)
    assert all(result.outcome is Outcome.APPLIED for result in train(trainer, 1, 2))
    moved = {name for name in different(before, state(trainer)) if not name.endswith(".updates")}
    assert moved
    assert all("/critic." in name for name in moved)
    result = trainer.train_step(1, 3, BATCH, Modes(only_train_generator=True))
    assert (result.outcome, result.gradient_norm) == (Outcome.APPLIED, 0.0)


def test_frozen_output_weights_get_no_gradient_and_change_no_other_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = torch.Generator().manual_seed(0)
    x_md, w_vd = torch.randn(5, 8, generator=draw), torch.randn(17, 8, generator=draw)
    vocabulary = Vocabulary.of(whole_config().model)
    found = []
    for learns in (True, False):
        x, w = x_md.clone().requires_grad_(), w_vd.clone().requires_grad_(learns)
        with monkeypatch.context() as patch:
            if not learns:
                patch.delattr(torch, "zeros_like")  # which the gradient of the weights starts from
            total = cross_entropy.weighted_sum(Head(x, w), torch.arange(5), torch.ones(5), vocabulary, None)
        total.backward()  # type: ignore[no-untyped-call]
        assert (w.grad is not None) == learns
        found.append(x.grad)
    assert torch.equal(found[0], found[1])  # type: ignore[arg-type]


def test_the_first_group_that_matches_scales_the_rate_and_sets_the_decay() -> None:
    groups = [
        {"match": "blocks.0.*", "lr_scale": 0.5, "weight_decay": 0.0},
        {"match": "blocks.*", "lr_scale": 0.25},
    ]
    trainer = make(groups=groups)
    named = dict(zip(trainer.generator.names, trainer.generator.weights, strict=True))
    trainer.generator.update(0.01)
    found = {
        name: (part["lr"], part["weight_decay"])
        for part in trainer.generator.optimizer.param_groups
        for name, weight in named.items()
        if any(weight is each for each in part["params"])
    }
    assert found["blocks.0.attention.to_qkv.weight"] == (0.005, 0.0)
    assert found["blocks.0.attention_norm.gamma"] == (0.005, 0.0)
    assert found["blocks.1.attention.to_qkv.weight"] == (0.0025, 0.3)
    assert found["blocks.1.attention_norm.gamma"] == (0.0025, 0.0), "norms have no weight decay"
    assert found["to_logits.weight"] == (0.01, 0.3)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_scale_and_decay_may_change_and_a_replay_takes_the_recorded_ones(name: str, tmp_path: Path) -> None:
    first = [{"match": "blocks.*", "lr_scale": 0.5, "weight_decay": 0.1}, *FROZEN[1:]]
    second = [*FROZEN[1:], {"match": "*.to_out.weight", "lr_scale": 2.0}]
    begun = make(name=name, groups=first, momentum=0.8)
    expected = train(begun, 1, 4)
    other = make(name=name, groups=second)
    before = state(other)
    now = whole_config(name=name, groups=second).optimizer.model_dump(mode="json")
    other.configure(whole_config(name=name, groups=first, momentum=0.8).optimizer.model_dump(mode="json"))
    assert train(other, 1, 4) == expected
    assert not different(state(begun), state(other))
    other.configure(now)
    begun.configure(now)
    assert train(other, 5, 6) == train(begun, 5, 6)
    assert not different(state(begun), state(other))
    assert different(before, state(other))


def test_what_is_frozen_and_the_name_cannot_change_with_the_state(tmp_path: Path) -> None:
    trainer = make(groups=FROZEN)
    train(trainer, 1, 2)
    before = state(trainer)
    for other, words in (
        ({"groups": []}, r"generator.blocks.0.\S+ \(and 8 more\) was trained and is now frozen"),
        ({"groups": [*FROZEN, {"match": "to_logits.weight", "train": False}]},
         "optimizer.groups: generator.to_logits.weight was frozen and is now trained"),
        ({"groups": [{"match": "nothing.*"}]}, "optimizer.groups.0.match: must match"),
        ({"groups": FROZEN, "name": "muon"}, "optimizer.name was 'muon' and is now 'adamw'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            trainer.configure(whole_config(**other).optimizer.model_dump(mode="json"))
    trainer.snapshot().write(tmp_path)
    fixed = "optimizer.name and the parameters that optimizer.groups freezes must be as when it was saved"
    for optimizer, words in (
        ({"groups": []}, "frozen.safetensors: does not hold exactly"),
        (
            {"groups": [*FROZEN, {"match": "to_logits.weight", "train": False}]},
            "safetensors: does not",
        ),
        ({"groups": FROZEN, "name": "muon"}, "blocks.1.attention.to_out.weight.exp_avg is not part"),
    ):
        with pytest.raises(ValueError, match=rf"{words}.*{fixed}"):
            make(**optimizer).load(tmp_path)
    assert not different(before, state(trainer))
    make(groups=FROZEN).load(tmp_path)


def test_a_snapshot_from_before_the_first_update_fits_every_optimizer(tmp_path: Path) -> None:
    make().snapshot().write(tmp_path)
    fresh, trained = make(name="muon", groups=FROZEN), make(name="muon", groups=FROZEN)
    train(trained, 1, 2)
    trained.load(tmp_path)
    assert not different(state(fresh), state(trained))
    assert train(trained, 1, 3) == train(fresh, 1, 3)


def test_what_a_checkpoint_holds_as_frozen_stays_frozen(tmp_path: Path) -> None:
    make(groups=FROZEN).snapshot().write(tmp_path)
    for groups in ([], FROZEN[:1]):
        with pytest.raises(
            ValueError, match=r"frozen.safetensors: does not hold exactly the weights that are frozen now"
        ):
            make(groups=groups).load(tmp_path)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (["block.*"], r"optimizer.groups.0.match: must match the name of a parameter, got 'block.\*'; "
                      r"did you mean 'blocks.\*'\?"),
        (["*.bias", "to_logit.weight"], r"optimizer.groups.1.match: .* did you mean 'to_logits.weight'\?"),
        (["critic.*"], r"optimizer.groups.0.match: must match"),
        (["§"], "an example of a name is 'token_emb.weight'"),
        (["blocks.*", "blocks.0.*"], r"optimizer.groups.1.match: earlier groups have all parameters that "
                                     r"'blocks.0.\*' matches"),
    ],
)  # fmt: skip
def test_a_pattern_without_a_parameter_is_refused_with_a_near_name(groups: list[str], words: str) -> None:
    for build in (make, check):
        with pytest.raises(ConfigError, match=words):
            build(groups=[{"match": pattern} for pattern in groups])


def test_the_groups_of_the_documentation_fit_the_built_in_model() -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "optimizers.md"
    section = tomllib.loads(re.findall(r"```toml\n(.+?)```", page.read_text(), re.DOTALL)[0])["optimizer"]
    trainer = make({"critic": "token"}, **section)
    found = {name for name, rule in trainer.generator.rules.items() if rule == "frozen"}
    assert found == {"token_emb.weight", "pos_emb.weight"}
    assert {part["lr_scale"] for part in trainer.generator.optimizer.param_groups} == {0.1, 0.5, 1.0}


def test_freezing_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match="no parameter is left to train"):
        make(groups=[{"match": "*", "train": False}])


def check(*args: Any, **optimizer: Any) -> list[str]:
    whole = whole_config(*args, **optimizer)
    return footprint(whole.model, whole.objective, whole.optimizer, whole.serve).lines


@pytest.mark.parametrize("optimizer", [{}, {"name": "muon"}, {"name": "muon", "groups": FROZEN}], ids=str)
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_check_counts_the_state_that_the_trainer_has(optimizer: dict[str, Any], ema_decay: float) -> None:
    objective = {"critic": "token", "self_cond": True}
    trainer = make(objective, ema_decay=ema_decay, **optimizer)
    lines = check(objective, ema_decay=ema_decay, **optimizer)

    def size(tensors: Any) -> int:
        return sum(tensor.numel() for tensor in tensors if tensor.ndim)

    files = live_tensors(trainer._groups())
    kept = {file: size(tensors.values()) for file, tensors in files.items()}
    learning = [w for group in trainer._groups().values() for w in group.weights]
    (line,) = (line for line in lines if line.startswith("state"))
    counted = sum(int(word.strip(")").replace(",", "")) for word in line.split("x 4")[0].split()
                  if word[0].isdigit())  # fmt: skip
    average = size(learning) if ema_decay else 0
    weights = kept["model.safetensors"] + kept.get("frozen.safetensors", 0)
    assert counted == weights + kept["optimizer.safetensors"] + size(learning) + average
    (line,) = (line for line in lines if line.startswith("checkpoint copy"))
    assert line.startswith(f"checkpoint copy {sum(kept.values()):,} numbers")
    assert ("frozen" in lines[0]) == ("groups" in optimizer)


def test_a_parameter_that_a_model_freezes_itself_has_no_state() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network[0].requires_grad_(False)
    group = optimizers.Group(network, whole_config().optimizer, fused=True)
    assert {name.partition(".")[0] for name in group.state()} == {"updates", "1"}
