"""Models that a user's own factory builds: what trains, and what training could not compute again."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from source_models import (
    LONGEST,
    MASK,
    PAD,
    VOCABULARY,
    make_trainer,
)
from torch import Tensor, nn

from maskwire_server.batch import Batch, Modes
from maskwire_server.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParameterGroup, ServeConfig
from maskwire_server.errors import ConfigError
from maskwire_server.recovery import fingerprint
from maskwire_server.training import muon
from maskwire_server.training.footprint import footprint
from maskwire_server.training.models.backbone import Backbone
from maskwire_server.training.models.masked_lm import MaskedLM
from maskwire_server.training.trainer import TorchTrainer

pytestmark = pytest.mark.filterwarnings(  # of the libraries themselves
    "ignore::DeprecationWarning",
    "ignore:.is_gradient_checkpointing.:FutureWarning",
    "ignore:Initializing zero-element:UserWarning",
)


class Mixer(nn.Module):
    """A small bidirectional model with an output embedding layer: attention over the valid positions."""

    def __init__(self, model: ModelConfig, dim: int = 16) -> None:
        super().__init__()
        self.ids = nn.Embedding(model.num_tokens, dim)
        self.places = nn.Embedding(model.max_seq_len, dim)
        self.inner = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, model.num_tokens)
        self.register_buffer("calls", torch.zeros(1))

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def get_input_embeddings(self) -> nn.Module:
        return self.ids

    def forward(
        self, attention_mask: Tensor, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        e_bnd = self.ids(input_ids) if inputs_embeds is None else inputs_embeds
        e_bnd = e_bnd + self.places.weight[: e_bnd.shape[1]]
        return self.output(self.inner(e_bnd + self.mixed(e_bnd, attention_mask.bool())).tanh())

    def mixed(self, e_bnd: Tensor, valid_bn: Tensor) -> Tensor:
        scores_bnn = (e_bnd @ e_bnd.mT).masked_fill(~valid_bn[:, None, :], -1e9)
        return scores_bnn.softmax(-1) @ e_bnd


class CountsCalls(Mixer):
    def mixed(self, e_bnd: Tensor, valid_bn: Tensor) -> Tensor:
        self.calls += 1
        return super().mixed(e_bnd, valid_bn)


class ReplacesBuffer(Mixer):
    """Another tensor of the same values is not the one that is saved."""

    def mixed(self, e_bnd: Tensor, valid_bn: Tensor) -> Tensor:
        self.calls = self.calls.clone()
        return super().mixed(e_bnd, valid_bn)


class ChangesWeight(Mixer):
    def mixed(self, e_bnd: Tensor, valid_bn: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.inner.weight *= 0.99
        return super().mixed(e_bnd.clone(), valid_bn)


class DrawsFromRandom(Mixer):
    def mixed(self, e_bnd: Tensor, valid_bn: Tensor) -> Tensor:
        return super().mixed(e_bnd, valid_bn) * (random.random() < 2)


class DrawsFromNumpy(Mixer):
    def mixed(self, e_bnd: Tensor, valid_bn: Tensor) -> Tensor:
        return super().mixed(e_bnd, valid_bn) * float(np.random.random() < 2)


class DrawsElsewhere(Mixer):
    """From a generator of torch of its own, which no step's seed sets."""

    def mixed(self, e_bnd: Tensor, valid_bn: Tensor) -> Tensor:
        if not hasattr(self, "own"):
            self.own = torch.Generator().manual_seed(0)
        return super().mixed(e_bnd, valid_bn) * torch.rand(1, generator=self.own)


class MixesRows(Mixer):
    def mixed(self, e_bnd: Tensor, valid_bn: Tensor) -> Tensor:
        return super().mixed(e_bnd, valid_bn) + e_bnd.mean(0)


class IgnoresMask(Mixer):
    def mixed(self, e_bnd: Tensor, valid_bn: Tensor) -> Tensor:
        return super().mixed(e_bnd, torch.ones_like(valid_bn))


class IgnoresMaskOfEmbeddings(Mixer):
    """Only with `inputs_embeds`, as in the passes of self-conditioning."""

    def forward(self, attention_mask: Tensor, input_ids: Any = None, inputs_embeds: Any = None) -> Tensor:
        mask = attention_mask if inputs_embeds is None else torch.ones_like(attention_mask)
        return super().forward(mask, input_ids, inputs_embeds)


class SwitchesAtShortRows(Mixer):
    """As BigBird, which attends fully from its first short row on."""

    switched = False

    def mixed(self, e_bnd: Tensor, valid_bn: Tensor) -> Tensor:
        self.switched |= e_bnd.shape[1] < LONGEST
        return super().mixed(e_bnd, valid_bn) * (2 if self.switched else 1)


class CountsLongEvaluations(Mixer):
    def mixed(self, e_bnd: Tensor, valid_bn: Tensor) -> Tensor:
        if not self.training and e_bnd.shape[1] == LONGEST and e_bnd.shape[0] > 1:
            self.calls += 1
        return super().mixed(e_bnd, valid_bn)


class Scaled(Mixer):
    """Its logits are scaled by a weight that begins at 1."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return super().forward(*arguments, **options) * self.scale


class SoftCapped(Mixer):
    """The cap shows at large logits alone."""

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return 30 * torch.tanh(super().forward(*arguments, **options) / 30)


class Expanded(Mixer):
    """A buffer and a frozen weight that have no memory of their own."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.register_buffer("places_rn", torch.arange(16.0).expand(4, -1))
        self.fixed = nn.Parameter(torch.randn(16, 8).T, requires_grad=False)

    def mixed(self, e_bnd: Tensor, valid_bn: Tensor) -> Tensor:
        return super().mixed(e_bnd, valid_bn) + self.places_rn[0] + self.fixed[0]


class ReturnsTuple(Mixer):
    def forward(self, *arguments: Any, **options: Any) -> Any:
        return (super().forward(*arguments, **options),)


class Lazy(Mixer):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.inner = nn.LazyLinear(16)


class SequentialOutput(Mixer):
    def get_output_embeddings(self) -> nn.Module:
        return nn.Sequential(self.output)


def leaves(model: ModelConfig) -> nn.Module:
    raise SystemExit(3)


class NoOutputLayer(Mixer):
    def get_output_embeddings(self) -> nn.Module:
        return None  # type: ignore[return-value]


class Narrow(Mixer):
    """Fewer logits than the vocabulary has ids."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.output = nn.Linear(16, model.num_tokens - 1)


class Raises(Mixer):
    def mixed(self, e_bnd: Tensor, valid_bn: Tensor) -> Tensor:
        raise RuntimeError("my layers\ndo not fit")


class ManyNorms(Mixer):
    """Its longest list of modules is not that of its layers."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(5))
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16))])

    def mixed(self, e_bnd: Tensor, valid_bn: Tensor) -> Tensor:
        for layer in (*self.layers, *self.norms):
            e_bnd = layer(e_bnd)
        return super().mixed(e_bnd, valid_bn)


class NamesItsLayers(ManyNorms):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.blocks = [self.inner]


def fails(model: ModelConfig) -> nn.Module:
    raise KeyError("no such size")


def gives_text(model: ModelConfig) -> str:
    return "a model"


def gives_plain_module(model: ModelConfig) -> nn.Module:
    return nn.Linear(3, 3)


def takes_nothing() -> nn.Module:
    return nn.Linear(3, 3)


WRONG: dict[Callable[..., Any], str] = {
    CountsCalls: "model: its forward pass must not change its state, got a change of generator.model.calls; ",
    ReplacesBuffer: "model: its forward pass must not change its state, got a change of "
    "generator.model.calls; ",
    ChangesWeight: "model: its forward pass must not change its state, got a change of "
    "generator.model.inner.weight; ",
    DrawsFromRandom: "model: it must draw random numbers with torch alone, got draws from Python's random ",
    DrawsFromNumpy: "model: it must draw random numbers with torch alone, got draws from Python's random ",
    DrawsElsewhere: "model: the same step must give the same gradients, but those of generator.model.",
    MixesRows: "model: a row must not depend on the other rows or their length, got outputs ",
    IgnoresMask: "model: a row must not depend on the other rows or their length, got outputs ",
    SwitchesAtShortRows: "model: the same step must give the same gradients, but those of generator.model.",
    CountsLongEvaluations: "model: its forward pass must not change its state, got a change of "
    "generator.model.calls; ",
    ReturnsTuple: "model: ReturnsTuple must return logits, or an object with an attribute `logits`, got "
    "tuple",
    Lazy: f"model.python.factory: {__name__}:Lazy must return a module whose parameters have shapes, got "
    "inner.weight of a lazy layer; give the layer its sizes",
    SequentialOutput: "model: SequentialOutput.get_output_embeddings() must return a layer with a weight "
    "of shape [vocabulary, width], such as nn.Linear, got Sequential",
    leaves: f"model.python.factory: {__name__}:leaves raised SystemExit: 3",
    NoOutputLayer: "model: NoOutputLayer.get_output_embeddings() must return the output layer, got None",
    Narrow: "model.num_tokens: must be the number of logits that the model gives per position, 40, got 41",
    Raises: "model: a step with rows of up to model.max_seq_len = 20 tokens failed: RuntimeError: my layers",
    fails: f"model.python.factory: {__name__}:fails raised KeyError: 'no such size'",
    gives_text: f"model.python.factory: {__name__}:gives_text must return a Backbone or a torch module with "
    "get_output_embeddings(), got str",
    gives_plain_module: f"model.python.factory: {__name__}:gives_plain_module must return a Backbone or a "
    "torch module with get_output_embeddings(), got Linear",
    takes_nothing: f"model.python.factory: {__name__}:takes_nothing raised TypeError: takes_nothing() takes "
    "0 positional arguments but 1 was given",
}


def of_factory(factory: Callable[..., Any], **options: Any) -> ModelConfig:
    table = {"factory": f"{__name__}:{factory.__name__}", "options": options}
    return ModelConfig(
        source="python", python=table, num_tokens=VOCABULARY, mask_id=MASK, pad_id=PAD, max_seq_len=LONGEST
    )


@pytest.mark.parametrize("critic", ["none", "self", "token"])
def test_a_model_of_the_users_own_trains(critic: str) -> None:
    trainer = make_trainer(of_factory(Mixer, dim=24), critic=critic, self_cond=True)
    sha256 = trainer.begin()
    batch = Batch(np.random.default_rng(0).integers(0, 38, (4, 12)), 4, 12)
    losses = [trainer.train_step(1, step, batch, Modes()).losses.loss for step in range(1, 4)]
    again = make_trainer(of_factory(Mixer, dim=24), critic=critic, self_cond=True)
    assert again.begin() == sha256
    assert [again.train_step(1, step, batch, Modes()).losses.loss for step in range(1, 4)] == losses
    assert trainer.networks.generator.dim == 24


def test_a_model_without_a_list_of_layers_is_not_compiled() -> None:
    with pytest.raises(ConfigError, match=r"serve.compile: must be off for a model that has no list"):
        make_trainer(of_factory(Mixer)).networks.compile_blocks("default")


@pytest.mark.parametrize(
    ("factory", "hidden"),
    [(ManyNorms, {"layers.0.weight", "layers.1.0.weight"}), (NamesItsLayers, {"inner.weight"})],
)
def test_muon_trains_the_linear_maps_of_the_layers(factory: Callable[..., Any], hidden: set[str]) -> None:
    network = make_trainer(of_factory(factory)).networks.generator
    assert {
        name for name, weight in network.named_parameters() if weight in muon.hidden_matrices(network)
    } == {f"model.{name}" for name in hidden}


def test_muon_on_a_model_without_layers_is_refused() -> None:
    model, optimizer = of_factory(Mixer), OptimizerConfig(name="muon")
    words = "got muon, which trains the nn.Linear modules in the model's `blocks`, and there are none; give"
    serve = ServeConfig(device="cpu")
    with pytest.raises(ConfigError, match=words):
        TorchTrainer(model, ObjectiveConfig(), optimizer, serve, 0)
    with pytest.raises(ConfigError, match=words):
        footprint(model, ObjectiveConfig(), optimizer, serve)


def test_check_lists_the_parameters_with_their_rules() -> None:
    groups = [ParameterGroup(match="*norms*", train=False)]
    optimizer = OptimizerConfig(name="muon", groups=groups)
    found = footprint(
        of_factory(ManyNorms), ObjectiveConfig(critic="self"), optimizer, ServeConfig(device="cpu")
    )
    assert "muon           16 x 16  generator.model.layers.0.weight" in found.parameters
    assert "frozen              16  generator.model.norms.4.bias" in found.parameters
    assert "adamw           1 x 16  critic.weight" in found.parameters


def test_the_fingerprint_has_the_hash_of_the_factorys_file() -> None:
    found = fingerprint.fingerprint(make_trainer(of_factory(Mixer)).versions)
    assert found["fingerprint.factory"] == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


@pytest.mark.parametrize("factory", WRONG, ids=lambda factory: factory.__name__)
def test_a_model_that_training_cannot_repeat_is_refused_in_one_line(factory: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_trainer(of_factory(factory)).begin()
    assert str(caught.value).startswith(WRONG[factory])
    assert len(str(caught.value).splitlines()) == 1


def test_the_passes_of_self_conditioning_must_respect_the_mask() -> None:
    make_trainer(of_factory(IgnoresMaskOfEmbeddings)).begin()
    with pytest.raises(ConfigError, match="model: a row must not depend on"):
        make_trainer(of_factory(IgnoresMaskOfEmbeddings), self_cond=True).begin()


@pytest.mark.parametrize("factory", [Scaled, SoftCapped], ids=lambda factory: factory.__name__)
@pytest.mark.parametrize("size", [1e-3, 10.0])
def test_what_follows_the_output_layer_is_seen_whatever_the_weights_are(
    factory: Callable[..., Any], size: float
) -> None:
    trainer = make_trainer(of_factory(factory))
    with torch.no_grad():
        for weight in trainer.networks.parameters():
            if weight.ndim == 2:
                weight *= size
    before = {name: weight.clone() for name, weight in trainer.networks.named_parameters()}
    trainer.begin()
    assert trainer.networks.generator.gives_logits
    assert all(torch.equal(before[name], weight) for name, weight in trainer.networks.named_parameters())
    trainer.train_step(1, 1, Batch(np.random.default_rng(0).integers(0, 38, (4, 12)), 4, 12), Modes())
    if factory is Scaled:
        assert trainer.networks.generator.model.scale != 1, "it trains"


def test_state_without_memory_of_its_own_is_saved_and_loaded(tmp_path: Path) -> None:
    trainer = make_trainer(of_factory(Expanded))
    trainer.begin()
    batch = Batch(np.random.default_rng(0).integers(0, 38, (4, 12)), 4, 12)
    trainer.train_step(1, 1, batch, Modes())
    trainer.snapshot().write(tmp_path)
    again = make_trainer(of_factory(Expanded))
    again.load(tmp_path)
    losses = [each.train_step(1, 2, batch, Modes()).losses for each in (trainer, again)]
    assert losses[0] == losses[1]


def test_groups_are_for_parameters_that_the_model_trains() -> None:
    groups = [ParameterGroup(match="*fixed", lr_scale=0.5)]
    optimizer = OptimizerConfig(groups=groups)
    with pytest.raises(ConfigError, match=r"optimizer.groups.0.match: must match the name of a parameter"):
        TorchTrainer(of_factory(Expanded), ObjectiveConfig(), optimizer, ServeConfig(device="cpu"), 0)


def test_a_backbone_of_the_users_own_has_no_critic_of_its_own() -> None:
    def build(model: ModelConfig) -> Backbone:
        return MaskedLM(Mixer(model), None, self_cond=False, mask_id=MASK, fill_id=0)

    globals()["build"] = build
    make_trainer(of_factory(build), critic="self").begin()
    for setting in ({"critic": "token"}, {"self_cond": True}):
        with pytest.raises(ConfigError, match="returned a Backbone, which supports neither a token critic"):
            make_trainer(of_factory(build), **setting)
