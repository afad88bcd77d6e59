"""What several ranks compute is what one process computes: losses, norms, gradients, samples, updates."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from rank_groups import compare

STEPS = int(os.environ.get("MASKWIRE_PARITY_STEPS", "1"))
"""`make robustness` takes 50."""
TOLERANCE = 1e-5
SELF_CRITIC = {"self_cond": True, "critic": "self"}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bernoulli": {"objective": {"weighting": "masked_mean", "masking": "bernoulli"}},
    "null embedding": {"objective": {"self_cond": True, "self_cond_start": "null"}},
    "self critic": {"objective": SELF_CRITIC},
    "token critic": {"objective": {"critic": "token", "critic_labels": "token_critic"}},
    "critic alone": {"objective": SELF_CRITIC, "modes": {"only_train_critic": True}, "ahead": True},
    "generator alone": {"objective": SELF_CRITIC, "modes": {"only_train_generator": True}},
    "one part": {"objective": SELF_CRITIC, "serve": {"micro_batch_tokens": 4096}},
    "recomputed": {"objective": SELF_CRITIC, "serve": {"activation_checkpointing": True}},
    "muon": {"optimizer": {"name": "muon"}},
}
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
LAYOUTS = {2: (1, 2), 3: (1, 3), 4: (1, 2, 4)}
"""The copies of the model, by the number of ranks; the ranks of each share one."""


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
        far = {
            what: difference for what, difference in result["worst"].items() if not difference <= TOLERANCE
        }
        assert not far, f"{name}: {far}"
    with_null = [result for name, result in found.items() if "null embedding" in name]
    assert all("generator.null_embed" in result["worst"] for result in with_null)


def test_two_ranks_compute_what_one_process_computes(tmp_path: Path) -> None:
    check(compare(tmp_path, 2, STEPS, scenarios(2)))


@pytest.mark.skipif(STEPS < 50, reason="a part of `make robustness`")
@pytest.mark.parametrize("size", [3, 4])
def test_more_ranks_compute_what_one_process_computes(size: int, tmp_path: Path) -> None:
    check(compare(tmp_path, size, STEPS, scenarios(size)))


def test_rows_fewer_than_ranks_and_other_sources(tmp_path: Path) -> None:
    pytest.importorskip("x_transformers", reason="needs the extra x-transformers")
    objective = {"self_cond": True, "critic": "token"}
    found = compare(
        tmp_path, 3, 1,
        {
            "one row": {"replicate": 3, "objective": objective, "rows": 1},
            "prompts alone": {"replicate": 1, "objective": objective, "rows": 1, "prompts": 1.0},
            "x-transformers": {"replicate": 1, "objective": objective, "model": MODERN},
        },
    )  # fmt: skip
    check(found)


def test_a_model_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    python = {"source": "python", "num_tokens": 257, "mask_id": 256, "max_seq_len": 20}
    factory = {"factory": "in_place:build"}
    found = compare(
        tmp_path, 2, 1,
        {
            "out of place": {"replicate": 1, "model": {**python, "python": factory}},
            "in place": {
                "replicate": 1, "refused": True,
                "model": {**python, "python": {**factory, "options": {"in_place": True}}},
            },
        },
    )  # fmt: skip
    refusal = found.pop("in place")["error"]
    assert "a model that ranks divide must not change the outputs of its layers in place" in refusal
    check(found)


def test_the_same_layout_gives_the_same_bits_again_and_mistakes_are_found(tmp_path: Path) -> None:
    again = {"replicate": 1, **OBJECTIVES["self critic"]}
    critic_alone = {"replicate": 1, **OBJECTIVES["critic alone"]}
    null = {"replicate": 1, **OBJECTIVES["null embedding"]}
    found = compare(
        tmp_path, 2, 2,
        {
            "first": again,
            "second": again,
            "disagreement": {"replicate": 1, "disagree": True},
            "null embedding as an input": {**null, "bug": "null embedding as an input"},
            "no reshard": {**critic_alone, "bug": "no reshard"},
            "divided by the ranks": {"replicate": 1, "bug": "divided by the ranks"},
            "rows from 0": {"replicate": 1, "bug": "rows from 0"},
            "no agreement": {"replicate": 1, "disagree": True, "bug": "no agreement"},
        },
    )  # fmt: skip
    assert found["first"]["hash"] == found["second"]["hash"] != ""
    assert "something else" in found["disagreement"]["error"]
    assert not found["no agreement"]["error"], "the difference is not noticed without the agreement"
    for bug in ("null embedding as an input", "no reshard", "divided by the ranks", "rows from 0"):
        with pytest.raises(AssertionError):
            check({bug: found[bug]})


@pytest.mark.skipif(STEPS < 50, reason="a part of `make robustness`: it waits for a collective's end")
def test_a_rank_without_an_empty_part_is_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"imed out|Connection closed"):
        compare(tmp_path, 2, 1, {"plain": {"replicate": 1, "rows": 1, "bug": "no empty part"}})
