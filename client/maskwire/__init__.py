"""maskwire: train and evaluate masked-token prediction models on another machine.

    import maskwire

    with maskwire.connect("127.0.0.1:50051") as trainer:
        result = trainer.train_step(tokens)

The client does not need torch. `maskwire.aio` is the asyncio client, `maskwire.data` reads and prepares data,
and `maskwire.errors` defines the exceptions.
"""

from typing import TYPE_CHECKING, Any

from maskwire._version import __version__

if TYPE_CHECKING:
    from maskwire import aio
    from maskwire.batch import Batch
    from maskwire.callbacks import EarlyStopping, SaveBest, StopTraining
    from maskwire.client import Client, Trainer, attach, connect
    from maskwire.data.file_data import ByteData, FileTokens, open_data
    from maskwire.data.packed_data import PackedData
    from maskwire.data.pair_data import PairData
    from maskwire.data.token_data import TokenData
    from maskwire.errors import MaskwireError

__all__ = [
    "Batch",
    "ByteData",
    "Client",
    "EarlyStopping",
    "FileTokens",
    "MaskwireError",
    "PackedData",
    "PairData",
    "SaveBest",
    "StopTraining",
    "TokenData",
    "Trainer",
    "__version__",
    "aio",
    "attach",
    "connect",
    "open_data",
]

_HOMES = {
    **dict.fromkeys(("connect", "attach", "Trainer", "Client"), "client"),
    **dict.fromkeys(("open_data", "TokenData", "ByteData", "FileTokens", "PackedData", "PairData"), "data"),
    "Batch": "batch",
    "MaskwireError": "errors",
    **dict.fromkeys(("EarlyStopping", "SaveBest", "StopTraining"), "callbacks"),
}


def __getattr__(name: str) -> Any:
    # Imported at first use, so that importing `maskwire.v1` alone stays fast.
    import importlib

    if name in ("aio", "data", "errors", "results"):
        return importlib.import_module(f"maskwire.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'maskwire' has no attribute {name!r}")
    return getattr(importlib.import_module(f"maskwire.{_HOMES[name]}"), name)
