"""The maskwire server: a resident masked-prediction model behind gRPC.

Three groups of packages that never import one another stand on `config`, `errors`, `batch`, `manifest`,
`requests` and `results`: `rpc` (gRPC), the run (`engine`, `journal`, `checkpoints`, `recovery`) and
`training` (torch). `app` joins them. `maskwire_server.load` makes a plain torch module of a checkpoint,
without any of them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskwire_server.training.models.pretrained import MaskedModel, load

__all__ = ["MaskedModel", "load"]


def __getattr__(name: str) -> Any:
    # Looked up at first use: the commands must not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module 'maskwire_server' has no attribute {name!r}")
    from maskwire_server.training.models import pretrained

    return getattr(pretrained, name)
