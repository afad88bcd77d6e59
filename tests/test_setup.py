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
    problem = setup.missing()
    assert "Python 3.11 or newer is needed" in problem
    assert "PYTHON=python3.12" in problem


def test_a_missing_venv_module_is_named_with_the_package(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert f"apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv" in setup.missing()


def test_a_full_disk_is_named_and_a_tight_one_warned_of(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1e9))
    assert "1.0 GB are left" in setup.missing()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5e9))
    monkeypatch.setattr(sys, "platform", "linux")
    assert setup.missing() is None
    assert "TORCH_INDEX" in capsys.readouterr().err
    monkeypatch.setenv("TORCH_INDEX", "https://example.org/cpu")
    assert setup.missing() is None
    assert capsys.readouterr().err == ""


def test_a_change_of_what_it_is_made_from_makes_it_anew(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in setup.INPUTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    first = setup.stamp()
    assert setup.stamp() == first
    (tmp_path / "constraints.txt").write_text("b")
    second = setup.stamp()
    monkeypatch.setenv("TORCH_INDEX", "x")
    assert len({first, second, setup.stamp()}) == 3


def test_a_command_that_fails_shows_why_and_what_to_do(
    setup: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        setup.run(sys.executable, "-c", "print('no such index'); raise SystemExit(3)")
    err = capsys.readouterr().err
    assert "no such index" in err
    assert "make command again" in err
