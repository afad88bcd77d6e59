"""The set-up tells what a machine lacks before it downloads anything."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "deploy" / "venv.py"


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    spec = importlib.util.spec_from_file_location("deploy_venv", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_old_python_is_named_with_what_to_do(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
    problem = setup.missing("")
    assert "Python 3.11 or newer is needed" in problem
    assert "PYTHON=python3.12" in problem


def test_a_missing_venv_module_is_named_with_the_package(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert f"apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv" in setup.missing("")


def test_a_full_disk_is_named_and_a_tight_one_warned_of(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1e9))
    assert "1.0 GB are left" in setup.missing("")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5e9))
    monkeypatch.setattr(sys, "platform", "linux")
    assert setup.missing("") is None
    assert "TORCH_INDEX" in capsys.readouterr().err
    assert setup.missing("https://example.org/cpu") is None
    assert capsys.readouterr().err == ""


def test_it_is_made_anew_when_its_inputs_change_and_keeps_the_index_that_was_named(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in setup.INPUTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.setattr(setup, "STAMP", tmp_path / "stamp")
    monkeypatch.setattr(setup, "missing", lambda _: None)
    monkeypatch.setattr(setup, "run", lambda *command: commands.append(command))

    def made(index: str | None = None) -> list[str]:
        """Which indexes torch came from, if anything was made."""
        commands.clear()
        if index is None:
            monkeypatch.delenv("TORCH_INDEX", raising=False)
        else:
            monkeypatch.setenv("TORCH_INDEX", index)
        assert setup.main() == 0
        indexes = [
            command[command.index("--index-url") + 1] for command in commands if "--index-url" in command
        ]
        return indexes if commands else ["nothing"]

    assert made("https://cpu") == ["https://cpu"]
    assert made("https://cpu") == ["nothing"]
    assert made() == ["nothing"], "without the variable the environment stays as it is"
    (tmp_path / "constraints.txt").write_text("b")
    assert made() == ["https://cpu"]
    assert made("") == [], "an empty index takes torch from the usual one again"


def test_an_extra_is_added_once_in_the_versions_of_the_tests(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(setup, "VENV", tmp_path)
    monkeypatch.setattr(setup, "make", lambda: 0)
    monkeypatch.setattr(setup, "run", lambda *command: commands.append(command))
    assert setup.main("docs") == 0
    assert setup.main("docs") == 0
    (command,) = commands
    assert command[command.index("--constraint") + 1] == str(setup.ROOT / "constraints.txt")
    assert any(wanted.startswith("Sphinx") for wanted in command)


def test_a_command_that_fails_shows_why_and_what_to_do(
    setup: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        setup.run(sys.executable, "-c", "print('no such index'); raise SystemExit(3)")
    err = capsys.readouterr().err
    assert "no such index" in err
    assert "make command again" in err


def test_an_environment_that_runs_its_own_set_up_is_made_from_its_base(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert setup.interpreter() == sys.executable or Path(sys.prefix) == setup.VENV
    monkeypatch.setattr(sys, "prefix", str(setup.VENV))
    assert Path(setup.interpreter()).is_relative_to(sys.base_prefix)
    assert Path(setup.interpreter()).exists()
