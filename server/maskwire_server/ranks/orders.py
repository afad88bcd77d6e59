"""Orders from the leader to its followers: a name, JSON arguments, and a payload as bytes."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import Any

_HEADER = struct.Struct("<II")


@dataclass(frozen=True)
class Order:
    """One operation that every rank carries out, in most cases a call of the trainer."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    """JSON values."""
    payload: bytes = b""
    """The batch of a step, as the journal keeps it."""

    def encode(self) -> bytes:
        """Encode the order: the sizes of head and payload as uint32, the head as JSON, and the payload."""
        head = json.dumps([self.name, self.arguments]).encode()
        return _HEADER.pack(len(head), len(self.payload)) + head + self.payload

    @staticmethod
    def decode(data: bytes) -> Order:
        """Parse the bytes that `encode` returned. Raises ValueError if the sizes are wrong."""
        head, payload = _HEADER.unpack_from(data)
        if len(data) != _HEADER.size + head + payload:
            raise ValueError(f"an order must have {_HEADER.size + head + payload} bytes, got {len(data)}")
        name, arguments = json.loads(data[_HEADER.size : _HEADER.size + head])
        return Order(name, arguments, data[_HEADER.size + head :])
