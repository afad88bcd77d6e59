"""The section [objective], and its presets."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from maskwire_server.config.base import Finite, Probability, Section

# A test compares each value with its source: Sahoo et al. 2024 (mdlm), Chang et al. 2022 (maskgit),
# Ghazvininejad et al. 2019 (cmlm), the defaults of NonAutoregressiveWrapper (x-transformers).
PRESETS: dict[str, dict[str, Any]] = {
    "mdlm": {"schedule": "linear", "masking": "exact", "weighting": "elbo"},
    "maskgit": {"schedule": "cosine", "masking": "exact", "weighting": "masked_mean"},
    "cmlm": {
        "schedule": "linear", "masking": "exact", "weighting": "masked_mean",
        "no_replace_prob": 0.1, "random_token_prob": 0.1,
    },
    "x-transformers": {
        "schedule": "linear", "masking": "exact", "weighting": "elbo",
        "no_replace_prob": 0.15, "random_token_prob": 0.1, "augment_prob": 0.5,
        "self_cond_prob": 0.75, "self_cond_start": "none",
    },
}  # fmt: skip


class ObjectiveConfig(Section):
    """[objective]: what is minimised. It belongs to the run and cannot change."""

    preset: Literal["mdlm", "maskgit", "cmlm", "x-transformers"] = "mdlm"
    """Defaults for the other keys of this section; each can be set beside it."""
    schedule: Literal["linear", "cosine", "quadratic"] = "linear"
    """The masked fraction m(t): 1-t, cos(pi t/2) or (1-t)^2."""
    masking: Literal["exact", "bernoulli"] = "exact"
    """A row masks an exact count of positions, or each position with probability m(t)."""
    weighting: Literal["elbo", "masked_mean"] = "elbo"
    """A bound on the negative log-likelihood, or the mean over masked positions."""
    no_replace_prob: Probability = 0.0
    """The share of masked positions that keep their own id."""
    random_token_prob: Probability = 0.0
    """The share of masked positions that get a random id."""
    augment_prob: Probability = 1.0
    """The probability, for each kind and batch, that it is used at all."""
    self_cond: bool = False
    """Feed a first pass's embeddings to the second."""
    self_cond_prob: Probability = 0.5
    """The probability, for each batch, of taking the first pass."""
    self_cond_start: Literal["null", "none"] = "null"
    """What conditions the first pass itself: the null embedding, or nothing."""
    critic: Literal["none", "self", "token"] = "none"
    """No critic, a head on the generator's trunk, or an encoder of its own."""
    critic_loss_weight: Finite = Field(1.0, ge=0)
    """The critic's weight in the loss when both learn; a critic that trains alone minimises its plain
    loss."""
    critic_labels: Literal["mismatch", "token_critic"] = "mismatch"
    """The critic finds sampled ids that are wrong, or positions that were masked."""

    @model_validator(mode="wrap")
    @classmethod
    def _apply_preset(cls, data: Any, handler: ModelWrapValidatorHandler[ObjectiveConfig]) -> ObjectiveConfig:
        if not isinstance(data, dict):
            return handler(data)
        section = handler({**PRESETS.get(data.get("preset", "mdlm"), {}), **data})
        # A preset's values are not set by the user: an existing run keeps those that it recorded.
        object.__setattr__(section, "__pydantic_fields_set__", set(data))
        return section

    @model_validator(mode="after")
    def _augmentation_fits(self) -> ObjectiveConfig:
        total = self.no_replace_prob + self.random_token_prob
        if total > 1:
            raise ValueError(f"no_replace_prob + random_token_prob must be at most 1, got {total:g}")
        return self

    @property
    def augments(self) -> bool:
        """Whether masked positions can show something else than the mask id."""
        return self.augment_prob > 0 and self.no_replace_prob + self.random_token_prob > 0

    @property
    def loss_is_bound(self) -> bool:
        """Whether generator_loss estimates a bound on the negative log-likelihood."""
        return self.weighting == "elbo" and not self.augments
