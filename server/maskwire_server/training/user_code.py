"""Import code that the server's configuration names."""

from __future__ import annotations

import hashlib
import importlib
import sys
from pathlib import Path
from typing import Any

from maskwire_server.errors import ConfigError


def import_object(setting: str, name: str) -> Any:
    """Import and return the object that a setting names as `package.module:object`.

    The module may be in the current folder. The name must come from the operator's configuration, never from
    a request or a file of a run. Raises ConfigError if the import fails.
    """
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        # Last, so that a file in the folder cannot replace a module of Python or of an installed package.
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            problem = f"there is no module {error.name!r} in the current folder ({here}), PYTHONPATH or the "
            problem += "installed packages; start the server in the folder of the module, or set PYTHONPATH"
        else:
            problem = f"importing {module_name!r} failed: {one_line(error)}"
        raise ConfigError(f"{setting}: {name!r} cannot be imported: {problem}") from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise ConfigError(
            f"{setting}: {name!r} cannot be imported: module {module_name!r} "
            f"({getattr(module, '__file__', None)}) has no {attribute!r}; if you mean a file of your "
            "own, rename it: modules of Python and of installed packages take precedence"
        ) from error


def file_sha256(name: str) -> str:
    """The SHA-256 of the file that defines an imported `package.module:object`, or "" if there is none."""
    path = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def one_line(error: BaseException) -> str:
    """The type and the first line of an error that the user's code raised."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
