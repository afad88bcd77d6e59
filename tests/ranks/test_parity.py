"""What several ranks compute is what one process computes: losses, norms, gradients, samples, updates."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_groups import compare
from source_models import ARCHITECTURES

STEPS = int(os.environ.get("MASKWIRE_PARITY_STEPS", "1"))
"""`make robustness` takes 50."""
TOLERANCE = 1e-5
"""Relative to the largest number of a tensor. Found: 3e-8, as the critic's cross-entropy is in fp32."""
BF16_TOLERANCE = 0.05
"""Found: 0.01. Partial sums of a product are rounded to 8 bits."""
SELF_CRITIC = {"self_cond": True, "critic": "self"}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bernoulli": {"objective": {"weighting": "masked_mean", "masking": "bernoulli"}},
    "null embedding": {"objective": {"self_cond": True, "self_cond_start": "null"}},
    "self critic": {"objective": SELF_CRITIC, "saved": True},
    "token critic": {
        "objective": {"critic": "token", "critic_labels": "token_critic"},
        "saved": True,
    },
    "critic alone": {"objective": SELF_CRITIC, "modes": {"only_train_critic": True}, "ahead": True},
    "generator alone": {"objective": SELF_CRITIC, "modes": {"only_train_generator": True}},
    "one part": {"objective": SELF_CRITIC, "serve": {"micro_batch_tokens": 4096}},
    "recomputed": {"objective": SELF_CRITIC, "serve": {"activation_checkpointing": True}},
    "muon": {"optimizer": {"name": "muon"}},
}
BF16: dict[str, Any] = {"replicate": 1, "objective": {**SELF_CRITIC, "self_cond_prob": 1.0}}
PARTS = {"bf16": {**BF16, "serve": {"precision": "bf16"}, "steps": 1}}
"""One step: logits are rounded, so that in one of ten steps the critic is given another sampled id."""
WHOLE = {"bf16, one part": {**BF16, "serve": {"precision": "bf16", "micro_batch_tokens": 4096}}}
"""Passes of a micro-batch share weights, but not the copies that autocast makes of them."""
MODERN = {
    "source": "x-transformers", "num_tokens": 257, "mask_id": 256, "max_seq_len": 20,
    "x_transformers": {"dim": 32, "depth": 2, "heads": 2, "attn_dim_head": 16, "rotary_pos_emb": True,
                       "use_rmsnorm": True, "ff_glu": True, "attn_qk_norm": True, "attn_kv_heads": 1},
}  # fmt: skip
SAMPLE = {
    ("null embedding", 1),
    ("self critic", 1),
    ("self critic", 2),
    ("token critic", 1),
    ("critic alone", 1),
}
"""What `make test` runs of it."""


def factory(name: str, **options: Any) -> dict[str, Any]:
    return {
        "source": "python", "num_tokens": 257, "mask_id": 256, "max_seq_len": 20,
        "python": {"factory": name, "options": options},
    }  # fmt: skip


ADAPTED: dict[str, Any] = {
    "source": "huggingface", "num_tokens": 257, "mask_id": 256, "max_seq_len": 20,
    "lora": {"rank": 2},
    "huggingface": {"path": "unused", "pretrained": False,
                    "config": {**ARCHITECTURES["BertConfig"], "model_type": "bert", "vocab_size": 257,
                               "pad_token_id": None}},
}  # fmt: skip
LAYOUTS = {2: (1, 2), 3: (1, 3), 4: (1, 2, 4)}
"""The copies of the model, by the number of ranks; the ranks of each share one."""


TOKEN: dict[str, Any] = {"objective": {"self_cond": True, "critic": "token"}}
FROZEN = {"groups": [{"match": f"generator.{part}.*", "train": False} for part in ("token_emb", "blocks.0")]}
MODELS: dict[str, Any] = {
    "x-transformers": {**TOKEN, "model": MODERN},
    "of a factory": {"model": factory("in_place:build")},
    "without blocks": {"model": factory("in_place:build", layers="stack")},
    "frozen weights": {"objective": SELF_CRITIC, "optimizer": FROZEN, "saved": True},
    "frozen weights, loaded": {"objective": SELF_CRITIC, "optimizer": FROZEN, "loaded_after": 1},
    "frozen weights, loaded untrained": {"optimizer": FROZEN, "loaded_after": 0},
}


def models(size: int) -> dict[str, Any]:
    """Other models than the built-in one, and weights that are not trained."""
    return {
        f"{name}, {replicate} x {size // replicate}": {"replicate": replicate, **scenario}
        for replicate in LAYOUTS[size]
        for name, scenario in MODELS.items()
        # A model without blocks can only be replicated.
        if (replicate == size if name == "without blocks" else STEPS > 1 or replicate == 1)
    }


def scenarios(size: int) -> dict[str, Any]:
    return {
        f"{name}, {replicate} x {size // replicate}": {"replicate": replicate, **scenario}
        for replicate in LAYOUTS[size]
        for name, scenario in OBJECTIVES.items()
        if STEPS > 1 or (name, replicate) in SAMPLE
    }


def check(found: dict[str, Any]) -> None:
    assert found
    for name, result in found.items():
        assert not result["wrong"], name
        assert not result["error"], name
        tolerance = BF16_TOLERANCE if name.startswith("bf16") else TOLERANCE
        far = {
            what: difference for what, difference in result["worst"].items() if not difference <= tolerance
        }
        assert not far, f"{name}: {far}"
    with_null = [result for name, result in found.items() if "null embedding" in name]
    assert all("generator.null_embed" in result["worst"] for result in with_null)


CAMPAIGN = {
    "one row", "x-transformers, 1 x 2", "of a factory, 1 x 2", "without blocks, 2 x 1",
    "frozen weights, 1 x 2", "experts, one row", "the average stands still", "three times the rate",
    "a negative rate", "outputs at random", "other outputs",
}  # fmt: skip
"""Scenarios, mistakes and refused models that only `make robustness` runs."""
CRITIC_ALONE = {"replicate": 1, **OBJECTIVES["critic alone"]}
NULL = {"replicate": 1, **OBJECTIVES["null embedding"]}
OTHERS: dict[str, Any] = {
    "one row": {"replicate": 1, **TOKEN, "rows": 1},
    "prompts alone": {"replicate": 1, **TOKEN, "rows": 1, "prompts": 1.0},
    **models(2),
    "experts": {"replicate": 1, "model": factory("control_flow:routed")},
    "experts, one row": {"replicate": 1, "rows": 1, "model": factory("control_flow:routed")},
    "experts outside blocks": {"replicate": 2, "model": factory("control_flow:routed", blocks=False)},
}
OTHERS = {name: scenario for name, scenario in OTHERS.items() if STEPS > 1 or name not in CAMPAIGN}
MISTAKES: dict[str, Any] = {
    "null embedding as an input": NULL,
    "no reshard": CRITIC_ALONE,
    "divided by the ranks": {"replicate": 1},
    "rows from 0": {"replicate": 1},
    "the average stands still": {"replicate": 1, "steps": 1},
    "three times the rate": {"replicate": 1, "steps": 1},
    "a negative rate": {"replicate": 1, "steps": 1, "optimizer": {"name": "muon"}},
}
MISTAKES = {name: mistake for name, mistake in MISTAKES.items() if STEPS > 1 or name not in CAMPAIGN}
AGREEMENT = {"replicate": 1, "disagree": True}

REFUSED = {
    "in place": (
        factory("in_place:build", in_place=True),
        "a model that is divided among ranks must not change the outputs of its layers in place",
    ),
    "calls at random": (
        factory("control_flow:skipping", skip="call", random=True),
        "distributed: one pass called the blocks [1, 3], another [2]; every pass of a model that is divided",
    ),
    "outputs at random": (
        factory("control_flow:skipping", skip="output", random=True),
        "distributed: one backward pass used the outputs of the blocks [3, 1], another those of [2]; every",
    ),
    "other calls": (
        factory("control_flow:skipping", skip="call"),
        "distributed: a pass called block 2 instead of block 1; every pass of a model that is divided",
    ),
    "other outputs": (
        factory("control_flow:skipping", skip="output"),
        "distributed: a pass began the backward pass of block 2 instead of block 3; every pass of a model",
    ),
}
REFUSED = {name: model for name, model in REFUSED.items() if STEPS > 1 or name not in CAMPAIGN}
"""Models, and what all ranks say. The last two deviate in a step, on all ranks alike, so that none waits."""
INSIDE = factory("control_flow:skipping", skip="inside", random=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one group of two ranks found; starting a group takes longer than all that it does."""
    pytest.importorskip("x_transformers", reason="needs the extra x-transformers")
    again = {"replicate": 1, **OBJECTIVES["self critic"], "steps": 2, "saved": True}
    return compare(
        tmp_path_factory.mktemp("ranks"), 2, STEPS,
        {
            **scenarios(2), **OTHERS, **PARTS, "first": again, "second": again,
            **{f"{bug}!": {"steps": 2, **mistake, "bug": bug} for bug, mistake in MISTAKES.items()},
            "diverged": {"replicate": 2, "diverged": True},
            "agreement": AGREEMENT, "no agreement": {**AGREEMENT, "bug": "no agreement"},
            **{
                name: {"replicate": 1, "refused": True, "model": model}
                for name, (model, _) in [*REFUSED.items(), ("inside", (INSIDE, ""))]
            },
        },
    )  # fmt: skip


@pytest.mark.parametrize("name", [*scenarios(2), *OTHERS, *PARTS])
def test_two_ranks_compute_what_one_process_computes(name: str, found: dict[str, Any]) -> None:
    check({name: found[name]})


def test_a_single_rank_computes_in_bf16_what_a_process_without_ranks_computes(tmp_path: Path) -> None:
    check(compare(tmp_path, 1, STEPS, WHOLE))


@pytest.mark.skipif(STEPS < 50, reason="a part of `make robustness`")
@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("chosen", [scenarios, models])
def test_more_ranks_compute_what_one_process_computes(
    size: int, chosen: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    check(compare(tmp_path, size, STEPS, chosen(size)))


def test_the_same_layout_gives_the_same_bits_again(found: dict[str, Any]) -> None:
    assert found["first"]["hash"] == found["second"]["hash"] != ""


@pytest.mark.parametrize("bug", MISTAKES)
def test_a_mistake_is_found(bug: str, found: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        check({bug: found[f"{bug}!"]})
    assert found[f"{bug}!"]["worst"]


def test_ranks_that_differ_notice_it_by_their_agreement_alone(found: dict[str, Any]) -> None:
    assert "have another result" in found["agreement"]["error"]
    assert not found["no agreement"]["error"]


def test_copies_of_the_model_that_differ_notice_it(found: dict[str, Any]) -> None:
    assert "have different weights, but hold the same part of the model" in found["diverged"]["error"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_divided_is_refused(name: str, found: dict[str, Any]) -> None:
    assert REFUSED[name][1] in found[name]["error"]


def test_a_model_that_skips_layers_inside_its_blocks_can_be_divided(found: dict[str, Any]) -> None:
    assert not found["inside"]["error"]
    assert "result" in found["inside"]["worst"]


@pytest.mark.skipif(STEPS < 50, reason="a part of `make robustness`: it imports transformers in each rank")
@pytest.mark.parametrize("size", LAYOUTS)
def test_ranks_train_adapters_as_one_process_does(size: int, tmp_path: Path) -> None:
    check(compare(tmp_path, size, STEPS, {
        f"{objective}, {replicate} x {size // replicate}": {
            "replicate": replicate, "model": ADAPTED, **OBJECTIVES[objective], "loaded": objective == "plain",
        }
        for replicate in LAYOUTS[size]
        for objective in ("plain", "self critic")
    }))  # fmt: skip


@pytest.mark.skipif(STEPS < 50, reason="a part of `make robustness`: it waits for a collective's end")
def test_a_rank_without_an_empty_part_is_found(tmp_path: Path) -> None:
    found = compare(tmp_path, 2, 1, {"plain": {"replicate": 1, "rows": 1, "bug": "no empty part"}})
    assert re.search(r"imed out|Connection closed", found["plain"]["error"])
