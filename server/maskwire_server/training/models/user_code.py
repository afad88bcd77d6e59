"""Functions that the operator's own configuration names, as `package.module:function`.

They run on the server with its rights. No request can name one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskwire_server.errors import ConfigError


def load(key: str, name: str) -> Callable[..., Any]:
    """The function that the setting `key` names. The current folder is searched too. Raises ConfigError."""
    module_name, colon, function = name.partition(":")
    if not colon or not module_name or not function:
        raise ConfigError(f"{key}: must be package.module:function, got {name!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"{key}: cannot import {module_name!r} ({type(error).__name__}: {error})"
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ConfigError(f"{key}: {module_name} must have a function {function!r}, got {found!r}")
    return found  # type: ignore[no-any-return]
