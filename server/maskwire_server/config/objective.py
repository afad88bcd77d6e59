"""The section [objective] of the configuration, and its presets."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ModelWrapValidatorHandler, WithJsonSchema, model_validator

from maskwire_server.config.base import Finite, Probability, Section

# Sources, with which a test compares each value: Sahoo et al. 2024 (mdlm), Chang et al. 2022 (maskgit),
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


SCHEDULES = ("linear", "cosine", "quadratic")
_FUNCTION = re.compile(r"(?!\d)\w+(\.(?!\d)\w+)*:(?!\d)\w+", re.ASCII)


def _schedule(value: str) -> str:
    if value in SCHEDULES or _FUNCTION.fullmatch(value):
        return value
    raise ValueError(
        f"must be 'linear', 'cosine' or 'quadratic', or a function of your own as 'package.module:function', "
        f"got {value!r}"
    )


class ObjectiveConfig(Section):
    """[objective]: the training loss. Fixed once the run exists."""

    preset: Literal["mdlm", "maskgit", "cmlm", "x-transformers"] = "mdlm"
    """Defaults for the other keys of this section. Each of them can still be set."""
    schedule: Annotated[
        str,
        AfterValidator(_schedule),
        WithJsonSchema({"anyOf": [{"enum": list(SCHEDULES)}, {"type": "string"}]}),
    ] = "linear"
    """Masked fraction m(t) at time t: 1-t, cos(pi t/2), (1-t)^2, or a function of your own as
    `package.module:function`, which the server imports from the current folder, PYTHONPATH or the installed
    packages. It maps times in [0, 1], an fp64 torch tensor, to masked fractions: m(0) = 1, m(1) = 0, never
    increasing, continuous."""
    schedule_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """Fingerprint of a schedule of your own: the SHA-256 of its values. The server records it with the run,
    and refuses to start if the function has changed since."""
    masking: Literal["exact", "bernoulli"] = "exact"
    """Mask exactly ceil(m(t) n) of a row's n positions, or each position with probability m(t)."""
    weighting: Literal["elbo", "masked_mean"] = "elbo"
    """elbo: an upper bound on the negative log-likelihood. masked_mean: the mean over masked positions."""
    no_replace_prob: Probability = 0.0
    """Fraction of masked positions that keep their own id."""
    random_token_prob: Probability = 0.0
    """Fraction of masked positions that get a random id."""
    augment_prob: Probability = 1.0
    """Probability that no_replace_prob is applied to a batch; drawn separately for random_token_prob."""
    self_cond: bool = False
    """Self-conditioning: feed the embeddings of a first pass into a second one."""
    self_cond_prob: Probability = 0.5
    """Probability that a batch takes the first pass."""
    self_cond_start: Literal["null", "none"] = "null"
    """Condition the first pass on a learned null embedding, or on nothing."""
    critic: Literal["none", "self", "token"] = "none"
    """none: no critic. self: a head on the generator's trunk. token: a separate encoder."""
    critic_loss_weight: Finite = Field(1.0, ge=0)
    """Weight of the critic's loss when generator and critic train together. It has no effect when the critic
    trains alone."""
    critic_labels: Literal["mismatch", "token_critic"] = "mismatch"
    """The critic learns to find wrong ids (mismatch) or masked positions (token_critic)."""

    @model_validator(mode="wrap")
    @classmethod
    def _apply_preset(cls, data: Any, handler: ModelWrapValidatorHandler[ObjectiveConfig]) -> ObjectiveConfig:
        if not isinstance(data, dict):
            return handler(data)
        section = handler({**PRESETS.get(data.get("preset", "mdlm"), {}), **data})
        # The user did not set the values of the preset, so an existing run keeps the values it recorded.
        object.__setattr__(section, "__pydantic_fields_set__", set(data))
        return section

    @model_validator(mode="after")
    def _augmentation_fits(self) -> ObjectiveConfig:
        total = self.no_replace_prob + self.random_token_prob
        if total > 1:
            raise ValueError(f"no_replace_prob + random_token_prob must be at most 1, got {total:g}")
        return self

    @model_validator(mode="after")
    def _fingerprint_fits(self) -> ObjectiveConfig:
        if self.schedule_sha256 is not None and not self.has_schedule_function:
            raise ValueError(
                "schedule_sha256 applies only to a schedule function of your own: leave it out with schedule "
                f"{self.schedule!r}, got {self.schedule_sha256!r}"
            )
        return self

    @property
    def has_schedule_function(self) -> bool:
        """Whether the schedule is a user's own function."""
        return self.schedule not in SCHEDULES

    @property
    def augments(self) -> bool:
        """Whether masked positions can contain an id other than the mask id."""
        return self.augment_prob > 0 and self.no_replace_prob + self.random_token_prob > 0

    @property
    def loss_is_bound(self) -> bool:
        """Whether generator_loss estimates an upper bound on the negative log-likelihood."""
        return self.weighting == "elbo" and not self.augments
