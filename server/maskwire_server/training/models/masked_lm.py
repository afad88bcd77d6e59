"""Modules with an output layer for logits, such as the masked language models of transformers.

Their logits are x w^T + b, where x is the input of the output layer. A hook keeps x and passes zero positions
to the layer, so that the module's own forward pass computes no logits. They are computed later, at masked
positions only.
At the first use, x w^T + b is compared with the module's own logits, with fixed values of the weights. If
they differ (ESM adds its bias elsewhere, MobileBERT reads its decoder's weight directly), the module's own
logits are used, which are computed at every position.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from maskwire_server.errors import ConfigError
from maskwire_server.training.conditioning_type import Conditioning
from maskwire_server.training.head import Head
from maskwire_server.training.models.backbone import Backbone, attended, mark_fused_maps, packed

log = logging.getLogger(__name__)

_FUSED = {"ModernBertAttention": {"Wqkv": 3}, "ModernBertMLP": {"Wi": 2}}
"""How many matrices a linear map stacks, by the class of a transformers module and the map's name."""


class MaskedLM(Backbone):
    """A `Backbone` around a module that takes `input_ids` or `inputs_embeds`, and `attention_mask`.

    `outputs` is the number of scores per position of a critic; None: a generator, whose scores are the
    module's logits. `mask_id` is the id at masked positions. `fill_id` is the id that the module gets at
    padding.
    """

    def __init__(
        self, module: nn.Module, outputs: int | None, *, self_cond: bool, mask_id: int, fill_id: int
    ) -> None:
        super().__init__()
        self.model = module
        output = self._output_layer()
        if output is None:
            raise ConfigError(
                f"model: {type(module).__name__}.get_output_embeddings() must return the output layer, "
                "got None"
            )
        weight = getattr(output, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ConfigError(
                f"model: {type(module).__name__}.get_output_embeddings() must return a layer with a weight "
                f"of shape [vocabulary, width], such as nn.Linear, got {type(output).__name__}"
            )
        self.dim = weight.shape[1]
        self.blocks = _layers(module)
        mark_fused_maps(module, _FUSED)
        self._mask_id, self._fill_id = mask_id, fill_id
        self._is_capturing = False
        self._output_input: Tensor | None = None
        self._compared = outputs is not None
        """Whether the logits were compared with x w^T + b. A critic uses no logits."""
        output.register_forward_pre_hook(self._keep_input)
        self.to_scores = None if outputs is None else nn.Linear(self.dim, outputs)
        if self_cond:
            self.condition_itself(self.dim, module.get_input_embeddings().weight.shape[1])  # type: ignore[operator]

    def forward(
        self,
        ids_bn: Tensor,
        valid_bn: Tensor | None,
        cond: Conditioning = None,
        read_m: Tensor | None = None,
    ) -> Tensor:
        """Return the inputs of the output layer, [b, n, d], or only those at `read_m`, [m, d].

        If the logits are not a linear map of these inputs, return the logits instead, [b, n, v] or [m, v].
        """
        if not self._compared:
            self.gives_logits, self._compared = not self._is_linear(ids_bn, valid_bn), True
        e_bnd = (self._logits if self.gives_logits else self._embeddings)(ids_bn, valid_bn, cond)
        return e_bnd if read_m is None else packed(e_bnd, read_m)

    def head(self, e_md: Tensor) -> Head:
        """Return the input, weight and bias of the output layer, or of a critic's score layer.

        If the input `e_md` already holds logits, weight and bias are None.
        """
        layer = self.to_scores or self._output_layer()
        return Head(e_md, None) if self.gives_logits else Head(e_md, layer.weight, layer.bias)

    def checkpoint_activations(self, on: bool) -> None:
        """If `on`, use the module's own activation checkpointing. Raises ConfigError if it has none."""
        if not on:
            return
        if not getattr(self.model, "supports_gradient_checkpointing", False):
            raise ConfigError(
                f"serve.activation_checkpointing: must be false, got true: {type(self.model).__name__} does "
                "not support it"
            )
        self.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    @property
    def base(self) -> nn.Module:
        """The module without its low-rank adapters."""
        inner = getattr(self.model, "get_base_model", None)
        return self.model if inner is None else inner()

    def _output_layer(self) -> Any:
        return self.model.get_output_embeddings()  # type: ignore[operator]

    def _keep_input(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not self._is_capturing:
            return None
        self._output_input = inputs[0]
        return (inputs[0][:, :0], *inputs[1:])

    def _input_of_output(self, ids_bn: Tensor, valid_bn: Tensor | None, cond: Conditioning) -> Tensor | None:
        """The input of the output layer; None if the module does not call that layer."""
        self._is_capturing = True
        try:
            self._call(ids_bn, valid_bn, cond)
            found, self._output_input = self._output_input, None
        finally:
            self._is_capturing = False
        return found

    def _embeddings(self, ids_bn: Tensor, valid_bn: Tensor | None, cond: Conditioning) -> Tensor:
        found = self._input_of_output(ids_bn, valid_bn, cond)
        if found is None or found.shape[:2] != ids_bn.shape:
            shape = "nothing" if found is None else tuple(found.shape)
            raise ConfigError(
                f"model: {type(self.model).__name__} must call its output layer exactly once per pass, with "
                f"an input of shape [rows, columns, width] = {[*ids_bn.shape, self.dim]}, got {shape}"
            )
        return found

    def _logits(self, ids_bn: Tensor, valid_bn: Tensor | None, cond: Conditioning) -> Tensor:
        found = self._call(ids_bn, valid_bn, cond)
        logits_bnv = found if isinstance(found, Tensor) else getattr(found, "logits", None)
        if not isinstance(logits_bnv, Tensor):
            raise ConfigError(
                f"model: {type(self.model).__name__} must return logits, or an object with an attribute "
                f"`logits`, got {type(found).__name__}"
            )
        return logits_bnv

    def _call(self, ids_bn: Tensor, valid_bn: Tensor | None, cond: Conditioning) -> Any:
        if valid_bn is not None:
            ids_bn = torch.where(valid_bn, ids_bn, self._fill_id)
        keep = attended(valid_bn)
        mask = torch.ones_like(ids_bn) if keep is None else keep.to(ids_bn.dtype)
        added = self.conditioning(cond)
        if added is None:
            return self.model(input_ids=ids_bn, attention_mask=mask)
        inputs = self.model.get_input_embeddings()(ids_bn)  # type: ignore[operator]
        return self.model(inputs_embeds=inputs + added, attention_mask=mask)

    @torch.no_grad()
    def _is_linear(self, ids_bn: Tensor, valid_bn: Tensor | None) -> bool:
        """Whether the module's own logits are x w^T + b, where x is the input of the output layer.

        Raises ConfigError if the logits are not finite, or do not allow self-conditioning.
        """
        training = self.model.training
        self.model.eval()
        try:
            ids = torch.cat((ids_bn[:3], torch.full_like(ids_bn[:1], self._mask_id)))
            valid = None if valid_bn is None else torch.cat((valid_bn[:3], torch.ones_like(valid_bn[:1])))
            with torch.random.fork_rng(), _other_values(self.model, self.blocks):
                own = self._logits(ids, valid, None)
                x, layer = self._input_of_output(ids, valid, None), self._output_layer()
                product = None if x is None else Head(x, layer.weight, layer.bias).logits()
        finally:
            self.model.train(training)
        if not bool(torch.isfinite(own).all()):
            raise ConfigError(
                f"model: the logits of {type(self.base).__name__} must be finite, also in rows of mask ids "
                "alone; choose another model, because this one cannot be trained with masks"
            )
        if product is not None and own.shape == product.shape:
            error = float((own - product).abs().max())
            if error <= 1e-4 * max(1.0, float(own.abs().max())):
                return True
        name = type(self.base).__name__
        if self.to_self_cond is not None:
            raise ConfigError(
                f"objective.self_cond: must be false, got true: the logits of {name} are not a linear map of "
                "an embedding, so it has no embedding that could condition its next pass"
            )
        log.warning(
            "the logits of %s are not the product of its output layer, so they are computed at all "
            "positions, which takes %d x 4 bytes per position", name, own.shape[-1],
        )  # fmt: skip
        return False


@contextlib.contextmanager
def _other_values(module: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Give the parameters outside `layers` fixed values in the `with` block, and restore them after it.

    With these values, anything that follows the output layer changes the logits, and the result of the
    comparison is the same at every start. With the weights' own values, the comparison would miss a new bias
    of 0, a scale of 1, or a soft cap of small logits. Matrices are scaled so that a normalised embedding
    gives logits of about 3.
    """
    inside = {weight for layer in layers for weight in layer.parameters()}
    outside = [w for w in module.parameters() if w not in inside and w.is_floating_point()]
    saved = [weight.clone() for weight in outside]
    random = torch.Generator().manual_seed(0)
    for weight in outside:
        noise = torch.randn(weight.shape, generator=random)
        weight.copy_(noise * 3 / weight.shape[-1] ** 0.5 if weight.ndim >= 2 else 1 + noise / 2)
    try:
        yield
    finally:
        for weight, values in zip(outside, saved, strict=True):
            weight.copy_(values)


def _layers(module: nn.Module) -> list[nn.Module]:
    """The module's own `blocks` if it has them, or else its `nn.ModuleList` with the most parameters."""
    own = getattr(module, "blocks", None)
    if isinstance(own, (nn.ModuleList, list, tuple)):  # not a number of blocks
        return list(own)
    lists = [each for each in module.modules() if isinstance(each, nn.ModuleList)]
    return list(max(lists, key=lambda each: sum(w.numel() for w in each.parameters()), default=[]))
