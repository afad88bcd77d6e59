"""Text that exists on every machine with Python."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from maskwire.data.file_discovery import find_files

LEFT_OUT = {"test", "tests", "site-packages", "idle_test", "lib2to3"}


def python_sources() -> list[Path]:
    """The standard library's own source files, without its tests."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return [
        path for path in find_files(library, "*.py") if not LEFT_OUT & set(path.relative_to(library).parts)
    ]
