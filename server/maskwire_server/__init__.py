"""The maskwire server: trains a masked-token model and serves it over gRPC.

There are three groups of packages: `rpc` (gRPC), the run (`engine`, `journal`, `checkpoints`, `recovery`)
and `training` (torch). No group imports another. `app` connects them, and the values that they exchange are
defined in `config`, `errors`, `batch`, `manifest`, `position`, `requests` and `results`.

`maskwire_server.load` loads a checkpoint as a plain torch module, without a server.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskwire_server.training.models.standalone_model import MaskedModel, load

__all__ = ["MaskedModel", "load"]


def __getattr__(name: str) -> Any:
    # Imported on first use, because importing torch takes seconds.
    if name not in __all__:
        raise AttributeError(f"module 'maskwire_server' has no attribute {name!r}")
    from maskwire_server.training.models import standalone_model

    return getattr(standalone_model, name)
