"""Recovery where results are not reproducible: close ones are accepted by default, wrong ones never."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from counter import NAN_ID, CounterTrainer
from rig import WAIT, FullDisk, Rig, bare, make_engine, wait_for
from robustness.drift import ROUNDING, PerturbedTrainer, settings, text, trainer
from torch import nn

from maskwire.v1.values import InexactReplay, Losses, Outcome, RunState
from maskwire_server import failpoints
from maskwire_server.batch import Batch, Modes, Payload
from maskwire_server.checkpoints import store
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.config import Config
from maskwire_server.engine.engine import Engine
from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal import inexact_replays
from maskwire_server.journal.records import StepRecord
from maskwire_server.recovery import fingerprint, verify
from maskwire_server.recovery.replay import InexactReplayError
from maskwire_server.recovery.replay_settings import ReplaySettings
from maskwire_server.recovery.tolerance import TOLERANCES, Tolerance, excess, measured_steps
from maskwire_server.requests import RestoreRequest, SaveRequest, SessionRequest, StepRequest
from maskwire_server.results import StepResult
from maskwire_server.training.trainer import TorchTrainer

LONG = {"every_seconds": 1e6}
COMPILED = 200.0
"""The longest wait for a model that is compiled meanwhile."""
KEPT: dict[str, Any] = {"checkpoints": LONG, "serve": {"keep_payloads": "all"}}
BY_TOLERANCE = InexactReplay(1, 1, 3, False)


@pytest.fixture(autouse=True)
def no_failpoints() -> Iterator[None]:
    yield
    failpoints.install(None)


class Rounding(CounterTrainer):
    """Its losses are right but for `error`, relative."""

    error = 0.0
    deterministic, compiled = "no", "off"

    @property
    def versions(self) -> dict[str, str]:
        said = {"deterministic": self.deterministic, "compile": self.compiled, "precision": "fp32"}
        return {**super().versions, **said}

    def train_step(self, *arguments: Any) -> StepResult:
        result = super().train_step(*arguments)
        loss = result.losses.loss * (1 + self.error)
        return StepResult(result.outcome, Losses(loss, loss), result.gradient_norm, 1e-3, 1, 2)


def rounding(error: float, **said: Any) -> type[Rounding]:
    return type("Other", (Rounding,), {"error": error, **said})


def killed(rig: Rig, kind: type[CounterTrainer], steps: int = 3) -> None:
    """A run with steps behind its newest checkpoint; an engine that is closed saves nothing."""
    engine = rig.start(kind, **KEPT)
    for seed in range(steps):
        engine.train_step(bare(seed)).result(WAIT)
    close(rig)


def close(rig: Rig) -> None:
    rig.engines.pop().close()


@pytest.mark.parametrize(
    "said",
    [{"deterministic": "no"}, {"deterministic": "yes", "compiled": "default"}],
    ids=["a GPU without deterministic kernels", "compiled"],
)
def test_close_results_are_accepted_saved_recorded_and_shown(rig: Rig, said: dict[str, str]) -> None:
    killed(rig, rounding(0, **said))
    seen: list[str] = []
    failpoints.install(seen.append)
    engine = rig.start(rounding(1e-4, **said), checkpoints=LONG)
    failpoints.install(None)
    assert seen.index("recovery.replayed") < seen.index("checkpoint.published"), "saved before SERVING"
    status = engine.status()
    assert status.inexact_replays == (BY_TOLERANCE,)
    assert engine.open_session(SessionRequest("me", "n")).result(WAIT).inexact_replays == (BY_TOLERANCE,)
    newest = Checkpoints(rig.folder).all()[0]
    assert (newest.info.step, newest.automatic) == (3, True)
    assert newest.info.name.startswith("replayed-000000003-")
    assert newest.inexact_replays == (BY_TOLERANCE,)
    state = rig.trainer.state
    close(rig)
    engine = rig.start(rounding(1e-4, **said), checkpoints=LONG)
    assert rig.trainer.trained == [], "nothing is computed again that was saved"
    assert (rig.trainer.state, engine.status().inexact_replays) == (state, (BY_TOLERANCE,))
    engine.save(SaveRequest("later")).result(WAIT)
    assert Checkpoints(rig.folder).get("later").inexact_replays == (BY_TOLERANCE,), "for ever"
    close(rig)
    assert verify.verify(rig.folder).inexact_replays == [BY_TOLERANCE]


def test_equal_losses_do_not_show_that_the_weights_are_equal(rig: Rig) -> None:
    killed(rig, rounding(0))
    assert rig.start(rounding(0)).status().inexact_replays == (BY_TOLERANCE,)


@pytest.mark.parametrize("error", [0.004, -0.004, 0.5, float("nan"), float("inf")])
def test_results_beyond_the_tolerance_stop_and_can_be_accepted(rig: Rig, error: float) -> None:
    killed(rig, rounding(0))
    with pytest.raises(InexactReplayError, match="step 1 computed again gave generator loss"):
        rig.start(rounding(error))
    engine = rig.start(rounding(error), accept_inexact_replay=True)
    assert engine.status().inexact_replays == (InexactReplay(1, 1, 3, True),)
    assert engine.checkpoints()[0].name.startswith("accepted-000000003-")


def test_where_results_are_reproducible_the_bytes_must_be_equal(rig: Rig) -> None:
    killed(rig, rounding(0, deterministic="yes"))
    with pytest.raises(InexactReplayError, match="step 1 computed again gave loss"):
        rig.start(rounding(1e-12, deterministic="yes"))
    engine = rig.start(rounding(0, deterministic="yes"))
    assert engine.status().inexact_replays == ()
    assert [info.name for info in engine.checkpoints()] == ["step-000000000"], "and nothing is saved"


def test_a_changed_fingerprint_still_stops(rig: Rig) -> None:
    killed(rig, rounding(0))
    with pytest.raises(RunDirectoryError, match=r"fingerprint\.compile was 'off'"):
        rig.start(rounding(0, compiled="default"))


@pytest.mark.parametrize("outcome", [Outcome.SKIPPED_NON_FINITE, Outcome.OUT_OF_MEMORY])
def test_a_changed_outcome_stops_whatever_is_accepted(rig: Rig, outcome: Outcome) -> None:
    def ends_otherwise(self: Rounding, *step: Any) -> StepResult:
        result = Rounding.train_step(self, *step)
        return StepResult(outcome if step[1] == 2 else result.outcome, result.losses, result.gradient_norm)

    killed(rig, rounding(0))
    for accept in (False, True):
        with pytest.raises(InexactReplayError, match=f"recomputing it gave {outcome.name}"):
            rig.start(rounding(0, train_step=ends_otherwise), accept_inexact_replay=accept)


def test_a_loss_that_is_absent_is_no_small_difference(rig: Rig) -> None:
    def with_a_critic(self: Rounding, *step: Any) -> StepResult:
        result = Rounding.train_step(self, *step)
        losses = Losses(result.losses.loss, result.losses.generator_loss, 1e-9)
        return StepResult(result.outcome, losses, result.gradient_norm)

    killed(rig, rounding(0))
    with pytest.raises(InexactReplayError, match="critic loss 1e-09, but None was acknowledged"):
        rig.start(rounding(0, train_step=with_a_critic))


@pytest.mark.parametrize("write", ["state", "record"])
def test_a_full_disk_lets_the_run_serve_only_once_the_state_is_saved(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    killed(rig, rounding(0))

    target, name = {"state": (store, "write_manifest"), "record": (inexact_replays, "record")}[write]
    original, full = getattr(target, name), [True]

    def writing(*arguments: Any) -> Any:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device") if write == "state" else FullDisk("full")
        return original(*arguments)

    monkeypatch.setattr(target, name, writing)
    engine = make_engine(rig.folder, rig.config(), rounding(1e-4), on_fatal=rig.fatal.append)
    rig.engines.append(engine)
    wait_for(lambda: engine.status().waiting_for == "space on the disk")
    assert engine.status().state is RunState.RECOVERING
    full[0] = False
    engine.wait_serving(WAIT)
    assert engine.status().inexact_replays == (BY_TOLERANCE,), "once"
    assert engine.checkpoints()[0].step == 3


def test_the_state_is_saved_or_the_run_does_not_serve(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(rig, rounding(0))

    def failing(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr("maskwire_server.checkpoints.store.write_manifest", failing)
        with pytest.raises(RunDirectoryError, match=r"could not be written .*Read-only"):
            rig.start(rounding(1e-4))
    assert rig.start(rounding(-1e-4)).status().inexact_replays == (BY_TOLERANCE,), "once"


def test_stretches_grow_together_and_stay_apart(rig: Rig) -> None:
    killed(rig, rounding(0))
    engine = rig.start(rounding(1e-4), **KEPT)
    for seed in (3, 4):
        engine.train_step(bare(seed)).result(WAIT)
    engine.save(SaveRequest("five")).result(WAIT)
    engine.train_step(bare(5)).result(WAIT)
    close(rig)
    engine = rig.start(rounding(-1e-4), **KEPT)
    two = (BY_TOLERANCE, InexactReplay(1, 6, 6, False))
    assert engine.status().inexact_replays == two
    engine.restore(RestoreRequest("five")).result(WAIT)
    engine.train_step(bare(7)).result(WAIT)
    engine.save(SaveRequest("branch")).result(WAIT)
    assert Checkpoints(rig.folder).get("branch").inexact_replays == (BY_TOLERANCE,), "of its own history"
    assert engine.status().inexact_replays == two
    close(rig)
    for manifest in Checkpoints(rig.folder).all():
        if manifest.info.step:
            shutil.rmtree(rig.folder / "checkpoints" / manifest.info.name)
    engine = rig.start(rounding(0), **KEPT)
    assert engine.status().inexact_replays == (
        InexactReplay(1, 1, 5, False), InexactReplay(1, 6, 6, False), InexactReplay(2, 6, 6, False),
    )  # fmt: skip


def test_the_tolerance_grows_with_the_steps_up_to_the_whole() -> None:
    whole = TOLERANCES["fp32"]
    assert whole.after(0).generator_loss == pytest.approx(0.05 * whole.generator_loss)
    assert whole.after(450).critic_loss == pytest.approx(whole.critic_loss / 2)
    assert whole.after(950) == whole.after(10**6) == whole


def test_what_is_skipped_is_not_computed(rig: Rig) -> None:
    engine = rig.start(rounding(0), checkpoints=LONG)
    engine.train_step(bare(0, first=NAN_ID)).result(WAIT)
    close(rig)
    assert rig.start(rounding(1e-4)).status().inexact_replays == ()


def test_versions_that_say_nothing_are_reproducible() -> None:
    assert fingerprint.reproducible({})
    assert fingerprint.reproducible({"fingerprint.deterministic": "yes", "fingerprint.compile": "off"})
    assert not fingerprint.reproducible({"fingerprint.deterministic": "no"})
    assert not fingerprint.reproducible({"fingerprint.compile": "reduce-overhead"})


# With a real model and critic.

STEPS = 200


class Perturbed(PerturbedTrainer):
    rounding = ROUNDING["tf32"]  # the coarsest for which the tolerance is the narrowest

    @property
    def versions(self) -> dict[str, str]:
        return {**super().versions, "deterministic": "no"}


class DoubledRate(Perturbed):
    def train_step(self, lineage: int, step: int, batch: Batch, modes: Modes, *others: Any) -> StepResult:
        rate = 2 * self._optimizer.learning_rate * min(1.0, step / self._optimizer.warmup_steps)
        return super().train_step(lineage, step, batch, Modes(learning_rate=rate), *others)


class OtherCheckpoint(Perturbed):
    def load(self, folder: Path) -> None:
        super().load(folder.with_name("other"))


def run(
    run_dir: Path,
    whole: Config,
    build: Callable[[], TorchTrainer],
    steps: range = range(0),
    saved: int | None = None,
) -> Engine:
    """Serve until these steps are trained; the caller closes it, which saves nothing."""
    engine = make_engine(run_dir, whole, build)  # type: ignore[arg-type]
    try:
        engine.wait_serving(COMPILED)
        for step in steps:
            sent = Payload(text(step, 8, 16), Modes())
            engine.train_step(StepRequest(sent)).result(COMPILED)
            if step in (20, saved):
                engine.save(SaveRequest("other" if step == 20 else "kept")).result(WAIT)
    except BaseException:
        engine.close()
        raise
    return engine


def whole(seed: int = 3) -> Config:
    made = settings("self", "fp32", run={"seed": seed})
    return made.model_copy(update={"checkpoints": made.checkpoints.model_copy(update={"every_seconds": 1e6})})


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 steps, a checkpoint, and 200 steps after it."""
    folder = tmp_path_factory.mktemp("perturbed") / "run"
    run(folder, whole(), lambda: trainer(Perturbed, whole()), range(1, 41 + STEPS), 40).close()
    return folder


@pytest.fixture
def run_dir(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "run"))


def test_weights_that_round_otherwise_come_back_over_200_steps(run_dir: Path) -> None:
    engine = run(run_dir, whole(), lambda: trainer(Perturbed, whole()))
    status = engine.status()
    engine.close()
    assert status.step == 40 + STEPS
    assert status.inexact_replays == (InexactReplay(1, 41, 40 + STEPS, False),)


@pytest.mark.parametrize(
    "build",
    [
        lambda: trainer(Perturbed, whole(), seed=4),
        lambda: trainer(DoubledRate, whole()),
        lambda: trainer(OtherCheckpoint, whole()),
    ],
    ids=["seed", "learning rate", "checkpoint"],
)
def test_a_wrong_seed_rate_or_checkpoint_is_refused(run_dir: Path, build: Callable[[], TorchTrainer]) -> None:
    with pytest.raises(InexactReplayError, match="relative tolerance"):
        run(run_dir, whole(), build).close()


@pytest.mark.parametrize(
    ("precision", "critic", "size", "steps", "noise"),
    [("bf16", "self", (4, 16), 60, noise) for noise in (1, 2, 17)]
    + [("tf32", "self", (4, 16), 60, 5), ("tf32", "none", (8, 32), 160, 1)],
)
def test_ten_times_the_learning_rate_drifts_no_further_than_the_tolerance(
    precision: str, critic: str, size: tuple[int, int], steps: int, noise: int, tmp_path: Path
) -> None:
    made = settings(critic, "bf16" if precision == "bf16" else "fp32", rate=1e-2)
    kind = type("Rounded", (PerturbedTrainer,), {"rounding": ROUNDING[precision], "noise_seed": noise})
    first, again = trainer(TorchTrainer, made), trainer(kind, made)
    for step in range(1, 21):
        first.train_step(1, step, text(step, *size), Modes())
    first.snapshot().write(tmp_path)
    again.load(tmp_path)
    grown = 0.0
    for step in range(21, 21 + steps):
        batch = text(step, *size)
        was, now = (each.train_step(1, step, batch, Modes()) for each in (first, again))
        record = StepRecord(1, step, None, 1, b"", was.outcome, was.losses, was.gradient_norm, b"")
        allowed = TOLERANCES[precision].after(grown)
        assert excess(record, now, allowed, size[0] * size[1]) is None, f"step {step}"
        grown += measured_steps(1e-2)


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_a_compiled_run_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by torch.compile, without a C++ compiler's half a minute: test_trainer.py has a run with it."""
    compiling = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda block, **options: compiling(block, backend="aot_eager", **options)
    )
    made = whole()
    compiled = made.model_copy(update={"serve": made.serve.model_copy(update={"compile": "default"})})
    folder = tmp_path / "run"
    for steps in (range(1, 6), range(0)):
        engine = run(folder, compiled, lambda: trainer(TorchTrainer, compiled), steps)
        found = engine.status()
        engine.close()
    assert (found.step, found.inexact_replays) == (5, (InexactReplay(1, 1, 5, False),))


def test_the_tolerances_are_those_that_the_page_derives() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "durability.md").read_text()
    for precision, tolerance in TOLERANCES.items():
        numbers = [f"{100 * value:g} %" for value in vars(tolerance).values()]
        assert f"| {precision} | {' | '.join(numbers)} |" in page


def test_a_manifest_of_before_says_nothing_of_replays(rig: Rig) -> None:
    killed(rig, rounding(0))
    from maskwire_server.manifest import Manifest, _body_hash

    path = rig.folder / "checkpoints" / "step-000000000" / "manifest.json"
    body = json.loads(path.read_text())
    del body["inexact_replays"], body["manifest_sha256"]
    older = json.dumps({**body, "manifest_sha256": _body_hash(body)}).encode()
    assert Manifest.from_json(older).inexact_replays == ()


def test_the_largest_scale_of_a_group_counts_as_its_learning_rate() -> None:
    def after_a_step(learning_rate: float, *scales: float) -> Tolerance | None:
        was = {
            "fingerprint.deterministic": "no", "optimizer.learning_rate": learning_rate,
            "optimizer.groups": [{"match": "*", "lr_scale": scale} for scale in scales],
        }  # fmt: skip
        journal: Any = SimpleNamespace(event=lambda _: was)
        recorded = ReplaySettings(journal, was, lambda *_: None, strict=True)
        record = StepRecord(1, 1, None, 1, b"", Outcome.APPLIED, Losses(1.0), 1.0, b"")
        assert len(list(recorded.apply(iter([(record, None)])))) == 1
        recorded.tolerance(None)
        return recorded.tolerance(None)

    assert after_a_step(1e-3, 0.5, 20.0) == after_a_step(2e-2) != after_a_step(1e-3)
    assert after_a_step(1e-3, 0.5) == after_a_step(1e-3)
