"""`check --ranks`: the memory of each layout of ranks, by hand and against tensors that are divided."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import fork_server
import pytest
import torch

from maskwire_server import config
from maskwire_server.errors import ConfigError
from maskwire_server.training import rank_memory
from maskwire_server.training.models.generator_critic import Networks
from maskwire_server.training.rank_memory import Held, Machines, Room, held, layouts
from maskwire_server.training.weight_partition import check_shardable, part_size

WORKER = Path(__file__).with_name("layout_worker.py")
RANKS = 2
GIB = 2**30

ENCODER = {"num_tokens": 11, "mask_id": 10, "max_seq_len": 6, "dim": 4, "depth": 1, "heads": 1, "dim_head": 2}
OF_FACTORY = {"num_tokens": 11, "mask_id": 10, "max_seq_len": 6, "source": "python"}
WITHOUT_BLOCKS = {**OF_FACTORY, "python": {"factory": "layout_worker:WithoutBlocks"}}
WITH_SCALAR = {**OF_FACTORY, "python": {"factory": "layout_worker:WithScalar"}}


def sharing(what: str) -> dict[str, Any]:
    return {**OF_FACTORY, "python": {"factory": "layout_worker:Sharing", "options": {"share": what}}}


CPU = {"device": "cpu", "threads": 1}
FROZEN = [{"match": "generator.blocks.0.*", "train": False}]

DIVIDED: dict[str, dict[str, Any]] = {
    "encoder": {"model": ENCODER},
    "replicas": {"model": ENCODER, "replicate": RANKS},
    "all": {
        "model": {**ENCODER, "depth": 3, "qk_norm": True, "feed_forward": "swiglu"},
        "objective": {"critic": "token", "self_cond": True, "self_cond_prob": 1.0},
        "optimizer": {"name": "muon", "ema_decay": 0.9, "groups": FROZEN},
    },
    "self critic": {"model": ENCODER, "objective": {"critic": "self"}, "optimizer": {"ema_decay": 0.9}},
    "x-transformers": {
        "model": {
            "source": "x-transformers", "num_tokens": 11, "mask_id": 10, "max_seq_len": 6,
            "x_transformers": {"dim": 6, "depth": 2, "heads": 3, "attn_dim_head": 2},
        },
        "optimizer": {"ema_decay": 0.9},
    },
    "no blocks, replicas": {
        "model": WITHOUT_BLOCKS, "replicate": RANKS,
    },
    "embeddings that are shared outside the blocks": {"model": sharing("embeddings")},
}  # fmt: skip
REFUSED: dict[str, dict[str, Any]] = {
    "no blocks": {"model": WITHOUT_BLOCKS},
    "scalar": {
        "model": WITH_SCALAR,
        "replicate": RANKS,
    },
    **{what: {"model": sharing(what)} for what in ("block", "weight", "layer")},
}
CASES = {name: {"replicate": 1, "serve": CPU, **case} for name, case in {**DIVIDED, **REFUSED}.items()}


def loaded(**sections: Any) -> config.Config:
    return config.load(None, **{"serve": CPU, **sections})


def report(machines: Machines, **sections: Any) -> list[str]:
    chosen = loaded(**sections)
    sections = (chosen.model, chosen.objective, chosen.optimizer, chosen.serve, chosen.distributed)
    return layouts(*sections, machines).lines


def networks_of(chosen: config.Config) -> Networks:
    with torch.device("meta"):
        return Networks(chosen.model, chosen.objective)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks held, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    installed = importlib.util.find_spec("x_transformers") is not None
    cases = {name: case for name, case in CASES.items() if installed or name != "x-transformers"}
    (folder / "cases.json").write_text(json.dumps(cases))
    if fork_server.Process is fork_server.Forked:
        fork_server.CONNECTION.preload("maskwire_server.training.sharding", environment={})
    workers = [
        fork_server.Process(
            [sys.executable, WORKER, str(rank), str(RANKS), folder / "store", folder / "cases.json",
             folder / f"{rank}.json"]
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    try:
        assert [worker.wait(100) for worker in workers] == [0] * RANKS
    finally:
        for worker in workers:
            worker.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("name", DIVIDED)
def test_each_rank_holds_exactly_the_predicted_numbers(name: str, measured: list[dict[str, Any]]) -> None:
    if name == "x-transformers":
        pytest.importorskip("x_transformers")
    case = dict(CASES[name])
    shard = RANKS // case.pop("replicate")
    chosen = loaded(**case)
    networks = networks_of(chosen)
    most = held(networks, chosen.optimizer, shard)
    for rank in range(RANKS):
        found = measured[rank][name]
        part = held(networks, chosen.optimizer, shard, rank % shard)
        assert found == {
            "weights": part.weights,
            "allocated": most.weights,
            "gradients": part.gradients,
            "moments": 2 * part.adamw + part.muon,
            "average": part.average,
        }
    assert most.average == most.weights * bool(chosen.optimizer.ema_decay)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no blocks", r"without `blocks` \(a list of its layers\) can only be replicated"),
        ("scalar", "scale"),
        ("block", "blocks 0 and 2 are the same module"),
        (
            "weight",
            r"blocks\.2\.0\.weight of block 2 is also the weight model\.blocks\.1\.0\.weight of block 1",
        ),
        (
            "layer",
            r"last\.weight of a layer outside the blocks is also the .*blocks\.1\.0\.weight of block 1",
        ),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused_by_every_rank_and_by_check(
    name: str, words: str, measured: list[dict[str, Any]]
) -> None:
    case = dict(CASES[name])
    shard = RANKS // case.pop("replicate")
    network = networks_of(loaded(**case)).generator
    with pytest.raises(ConfigError, match=words) as refused:
        check_shardable(network, shard)
    assert [found[name] for found in measured] == [str(refused.value)] * RANKS


def test_check_offers_only_replicas_to_a_model_without_blocks() -> None:
    lines = report(Machines(4), model=REFUSED["no blocks"]["model"])
    assert sum("not possible: a model without `blocks`" in line for line in lines) == 2
    assert lines[-1].startswith("recommended     --set distributed.replicate=4 --set distributed.shard=1")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("scalar", r"the weight model\.scale is a scalar"),
        ("block", "are the same module"),
        ("weight", "is also"),
    ],
)
def test_check_refuses_what_no_layout_can_divide(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        report(Machines(2), model=REFUSED[name]["model"])


def test_ranks_on_a_cpu_must_all_build_the_model_before_it_is_divided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """64 ranks need 64 x 2 whole copies of the weights; divided, less than that and the leader's state."""
    serve, optimizer = {"device": "cpu", "micro_batch_tokens": 12}, {"ema_decay": 0.9}
    model = {**ENCODER, "num_tokens": 4096, "mask_id": 4095}
    weights = networks_of(loaded(model=model))
    need = 64 * 2 * 4 * sum(weight.numel() for weight in weights.parameters())
    room: dict[str, Any] = {"gathered": 0, "computed": 0, "leader": 0, "sharing": 64}
    small = Held(1, 1, 1, 0, 1)
    assert Room(**room, build=need // 64, memory=need).fits(small)
    assert not Room(**room, build=need // 64, memory=need - 1).fits(small)
    rooms: list[Room] = []
    monkeypatch.setattr(rank_memory, "Room", lambda *given: rooms.append(Room(*given)) or rooms[-1])
    report(Machines(64), model=model, serve=serve, optimizer=optimizer)
    report(Machines(64, memory=GIB), model=model, serve={**serve, "device": "auto"}, optimizer=optimizer)
    assert [each.build for each in rooms] == [need // 64, 0], "the host of a GPU has another memory"


@pytest.mark.parametrize(
    ("shape", "shard", "parts"),
    [
        ((7, 3), 1, [21]),
        ((7, 3), 2, [12, 9]),
        ((7, 3), 3, [9, 9, 3]),
        ((4,), 3, [2, 2, 0]),
        ((1, 5), 4, [5, 0, 0, 0]),
        ((6, 2, 2), 4, [8, 8, 8, 0]),
    ],
)
def test_a_rank_holds_whole_rows(shape: tuple[int, ...], shard: int, parts: list[int]) -> None:
    assert [part_size(shape, shard, index) for index in range(shard)] == parts


def test_the_report_of_a_small_encoder_is_the_one_computed_by_hand() -> None:
    """The weights: embeddings 11 x 4 and 6 x 4, a final gain 4, an output layer 11 x 4; in the block, gains
    4 and 4, to_qkv 6 x 4, to_out 4 x 2, up 16 x 4 + 16, down 4 x 16 + 4."""
    outside, block = 44 + 24 + 4 + 44, 4 + 4 + 24 + 8 + 64 + 16 + 64 + 4
    # Three ranks hold 4, 2, 2 and 4 rows outside, and in the block 2, 2, 2, 2, 6 (+ 6) and 2 (+ 2).
    third = (4 * 4 + 2 * 4 + 2 + 4 * 4) + (2 + 2 + 2 * 4 + 2 * 2 + 6 * 4 + 6 + 2 * 16 + 2)
    whole = outside + block
    model = {**ENCODER, "tied_embeddings": False}
    serve = {"device": "cpu", "micro_batch_tokens": 12}
    lines = report(Machines(3, memory=GIB), model=model, serve=serve, optimizer={"ema_decay": 0.9})
    logits = 4 * 3 * (2**22 // 11) * 11
    activations = 12 * (8 * 4 + 2 * 16) * 4
    assert (outside, block, whole, third) == (116, 188, 304, 122)
    gathered = (outside * 2 + block * 2 + block) * 4
    state = f"(weights {third} + gradients {third} + AdamW's two moments 2 x {third} + average {third})"
    assert lines[0] == "parameters      304"
    assert lines[1] == "ranks           3; on cpu, 1.00 GiB for each"
    assert lines[2] == (
        "gathered        (outside the blocks, weights 116 + gradients 116; of 1 blocks, 1 x (weights 188 + "
        f"gradients 188); gloo's copy of the largest of them, 188) x 4 bytes = {gathered / 2**20:.1f} MiB"
    )
    assert lines[3].startswith("activations     12 positions per micro-batch x 64 numbers x 1 blocks x")
    assert lines[5] == "leader          whole weights for evaluations, 304 x 4 bytes = 0.0 MiB"
    assert lines[6].endswith("for a snapshot, 1,216 numbers x 4 bytes = 0.0 MiB")
    assert "3 ranks x 2 x 304 weights x 4 bytes" in lines[6]
    assert lines[7] == "layout          replicate 3 x shard 1"
    assert lines[8].startswith("  state         (weights 304 + gradients 304 + AdamW's two moments 2 x 304")
    assert lines[10] == "layout          replicate 1 x shard 3"
    assert lines[11] == f"  state         ceil(rows / 3) rows of each tensor: {state} x 4 bytes = 0.0 MiB"
    assert activations + logits > 4 * whole
    # The last byte decides: the leader also has the whole weights and, on a CPU, the snapshot.
    leader = 4 * (304 + 4 * 304)
    for shard, numbers in ((1, 304), (3, third)):
        need = 4 * 5 * numbers + gathered + max(activations + logits, 4 * numbers) + leader
        for memory, verdict in ((need, "fits"), (need - 1, "does not fit")):
            own = report(Machines(3, memory=memory), model=model, serve=serve, optimizer={"ema_decay": 0.9})
            (line,) = (own[i + 2] for i, each in enumerate(own) if each.endswith(f"x shard {shard}"))
            assert line.endswith(f": {verdict}"), line


def test_the_gradients_of_a_micro_batch_count_if_they_are_larger_than_its_activations() -> None:
    for positions, words in (
        (64, " + gradients of a micro-batch 1.14 GiB) + leader"),
        (2**16, " + activations and logits 96.05 GiB) + leader"),
    ):
        serve = {"device": "cpu", "micro_batch_tokens": positions}
        lines = report(Machines(1, memory=80 * GIB), model=BIG, serve=serve)
        (line,) = (line for line in lines if line.startswith("  together"))
        assert words in line


BIG = {"num_tokens": 1000, "mask_id": 999, "dim": 1024, "depth": 24, "heads": 16, "dim_head": 64}
SMALL_STEP = {"device": "auto", "micro_batch_tokens": 512}


@pytest.mark.parametrize(
    ("machines", "replicate", "shard", "where"),
    [
        (Machines(8, 2, 80 * GIB), 16, 1, " within"),
        (Machines(8, 2, 8 * GIB), 8, 2, " within"),
        (Machines(6, 2, 7 * GIB), 4, 3, " within"),
        (Machines(3, 2, 8 * GIB), 2, 3, " within"),  # 2 would fit, across hosts
        (Machines(2, 4, 7 * GIB), 2, 4, ", across"),
    ],
)
def test_the_smallest_shard_that_fits_is_recommended_within_a_host_if_possible(
    machines: Machines, replicate: int, shard: int, where: str
) -> None:
    advice = report(machines, model=BIG, serve=SMALL_STEP)[-1]
    assert f"distributed.replicate={replicate} --set distributed.shard={shard}: " in advice
    assert advice.partition("the smallest shard that fits")[2].startswith(where)
