"""The section [storage] of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from maskwire_server.config.base import Finite, Section


class StorageConfig(Section):
    """[storage]: the run's copy in an object store (docs/object-stores.md). Can be changed at a restart."""

    mirror: str | None = None
    """Address of the copy, for example s3://bucket/prefix. The server uploads records, batches and
    checkpoints there, and restores the run from there if the run directory is empty. One run per address.
    Needs the extra maskwire[storage]."""
    acknowledge: Literal["local", "mirrored"] = "local"
    """local: acknowledge a step when it is on the disk of this machine; if the machine is lost, the steps
    since the last upload are lost too. mirrored: acknowledge it when it is in the object store as well."""
    segment_seconds: Finite = Field(5.0, gt=0)
    """With acknowledge = local: upload new records this often."""
    segment_bytes: int = Field(4 * 2**20, ge=2**10, le=2**30)
    """Approximate maximum size of one upload of records and batches, in bytes."""

    @field_validator("mirror")
    @classmethod
    def _has_protocol(cls, value: str | None) -> str | None:
        if value is None:
            return None
        protocol, separator, rest = value.partition("://")
        if not separator or not protocol or not rest.strip("/"):
            raise ValueError(f"must be PROTOCOL://BUCKET/PREFIX, for example s3://bucket/run, got {value!r}")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _has_a_mirror(self) -> StorageConfig:
        if self.acknowledge == "mirrored" and self.mirror is None:
            raise ValueError("acknowledge = 'mirrored' needs mirror, got none; set storage.mirror")
        return self
