"""Stand-ins for the packages wandb and trackio: only what the loggers use of them.

`test_logger_packages.py` compares them with the real packages where these are installed.
"""

from __future__ import annotations

import json
import struct
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "Record": {
        "history": (2, "HistoryRecord"), "config": (5, "ConfigRecord"),
        "run": (17, "RunRecord"), "exit": (18, "RunExitRecord"),
    },
    "HistoryRecord": {"item": (1, "HistoryItem*"), "step": (2, "HistoryStep")},
    "HistoryItem": {"key": (1, ""), "nested_key": (2, "*"), "value_json": (16, "")},
    "HistoryStep": {"num": (1, "int64")},
    "RunRecord": {"config": (4, "ConfigRecord")},
    "ConfigRecord": {"update": (1, "ConfigItem*")},
    "ConfigItem": {"key": (1, ""), "nested_key": (2, "*"), "value_json": (16, "")},
    "RunExitRecord": {},
}  # fmt: skip
"""The fields of W&B's messages that we read: number and type, by default a string; *: repeated."""


def described() -> descriptor_pb2.FileDescriptorProto:
    """The messages, as protobuf describes them."""
    file = descriptor_pb2.FileDescriptorProto(
        name="wandb_internal.proto", package="wandb_internal", syntax="proto3"
    )
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field_name, (number, kind) in fields.items():
            field = message.field.add(name=field_name, number=number, label="LABEL_OPTIONAL")
            if kind.endswith("*"):
                field.label = field.LABEL_REPEATED
            if kind == "int64":
                field.type = field.TYPE_INT64
            elif kind.strip("*"):
                field.type, field.type_name = field.TYPE_MESSAGE, f".wandb_internal.{kind.strip('*')}"
            else:
                field.type = field.TYPE_STRING
            if name == "Record":
                field.oneof_index = 0
    file.message_type[0].oneof_decl.add(name="record_type")
    return file


_POOL = descriptor_pool.DescriptorPool()
_POOL.Add(described())
Record: Any = message_factory.GetMessageClass(_POOL.FindMessageTypeByName("wandb_internal.Record"))


class _Config(dict[str, Any]):
    """A run's config, which is also written to its log."""

    def __init__(self, run: WandBRun) -> None:
        super().__init__()
        self._run = run

    def update(self, d: dict[str, Any]) -> None:  # type: ignore[override]
        super().update(d)
        items = [{"key": name, "value_json": json.dumps(value)} for name, value in d.items()]
        self._run.append(config={"update": items})


class WandBRun:
    def __init__(self, id: str, path: Path | None) -> None:
        self.offline = path is not None
        self.resumed = False
        self.starting_step = 0
        self.dir = "" if path is None else str(path.parent / "files")
        self.config = _Config(self)
        self._path = path
        if path is not None:
            path.parent.mkdir(parents=True)
            path.write_bytes(b":W&B\0\0\0")

    def append(self, **record: Any) -> None:
        """Append a message to the log of an offline run, as one chunk."""
        if self._path is not None:
            data = Record(**record).SerializeToString()
            with self._path.open("ab") as file:
                file.write(struct.pack("<IHB", 0, len(data), 1) + data)

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        items = [{"nested_key": [name], "value_json": json.dumps(value)} for name, value in data.items()]
        self.append(history={"item": items, "step": {"num": step}})
        self.starting_step = max(self.starting_step, (step or 0) + 1)

    def finish(self) -> None:
        self.append(exit={})


def wandb() -> dict[str, ModuleType]:
    """The package wandb with its modules, whose server is `wandb.online`: its runs by their id."""
    package, proto = ModuleType("wandb"), ModuleType("wandb.proto.wandb_internal_pb2")
    online: dict[str, WandBRun] = {}
    package.settings = SimpleNamespace(mode="online", root_dir=".")  # type: ignore[attr-defined]

    def setup() -> SimpleNamespace:
        return SimpleNamespace(settings=package.settings)

    def settings(*, console: str, disable_git: bool, save_code: bool, reinit: str) -> dict[str, Any]:
        return locals()

    def init(
        *, project: str, id: str, group: str, resume: str, mode: str | None = None, dir: Path | None = None,
        settings: object = None, tags: object = None, entity: object = None,
    ) -> WandBRun:  # fmt: skip
        if (mode or package.settings.mode) == "offline":
            folder = (dir or Path(package.settings.root_dir)) / "wandb"
            count = len([*folder.glob("*")])
            return WandBRun(id, folder / f"offline-run-{count:03}-{id}" / f"run-{id}.wandb")
        run = WandBRun(id, None)
        if resume == "allow" and id in online:
            run.resumed = True
            run.starting_step = online[id].starting_step
            run.config.update(online[id].config)
        online[id] = run
        return run

    vars(package).update(init=init, setup=setup, Settings=settings, Run=WandBRun, online=online)
    vars(proto).update(Record=Record)
    return {"wandb": package, "wandb.proto": ModuleType("wandb.proto"), proto.__name__: proto}


def trackio() -> dict[str, ModuleType]:
    """The package trackio with its modules; `trackio.projects` has the logs by project and run."""
    names = ("trackio", "trackio.run", "trackio.utils", "trackio.sqlite_storage")
    modules = {name: ModuleType(name) for name in names}
    package = modules["trackio"]
    projects: dict[str, dict[str, list[dict[str, Any]]]] = {}

    class Api:
        def runs(self, project: str) -> list[SimpleNamespace]:
            if project not in projects:
                raise ValueError(f"Project '{project}' does not exist")
            return [SimpleNamespace(name=name) for name in projects[project]]

    class Run:
        def __init__(self, rows: list[dict[str, Any]]) -> None:
            self._rows = rows
            self._next_step = 1 + max((row["step"] for row in rows), default=-1)

        def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
            self._rows.append({**metrics, "step": step})

        def finish(self) -> None: ...

    def init(
        project: str, name: str | None = None, group: str | None = None, *, space_id: str | None = None,
        resume: str = "never", embed: bool = True, auto_log_gpu: bool | None = None,
        auto_log_cpu: bool | None = None,
    ) -> Run:  # fmt: skip
        assert name is not None
        vars(package).get("print", print)(f"* Created new run: {name}")
        runs = projects.setdefault(project, {})
        return Run(runs.setdefault(name, []) if resume == "allow" else runs.setdefault(f"{name} again", []))

    class SQLiteStorage:
        @staticmethod
        def get_metric_values(
            project: str, run: str | None, metric_name: str, step: int | None = None
        ) -> list[dict[str, Any]]:
            assert run is not None
            return [row for row in projects[project][run] if row["step"] == step and metric_name in row]

        @staticmethod
        def get_logs(project: str, run: str | None = None) -> list[dict[str, Any]]:
            assert run is not None
            return projects[project][run]

    vars(package).update(Api=Api, Run=Run, init=init, projects=projects)
    for name in ("run", "utils", "sqlite_storage"):
        setattr(package, name, modules[f"trackio.{name}"])
    vars(modules["trackio.sqlite_storage"]).update(SQLiteStorage=SQLiteStorage)
    return modules


def install(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Import the stand-ins instead of the real packages, and return their modules by name."""
    modules = wandb() | trackio()
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
        patch.setitem(sys.modules, name, module)
    return modules
