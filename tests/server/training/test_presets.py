"""Every value of a preset is that of its source."""

from __future__ import annotations

import inspect
import random
import re
import warnings
from typing import Any

import pytest
import torch

from maskwire_server.config import PRESETS, ObjectiveConfig
from maskwire_server.training import sampling

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    xt = pytest.importorskip("x_transformers")

# What no source speaks of, or what all of them leave off.
PLAIN: dict[str, Any] = {
    "masking": "exact",
    "no_replace_prob": 0.0,
    "random_token_prob": 0.0,
    "augment_prob": 1.0,
    "self_cond": False,
    "self_cond_prob": 0.5,  # Chen et al. 2022, Analog Bits
    "self_cond_start": "null",
    "critic": "none",
    "critic_loss_weight": 1.0,
    "critic_labels": "mismatch",
}

PAPERS: dict[str, dict[str, Any]] = {
    # Sahoo et al. 2024, section 3: the log-linear schedule masks a share that is linear in time, and the
    # loss is the negative ELBO; nothing but the mask id is shown.
    "mdlm": {"schedule": "linear", "weighting": "elbo"},
    # Chang et al. 2022, section 3.1: the mean over masked tokens; 3.3: the cosine schedule.
    "maskgit": {"schedule": "cosine", "weighting": "masked_mean"},
    # Ghazvininejad et al. 2019, section 3.2: a uniform number of masked tokens; BERT's shares (Devlin et al.
    # 2019, 3.1): of the masked tokens .1 keep their id and .1 get a random one.
    "cmlm": {
        "schedule": "linear", "weighting": "masked_mean", "no_replace_prob": 0.1, "random_token_prob": 0.1,
    },
}  # fmt: skip


def values(preset: str) -> dict[str, Any]:
    found = ObjectiveConfig(preset=preset).model_dump()
    assert found.pop("preset") == preset
    assert found.pop("schedule_sha256") is None  # only of a schedule of the user's own
    return found


@pytest.mark.parametrize("preset", PAPERS)
def test_a_preset_has_the_values_of_its_paper(preset: str) -> None:
    assert values(preset) == PLAIN | PAPERS[preset]


def test_maskgit_samples_at_the_choice_temperature_of_its_paper() -> None:
    assert sampling.MASKGIT_CHOICE_TEMPERATURE == 4.5


def test_the_x_transformers_preset_has_the_defaults_of_the_wrapper() -> None:
    parameters = inspect.signature(xt.NonAutoregressiveWrapper.__init__).parameters
    theirs = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    # Of generation: requests say these.
    for name in ("steps", "can_mask_prev_unmasked"):
        theirs.pop(name)
    expected = {
        "schedule": theirs.pop("schedule"),
        "masking": "exact",  # the next test
        "weighting": "elbo" if theirs.pop("use_simple_mdlm_loss_weight") else "masked_mean",
        "no_replace_prob": theirs.pop("no_replace_prob"),
        "random_token_prob": theirs.pop("random_token_prob"),
        "augment_prob": coin_probability(),
        "self_cond": theirs.pop("self_cond"),
        "self_cond_prob": theirs.pop("self_cond_train_prob"),
        "self_cond_start": "none",  # the next test
        "critic": "self" if theirs.pop("self_token_critic") else "none",
        "critic_loss_weight": theirs.pop("critic_loss_weight"),
        "critic_labels": "mismatch",  # critic_labels = sampled_ids != orig_seq
    }
    assert theirs == {"token_critic": None}, "a default that no setting of ours stands for"
    assert values("x-transformers") == expected


def coin_probability() -> float:
    from x_transformers import nonautoregressive_wrapper as module

    source = inspect.getsource(module.NonAutoregressiveWrapper.forward)
    for option in ("no_replace_prob", "random_token_prob"):
        assert f"if self.{option} > 0. and coin_flip():" in source
    found = re.search(r"sample_prob\(([\d.]+)\)", inspect.getsource(module.coin_flip))
    assert found is not None
    return float(found[1])


def test_the_wrappers_first_pass_is_not_conditioned_and_its_counts_are_exact() -> None:
    torch.manual_seed(0)
    random.seed(0)
    net = xt.TransformerWrapper(
        num_tokens=9, max_seq_len=8, attn_layers=xt.Encoder(dim=8, depth=1, heads=2, attn_dim_head=4)
    )
    wrapper = xt.NonAutoregressiveWrapper(
        net, mask_id=8, self_cond=True, self_cond_train_prob=1.0, no_replace_prob=0.0, random_token_prob=0.0
    )
    calls: list[tuple[torch.Tensor, dict[str, Any]]] = []
    forward = net.forward

    def spy(ids: torch.Tensor, **options: Any) -> Any:
        calls.append((ids, options))
        return forward(ids, **options)

    net.forward = spy
    times = torch.tensor([0.0, 0.3, 0.5, 0.99])
    uniform = torch.Tensor.uniform_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.Tensor, "uniform_", lambda t, *a: t.copy_(times) if t.shape == (4,) else uniform(t, *a)
        )
        wrapper(torch.zeros(4, 8, dtype=torch.int64))
    (seen, first), (again, second) = calls
    assert "sum_embeds" not in first
    assert "sum_embeds" in second
    assert torch.equal(seen, again)
    assert (seen == 8).sum(1).tolist() == [8, 6, 4, 1], "ceil((1 - t) n), at least 1"


def test_every_preset_is_compared() -> None:
    assert PRESETS.keys() == PAPERS.keys() | {"x-transformers"}
    assert set(ObjectiveConfig.model_fields) == {"preset", "schedule", "schedule_sha256", "weighting", *PLAIN}
