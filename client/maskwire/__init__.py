"""maskwire: train and evaluate masked-token prediction models on another machine.

    import maskwire

    with maskwire.connect("127.0.0.1:50051") as trainer:
        result = trainer.train_step(tokens)

The client needs no torch. `maskwire.data` has data, `maskwire.errors` what is raised.
"""

from typing import TYPE_CHECKING, Any

from maskwire._version import __version__

if TYPE_CHECKING:
    from maskwire.client import Trainer, connect
    from maskwire.data import ByteData
    from maskwire.errors import MaskwireError

__all__ = ["ByteData", "MaskwireError", "Trainer", "__version__", "connect"]

_HOMES = {"connect": "client", "Trainer": "client", "ByteData": "data", "MaskwireError": "errors"}


def __getattr__(name: str) -> Any:
    # Looked up at first use, so that importing `maskwire.v1` alone stays light.
    if name not in _HOMES:
        raise AttributeError(f"module 'maskwire' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"maskwire.{_HOMES[name]}"), name)
