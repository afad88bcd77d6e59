"""The loggers of W&B and trackio without these packages: their calls, and a log that the real W&B wrote."""

from __future__ import annotations

import inspect
import lzma
import struct
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import logger_packages
import pytest
from google.protobuf import descriptor_pb2
from recorded_run import Server, log_steps

from maskwire.loggers import wandb as wandb_logger
from maskwire.loggers.log_thread import LogThread
from maskwire.loggers.records import Place
from maskwire.loggers.trackio import Trackio
from maskwire.loggers.wandb import WandB
from maskwire.loggers.wandb_offline_reader import OfflineLog, is_finished, messages, offline_log

LOG = Path(__file__).parents[1] / "fixtures" / "wandb-offline-run.xz"


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return logger_packages.install(monkeypatch)


@pytest.fixture(scope="module")
def written() -> bytes:
    """What the real W&B wrote: `tests/fixtures/write_wandb_log.py`."""
    return lzma.decompress(LOG.read_bytes())


def put(root: Path, content: bytes, name: str = "run-run", time: int = 0) -> Path:
    """A log among W&B's offline files."""
    folder = root / f"offline-run-{time:03}"
    folder.mkdir()
    (folder / f"{name}.wandb").write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("kept", "step", "evaluated"),
    [
        (38_033, 80, True),  # all of it
        (37_993, 80, True),
        (37_992, 79, False),  # the last byte of step 80 is missing
        (32_829, 70, False),  # step 70 is in two blocks
        (32_828, 69, False),
        (923, 5, False),
        (922, 4, False),  # no step: the log says after which one it begins
        (383, 4, False),
    ],
)
@pytest.mark.usefixtures("packages")
def test_the_end_of_a_cut_log_of_wandb_is_its_last_whole_record(
    written: bytes, tmp_path: Path, kept: int, step: int, evaluated: bool
) -> None:
    put(tmp_path, written[:kept])
    assert offline_log(tmp_path, "run") == OfflineLog(Place("run", 1, step), evaluated)


@pytest.mark.parametrize("content", [382, 6, 0, b":W&C"], ids=str)
@pytest.mark.usefixtures("packages")
def test_a_log_of_wandb_without_a_whole_record_is_passed_over_for_the_one_before(
    written: bytes, tmp_path: Path, content: int | bytes
) -> None:
    torn = content + written[4:] if isinstance(content, bytes) else written[:content]
    put(tmp_path, torn, time=1)
    assert offline_log(tmp_path, "run") is None
    put(tmp_path, written[:923], time=0)
    assert offline_log(tmp_path, "run") == OfflineLog(Place("run", 1, 5), False)


@pytest.mark.usefixtures("packages")
def test_the_newest_lineage_is_read_and_other_runs_are_not(written: bytes, tmp_path: Path) -> None:
    put(tmp_path, written, time=3)
    put(tmp_path, written[:1_409], name="run-run-lineage-10", time=1)
    put(tmp_path, written, name="run-run-lineage-9", time=2)
    put(tmp_path, written, name="run-run2", time=4)
    assert offline_log(tmp_path, "run") == OfflineLog(Place("run", 10, 6), False)


@pytest.mark.usefixtures("packages")
def test_a_run_of_wandb_is_finished_once_its_last_record_is_whole(written: bytes, tmp_path: Path) -> None:
    assert is_finished(put(tmp_path, written, time=0))
    assert not is_finished(put(tmp_path, written[:-1], time=1))


def test_the_messages_of_a_log_of_wandb_are_all_read(written: bytes) -> None:
    found = [logger_packages.Record.FromString(data) for data in messages(written)]
    steps = [one.history.step.num for one in found if one.WhichOneof("record_type") == "history"]
    assert steps == [*range(5, 81)]
    assert len(found) == 237


@pytest.mark.parametrize("left", range(9))
def test_a_message_is_found_whatever_the_one_before_leaves_of_its_block(left: int) -> None:
    """A chunk has a head of 7 bytes: what is shorter at the end of a block is padding."""
    whole, first, middle, last = 1, 2, 3, 4
    head = struct.Struct("<IHB")
    before = b"a" * (32_768 - 7 - head.size - left)
    log = b":W&B\0\0\0" + head.pack(0, len(before), whole) + before
    begin = b"b" * max(0, left - head.size)
    fits = left >= head.size
    log += head.pack(0, len(begin), first) + begin if fits else bytes(left)
    rest = b"c" * (32_768 - head.size)
    log += head.pack(0, len(rest), middle if fits else first) + rest
    log += head.pack(0, 1, last) + b"d"
    assert [*messages(log)] == [before, begin + rest + b"d"]


def test_a_log_of_wandb_is_resumed_where_the_real_one_ended(
    packages: dict[str, Any], written: bytes, tmp_path: Path
) -> None:
    (tmp_path / ".wandb").mkdir()  # W&B's folder, if it exists
    put(tmp_path / ".wandb", written)
    packages["wandb"].settings.root_dir, packages["wandb"].settings.mode = str(tmp_path), "offline"
    assert WandB("project").open(Place("run", 1, 90)) == Place("run", 1, 80)


def test_close_waits_until_wandb_has_written_its_last_record(
    packages: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    logger = WandB("project", mode="offline", folder=tmp_path)
    assert logger.open(Place("run", 1, 0)) is None
    run = logger._run
    left = 3  # another process writes the end of the log some time after `finish`

    def sleep(_: float) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            run.append(exit={})

    monkeypatch.setattr(run, "finish", lambda: None)
    monkeypatch.setattr(wandb_logger.time, "sleep", sleep)
    logger.close()
    assert left == 0


def test_a_run_on_the_server_of_wandb_is_resumed_after_its_last_step(packages: dict[str, Any]) -> None:
    place = Place("run", 1, 4)
    assert WandB("project").open(place) is None
    assert packages["wandb"].online["run"].config == {"run_id": "run", "lineage": 1, "start_step": 4}
    assert WandB("project").open(Place("run", 1, 6)) == place  # nothing was logged after step 4
    log_steps(WandB("project"), Server((0, 0, 6)), range(7, 9))
    assert WandB("project").open(Place("run", 1, 9)) == Place("run", 1, 8)
    assert WandB("project").open(Place("run", 2, 3)) is None
    assert [*packages["wandb"].online] == ["run", "run-lineage-2"]


def test_wandb_without_a_network_is_reported_with_the_remedy(packages: dict[str, Any]) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("no route")

    packages["wandb"].init = init
    thread = LogThread(WandB("project"), Place("run", 1, 0))
    assert thread.opened() is None
    thread.close()
    assert "(RuntimeError: wandb.init failed: no route; check the network, or log with mode='offline'" in (
        thread.failure
    )


@pytest.mark.usefixtures("packages")
def test_what_trackio_prints_does_not_mix_with_a_result_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    Trackio("project").open(Place("run", 1, 0))
    assert capsys.readouterr() == ("", "* Created new run: run\n")


def test_a_lineage_of_which_trackio_has_no_step_is_passed_over_for_the_one_before(
    packages: dict[str, Any],
) -> None:
    packages["trackio"].projects["project"] = {"run": [{"train/loss": 1.0, "step": 3}], "run-2": []}
    assert Trackio("project").open(Place("run", 2, 5)) == Place("run", 1, 3)


@pytest.mark.parametrize(
    ("package", "calls"),
    [
        ("wandb", ("init", "setup", "Settings", "Run.log", "Run.finish")),
        ("trackio", ("init", "Api.runs", "Run.log", "Run.finish")),
        ("trackio.sqlite_storage", ("SQLiteStorage.get_metric_values", "SQLiteStorage.get_logs")),
    ],
)
def test_the_stand_ins_take_only_arguments_that_the_real_packages_have(
    package: str, calls: tuple[str, ...]
) -> None:
    pytest.importorskip(package.split(".")[0])
    stand_in = (logger_packages.wandb() | logger_packages.trackio())[package]
    for call in calls:
        ours = inspect.signature(attrgetter(call)(stand_in)).parameters
        theirs = inspect.signature(attrgetter(call)(import_module(package))).parameters
        assert ours.keys() <= theirs.keys(), call
        by_place = [name for name, one in ours.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
        assert by_place == [*theirs][: len(by_place)], call


def test_the_stand_in_for_wandb_has_properties_and_messages_of_the_real_one() -> None:
    real = pytest.importorskip("wandb").Run
    properties = ("config", "dir", "offline", "resumed", "starting_step")
    assert {type(getattr(real, name)) for name in properties} == {property}
    whole = descriptor_pb2.FileDescriptorProto()
    import_module("wandb.proto.wandb_internal_pb2").Record.DESCRIPTOR.file.CopyToProto(whole)
    theirs = {message.name: {field.name: field for field in message.field} for message in whole.message_type}
    for message in logger_packages.described().message_type:
        for field in message.field:
            other = theirs[message.name][field.name]
            same = ("number", "type", "type_name", "label")
            assert [getattr(field, key) for key in same] == [getattr(other, key) for key in same], field
