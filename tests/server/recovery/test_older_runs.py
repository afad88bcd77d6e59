"""Runs of older versions are opened, verified and trained on: an upgrade orphans none."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fork_server
import pytest
from counter import CounterTrainer
from fixtures.write_runs import RUNS, tokens
from older_runs import (
    PRESETS,
    SETTINGS,
    machine_of,
    move_to_this_machine,
    trainer_on_its_machine,
    unpack,
)
from rig import WAIT, make_engine, open_session

import maskwire_server
from maskwire_server import config
from maskwire_server.batch import Batch, Modes, Payload
from maskwire_server.config.record import recorded as as_recorded
from maskwire_server.engine.engine import Engine
from maskwire_server.errors import Refused, RunDirectoryError
from maskwire_server.journal.journal import Journal
from maskwire_server.recovery import recorded_config, verify
from maskwire_server.recovery.replay import InexactReplayError
from maskwire_server.recovery.state_at_step import rewind
from maskwire_server.requests import StepRequest

SERVER = str(Path(sys.executable).with_name("maskwire-server"))
TORCH = ("torch", "critic-alone", *PRESETS)


def train(engine: Engine, *steps: int, first_id: int = 0) -> None:
    session = open_session(engine, "a later job", f"{steps}", takeover=True)
    for step in steps:
        sent = Payload(Batch(tokens(step, first_id), 4, 16), Modes())
        assert engine.train_step(StepRequest(sent, session)).result(WAIT).step == step


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.close()


def last_step(name: str) -> int:
    before, behind, _ = RUNS[name]
    return before + behind


def start(run_dir: Path, engines: list[Engine], whole: config.Config | None = None, **changes: Any) -> Engine:
    whole = recorded_config.of_run(whole or config.load(None, **SETTINGS), run_dir)
    engine = make_engine(run_dir, whole, lambda: trainer_on_its_machine(run_dir, whole, **changes))  # type: ignore[arg-type, return-value]
    engines.append(engine)
    engine.wait_serving(60)
    return engine


def test_a_counter_run_is_replayed_to_the_same_bytes(tmp_path: Path, engines: list[Engine]) -> None:
    run_dir = unpack("counter", tmp_path)
    whole = recorded_config.of_run(config.load(None, **SETTINGS), run_dir)
    made: list[CounterTrainer] = []

    def build() -> CounterTrainer:
        made.append(CounterTrainer())
        return made[-1]

    engine = make_engine(run_dir, whole, build)
    engines.append(engine)
    engine.wait_serving(WAIT)
    assert engine.status().step == last_step("counter")
    assert [step for _, step in made[0].trained] == [6, 7, 8, 9, 10, 11, 12]
    assert engine.status().inexact_replays == ()
    assert engine.status().digest_version == 1, "it had steps"
    with pytest.raises(Refused, match="the run uses digest version 1, which this client does not support"):
        open_session(engine, "a client of the future", "nonce", takeover=True, digest_versions=(2,))
    before = engine.status().digest
    train(engine, 13, first_id=20)
    engine.close()
    found = verify.verify(run_dir)
    assert (found.problems, found.step, found.inexact_replays) == ([], 13, [])
    assert verify.inspect(run_dir, 12).record.digest == before


@pytest.mark.parametrize("name", TORCH)
def test_a_torch_run_is_replayed_within_the_tolerance_and_trained_on(
    name: str, tmp_path: Path, engines: list[Engine]
) -> None:
    run_dir = unpack(name, tmp_path)
    assert verify.verify(run_dir).problems == []
    run_dir = unpack(name, tmp_path)  # again, as the kill left it
    engine = start(run_dir, engines)
    status = engine.status()
    assert status.step == last_step(name)
    behind = RUNS[name][0] + 1
    (replay,) = status.inexact_replays
    assert (replay.first_step, replay.last_step, replay.accepted) == (behind, last_step(name), False)
    assert status.newest_checkpoint is not None
    assert status.newest_checkpoint.step == status.step, "saved before anything follows from it"
    train(engine, last_step(name) + 1)
    engine.close()
    found = verify.verify(run_dir)
    assert found.problems == []
    assert found.inexact_replays == [replay]
    record = json.loads(
        (run_dir / "checkpoints" / status.newest_checkpoint.name / "manifest.json").read_text()
    )
    assert record["inexact_replays"] == [vars(replay)]


def test_a_numerics_version_is_what_makes_the_tolerance_apply(tmp_path: Path, engines: list[Engine]) -> None:
    from maskwire_server.training import numerics
    from maskwire_server.training.trainer import TorchTrainer

    def other_losses(self: TorchTrainer, *step: Any) -> Any:
        result = TorchTrainer.train_step(self, *step)
        losses = type(result.losses)(
            result.losses.loss, (result.losses.generator_loss or 0) * 1.0001, result.losses.critic_loss
        )
        return type(result)(**{**vars(result), "losses": losses})

    assert numerics.NUMERICS_VERSION > 1
    run_dir = unpack("torch", tmp_path)
    as_then = {**machine_of(run_dir), "numerics": "1"}
    with pytest.raises(InexactReplayError, match="step 7 computed again"):
        start(run_dir, engines, train_step=other_losses, machine=as_then)
    engine = start(run_dir, engines, train_step=other_losses)
    assert len(engine.status().inexact_replays) == 1
    assert engine.status().versions["numerics"] == str(numerics.NUMERICS_VERSION)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"objective": {"preset": "mdlm"}}, "objective.preset is 'x-transformers' in the run, but 'mdlm' in"),
        ({"objective": {"self_cond_prob": 0.9}}, "objective.self_cond_prob is 0.5 in the run, but 0.9 in"),
        ({"model": {"dim": 16}}, "model.dim is 8 in the run, but 16 in the configuration"),
        ({"run": {"seed": 3}}, "run.seed is 0 in the run, but 3 in the configuration"),
    ],
)
def test_what_is_set_and_differs_is_refused_by_name(section: Any, words: str, tmp_path: Path) -> None:
    run_dir = unpack("x-transformers", tmp_path)
    with pytest.raises(RunDirectoryError, match=words):
        recorded_config.of_run(config.load(None, **section), run_dir)


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_values_are_those_of_the_record_whatever_the_preset_says_now(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = unpack(name, tmp_path)
    recorded = json.loads((run_dir / "checkpoints" / "kept" / "manifest.json").read_text())["configuration"]
    monkeypatch.setitem(config.PRESETS, name, {"schedule": "quadratic", "self_cond_prob": 0.77})
    for said in ({}, {"objective": {"preset": name}}):
        whole = recorded_config.of_run(config.load(None, **said), run_dir)
        assert as_recorded(whole.model, whole.objective) == {
            key: recorded[key] for key in ("model", "objective")
        }
    module = maskwire_server.load(run_dir / "checkpoints" / "kept")
    assert as_recorded(module.config, module.objective)["objective"] == recorded["objective"]


def test_an_option_that_the_record_lacks_has_its_default(tmp_path: Path) -> None:
    """As an older run looks to a version with a new option, in its section or in a preset."""
    record = json.loads(config.load(None, objective={"preset": "cmlm"}, run={"seed": 4}).canonical())
    del record["model"]["qk_norm"], record["objective"]["no_replace_prob"]
    canonical = json.dumps(record).encode()
    journal = Journal(tmp_path / "run")
    journal.create({"run_id": "a", "seed": 4, "canonical": canonical}, bytes(32))
    journal.close()
    whole = recorded_config.of_run(config.load(None), tmp_path / "run")
    assert (whole.run.seed, whole.model.qk_norm, whole.objective.no_replace_prob) == (4, False, 0.0)
    assert whole.canonical() == canonical, "the first digest is of the recorded bytes"
    with pytest.raises(RunDirectoryError, match=r"model\.qk_norm is False in the run, but True in the con"):
        recorded_config.of_run(config.load(None, model={"qk_norm": True}), tmp_path / "run")


def test_an_option_that_this_version_does_not_know_is_named(tmp_path: Path) -> None:
    record = json.loads(config.load(None).canonical())
    record["objective"]["of_the_future"] = 1
    journal = Journal(tmp_path / "run")
    journal.create({"run_id": "a", "seed": 0, "canonical": json.dumps(record).encode()}, bytes(32))
    journal.close()
    with pytest.raises(RunDirectoryError, match=r"the run has recorded objective\.of_the_future, which"):
        recorded_config.of_run(config.load(None), tmp_path / "run")


def test_a_replay_across_an_inexact_one_has_the_tolerance_too(tmp_path: Path, engines: list[Engine]) -> None:
    run_dir = unpack("torch", tmp_path)
    engine = start(run_dir, engines)
    train(engine, 19, 20, 21)
    engine.close()
    whole = recorded_config.of_run(config.load(None, **SETTINGS), run_dir)

    def go_to(step: int) -> int:
        _, inexact = rewind(
            run_dir, lambda: trainer_on_its_machine(run_dir, whole), whole.model_dump(mode="json"),
            seed=whole.run.seed, canonical=whole.canonical(), to_step=step, out=None,
        )  # fmt: skip
        return inexact

    assert go_to(21) == 0, "behind the checkpoint that was saved, and computed by this version"
    for checkpoint in (run_dir / "checkpoints").glob("replayed-*"):
        checkpoint.rename(tmp_path / checkpoint.name)
    go_to(21)  # from the checkpoint before it, through the steps of the other version


def test_the_commands_open_an_older_run(tmp_path: Path) -> None:
    from serving import ServerProcess

    import maskwire

    run_dir = unpack("torch", tmp_path)
    move_to_this_machine(run_dir)
    command = [SERVER, "serve", "--run-dir", str(run_dir), "--set=serve.address=127.0.0.1:0"]
    command += ["--set=optimizer.learning_rate=0.01", "--set=optimizer.warmup_steps=0"]
    server = ServerProcess(tmp_path / "server", command)
    server._command = command
    server.start()
    try:
        with maskwire.attach(server.address) as client:
            status = client.status()
        (replay,) = status.inexact_replays
        assert (replay.lineage, replay.first_step, replay.last_step, replay.accepted) == (1, 7, 18, False)
        shown = fork_server.run(
            [SERVER.replace("maskwire-server", "maskwire"), "status", "--target", server.address],
            text=True,
            check=True,
        )
        assert "steps 7 to 18 (lineage 1)" in shown.stdout
    finally:
        assert server.stop() == 0
    for arguments in (
        ["verify"],
        ["inspect", "18"],
        ["replay", "--to", "18", "--set=optimizer.learning_rate=0.01"],
        ["export", str(tmp_path / "weights")],
    ):
        done = fork_server.run([SERVER, *arguments, "--run-dir", str(run_dir)], text=True)
        assert done.returncode == 0, done.stderr
        if arguments == ["verify"]:
            assert "within the tolerance): steps 7 to 18 of lineage 1" in done.stdout
