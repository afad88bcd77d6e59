"""The configuration: frozen, and checked where it is made.

Flags over environment (`MASKWIRE_SECTION__KEY`) over the TOML file. Nothing reads more than its own
section.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from maskwire_server.errors import ConfigError


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"must be finite, got {value}")
    return value


Finite = Annotated[float, AfterValidator(_finite)]
Probability = Annotated[float, Field(ge=0, le=1)]

OFF = "off"
CAN_BE_OFF = BeforeValidator(lambda value: None if value == OFF else value)
"""Marks a limit or an interval that can be turned off. A file, the environment and flags all say "off";
inside and in what is recorded it is None. Ids, probabilities and counts are never off."""
Steps = Annotated[Annotated[int, Field(ge=1)] | None, CAN_BE_OFF]
Positive = Annotated[Annotated[Finite, Field(gt=0)] | None, CAN_BE_OFF]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunConfig(_Section):
    """[run]: where the run lives, and its seed."""

    dir: Path = Path("runs/default")
    """Everything the run needs to come back, under one folder."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seeds the weights, the masks and every other draw. It belongs to the run and cannot change."""

    @field_validator("dir")
    @classmethod
    def _readable(cls, value: Path) -> Path:
        # safetensors writes under any path and reads under UTF-8 alone: the second start would fail.
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raw = os.fsencode(value)
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                raise ValueError(f"the path must be UTF-8, got {raw!r}") from None
            raise ValueError(
                "the path is UTF-8, but this process runs in a locale of ASCII and cannot read it: set "
                f"LC_ALL=C.UTF-8 or PYTHONUTF8=1, got {text!r}"
            ) from None
        return value


class ModelConfig(_Section):
    """[model]: the encoder. It belongs to the run and cannot change."""

    num_tokens: int = Field(257, ge=2, le=2**24)
    """The vocabulary's size, the mask id included. 257 is bytes and a mask id."""
    mask_id: int = Field(256, ge=0)
    """The id that stands for a masked position. Data must not use it: a batch that has it is refused."""
    pad_id: int | None = Field(None, ge=0)
    """The id that stands for padding in batches without lengths, if the data has one."""
    max_seq_len: int = Field(512, ge=1, le=2**20)
    """The longest row, in tokens."""
    dim: int = Field(256, ge=1)
    """The width of the residual stream."""
    depth: int = Field(4, ge=1)
    """The number of blocks, each attention and feed-forward."""
    heads: int = Field(4, ge=1)
    """Attention heads."""
    dim_head: int = Field(64, ge=1)
    """The width of one head."""
    ff_mult: float = Field(4, gt=0)
    """The feed-forward's inner width, as a multiple of dim."""
    emb_dim: int | None = Field(None, ge=1)
    """The embeddings' width, when it differs from dim."""
    dropout: float = Field(0, ge=0, lt=1)
    """In training: of the embeddings, of the attention weights and attention's output, of the feed-forward's
    inner activations and its output. Draws depend on serve.micro_batch_tokens."""
    positions: Literal["learned", "rotary"] = "learned"
    """How positions enter."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """The normalisation before each sub-layer and at the end."""
    feed_forward: Literal["gelu", "swiglu"] = "gelu"
    """The feed-forward's nonlinearity."""
    qk_norm: bool = False
    """Normalise queries and keys to unit root mean square, with a learned gain."""
    tied_embeddings: bool = False
    """Use the token embedding as the output projection, scaled by dim^-1/2."""

    @model_validator(mode="after")
    def _ids_fit(self) -> ModelConfig:
        for name in ("mask_id", "pad_id"):
            value = getattr(self, name)
            if value is not None and value >= self.num_tokens:
                raise ValueError(f"{name} must be below num_tokens = {self.num_tokens}, got {value}")
        if self.pad_id is not None and self.pad_id == self.mask_id:
            raise ValueError(f"pad_id must differ from mask_id, got {self.pad_id} for both")
        if self.num_tokens - 1 - (self.pad_id is not None) < 1:
            raise ValueError(f"num_tokens must leave an id for data, got {self.num_tokens}")
        if self.positions == "rotary" and self.dim_head % 2:
            raise ValueError(f"dim_head must be even with rotary positions, got {self.dim_head}")
        if self.tied_embeddings and self.emb_dim not in (None, self.dim):
            raise ValueError(f"emb_dim must equal dim = {self.dim} with tied_embeddings, got {self.emb_dim}")
        return self


# A test compares each value with its source: Sahoo et al. 2024 (mdlm), Chang et al. 2022 (maskgit),
# Ghazvininejad et al. 2019 (cmlm), the defaults of NonAutoregressiveWrapper (x-transformers).
PRESETS: dict[str, dict[str, Any]] = {
    "mdlm": {"schedule": "linear", "masking": "exact", "weighting": "elbo"},
    "maskgit": {"schedule": "cosine", "masking": "exact", "weighting": "masked_mean"},
    "cmlm": {
        "schedule": "linear", "masking": "exact", "weighting": "masked_mean",
        "no_replace_prob": 0.1, "random_token_prob": 0.1,
    },
    "x-transformers": {
        "schedule": "linear", "masking": "exact", "weighting": "elbo",
        "no_replace_prob": 0.15, "random_token_prob": 0.1, "augment_prob": 0.5,
        "self_cond_prob": 0.75, "self_cond_start": "none",
    },
}  # fmt: skip


class ObjectiveConfig(_Section):
    """[objective]: what is minimised. It belongs to the run and cannot change."""

    preset: Literal["mdlm", "maskgit", "cmlm", "x-transformers"] = "mdlm"
    """Defaults for the other keys of this section; each can be set beside it."""
    schedule: Literal["linear", "cosine", "quadratic"] = "linear"
    """The masked fraction m(t): 1-t, cos(pi t/2) or (1-t)^2."""
    masking: Literal["exact", "bernoulli"] = "exact"
    """A row masks an exact count of positions, or each position with probability m(t)."""
    weighting: Literal["elbo", "masked_mean"] = "elbo"
    """A bound on the negative log-likelihood, or the mean over masked positions."""
    no_replace_prob: Probability = 0.0
    """The share of masked positions that keep their own id."""
    random_token_prob: Probability = 0.0
    """The share of masked positions that get a random id."""
    augment_prob: Probability = 1.0
    """The probability, for each kind and batch, that it is used at all."""
    self_cond: bool = False
    """Feed a first pass's embeddings to the second."""
    self_cond_prob: Probability = 0.5
    """The probability, for each batch, of taking the first pass."""
    self_cond_start: Literal["null", "none"] = "null"
    """What conditions the first pass itself: the null embedding, or nothing."""
    critic: Literal["none", "self", "token"] = "none"
    """No critic, a head on the generator's trunk, or an encoder of its own."""
    critic_loss_weight: Finite = Field(1.0, ge=0)
    """The critic's weight in the loss when both learn; a critic that trains alone minimises its plain
    loss."""
    critic_labels: Literal["mismatch", "token_critic"] = "mismatch"
    """The critic finds sampled ids that are wrong, or positions that were masked."""

    @model_validator(mode="wrap")
    @classmethod
    def _apply_preset(cls, data: Any, handler: ModelWrapValidatorHandler[ObjectiveConfig]) -> ObjectiveConfig:
        if not isinstance(data, dict):
            return handler(data)
        section = handler({**PRESETS.get(data.get("preset", "mdlm"), {}), **data})
        # A preset's values are not set by the user: an existing run keeps those that it recorded.
        object.__setattr__(section, "__pydantic_fields_set__", set(data))
        return section

    @model_validator(mode="after")
    def _augmentation_fits(self) -> ObjectiveConfig:
        total = self.no_replace_prob + self.random_token_prob
        if total > 1:
            raise ValueError(f"no_replace_prob + random_token_prob must be at most 1, got {total:g}")
        return self

    @property
    def augments(self) -> bool:
        """Whether masked positions can show something else than the mask id."""
        return self.augment_prob > 0 and self.no_replace_prob + self.random_token_prob > 0

    @property
    def loss_is_bound(self) -> bool:
        """Whether generator_loss estimates a bound on the negative log-likelihood."""
        return self.weighting == "elbo" and not self.augments


class OptimizerConfig(_Section):
    """[optimizer]: it may change between restarts."""

    name: Literal["adamw"] = "adamw"
    """The optimizer."""
    learning_rate: Finite = Field(1e-3, ge=0)
    """The peak learning rate."""
    warmup_steps: int = Field(100, ge=0)
    """Steps of linear warm-up from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a half cosine to min_learning_rate at total_steps."""
    total_steps: Steps = None
    """Where the cosine ends; it stays at min_learning_rate behind it. off: without a cosine."""
    min_learning_rate: Finite = Field(0.0, ge=0)
    """Where the cosine ends."""
    weight_decay: Finite = Field(0.01, ge=0)
    """Decoupled weight decay of matrices; norms, biases and embeddings are spared."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """AdamW's decay rates."""
    eps: Finite = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    clip_grad_norm: Positive = 1.0
    """The largest global gradient norm; off: no clipping."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """The decay of the weights' moving average, evaluated when kept; 0: none is kept."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> OptimizerConfig:
        if self.schedule != "cosine":
            return self
        if self.total_steps is None:
            raise ValueError("total_steps must be set with schedule = 'cosine', got none")
        if self.total_steps <= self.warmup_steps:
            raise ValueError(
                f"total_steps must be above warmup_steps = {self.warmup_steps}, got {self.total_steps}"
            )
        return self


class CheckpointsConfig(_Section):
    """[checkpoints]: when they are saved and how long they are kept."""

    every_steps: Steps = None
    """Save after every so many steps; off: not for their number."""
    every_seconds: Positive = 300.0
    """Save when this much time passed since the last, if a step was trained; off: not for the time."""
    keep_last: int = Field(3, ge=2)
    """Keep this many of the automatic checkpoints; those that somebody asked for, without a score, stay."""
    keep_every: Steps = None
    """Keep also those whose step is a multiple of this; off: none for that."""
    keep_best: int = Field(1, ge=0)
    """Of those saved with a score, keep the best (lowest) so many."""


class ServeConfig(_Section):
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
        if self.allow_insecure or is_loopback(host.strip("[]")):
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


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Config(BaseSettings):
    """The whole configuration."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="MASKWIRE_",
        env_nested_delimiter="__",
        validate_default=True,
    )

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    serve: ServeConfig = ServeConfig()

    _recorded: bytes | None = PrivateAttr(None)

    def canonical(self) -> bytes:
        """What belongs to the run for ever, as the bytes that its first digest covers.

        Of an existing run they are the recorded bytes: another version may know other options.
        """
        if self._recorded is not None:
            return self._recorded
        fixed = {
            "model": self.model.model_dump(mode="json"),
            "objective": self.objective.model_dump(mode="json"),
        }
        return json.dumps(fixed, sort_keys=True, separators=(",", ":")).encode()

    def of_run(self, seed: int, canonical: bytes) -> Config:
        """This configuration for a run with that record: what was not set here comes from there.

        Raises ConfigError that names each value set here which the record contradicts.
        """
        record = json.loads(canonical)
        model, objective = recorded_sections(record)
        differences = []
        if "seed" in self.run.model_fields_set and self.run.seed != seed:
            differences.append(f"run.seed is {seed} in the run, {self.run.seed} in the configuration")
        for name, was in (("model", model), ("objective", objective)):
            section = getattr(self, name)
            recorded, configured = was.model_dump(mode="json"), section.model_dump(mode="json")
            differences += [
                f"{name}.{key} is {recorded[key]!r} in the run, {configured[key]!r} in the configuration"
                for key in sorted(section.model_fields_set)
                if recorded[key] != configured[key]
            ]
        if differences:
            raise ConfigError("; ".join(differences))
        run = self.run.model_copy(update={"seed": seed})
        whole = self.model_copy(update={"run": run, "model": model, "objective": objective})
        whole._recorded = canonical
        return whole


class NewerRunError(ConfigError):
    """A run records options that only a newer version has."""


def recorded_sections(record: dict[str, Any]) -> tuple[ModelConfig, ObjectiveConfig]:
    """[model] and [objective] as a run recorded them, by this version or another.

    An option that the record lacks is newer than the run and has its default, whatever a preset says now:
    a new option's default must be what was done before there was the option. Raises ConfigError for options
    that this version does not have.
    """
    fields = {"model": ModelConfig.model_fields, "objective": ObjectiveConfig.model_fields}
    unknown = [f"{name}.{key}" for name in fields for key in record[name] if key not in fields[name]]
    if unknown:
        raise NewerRunError(
            f"{', '.join(unknown)} is recorded, and this version does not know it: a newer version wrote the "
            "run, use that one"
        )
    whole = {
        name: {**{key: field.default for key, field in fields[name].items()}, **record[name]}
        for name in fields
    }
    try:
        return ModelConfig(**whole["model"]), ObjectiveConfig(**whole["objective"])
    except ValidationError as error:
        raise ConfigError("; ".join(_line(problem) for problem in error.errors())) from None


class _Environment(EnvSettingsSource):
    """The environment; a list that is none is left to the setting's own check, which names the key."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value


def load(file: Path | None = None, **flags: dict[str, Any]) -> Config:
    """Read the configuration: `flags` (by section) over the environment over `file`.

    Raises ConfigError with one line a problem: the key, the value and what would be right.
    """

    class _Sourced(Config):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            toml = TomlConfigSettingsSource(settings_cls, toml_file=file)
            return init_settings, _Environment(settings_cls), toml

    if file is not None and not file.is_file():
        raise ConfigError(f"{file}: no such file; `maskwire-server init` writes one")
    try:
        return _Sourced(**flags)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigError("\n".join(_line(problem) for problem in error.errors())) from None
    except ValueError as error:  # not TOML
        bare = file is not None and re.search(r"(?m)^\s*\w+\s*=\s*off\b", file.read_text(errors="replace"))
        cure = f'; write {bare[0].split("=")[0].strip()} = "off", with quotes' if bare else ""
        raise ConfigError(f"{file}: {error}{cure}") from None


def can_be_off() -> list[str]:
    """The settings that take "off", by name."""
    return [
        f"{name}.{key}"
        for name, field in Config.model_fields.items()
        for key, setting in type(field.default).model_fields.items()
        if CAN_BE_OFF in setting.metadata
    ]


def _line(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["input"] == OFF:
        section, _, name = key.partition(".")
        found = Config.model_fields.get(section)
        optional = found is not None and getattr(found.default, name, OFF) is None
        instead = "leave it out for none or the automatic choice" if optional else "give it a value"
        return f"{key}: cannot be off: {instead}; what can be off is {', '.join(can_be_off())}, got 'off'"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key"
    if "got" in message:
        return f"{key}: {message}"
    value = problem["input"]
    # What other programs take for off.
    off = str(value).lower() in ("0", "0.0", "off", "none", "null", "false", "") and key in can_be_off()
    instead = '; "off" turns it off' if off else ""
    return f"{key}: {message[0].lower()}{message[1:]}{instead}, got {value!r}"
