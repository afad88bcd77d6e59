"""Merging adapters needs the server's command on this machine, and reports what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from maskwire.cli.merge_adapters import merge


@pytest.fixture
def binaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the only commands that are installed."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_without_the_command_the_extra_is_named(binaries: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'pip install "maskwire\[huggingface\]"'):
        merge(tmp_path / "weights", tmp_path / "out", ema=False)


@pytest.mark.parametrize("ema", [False, True])
def test_the_command_gets_the_folder_and_its_error_is_reported(
    binaries: Path, tmp_path: Path, ema: bool
) -> None:
    command = binaries / "maskwire-server"
    command.write_text('#!/bin/sh\necho noise >&2\necho "maskwire-server: got $*" >&2\nexit 2\n')
    command.chmod(0o700)
    weights = " --weights ema" if ema else ""
    expected = (
        f"the adapters cannot be merged: got export {tmp_path / 'out'} --folder {tmp_path / 'in'} "
        f"--to huggingface --merged{weights} "
        f"(the downloaded weights are in {tmp_path / 'in'})"
    )
    with pytest.raises(ValueError, match="got export") as caught:
        merge(tmp_path / "in", tmp_path / "out", ema=ema)
    assert str(caught.value) == expected
