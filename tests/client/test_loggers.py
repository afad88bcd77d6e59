"""Each logger's own reader reads what was written, whatever came between: each step once, none missing."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
from recorded_run import Server, log_steps

from maskwire.loggers.csv_file import COLUMNS, CsvFile
from maskwire.loggers.json_lines import JsonLines
from maskwire.loggers.logger import Logger
from maskwire.loggers.records import Place
from maskwire.loggers.tensorboard import TensorBoard

Curves = dict[int, dict[str, list[tuple[int, float]]]]
"""By lineage and name: (step, value)."""


class Kind:
    """A logger in a folder, and a reader of what it wrote."""

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
    def logger(self) -> Logger:
        pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
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


def truncate(path: Path, count: int) -> None:
    os.truncate(path, path.stat().st_size - count)


KINDS = [JsonKind, CsvKind, TensorBoardKind]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__.removesuffix("Kind"))
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    made: Kind = request.param(tmp_path)
    return made


def steps_of(curves: Curves, lineage: int, name: str = "train/loss") -> list[int]:
    one = curves.get(lineage) or curves.get(0) or {}
    return [step for step, _ in one.get(name, [])]


def test_each_step_is_read_once_after_an_interruption(kind: Kind) -> None:
    log_steps(kind.logger(), Server((0, 0, 0)), range(1, 6), evaluated=5)
    log_steps(kind.logger(), Server((0, 0, 9)), range(10, 12), evaluated=11)  # 6 to 9 were not seen
    log_steps(kind.logger(), Server((0, 0, 11)))  # nothing is missing
    curves = kind.curves()
    assert steps_of(curves, 1) == [*range(1, 12)]
    assert steps_of(curves, 1, "eval/bits_per_token") == [5, 11]
    values = {value for by_name in curves.values() for _, value in by_name["eval/bits_per_token"]}
    assert values == {2.5}


def test_a_record_that_was_not_written_whole_is_filled_in(kind: Kind) -> None:
    log_steps(kind.logger(), Server((0, 0, 0)), range(1, 6))
    kind.tear()
    log_steps(kind.logger(), Server((0, 0, 5)), range(6, 8))
    assert steps_of(kind.curves(), 1) == [*range(1, 8)]


def test_an_evaluation_that_was_repeated_is_read_once(kind: Kind) -> None:
    log_steps(kind.logger(), Server((0, 0, 0)), range(1, 6), evaluated=5)
    log_steps(kind.logger(), Server((0, 0, 5)), evaluated=5)
    assert steps_of(kind.curves(), 1, "eval/bits_per_token") == [5]


def test_a_log_that_was_begun_later_has_the_steps_from_there(kind: Kind) -> None:
    log_steps(kind.logger(), Server((0, 0, 4)))  # stopped before its first step
    log_steps(kind.logger(), Server((0, 0, 6)), range(7, 8))
    assert steps_of(kind.curves(), 1) == [5, 6, 7]


def test_after_a_restore_the_new_lineage_begins_at_its_checkpoint(kind: Kind) -> None:
    log_steps(kind.logger(), Server((0, 0, 0)), range(1, 5))
    log_steps(kind.logger(), Server((0, 0, 6), (1, 2, 3)), range(4, 6))
    curves = kind.curves()
    if 0 in curves:  # one curve, of the history that the run has now
        assert steps_of(curves, 0) == [1, 2, 3, 4, 5]
    else:
        assert steps_of(curves, 1) == [1, 2, 3, 4, 5, 6]
        assert steps_of(curves, 2) == [3, 4, 5]


def test_a_log_ahead_of_its_run_begins_again(kind: Kind) -> None:
    log_steps(kind.logger(), Server((0, 0, 0)), range(1, 9))
    log_steps(kind.logger(), Server((0, 0, 3)), range(4, 6))  # a backup of the run was put back
    found = steps_of(kind.curves(), 1)
    assert found[-2:] == [4, 5]
    if 0 in kind.curves():
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
