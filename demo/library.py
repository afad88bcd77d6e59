"""Text that exists on every machine with Python."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

from maskwire.data.file_discovery import find_files

LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "idle_test", "lib2to3"}


def python_sources() -> list[Path]:
    """The standard library's own source files, without its tests and without empty files."""
    found: list[Path] = []
    for folder, folders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith(".")]
        found += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(".")]
    return find_files(path for path in found if path.stat().st_size)  # it would name the empty ones
