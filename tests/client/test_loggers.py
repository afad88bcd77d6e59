"""Each logger's own reader reads what was written, whatever came between: each step once, none missing."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import logger_packages
import pytest
from recorded_run import Server, log_steps

from maskwire.loggers.csv_file import COLUMNS, CsvFile
from maskwire.loggers.json_lines import JsonLines
from maskwire.loggers.log_thread import LogThread
from maskwire.loggers.logger import Logger
from maskwire.loggers.records import Place
from maskwire.loggers.tensorboard import TensorBoard
from maskwire.loggers.trackio import Trackio
from maskwire.loggers.wandb import WandB

Curves = dict[int, dict[str, list[tuple[int, float]]]]
"""By lineage and name: (step, value)."""


class Kind:
    """A logger in a folder, and a reader of what it wrote."""

    package: str | None = None
    stand_in = False
    """Whether `logger_packages` stands in for the package."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def logger(self) -> Logger:
        raise NotImplementedError

    def curves(self) -> Curves:
        raise NotImplementedError

    def tear(self) -> None:
        """Leave the last record incomplete, as a kill does."""


def by_lineage(rows: list[dict[str, Any]]) -> Curves:
    found: Curves = {}
    for row in rows:
        for name, field in (("train/loss", "generator_loss"), ("eval/bits_per_token", "eval_bits_per_token")):
            if row.get(field) not in (None, ""):
                curves = found.setdefault(int(row["lineage"]), {})
                curves.setdefault(name, []).append((int(row["step"]), float(row[field])))
    return found


class JsonKind(Kind):
    def logger(self) -> Logger:
        return JsonLines(self.folder / "m.jsonl")

    def curves(self) -> Curves:
        return by_lineage([json.loads(line) for line in (self.folder / "m.jsonl").read_text().splitlines()])

    def tear(self) -> None:
        truncate(self.folder / "m.jsonl", 10)


class CsvKind(Kind):
    def logger(self) -> Logger:
        return CsvFile(self.folder / "m.csv")

    def curves(self) -> Curves:
        with (self.folder / "m.csv").open(newline="") as file:
            return by_lineage(list(csv.DictReader(file)))

    def tear(self) -> None:
        truncate(self.folder / "m.csv", 10)


class TensorBoardKind(Kind):
    package = "tensorboard"

    def logger(self) -> Logger:
        return TensorBoard(self.folder / "tb")

    def curves(self) -> Curves:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        reader = EventAccumulator(str(self.folder / "tb" / "run"), size_guidance={"scalars": 0})
        reader.Reload()
        tags = {"train/loss": "train/generator_loss", "eval/bits_per_token": "eval/bits_per_token"}
        return {
            0: {
                name: [(event.step, event.value) for event in reader.Scalars(tag)]
                for name, tag in tags.items()
                if tag in reader.Tags()["scalars"]
            }
        }

    def tear(self) -> None:
        truncate(max((self.folder / "tb" / "run").iterdir()), 10)


class WandBKind(Kind):
    package = "wandb"

    def logger(self) -> Logger:
        return WandB("project", mode="offline", folder=self.folder)

    def tear(self) -> None:
        truncate(max(self.folder.glob("wandb/offline-run-*/*.wandb")), 1000)

    def curves(self) -> Curves:
        from wandb.proto.wandb_internal_pb2 import Record

        from maskwire.loggers.wandb_offline_reader import messages

        found: Curves = {}
        for path in sorted(self.folder.glob("wandb/offline-run-*/*.wandb")):
            lineage = int(path.stem.removeprefix("run-run").removeprefix("-lineage-") or 1)
            curves = found.setdefault(lineage, {})
            for message in messages(path.read_bytes()):
                row = Record.FromString(message).history
                for item in row.item:
                    name = {"train/generator_loss": "train/loss"}.get(item.nested_key[0], item.nested_key[0])
                    if name != "train/loss" or item.nested_key[0] == "train/generator_loss":
                        curves.setdefault(name, []).append((row.step.num, float(json.loads(item.value_json))))
        return found


class TrackioKind(Kind):
    package = "trackio"

    def logger(self) -> Logger:
        return Trackio(self.project)

    @property
    def project(self) -> str:
        return self.folder.name

    def curves(self) -> Curves:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        found: Curves = {}
        for run in trackio.Api().runs(self.project):
            curves = found.setdefault(int(run.name.removeprefix("run").removeprefix("-") or 1), {})
            for row in SQLiteStorage.get_logs(self.project, run.name):
                for name, field in (("train/loss", "train/generator_loss"), ("eval/bits_per_token",) * 2):
                    if field in row:
                        curves.setdefault(name, []).append((row["step"], row[field]))
        return found


def truncate(path: Path, count: int) -> None:
    os.truncate(path, path.stat().st_size - count)


class WandBStandInKind(WandBKind):
    stand_in = True

    def tear(self) -> None:
        truncate(max(self.folder.glob("wandb/offline-run-*/*.wandb")), 150)


class TrackioStandInKind(TrackioKind):
    stand_in = True


KINDS = [JsonKind, CsvKind, TensorBoardKind, WandBKind, TrackioKind, WandBStandInKind, TrackioStandInKind]


def interrupted(kind: Kind) -> None:
    log_steps(kind.logger(), Server((0, 0, 0)), range(1, 6), evaluated=5)
    log_steps(kind.logger(), Server((0, 0, 9)), range(10, 12), evaluated=11)  # 6 to 9 were not seen
    log_steps(kind.logger(), Server((0, 0, 11)))  # nothing is missing


def torn(kind: Kind) -> None:
    log_steps(kind.logger(), Server((0, 0, 0)), range(1, 6))
    kind.tear()
    log_steps(kind.logger(), Server((0, 0, 5)), range(6, 8))


def evaluated_again(kind: Kind) -> None:
    log_steps(kind.logger(), Server((0, 0, 0)), range(1, 6), evaluated=5)
    log_steps(kind.logger(), Server((0, 0, 5)), evaluated=5)


def begun_later(kind: Kind) -> None:
    log_steps(kind.logger(), Server((0, 0, 4)))  # stopped before its first step
    log_steps(kind.logger(), Server((0, 0, 6)), range(7, 8))


def restored(kind: Kind) -> None:
    log_steps(kind.logger(), Server((0, 0, 0)), range(1, 5))
    log_steps(kind.logger(), Server((0, 0, 6), (1, 2, 3)), range(4, 6))
    log_steps(kind.logger(), Server((0, 0, 6), (1, 2, 6)))


def ahead_of_its_run(kind: Kind) -> None:
    log_steps(kind.logger(), Server((0, 0, 0)), range(1, 9))
    log_steps(kind.logger(), Server((0, 0, 3)), range(4, 6))  # a backup of the run was put back


SCENARIOS = [interrupted, torn, evaluated_again, begun_later, restored, ahead_of_its_run]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__.removesuffix("Kind"))
def curves(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curves]:
    """What each scenario leaves, as the logger's own reader reads it."""
    kind, folder = request.param, tmp_path_factory.mktemp("logs")
    if kind is TrackioKind:  # read once, when trackio is imported; by default it writes to the home folder
        os.environ["TRACKIO_DIR"] = str(folder / "trackio")
    with pytest.MonkeyPatch.context() as patch:
        if kind.stand_in:
            logger_packages.install(patch)
        elif kind.package is not None:
            pytest.importorskip(kind.package, reason=f"the package {kind.package} is not installed")
        if kind is WandBKind:  # its own processes end with the one that logs
            command = [sys.executable, __file__, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        else:
            write_all(kind, folder)
        return {scenario.__name__: kind(folder / scenario.__name__).curves() for scenario in SCENARIOS}


def write_all(kind: type[Kind], folder: Path) -> None:
    for scenario in SCENARIOS:
        (folder / scenario.__name__).mkdir()
        scenario(kind(folder / scenario.__name__))


def steps_of(curves: Curves, lineage: int, name: str = "train/loss") -> list[int]:
    one = curves.get(lineage) or curves.get(0) or {}
    return [step for step, _ in one.get(name, [])]


def test_each_step_is_read_once_after_an_interruption(curves: dict[str, Curves]) -> None:
    found = curves["interrupted"]
    assert steps_of(found, 1) == [*range(1, 12)]
    assert steps_of(found, 1, "eval/bits_per_token") == [5, 11]
    values = {value for by_name in found.values() for _, value in by_name["eval/bits_per_token"]}
    assert values == {2.5}


def test_a_record_that_was_not_written_whole_is_filled_in(curves: dict[str, Curves]) -> None:
    assert steps_of(curves["torn"], 1) == [*range(1, 8)]


def test_an_evaluation_that_was_repeated_is_read_once(curves: dict[str, Curves]) -> None:
    assert steps_of(curves["evaluated_again"], 1, "eval/bits_per_token") == [5]


def test_a_log_that_was_begun_later_has_the_steps_from_there(curves: dict[str, Curves]) -> None:
    assert steps_of(curves["begun_later"], 1) == [5, 6, 7]


def test_after_a_restore_the_new_lineage_begins_at_its_checkpoint(curves: dict[str, Curves]) -> None:
    found = curves["restored"]
    if 0 in found:  # one curve, of the history that the run has now
        assert steps_of(found, 0) == [1, 2, 3, 4, 5, 6]
    else:
        assert steps_of(found, 1) == [1, 2, 3, 4, 5, 6]
        assert steps_of(found, 2) == [3, 4, 5, 6]


def test_a_log_ahead_of_its_run_begins_again(curves: dict[str, Curves]) -> None:
    found = steps_of(curves["ahead_of_its_run"], 1)
    assert found[-2:] == [4, 5]
    if 0 in curves["ahead_of_its_run"]:
        assert found == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("text", ["step,loss\n1,2\n", "some text", "run_id,lineage,steps\n"])
def test_a_csv_file_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"m\.csv is not a metrics file: it begins with b"):
        CsvFile(path).open(Place("run", 1, 0))
    assert path.read_text() == text


def test_the_columns_of_a_csv_file_are_the_fields_of_all_records(tmp_path: Path) -> None:
    log_steps(JsonLines(tmp_path / "m.jsonl"), Server((0, 0, 0)), range(1, 5), evaluated=4)
    log_steps(JsonLines(tmp_path / "m.jsonl"), Server((0, 0, 6), (1, 2, 3)), range(4, 6))
    log_steps(JsonLines(tmp_path / "m.jsonl"), Server((0, 0, 2), run_id="other"))
    names: set[str] = set()
    for line in (tmp_path / "m.jsonl").read_text().splitlines():
        names |= json.loads(line).keys()
    assert names == set(COLUMNS)


@pytest.mark.parametrize("kept", range(0, 400, 37))
def test_a_csv_file_cut_anywhere_is_completed(tmp_path: Path, kept: int) -> None:
    def read(path: Path) -> list[str]:
        with path.open(newline="") as file:
            return [row["step"] for row in csv.DictReader(file) if not row["event"]]

    path = tmp_path / "m.csv"
    log_steps(CsvFile(path), Server((0, 0, 0)), range(1, 5))
    os.truncate(path, min(kept, path.stat().st_size))
    log_steps(CsvFile(path), Server((0, 0, 4)), range(5, 6))
    assert read(path)[-1] == "5"
    assert read(path) == [str(step) for step in range(int(read(path)[0]), 6)]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return logger_packages.install(monkeypatch)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (WandB, {"taggs": ["a"]}, r"WandB\(\) has no argument 'taggs': did you mean 'tags'"),
        (WandB, {"foldr": "a"}, r"WandB\(\) has no argument 'foldr': did you mean 'folder'"),
        (WandB, {"dir": "a"}, r"WandB\(\) has no argument 'dir': did you mean 'folder'"),
        (WandB, {"id": "a"}, r"WandB\(\) has no argument 'id'"),
        (Trackio, {"space": "a"}, r"Trackio\(\) has no argument 'space': did you mean 'space_id'"),
        (Trackio, {"name": "a"}, r"Trackio\(\) has no argument 'name'"),
    ],
)
def test_an_option_that_the_package_does_not_have_is_refused_with_the_nearest(
    packages: dict[str, Any], kind: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(TypeError, match=words):
        kind("project", **options)
    kind("project", **{"tags" if kind is WandB else "space_id": "a"})


@pytest.mark.parametrize(("kind", "option"), [(WandB, "tags"), (Trackio, "space_id")])
def test_the_options_are_those_of_the_installed_package(kind: Any, option: str) -> None:
    pytest.importorskip(kind.__name__.lower())
    kind("project", **{option: "a"})
    with pytest.raises(TypeError, match=f"did you mean {option!r}"):
        kind("project", **{f"{option}s": "a"})


@pytest.mark.usefixtures("packages")
def test_a_mode_that_wandb_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="mode must be 'online', 'offline' or None, got 'ofline'"):
        WandB("project", mode="ofline")  # type: ignore[arg-type]


@pytest.mark.usefixtures("packages")
def test_a_file_in_place_of_the_folder_of_wandb_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(NotADirectoryError, match=r"the log wandb project cannot be opened \(Not a directory"):
        LogThread(WandB("project", folder=tmp_path / "a"), Place("run", 1, 0)).opened()


class CacheError(FileNotFoundError, ValueError):
    """As huggingface_hub raises without a network."""


@pytest.mark.parametrize("call", ["runs", "init"])
@pytest.mark.parametrize("error", [ConnectionError("no route"), CacheError("no route")])
def test_trackio_without_a_network_is_reported_and_does_not_stop_training(
    packages: dict[str, Any], call: str, error: Exception
) -> None:
    trackio = packages["trackio"]

    def answer(name: str) -> Any:
        if name == call:
            raise error
        return []

    trackio.Api = lambda: SimpleNamespace(runs=lambda _: answer("runs"))
    trackio.init = lambda *_, **__: answer("init")
    thread = LogThread(Trackio("project"), Place("run", 1, 0))
    assert thread.opened() is None
    thread.close()
    assert thread.failure == (
        "trackio project: no more records are written (RuntimeError: trackio failed: no route; check the "
        "network and trackio's setup); training is not affected"
    )


if __name__ == "__main__":
    write_all(WandBKind, Path(sys.argv[1]))
