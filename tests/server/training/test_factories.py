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
    DrawsElsewhere: "model: the same step must give the same gradients, got others for generator.model.",
    MixesRows: "model: a row must not depend on the other rows or their length, got embeddings ",
    IgnoresMask: "model: a row must not depend on the other rows or their length, got embeddings ",
    NoOutputLayer: "model: NoOutputLayer.get_output_embeddings() must return the output layer, got None",
    Narrow: "model.num_tokens: must be the number of the model's logits at a position, 40, got 41",
    Raises: "model: a step with ids of the shape [3, 16] failed: RuntimeError: my layers",
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
    with pytest.raises(ConfigError, match=r"serve.compile: the model has no list of layers; set it to off"):
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
    words = "optimizer.name: muon trains the nn.Linear maps in the model's layers, and found none; give"
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


def test_a_backbone_of_the_users_own_has_no_critic_of_its_own() -> None:
    def build(model: ModelConfig) -> Backbone:
        return MaskedLM(Mixer(model), None, self_cond=False, mask_id=MASK, fill_id=0)

    globals()["build"] = build
    make_trainer(of_factory(build), critic="self").begin()
    for setting in ({"critic": "token"}, {"self_cond": True}):
        with pytest.raises(ConfigError, match="returned a Backbone, which has neither a token critic nor"):
            make_trainer(of_factory(build), **setting)
