"""The training loop, around a trainer that counts."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from counting_trainer import Counting, Numbered, evaluation, fit

from maskwire.data.file_data import ByteData
from maskwire.data.token_data import TokenData
from maskwire.errors import DataMismatchError
from maskwire.loggers.progress import training_progress
from maskwire.protocol.fit import FitResult
from maskwire.results import StepResult, StepsPage


def test_each_step_gets_its_own_batch_up_to_an_absolute_step(tmp_path: Path) -> None:
    trainer = Counting(step=4)
    metrics = tmp_path / "metrics.jsonl"
    result = fit(trainer, Numbered(), until_step=9, progress=False, metrics=metrics, learning_rate=0.5)
    assert trainer.batches == [5, 6, 7, 8, 9]
    assert trainer.options == [{"learning_rate": 0.5}] * 5
    assert (result.first_step, result.step, result.tokens) == (5, 9, 50)
    begun, *lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert (begun["event"], begun["step"]) == ("started", 4)
    assert [line["step"] for line in lines] == [5, 6, 7, 8, 9]
    assert all((line["run_id"], line["lineage"]) == ("run", 1) for line in [begun, *lines])
    again = fit(trainer, Numbered(), until_step=9, progress=False)
    assert (again.tokens, again.last) == (0, None)


def test_evaluations_and_checkpoints_come_at_their_multiples() -> None:
    trainer = Counting(step=1)
    result = fit(
        trainer, Numbered(), until_step=10, evaluate=evaluation, eval_every=4, checkpoint_every=3,
        progress=False,
    )  # fmt: skip
    assert [found.step for found in result.evaluations] == [4, 8]
    assert trainer.saved == [3, 6, 9]
    assert result.step == 10


@pytest.mark.parametrize("option", ["until_step", "eval_every", "checkpoint_every"])
@pytest.mark.parametrize("value", [-5, 2.5, 4.0, True, "4", float("inf")])
def test_a_number_of_steps_that_cannot_be_one_is_refused_before_anything_is_asked(
    option: str, value: Any
) -> None:
    options: dict[str, Any] = {"until_step": 4, "evaluate": evaluation, option: value}
    with pytest.raises(ValueError, match=f"{option} must be .*at least [01].*got {value!r}"):
        fit(object(), Numbered(), progress=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["eval_every", "checkpoint_every"])
def test_an_interval_of_0_is_refused_and_none_is_said_to_mean_never(option: str) -> None:
    options: dict[str, Any] = {"evaluate": evaluation, option: 0}
    with pytest.raises(ValueError, match=f"{option} must be at least 1, or None for never, got 0"):
        fit(Counting(), Numbered(), until_step=4, progress=False, **options)
    assert fit(Counting(), Numbered(), until_step=np.int64(2), progress=False, **{option: None}).step == 2


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (None, r"data.batch\(1\) must return rows of token ids, got None"),
        ([1, 2, 3], r"data.batch\(1\) must return rows.*in no row: return \[row\]"),
        (np.arange(3), r"data.batch\(1\) must return rows.*in no row: return \[row\]"),
        ("text", r"data.batch\(1\) must be rows of token ids, got str: encode the text"),
        ({"input_ids": [[1]]}, r"data.batch\(1\) must be rows of token ids, got dict: pass its 'input_ids'"),
    ],
)
def test_a_batch_that_is_no_rows_is_named_by_its_step(rows: Any, words: str) -> None:
    class Wrong:
        def batch(self, step: int) -> Any:
            return rows

    with pytest.raises(TypeError, match=words):
        fit(Counting(), Wrong(), until_step=2, progress=False)


@pytest.mark.parametrize("found", [2.5, None, {"bits_per_token": 1.0}])
def test_an_evaluation_that_returns_no_result_is_told_what_to_return(found: Any) -> None:
    words = rf"evaluate must return an EvalResult, got {type(found).__name__}: .*`return trainer\.evaluate"
    with pytest.raises(TypeError, match=words):
        fit(Counting(), Numbered(), until_step=2, progress=False, evaluate=lambda _: found, eval_every=1)


def test_metrics_are_json_also_when_a_loss_is_not_a_number(tmp_path: Path) -> None:
    metrics = tmp_path / "m.jsonl"
    fit(Counting(), Numbered(), until_step=4, progress=False, metrics=metrics)
    lines = [
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
        for line in metrics.read_text().splitlines()
    ]
    assert lines[2]["loss"] is None
    assert lines[2]["outcome"] == "SKIPPED_NON_FINITE"
    assert lines[3] == lines[3] | {"loss": 0.25, "tokens": 10, "gradient_norm": 0.5, "critic_loss": None}


def test_ctrl_c_finishes_what_is_in_flight_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Counting()

    def interrupt(result: StepResult) -> None:
        if result.step == 5:
            raise KeyboardInterrupt

    result = fit(trainer, Numbered(), until_step=1000, on_step=interrupt)
    assert result.interrupted
    assert result.step == trainer.handed_in < 1000
    assert trainer.in_flight == 0
    assert "run the same command to resume" in capsys.readouterr().err


def test_an_error_of_a_step_comes_out() -> None:
    with pytest.raises(ValueError, match="bad batch"):
        fit(Counting(fail_at=3), Numbered(), until_step=10, progress=False)


@pytest.mark.parametrize(
    "given",
    [{}, {"evaluate": evaluation}, {"eval_every": 2}],
    ids=["neither", "no interval", "no evaluation"],
)
def test_the_best_of_no_evaluations_is_refused_before_anything_is_trained(given: dict[str, Any]) -> None:
    trainer = Counting()
    with pytest.raises(ValueError, match="save_best needs evaluate and eval_every"):
        fit(trainer, Numbered(), until_step=4, save_best=True, progress=False, **given)
    assert trainer.batches == []


def test_progress_in_a_log_ends_with_where_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Counting(), Numbered(), until_step=6)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("step 6/6  loss 0.1667")
    assert "tokens/s" in last


def test_a_checkpoint_that_an_earlier_call_was_stopped_before_is_made_up_for() -> None:
    trainer = Counting(step=6)
    fit(trainer, Numbered(), until_step=6, checkpoint_every=3, progress=False)
    assert trainer.saved == [6]
    fit(trainer, Numbered(), until_step=6, checkpoint_every=3, progress=False)
    assert trainer.saved == [6], "once"


def test_changed_data_is_refused_with_the_files_that_were_written_last(tmp_path: Path) -> None:
    def refuse(fingerprint: dict[str, str], *, allow_changed: bool) -> None:
        assert not allow_changed
        differs = [part for part, value in fingerprint.items() if value != was.get(part)]
        raise DataMismatchError(
            "the data is not what the run was trained on", reason="DATA_CHANGED",
            metadata={"changed": ",".join(differs)},
        )  # fmt: skip

    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("some text")
        os.utime(tmp_path / f"{number}.txt", (number, number * 3600))
    os.utime(tmp_path / "1.txt", (0, 86400))
    was = ByteData(tmp_path, length=4, batch_size=1, pattern="[0-3].txt").fingerprint()
    trainer = Counting()
    trainer.use_data = refuse  # type: ignore[attr-defined]
    trainer.use_tokenizer = lambda _: None  # type: ignore[attr-defined]
    words = (
        rf"of 5 files, .* written last: {tmp_path}/1\.txt \(1970-01-02 00:00:00 UTC\), {tmp_path}/4\.txt "
        rf"\(1970-01-01 04:00:00 UTC\), {tmp_path}/3\.txt .*--pattern"
    )
    with pytest.raises(DataMismatchError, match=words) as found:
        fit(trainer, ByteData(tmp_path, length=4, batch_size=1), until_step=4, progress=False)
    assert (found.value.reason, found.value.metadata["changed"].count("content")) == ("DATA_CHANGED", 1)
    was = ByteData(tmp_path, length=4, batch_size=1).fingerprint()
    with pytest.raises(DataMismatchError) as found:
        fit(trainer, ByteData(tmp_path, length=5, batch_size=1), until_step=4, progress=False)
    assert "written last" not in str(found.value), "the files are what they were"


@pytest.mark.parametrize(
    ("recorded", "held_out", "words"),
    [
        (
            {"held_out": "0.07"},
            0,
            "held_out was 0.07 and is not set: train on the data split with held_out=0.07",
        ),
        ({}, 0.5, "held_out was not set and is 0.5: train on the data without a split"),
    ],
)
def test_another_held_out_share_is_named_first_as_the_cause(
    recorded: dict[str, str], held_out: float, words: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise DataMismatchError("the data differs", metadata={"changed": "content,documents,held_out"})

    trainer = Counting()
    trainer.data = recorded
    trainer.use_data = refuse  # type: ignore[attr-defined]
    data = TokenData([[number] * 8 for number in range(40)], length=4, batch_size=1)
    with pytest.raises(DataMismatchError) as found:
        fit(trainer, data.split(held_out)[0] if held_out else data, until_step=4, progress=False)
    assert str(found.value) == f"{words}. The data differs"


def test_waits_for_the_server_do_not_count_for_the_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = waited = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    lines = training_progress(True, 0, 100, lambda: waited)
    now, waited = 310.0, 300.0
    lines.update(10, 1.0, 500)
    assert capsys.readouterr().err == "step 10/100  loss 1.0000  50 tokens/s  90 s left\n"


def test_the_result_counts_no_wait_for_the_server_as_training() -> None:
    trainer = Counting()
    trainer.seconds_waited = 5.0  # before this call
    began = time.monotonic()

    def wait(found: StepResult) -> None:
        trainer.seconds_waited += (time.monotonic() - began) / 2

    result = fit(trainer, Numbered(), until_step=1, progress=False, on_step=wait)
    assert 0 < result.seconds_waited < result.seconds
    assert result.tokens_per_second == 10 / (result.seconds - result.seconds_waited)
    assert FitResult(1, 1, seconds=3.0, tokens=10).tokens_per_second == 10 / 3
    assert FitResult(1, 0).tokens_per_second == 0


def test_a_tokenizer_is_said_only_when_something_is_trained() -> None:
    class Knowing(Numbered):
        tokenizer = "bytes"

    said: list[str] = []
    trainer = Counting(step=4)
    trainer.use_tokenizer = said.append  # type: ignore[attr-defined]
    fit(trainer, Knowing(), until_step=4, progress=False)
    assert said == []
    fit(trainer, Knowing(), until_step=5, progress=False)
    assert said == ["bytes"]


def test_an_evaluation_that_was_broken_off_comes_first_in_the_next_call_with_its_checkpoint() -> None:
    class Stopped(BaseException):
        pass

    def broken(trainer: Counting) -> Any:
        raise Stopped

    def found(trainer: Counting) -> Any:
        return SimpleNamespace(
            step=trainer.step, bits_per_token=2.0, nats_per_token=1.4 / trainer.step, standard_error=None
        )

    class Saving(Counting):
        def checkpoints(self) -> list[Any]:
            return [SimpleNamespace(step=step, digest=self.digest, score=1.4 / step) for step in self.saved]

        def checkpoint(self, **options: Any) -> Any:
            raise_now = self.broken_save
            self.broken_save = False
            if raise_now:
                raise Stopped
            return super().checkpoint(**options)

        broken_save = False

    trainer = Saving()
    options: dict[str, Any] = {"until_step": 8, "eval_every": 4, "save_best": True, "progress": False}
    with pytest.raises(Stopped):
        fit(trainer, Numbered(), evaluate=broken, **options)
    assert (trainer.step, trainer.marked) == (4, [])
    trainer.broken_save = True
    with pytest.raises(Stopped):
        fit(trainer, Numbered(), evaluate=found, **options)
    assert (trainer.step, trainer.saved, trainer.marked) == (4, [], []), "its checkpoint is owed too"
    done = fit(trainer, Numbered(), evaluate=found, **options)
    assert [one.step for one in done.evaluations] == [4, 8]
    assert (trainer.saved, trainer.marked) == ([4, 8], [4, 8])
    assert fit(trainer, Numbered(), evaluate=found, **options).evaluations == [], "each once"


def test_an_evaluation_is_due_only_at_its_multiples_behind_a_step_of_this_lineage() -> None:
    def steps(trainer: Counting, **options: Any) -> list[int]:
        done = fit(
            trainer, Numbered(), until_step=trainer.step, evaluate=evaluation, progress=False, **options
        )
        return [one.step for one in done.evaluations]

    assert steps(Counting(step=0), eval_every=4) == []
    assert steps(Counting(step=5), eval_every=4) == []
    assert steps(Counting(step=4), eval_every=4) == [4]
    restored = Counting(step=4)
    restored.lineage, restored.evaluated = 2, (1, 4)
    restored.steps_page = lambda **_: StepsPage("run", 2, 1, 4, "a", (), "")  # type: ignore[method-assign]
    assert steps(restored, eval_every=4) == [], "the state of a checkpoint that was restored"
    older = Counting(step=4)
    older.steps_page = None  # type: ignore[assignment,method-assign]
    older.evaluated = (1, 4)
    assert steps(older, eval_every=4) == []
