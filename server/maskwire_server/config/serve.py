"""The section [serve] of the configuration."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from maskwire_server.config.base import Finite, Section


class ServeConfig(Section):
    """[serve]: address, access, device and limits. Can be changed at a restart."""

    address: str = "127.0.0.1:50051"
    """HOST:PORT to listen on (port 0: any free port), or unix:PATH for a Unix socket with mode 0600."""
    socket: Path | None = None
    """Path of a Unix socket (mode 0600) to listen on as well. Clients of the socket need no token."""
    allow_insecure: bool = False
    """Allow an address other than loopback without TLS, or without tokens or client certificates. Anyone who
    reaches the port can then read the traffic, or train."""
    tls_certificate: Path | None = None
    """Certificate chain of the server (PEM), which turns on TLS. Needs tls_key."""
    tls_key: Path | None = None
    """Private key of the certificate (PEM, not encrypted)."""
    tls_client_ca: Path | None = None
    """Certificate authorities (PEM). Only clients with a certificate signed by one of them may connect."""
    token_read_file: Path | None = None
    """File with the bearer tokens of role read (status, evaluate, generate, list): one per line, optionally
    followed by an expiry time."""
    token_train_file: Path | None = None
    """File with the bearer tokens of role train: train, and everything that read allows."""
    token_admin_file: Path | None = None
    """File with the bearer tokens of role admin: restore, delete, download, and everything that train
    allows."""
    download_role: Literal["read", "train", "admin"] = "admin"
    """The lowest role that may download checkpoints."""
    reflection: bool = True
    """Offer gRPC reflection, so that tools such as grpcurl work without the proto file."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """auto: bf16 autocast on GPUs that support it, else fp32. tf32: TF32 matrix products on a GPU."""
    compile: Literal["off", "default", "reduce-overhead"] = "off"
    """Compile the blocks with torch.compile. For GPUs. reduce-overhead: with CUDA graphs; not benchmarked."""
    deterministic: bool = False
    """Use deterministic kernels on a GPU. They are slower, but a replay after a crash is then exact to the
    bit instead of within a tolerance. On a CPU, replay is always exact."""
    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads for computing. Default: the cores that this process may use, within the CPU quota of its
    container. OMP_NUM_THREADS is not used."""
    durability: Literal["full", "off"] = "full"
    """full: a step is on disk before it is acknowledged. off: a power failure or crash of the machine can
    lose the steps since the last checkpoint."""
    keep_payloads: Literal["recovery", "all"] = "recovery"
    """recovery: keep batches as long as recovery may need them. all: keep every batch, for replay."""
    reserve_bytes: int = Field(32 * 2**20, ge=0)
    """Disk space to reserve for the journal, in bytes. With less free space, steps are rejected (HELD)."""
    poison_after: int = Field(0, ge=0)
    """Quarantine a batch after the server has crashed this many times while training on it. 0: never."""
    max_batch_tokens: int = Field(2**20, ge=1, le=2**28)
    """Maximum positions (rows times columns) of one batch."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Split a batch into micro-batches of at most this many positions. Loss and gradient stay the same, apart
    from the random draws of model.dropout. Default: chosen for the device."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the blocks for the backward pass and recompute the rest. Takes a third
    more time and a fraction of the memory; the results are the same."""
    max_message_bytes: int = Field(64 * 2**20, ge=2**16, le=2**31 - 1)
    """Maximum size of a message, in bytes."""
    queue_limit: int = Field(64, ge=1, le=4096)
    """Maximum number of requests that wait for the device."""
    window: int = Field(8, ge=1, le=256)
    """Maximum number of steps that a session may have in flight."""
    max_draws: int = Field(1024, ge=1)
    """Maximum number of draws per row in an evaluation."""
    max_generation_steps: int = Field(1024, ge=1)
    """Maximum number of unmasking passes in a generation."""
    max_read_tokens: int | None = Field(None, ge=1, le=2**48)
    """Maximum positions that one evaluation or generation may send through the model, because no step is
    trained in the meantime. Evaluation: rows times columns times draws, and times columns again with the
    chain rule. Generation: rows times columns times passes. Self-conditioning doubles it, and a critic adds
    one pass. Default: 67,108,864, on a CPU 4,194,304."""
    max_read_seconds: Finite = Field(30.0, gt=0)
    """How long an evaluation or generation may keep a training step or a save waiting before it is ended
    (READ_TOO_LONG). Keep it below the clients' deadline for a step, 60 s by default. While neither waits, it
    may take longer."""
    max_reads_per_credential: int = Field(8, ge=1, le=4096)
    """Maximum number of evaluations and generations of one token (without tokens, of one client certificate)
    that wait for the device."""
    step_timeout_seconds: Finite | None = Field(None, gt=0)
    """A training step that takes longer counts as hung: the server logs the stack of each thread and exits
    with code 71, so that it can be restarted. Work that may have to compile kernels (the first step of each
    batch shape, evaluations, generations, copies for checkpoints) gets at least 600 s. Default: 20 times the
    median of the last 100 steps, at least 600 s."""
    session_idle_seconds: Finite = Field(60.0, gt=0)
    """A session ends when none of its requests has been queued or running for this long."""
    gap_seconds: Finite = Field(5.0, gt=0)
    """How long a step waits for a missing predecessor before it is rejected."""
    drain_seconds: Finite = Field(30.0, ge=0)
    """How long the server waits for the running step and the last checkpoint after SIGTERM."""

    @model_validator(mode="after")
    def _access_is_safe(self) -> ServeConfig:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key must be set together, got only one of them")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key, got none of them; set both")
        authenticated = self.has_tokens or self.tls_client_ca is not None
        if self.address.startswith("unix:"):
            if self.tls_certificate is not None or self.has_tokens or self.socket is not None:
                raise ValueError(
                    "tls_*, token_* and socket must be left out when address is a Unix socket, because only "
                    f"its owner can open it (mode 0600), got address {self.address!r}"
                )
            return self
        host, colon, port = self.address.rpartition(":")
        if not colon or not host or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"address must be HOST:PORT with a port of 0 to 65535, got {self.address!r}")
        if self.allow_insecure or _is_loopback(host.strip("[]")):
            return self
        if self.tls_certificate is None or not authenticated:
            missing = "token_*_file or tls_client_ca"
            if self.tls_certificate is None:
                missing = "tls_certificate and tls_key"
            raise ValueError(
                f"address must be on loopback (127.0.0.1, localhost, [::1]) without {missing}, got "
                f"{self.address!r}: set them, use `ssh -L`, or accept the risk with allow_insecure = true"
            )
        return self

    @property
    def has_tokens(self) -> bool:
        """Whether clients need a token."""
        return bool(self.token_files)

    @property
    def token_files(self) -> tuple[Path, ...]:
        """The paths of the token files that are set."""
        files = (self.token_read_file, self.token_train_file, self.token_admin_file)
        return tuple(path for path in files if path is not None)

    @property
    def certificate_files(self) -> tuple[Path, ...]:
        """The paths of the certificate and key files for TLS that are set."""
        files = (self.tls_certificate, self.tls_key, self.tls_client_ca)
        return tuple(path for path in files if path is not None)


def _is_loopback(host: str) -> bool:
    """Whether a host is on the loopback interface."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
