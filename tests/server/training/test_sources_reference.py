"""Models of every source agree with dense code: their library's own logits, plain cross-entropy, autograd.

Letters: b rows, n positions, d width of the embeddings, v vocabulary, m masked positions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from source_models import (
    LONGEST,
    MODERN_ENCODER,
    TIED_ENCODER,
    VOCABULARY,
    make_trainer,
    of_folder,
    of_x_transformers,
    ragged_batch,
    shake,
    write_folder,
)
from torch import Tensor, nn
from whole_batch import corrupt

from maskwire_server.batch import Modes
from maskwire_server.config import ModelConfig
from maskwire_server.training import draws, objective
from maskwire_server.training.corruption import Corruption, StepKey, Vocabulary
from maskwire_server.training.draws import Purpose
from maskwire_server.training.trainer import TorchTrainer

pytestmark = pytest.mark.filterwarnings(  # of the libraries themselves
    "ignore::DeprecationWarning", "ignore:.is_gradient_checkpointing.:FutureWarning"
)
SOURCES = ["Bert", "ModernBert", "Roberta", "DistilBert", "lora", "x-modern", "x-tied"]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "plain": {},
    "self critic": {"critic": "self", "self_cond": True, "self_cond_prob": 1.0},
    "token critic": {"critic": "token", "self_cond": True, "self_cond_prob": 0.0},
}
AT = StepKey(3, 1, 1)
MODES = Modes(generator_sample_temperature=0.8)


class Transformers:
    """A masked language model, called as its library's users do."""

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module)
        self.base = getattr(self.module, "get_base_model", lambda: self.module)()

    def logits(self, ids_bn: Tensor, valid_bn: Tensor, added: Tensor | None = None) -> Tensor:
        mask = valid_bn.long()
        if added is None:
            return self.module(input_ids=ids_bn, attention_mask=mask).logits
        inputs = self.module.get_input_embeddings()(ids_bn) + added
        return self.module(inputs_embeds=inputs, attention_mask=mask).logits

    def embeddings(self, *inputs: Tensor | None) -> Tensor:
        """The input of the output layer: what the model puts out when this layer is the identity."""
        output = self.base.get_output_embeddings()
        name = next(name for name, module in self.base.named_modules() if module is output)
        parent = self.base.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        setattr(parent, leaf, nn.Identity())
        try:
            return self.logits(*inputs)
        finally:
            setattr(parent, leaf, output)


class XTransformers:
    """A `TransformerWrapper` that is built and called as its library's users do."""

    def __init__(self, weights: dict[str, Tensor], options: dict[str, Any], **more: Any) -> None:
        from x_transformers import Encoder, TransformerWrapper

        of_wrapper = ("num_memory_tokens", "tie_embedding")
        wrapper = {key: value for key, value in options.items() if key in of_wrapper}
        layers = {key: value for key, value in options.items() if key not in of_wrapper}
        if more:
            wrapper.pop("tie_embedding", None)
        self.module = TransformerWrapper(
            num_tokens=VOCABULARY, max_seq_len=LONGEST, attn_layers=Encoder(**layers), **wrapper, **more
        )
        self.module.load_state_dict(weights)

    def logits(self, ids_bn: Tensor, valid_bn: Tensor, added: Tensor | None = None) -> Tensor:
        return self.module(ids_bn, mask=valid_bn, sum_embeds=added)

    def embeddings(self, ids_bn: Tensor, valid_bn: Tensor, added: Tensor | None = None) -> Tensor:
        return self.module(ids_bn, mask=valid_bn, sum_embeds=added, return_embeddings=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that transformers wrote, by architecture, when first asked for."""

    class Written(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = write_folder(tmp_path_factory.mktemp(name), f"{name}Config")
            return self[name]

    return Written()


def model_of(source: str, folders: dict[str, Path]) -> ModelConfig:
    if source == "x-modern":
        return of_x_transformers(**MODERN_ENCODER)
    if source == "x-tied":
        return of_x_transformers(**TIED_ENCODER)
    pytest.importorskip("transformers", reason="needs the extra huggingface")
    if source == "lora":
        pytest.importorskip("peft", reason="needs the extra huggingface")
        return of_folder(folders["Bert"], lora={"rank": 2})
    return of_folder(folders[source])


def references(trainer: TorchTrainer, model: ModelConfig) -> dict[str, Any]:
    """The library's own module for the generator, and for a token critic."""
    found: dict[str, Any] = {}
    for part, backbone in trainer.networks.named_children():
        if model.source != "x-transformers":
            if hasattr(backbone, "model"):
                found[part] = Transformers(backbone.model)
        elif hasattr(backbone, "net"):
            outputs = {} if part == "generator" else {"logits_dim": 1}
            found[part] = XTransformers(backbone.net.state_dict(), model.x_transformers, **outputs)
    return found


def dense_losses(
    reference: dict[str, Any],
    extra: dict[str, Tensor],
    what: Corruption,
    trainer: TorchTrainer,
    model: ModelConfig,
) -> Tensor:
    """The loss of a step from logits at every position."""
    config, generator = trainer._objective, reference["generator"]
    added = None
    if config.self_cond:
        cond = extra["generator.null_embed"]
        if config.self_cond_prob == 1:
            start = cond @ extra["generator.to_self_cond.weight"].T
            start = start if config.self_cond_start == "null" else None
            with torch.no_grad():
                cond = generator.embeddings(what.input_bn, what.valid_bn, start)
        added = cond @ extra["generator.to_self_cond.weight"].T
    logits_bnv = generator.logits(what.input_bn, what.valid_bn, added).clone()
    logits_bnv[..., Vocabulary.of(model).special] = -torch.inf
    weight_b = objective.position_weights(config, what.n_b, what.k_b)
    nll_bn = F.cross_entropy(logits_bnv.transpose(1, 2), what.ids_bn, reduction="none")
    loss = (nll_bn.double() * weight_b[:, None])[what.mask_bn].sum()
    if config.critic == "none":
        return loss
    keys_b = draws.keys(Purpose.CRITIC_SAMPLE, AT.seed, AT.lineage, AT.number, rows=range(len(weight_b)))
    u_bn = draws.uniform(keys_b, what.ids_bn.shape[1])
    assert MODES.generator_sample_temperature is not None
    sampled_m = objective.sample(
        logits_bnv.detach()[what.mask_bn], u_bn[what.mask_bn], MODES.generator_sample_temperature
    )
    filled_bn = what.ids_bn.masked_scatter(what.mask_bn, sampled_m)
    if config.critic == "self":
        e_bnd = generator.embeddings(filled_bn, what.valid_bn)
        scores_bn1 = F.linear(e_bnd, extra["critic.weight"], extra["critic.bias"])
    elif model.source == "x-transformers":
        scores_bn1 = reference["critic"].logits(filled_bn, what.valid_bn)
    else:
        e_bnd = reference["critic"].embeddings(filled_bn, what.valid_bn)
        scores_bn1 = F.linear(e_bnd, extra["critic.to_scores.weight"], extra["critic.to_scores.bias"])
    wrong_bn = (filled_bn != what.ids_bn).float()
    scores = scores_bn1.reshape(wrong_bn.shape)
    bce_bn = F.binary_cross_entropy_with_logits(scores, wrong_bn, reduction="none")
    return loss + config.critic_loss_weight * bce_bn[what.maskable_bn].double().sum() / what.n_b.sum()


def gradients(reference: dict[str, Any], extra: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for part, library in reference.items():
        inner = "net" if isinstance(library, XTransformers) else "model"
        for name, weight in library.module.named_parameters():
            if weight.grad is not None:
                yield f"{part}.{inner}.{name}", weight.grad
    for name, weight in extra.items():
        if weight.grad is not None:
            yield name, weight.grad


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Compare to 1e-5 of each gradient. Keys' biases have none but rounding: softmax undoes them."""
    total = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    for name in found.keys() | wanted.keys():
        zero = torch.zeros(())
        one, other = found.get(name, zero), wanted.get(name, zero)
        limit = 1e-5 * float(other.norm()) + 1e-7 * float(total)
        assert float((one - other).norm()) <= limit, f"{name}: {one.norm()}, {other.norm()}"


@pytest.mark.parametrize("objective_name", OBJECTIVES)
@pytest.mark.parametrize("source", SOURCES)
def test_loss_and_gradients_are_those_of_dense_code(
    source: str, objective_name: str, folders: dict[str, Path]
) -> None:
    model = model_of(source, folders)
    trainer = make_trainer(model, micro_batch=45, **OBJECTIVES[objective_name])
    shake(trainer.networks)
    reference = references(trainer, model)
    extra = {
        name: weight.detach().clone().requires_grad_()
        for name, weight in trainer.networks.named_parameters()
        if ".model." not in name and ".net." not in name
    }
    batch = trainer._host(ragged_batch())
    what = corrupt(
        batch.ids_rn, batch.valid_rn, batch.prompt_rn, trainer._objective, Vocabulary.of(model), AT
    )
    loss = dense_losses(reference, extra, what, trainer, model)
    loss.backward()  # type: ignore[no-untyped-call]
    found = trainer._gradients(trainer._prepared(batch, MODES, AT))
    copy = found.begin_read(torch.zeros(()))
    losses, _ = found.read(copy, trainer._objective.critic_loss_weight, MODES)
    assert losses.loss == pytest.approx(loss.item(), rel=1e-5)
    own = {name: w.grad for name, w in trainer.networks.named_parameters() if w.grad is not None}
    wanted = dict(gradients(reference, extra))
    assert len(wanted) > 10
    assert_close(own, wanted)
    assert not trainer.networks.generator.gives_logits, "the projection runs at masked positions only"
    if source == "lora":
        assert all(".lora_" in name for name in own if name.startswith("generator.model."))
