"""The holder of the writer's session: a client and its process."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ClientProcess:
    """A client's process, as the client reported it. The proto describes each field."""

    host: str
    process_id: int
    start_time_ticks: int = 0
    boot_id: str = ""
    pid_namespace: str = ""
    job: str = ""


@dataclass(frozen=True)
class Holder:
    """The client that holds, or held, the writer's session of an epoch."""

    client_name: str
    epoch: int
    process: ClientProcess | None = None
    """The client's process; None: not reported."""

    @property
    def where(self) -> str:
        """The host and process of the client for a message, with a leading space; empty if not known."""
        process = self.process
        return f" (host {process.host}, process {process.process_id})" if process else ""

    def __str__(self) -> str:
        return f"{self.client_name!r}{self.where}"

    def metadata(self) -> dict[str, Any]:
        """Return metadata for an error: `epoch`, `writer`, and each field of the process as `writer_NAME`."""
        fields = asdict(self.process) if self.process else {}
        named = {f"writer_{name}": value for name, value in fields.items()}
        return {"epoch": self.epoch, "writer": self.client_name, **named}
