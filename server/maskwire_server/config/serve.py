"""The section [serve]."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from maskwire_server.config.base import Finite, Section


class ServeConfig(Section):
    """[serve]: the address, access, the device and the limits. It may change between restarts."""

    address: str = "127.0.0.1:50051"
    """HOST:PORT to listen on, port 0 picks a free one; or unix:PATH for a Unix socket alone, mode 0600."""
    socket: Path | None = None
    """A Unix socket to listen on beside the address, mode 0600: who can open it needs no token."""
    allow_insecure: bool = False
    """Listen beyond loopback without TLS, or without tokens and client certificates: anyone who reaches
    the port can train, or read what is sent."""
    tls_certificate: Path | None = None
    """The server's certificate chain (PEM): the address speaks TLS then. With tls_key."""
    tls_key: Path | None = None
    """Its private key (PEM, not encrypted)."""
    tls_client_ca: Path | None = None
    """Authorities (PEM) of client certificates: only clients with one may connect."""
    token_read_file: Path | None = None
    """Bearer tokens of role read (status, evaluate, generate, list): one per line, optionally followed by its
    expiry time."""
    token_train_file: Path | None = None
    """Bearer tokens of role train (and what read may)."""
    token_admin_file: Path | None = None
    """Bearer tokens of role admin (restore, delete, download, and what train may)."""
    download_role: Literal["read", "train", "admin"] = "admin"
    """The role that may download checkpoints."""
    reflection: bool = True
    """Let clients discover the service without its proto file."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """auto: bf16 autocast on a GPU that has it, fp32 otherwise; tf32: a GPU's shorter matrix products."""
    compile: Literal["off", "default", "reduce-overhead"] = "off"
    """torch.compile the blocks; reduce-overhead: in CUDA graphs. For a GPU, not measured."""
    deterministic: bool = False
    """Kernels that give the same bytes every time, on a GPU: a replay after a crash is then exact, and
    otherwise within a tolerance; slower. On a CPU they always do."""
    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads of the matrix products; absent: the cores this process may use, a container's
    CPU quota counted."""
    durability: Literal["full", "off"] = "full"
    """full: a step is flushed to disk before it is acknowledged; off: steps since the last checkpoint
    can be lost with the machine."""
    keep_payloads: Literal["recovery", "all"] = "recovery"
    """Keep batches until checkpoints cover them, or for ever: then every step can be computed again."""
    reserve_bytes: int = Field(32 * 2**20, ge=0)
    """Disk that stays free for the journal: with less, steps are refused (HELD) until there is room."""
    poison_after: int = Field(0, ge=0)
    """Set a batch aside once the server has died so many times while training on it; 0: never."""
    max_batch_tokens: int = Field(2**20, ge=1, le=2**28)
    """The most positions (rows times columns) of one batch."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Split a batch into parts of at most so many positions, with the same loss and gradient (with
    model.dropout: with other draws of it); absent: chosen for the device."""
    activation_checkpointing: bool = False
    """Keep only the blocks' inputs for the backward pass and compute the rest again there: a third more
    work, a fraction of the memory, the same results."""
    max_message_bytes: int = Field(64 * 2**20, ge=2**16, le=2**31 - 1)
    """The largest message accepted, in bytes."""
    queue_limit: int = Field(64, ge=1, le=4096)
    """The most requests that wait for the device."""
    window: int = Field(8, ge=1, le=256)
    """The most steps of a session in flight."""
    max_draws: int = Field(1024, ge=1)
    """The most evaluation draws a row."""
    max_generation_steps: int = Field(1024, ge=1)
    """The most unmasking passes of a generation."""
    max_read_tokens: int | None = Field(None, ge=1, le=2**48)
    """The most positions that one evaluation or generation may push through the model, which trains
    nothing meanwhile: rows times columns times draws, by the chain rule times columns again, or times
    unmasking passes; twice with self-conditioning, and once more with a critic's pass; absent:
    67,108,864, on a CPU 4,194,304."""
    session_idle_seconds: Finite = Field(60.0, gt=0)
    """A session ends when nothing of it was queued or running for so long."""
    gap_seconds: Finite = Field(5.0, gt=0)
    """How long a step waits for its predecessor."""
    drain_seconds: Finite = Field(30.0, ge=0)
    """How long SIGTERM waits for the running step and the last checkpoint."""

    @model_validator(mode="after")
    def _door_is_safe(self) -> ServeConfig:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key must be set together, got only one of them")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key, got none")
        authenticated = self.has_tokens or self.tls_client_ca is not None
        if self.address.startswith("unix:"):
            if self.tls_certificate is not None or self.has_tokens or self.socket is not None:
                raise ValueError(
                    f"address is a Unix socket, {self.address!r}: leave tls_*, token_* and socket out, "
                    "who can open it (mode 0600) is let in"
                )
            return self
        host, colon, port = self.address.rpartition(":")
        if not colon or not host or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"address must be HOST:PORT with a port of 0 to 65535, got {self.address!r}")
        if self.allow_insecure or _is_loopback(host.strip("[]")):
            return self
        if self.tls_certificate is None or not authenticated:
            lacks = (
                "tls_certificate and tls_key"
                if self.tls_certificate is None
                else ("token_*_file or tls_client_ca")
            )
            raise ValueError(
                f"address must be on loopback (127.0.0.1, localhost, [::1]) without {lacks}, got "
                f"{self.address!r}: set them, reach it with `ssh -L`, or accept it with allow_insecure = true"
            )
        return self

    @property
    def has_tokens(self) -> bool:
        """Whether clients must show a token."""
        return any((self.token_read_file, self.token_train_file, self.token_admin_file))


def _is_loopback(host: str) -> bool:
    """Whether a host is this machine's loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
