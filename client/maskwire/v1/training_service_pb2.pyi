import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_UINT8: _ClassVar[DataType]
    DATA_TYPE_UINT16: _ClassVar[DataType]
    DATA_TYPE_INT32: _ClassVar[DataType]
    DATA_TYPE_INT64: _ClassVar[DataType]

class StepOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STEP_OUTCOME_UNSPECIFIED: _ClassVar[StepOutcome]
    STEP_OUTCOME_APPLIED: _ClassVar[StepOutcome]
    STEP_OUTCOME_SKIPPED_NON_FINITE: _ClassVar[StepOutcome]
    STEP_OUTCOME_OUT_OF_MEMORY: _ClassVar[StepOutcome]
    STEP_OUTCOME_POISON: _ClassVar[StepOutcome]

class RunState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RUN_STATE_UNSPECIFIED: _ClassVar[RunState]
    RUN_STATE_RECOVERING: _ClassVar[RunState]
    RUN_STATE_SERVING: _ClassVar[RunState]
    RUN_STATE_RESTORING: _ClassVar[RunState]
    RUN_STATE_HELD: _ClassVar[RunState]
    RUN_STATE_HALTED: _ClassVar[RunState]
    RUN_STATE_DRAINING: _ClassVar[RunState]
    RUN_STATE_RECOVERY_FAILED: _ClassVar[RunState]

class Estimator(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ESTIMATOR_UNSPECIFIED: _ClassVar[Estimator]
    ESTIMATOR_SYSTEMATIC: _ClassVar[Estimator]
    ESTIMATOR_CHAIN_RULE: _ClassVar[Estimator]

class ChainOrder(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHAIN_ORDER_UNSPECIFIED: _ClassVar[ChainOrder]
    CHAIN_ORDER_LEFT_TO_RIGHT: _ClassVar[ChainOrder]
    CHAIN_ORDER_RANDOM: _ClassVar[ChainOrder]

class GenerationOrder(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GENERATION_ORDER_UNSPECIFIED: _ClassVar[GenerationOrder]
    GENERATION_ORDER_RANDOM: _ClassVar[GenerationOrder]
    GENERATION_ORDER_CONFIDENCE: _ClassVar[GenerationOrder]
    GENERATION_ORDER_MARGIN: _ClassVar[GenerationOrder]
    GENERATION_ORDER_ENTROPY: _ClassVar[GenerationOrder]
    GENERATION_ORDER_CRITIC: _ClassVar[GenerationOrder]

class SelfCondMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SELF_COND_MODE_UNSPECIFIED: _ClassVar[SelfCondMode]
    SELF_COND_MODE_TWO_PASS: _ClassVar[SelfCondMode]
    SELF_COND_MODE_CARRY: _ClassVar[SelfCondMode]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_UINT8: DataType
DATA_TYPE_UINT16: DataType
DATA_TYPE_INT32: DataType
DATA_TYPE_INT64: DataType
STEP_OUTCOME_UNSPECIFIED: StepOutcome
STEP_OUTCOME_APPLIED: StepOutcome
STEP_OUTCOME_SKIPPED_NON_FINITE: StepOutcome
STEP_OUTCOME_OUT_OF_MEMORY: StepOutcome
STEP_OUTCOME_POISON: StepOutcome
RUN_STATE_UNSPECIFIED: RunState
RUN_STATE_RECOVERING: RunState
RUN_STATE_SERVING: RunState
RUN_STATE_RESTORING: RunState
RUN_STATE_HELD: RunState
RUN_STATE_HALTED: RunState
RUN_STATE_DRAINING: RunState
RUN_STATE_RECOVERY_FAILED: RunState
ESTIMATOR_UNSPECIFIED: Estimator
ESTIMATOR_SYSTEMATIC: Estimator
ESTIMATOR_CHAIN_RULE: Estimator
CHAIN_ORDER_UNSPECIFIED: ChainOrder
CHAIN_ORDER_LEFT_TO_RIGHT: ChainOrder
CHAIN_ORDER_RANDOM: ChainOrder
GENERATION_ORDER_UNSPECIFIED: GenerationOrder
GENERATION_ORDER_RANDOM: GenerationOrder
GENERATION_ORDER_CONFIDENCE: GenerationOrder
GENERATION_ORDER_MARGIN: GenerationOrder
GENERATION_ORDER_ENTROPY: GenerationOrder
GENERATION_ORDER_CRITIC: GenerationOrder
SELF_COND_MODE_UNSPECIFIED: SelfCondMode
SELF_COND_MODE_TWO_PASS: SelfCondMode
SELF_COND_MODE_CARRY: SelfCondMode

class SessionRef(_message.Message):
    __slots__ = ("run_id", "lineage", "epoch")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    lineage: int
    epoch: int
    def __init__(self, run_id: _Optional[str] = ..., lineage: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class History(_message.Message):
    __slots__ = ("run_id", "lineage", "step", "digest")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    lineage: int
    step: int
    digest: bytes
    def __init__(self, run_id: _Optional[str] = ..., lineage: _Optional[int] = ..., step: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("num_tokens", "mask_id", "pad_id", "max_seq_len", "parameters", "objective", "loss_is_bound", "has_critic", "self_cond")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MASK_ID_FIELD_NUMBER: _ClassVar[int]
    PAD_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQ_LEN_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    OBJECTIVE_FIELD_NUMBER: _ClassVar[int]
    LOSS_IS_BOUND_FIELD_NUMBER: _ClassVar[int]
    HAS_CRITIC_FIELD_NUMBER: _ClassVar[int]
    SELF_COND_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    mask_id: int
    pad_id: int
    max_seq_len: int
    parameters: int
    objective: str
    loss_is_bound: bool
    has_critic: bool
    self_cond: bool
    def __init__(self, num_tokens: _Optional[int] = ..., mask_id: _Optional[int] = ..., pad_id: _Optional[int] = ..., max_seq_len: _Optional[int] = ..., parameters: _Optional[int] = ..., objective: _Optional[str] = ..., loss_is_bound: _Optional[bool] = ..., has_critic: _Optional[bool] = ..., self_cond: _Optional[bool] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_batch_tokens", "max_message_bytes", "window", "max_draws", "max_generation_steps", "max_read_tokens")
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    MAX_DRAWS_FIELD_NUMBER: _ClassVar[int]
    MAX_GENERATION_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_READ_TOKENS_FIELD_NUMBER: _ClassVar[int]
    max_batch_tokens: int
    max_message_bytes: int
    window: int
    max_draws: int
    max_generation_steps: int
    max_read_tokens: int
    def __init__(self, max_batch_tokens: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., window: _Optional[int] = ..., max_draws: _Optional[int] = ..., max_generation_steps: _Optional[int] = ..., max_read_tokens: _Optional[int] = ...) -> None: ...

class ClientProcess(_message.Message):
    __slots__ = ("host", "process_id", "start_time_ticks", "boot_id", "pid_namespace", "job")
    HOST_FIELD_NUMBER: _ClassVar[int]
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    START_TIME_TICKS_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    PID_NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    host: str
    process_id: int
    start_time_ticks: int
    boot_id: str
    pid_namespace: str
    job: str
    def __init__(self, host: _Optional[str] = ..., process_id: _Optional[int] = ..., start_time_ticks: _Optional[int] = ..., boot_id: _Optional[str] = ..., pid_namespace: _Optional[str] = ..., job: _Optional[str] = ...) -> None: ...

class SessionHolder(_message.Message):
    __slots__ = ("client_name", "epoch", "process")
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    client_name: str
    epoch: int
    process: ClientProcess
    def __init__(self, client_name: _Optional[str] = ..., epoch: _Optional[int] = ..., process: _Optional[_Union[ClientProcess, _Mapping]] = ...) -> None: ...

class OpenSessionRequest(_message.Message):
    __slots__ = ("client_name", "nonce", "takeover", "held_epoch", "history", "tokenizer", "process", "gone_epoch", "evaluated_step", "data", "allow_changed_data", "digest_versions")
    class DataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    TAKEOVER_FIELD_NUMBER: _ClassVar[int]
    HELD_EPOCH_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    GONE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    EVALUATED_STEP_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    ALLOW_CHANGED_DATA_FIELD_NUMBER: _ClassVar[int]
    DIGEST_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    client_name: str
    nonce: str
    takeover: bool
    held_epoch: int
    history: History
    tokenizer: str
    process: ClientProcess
    gone_epoch: int
    evaluated_step: int
    data: _containers.ScalarMap[str, str]
    allow_changed_data: bool
    digest_versions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, client_name: _Optional[str] = ..., nonce: _Optional[str] = ..., takeover: _Optional[bool] = ..., held_epoch: _Optional[int] = ..., history: _Optional[_Union[History, _Mapping]] = ..., tokenizer: _Optional[str] = ..., process: _Optional[_Union[ClientProcess, _Mapping]] = ..., gone_epoch: _Optional[int] = ..., evaluated_step: _Optional[int] = ..., data: _Optional[_Mapping[str, str]] = ..., allow_changed_data: _Optional[bool] = ..., digest_versions: _Optional[_Iterable[int]] = ...) -> None: ...

class OpenSessionResponse(_message.Message):
    __slots__ = ("session", "step", "durable_step", "digest", "model", "limits", "tokenizer", "inexact_replays", "superseded", "evaluated_lineage", "evaluated_step", "data", "digest_version", "kept_tokenizer_digest")
    class DataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DURABLE_STEP_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    INEXACT_REPLAYS_FIELD_NUMBER: _ClassVar[int]
    SUPERSEDED_FIELD_NUMBER: _ClassVar[int]
    EVALUATED_LINEAGE_FIELD_NUMBER: _ClassVar[int]
    EVALUATED_STEP_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    DIGEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    KEPT_TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    session: SessionRef
    step: int
    durable_step: int
    digest: bytes
    model: ModelInfo
    limits: Limits
    tokenizer: str
    inexact_replays: _containers.RepeatedCompositeFieldContainer[InexactReplay]
    superseded: SessionHolder
    evaluated_lineage: int
    evaluated_step: int
    data: _containers.ScalarMap[str, str]
    digest_version: int
    kept_tokenizer_digest: str
    def __init__(self, session: _Optional[_Union[SessionRef, _Mapping]] = ..., step: _Optional[int] = ..., durable_step: _Optional[int] = ..., digest: _Optional[bytes] = ..., model: _Optional[_Union[ModelInfo, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., tokenizer: _Optional[str] = ..., inexact_replays: _Optional[_Iterable[_Union[InexactReplay, _Mapping]]] = ..., superseded: _Optional[_Union[SessionHolder, _Mapping]] = ..., evaluated_lineage: _Optional[int] = ..., evaluated_step: _Optional[int] = ..., data: _Optional[_Mapping[str, str]] = ..., digest_version: _Optional[int] = ..., kept_tokenizer_digest: _Optional[str] = ...) -> None: ...

class InexactReplay(_message.Message):
    __slots__ = ("lineage", "first_step", "last_step", "accepted")
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    lineage: int
    first_step: int
    last_step: int
    accepted: bool
    def __init__(self, lineage: _Optional[int] = ..., first_step: _Optional[int] = ..., last_step: _Optional[int] = ..., accepted: _Optional[bool] = ...) -> None: ...

class CloseSessionRequest(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: SessionRef
    def __init__(self, session: _Optional[_Union[SessionRef, _Mapping]] = ...) -> None: ...

class CloseSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TokenBatch(_message.Message):
    __slots__ = ("data", "shape", "dtype", "lengths", "prompt_mask", "segment_ids")
    DATA_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_MASK_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_IDS_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: DataType
    lengths: _containers.RepeatedScalarFieldContainer[int]
    prompt_mask: bytes
    segment_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, data: _Optional[bytes] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[_Union[DataType, str]] = ..., lengths: _Optional[_Iterable[int]] = ..., prompt_mask: _Optional[bytes] = ..., segment_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Losses(_message.Message):
    __slots__ = ("loss", "generator_loss", "critic_loss")
    LOSS_FIELD_NUMBER: _ClassVar[int]
    GENERATOR_LOSS_FIELD_NUMBER: _ClassVar[int]
    CRITIC_LOSS_FIELD_NUMBER: _ClassVar[int]
    loss: float
    generator_loss: float
    critic_loss: float
    def __init__(self, loss: _Optional[float] = ..., generator_loss: _Optional[float] = ..., critic_loss: _Optional[float] = ...) -> None: ...

class TrainStepRequest(_message.Message):
    __slots__ = ("session", "step", "request_id", "batch", "only_train_generator", "only_train_critic", "generator_sample_temperature", "learning_rate")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    ONLY_TRAIN_GENERATOR_FIELD_NUMBER: _ClassVar[int]
    ONLY_TRAIN_CRITIC_FIELD_NUMBER: _ClassVar[int]
    GENERATOR_SAMPLE_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    session: SessionRef
    step: int
    request_id: str
    batch: TokenBatch
    only_train_generator: bool
    only_train_critic: bool
    generator_sample_temperature: float
    learning_rate: float
    def __init__(self, session: _Optional[_Union[SessionRef, _Mapping]] = ..., step: _Optional[int] = ..., request_id: _Optional[str] = ..., batch: _Optional[_Union[TokenBatch, _Mapping]] = ..., only_train_generator: _Optional[bool] = ..., only_train_critic: _Optional[bool] = ..., generator_sample_temperature: _Optional[float] = ..., learning_rate: _Optional[float] = ...) -> None: ...

class StepMetrics(_message.Message):
    __slots__ = ("gradient_norm", "learning_rate", "masked_tokens", "maskable_tokens", "queue_seconds", "compute_seconds", "commit_seconds")
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    MASKED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MASKABLE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMMIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    gradient_norm: float
    learning_rate: float
    masked_tokens: int
    maskable_tokens: int
    queue_seconds: float
    compute_seconds: float
    commit_seconds: float
    def __init__(self, gradient_norm: _Optional[float] = ..., learning_rate: _Optional[float] = ..., masked_tokens: _Optional[int] = ..., maskable_tokens: _Optional[int] = ..., queue_seconds: _Optional[float] = ..., compute_seconds: _Optional[float] = ..., commit_seconds: _Optional[float] = ...) -> None: ...

class TrainStepResponse(_message.Message):
    __slots__ = ("step", "losses", "replayed", "outcome", "digest", "metrics")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    step: int
    losses: Losses
    replayed: bool
    outcome: StepOutcome
    digest: bytes
    metrics: StepMetrics
    def __init__(self, step: _Optional[int] = ..., losses: _Optional[_Union[Losses, _Mapping]] = ..., replayed: _Optional[bool] = ..., outcome: _Optional[_Union[StepOutcome, str]] = ..., digest: _Optional[bytes] = ..., metrics: _Optional[_Union[StepMetrics, _Mapping]] = ...) -> None: ...

class EvalLossRequest(_message.Message):
    __slots__ = ("batch", "row_ids", "only_train_generator", "only_train_critic", "generator_sample_temperature", "draws", "seed", "estimator", "raw_weights", "text_bytes", "chain_order")
    BATCH_FIELD_NUMBER: _ClassVar[int]
    ROW_IDS_FIELD_NUMBER: _ClassVar[int]
    ONLY_TRAIN_GENERATOR_FIELD_NUMBER: _ClassVar[int]
    ONLY_TRAIN_CRITIC_FIELD_NUMBER: _ClassVar[int]
    GENERATOR_SAMPLE_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    DRAWS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    ESTIMATOR_FIELD_NUMBER: _ClassVar[int]
    RAW_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    TEXT_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHAIN_ORDER_FIELD_NUMBER: _ClassVar[int]
    batch: TokenBatch
    row_ids: _containers.RepeatedScalarFieldContainer[int]
    only_train_generator: bool
    only_train_critic: bool
    generator_sample_temperature: float
    draws: int
    seed: int
    estimator: Estimator
    raw_weights: bool
    text_bytes: int
    chain_order: ChainOrder
    def __init__(self, batch: _Optional[_Union[TokenBatch, _Mapping]] = ..., row_ids: _Optional[_Iterable[int]] = ..., only_train_generator: _Optional[bool] = ..., only_train_critic: _Optional[bool] = ..., generator_sample_temperature: _Optional[float] = ..., draws: _Optional[int] = ..., seed: _Optional[int] = ..., estimator: _Optional[_Union[Estimator, str]] = ..., raw_weights: _Optional[bool] = ..., text_bytes: _Optional[int] = ..., chain_order: _Optional[_Union[ChainOrder, str]] = ...) -> None: ...

class RowResult(_message.Message):
    __slots__ = ("row_id", "nats", "tokens", "half_difference_nats")
    ROW_ID_FIELD_NUMBER: _ClassVar[int]
    NATS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    HALF_DIFFERENCE_NATS_FIELD_NUMBER: _ClassVar[int]
    row_id: int
    nats: float
    tokens: int
    half_difference_nats: float
    def __init__(self, row_id: _Optional[int] = ..., nats: _Optional[float] = ..., tokens: _Optional[int] = ..., half_difference_nats: _Optional[float] = ...) -> None: ...

class EvalSums(_message.Message):
    __slots__ = ("generator_nats", "generator_weight", "critic_nats", "critic_weight", "critic_loss_weight")
    GENERATOR_NATS_FIELD_NUMBER: _ClassVar[int]
    GENERATOR_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    CRITIC_NATS_FIELD_NUMBER: _ClassVar[int]
    CRITIC_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    CRITIC_LOSS_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    generator_nats: float
    generator_weight: float
    critic_nats: float
    critic_weight: float
    critic_loss_weight: float
    def __init__(self, generator_nats: _Optional[float] = ..., generator_weight: _Optional[float] = ..., critic_nats: _Optional[float] = ..., critic_weight: _Optional[float] = ..., critic_loss_weight: _Optional[float] = ...) -> None: ...

class FractionResult(_message.Message):
    __slots__ = ("masked_fraction_min", "masked_fraction_max", "nats_per_masked_token", "accuracy", "masked_tokens")
    MASKED_FRACTION_MIN_FIELD_NUMBER: _ClassVar[int]
    MASKED_FRACTION_MAX_FIELD_NUMBER: _ClassVar[int]
    NATS_PER_MASKED_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    MASKED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    masked_fraction_min: float
    masked_fraction_max: float
    nats_per_masked_token: float
    accuracy: float
    masked_tokens: int
    def __init__(self, masked_fraction_min: _Optional[float] = ..., masked_fraction_max: _Optional[float] = ..., nats_per_masked_token: _Optional[float] = ..., accuracy: _Optional[float] = ..., masked_tokens: _Optional[int] = ...) -> None: ...

class EvalLossResponse(_message.Message):
    __slots__ = ("losses", "nats_per_token", "bits_per_token", "perplexity", "standard_error", "monte_carlo_error", "accuracy", "critic_accuracy", "by_masked_fraction", "rows", "bits_per_byte", "tokens", "step", "digest", "ema_weights", "draws", "sums")
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    NATS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    BITS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PERPLEXITY_FIELD_NUMBER: _ClassVar[int]
    STANDARD_ERROR_FIELD_NUMBER: _ClassVar[int]
    MONTE_CARLO_ERROR_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    CRITIC_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    BY_MASKED_FRACTION_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BITS_PER_BYTE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    EMA_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    DRAWS_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    losses: Losses
    nats_per_token: float
    bits_per_token: float
    perplexity: float
    standard_error: float
    monte_carlo_error: float
    accuracy: float
    critic_accuracy: float
    by_masked_fraction: _containers.RepeatedCompositeFieldContainer[FractionResult]
    rows: _containers.RepeatedCompositeFieldContainer[RowResult]
    bits_per_byte: float
    tokens: int
    step: int
    digest: bytes
    ema_weights: bool
    draws: int
    sums: EvalSums
    def __init__(self, losses: _Optional[_Union[Losses, _Mapping]] = ..., nats_per_token: _Optional[float] = ..., bits_per_token: _Optional[float] = ..., perplexity: _Optional[float] = ..., standard_error: _Optional[float] = ..., monte_carlo_error: _Optional[float] = ..., accuracy: _Optional[float] = ..., critic_accuracy: _Optional[float] = ..., by_masked_fraction: _Optional[_Iterable[_Union[FractionResult, _Mapping]]] = ..., rows: _Optional[_Iterable[_Union[RowResult, _Mapping]]] = ..., bits_per_byte: _Optional[float] = ..., tokens: _Optional[int] = ..., step: _Optional[int] = ..., digest: _Optional[bytes] = ..., ema_weights: _Optional[bool] = ..., draws: _Optional[int] = ..., sums: _Optional[_Union[EvalSums, _Mapping]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("count", "length", "prompts", "steps", "order", "temperature", "top_k", "top_p", "choice_temperature", "row_seeds", "seed", "stream_steps", "remasking", "self_cond_mode", "raw_weights", "start_temperature", "filter_thres")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    CHOICE_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    ROW_SEEDS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STREAM_STEPS_FIELD_NUMBER: _ClassVar[int]
    REMASKING_FIELD_NUMBER: _ClassVar[int]
    SELF_COND_MODE_FIELD_NUMBER: _ClassVar[int]
    RAW_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    START_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    FILTER_THRES_FIELD_NUMBER: _ClassVar[int]
    count: int
    length: int
    prompts: TokenBatch
    steps: int
    order: GenerationOrder
    temperature: float
    top_k: int
    top_p: float
    choice_temperature: float
    row_seeds: _containers.RepeatedScalarFieldContainer[int]
    seed: int
    stream_steps: bool
    remasking: bool
    self_cond_mode: SelfCondMode
    raw_weights: bool
    start_temperature: float
    filter_thres: float
    def __init__(self, count: _Optional[int] = ..., length: _Optional[int] = ..., prompts: _Optional[_Union[TokenBatch, _Mapping]] = ..., steps: _Optional[int] = ..., order: _Optional[_Union[GenerationOrder, str]] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., choice_temperature: _Optional[float] = ..., row_seeds: _Optional[_Iterable[int]] = ..., seed: _Optional[int] = ..., stream_steps: _Optional[bool] = ..., remasking: _Optional[bool] = ..., self_cond_mode: _Optional[_Union[SelfCondMode, str]] = ..., raw_weights: _Optional[bool] = ..., start_temperature: _Optional[float] = ..., filter_thres: _Optional[float] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("tokens", "unmasking_step", "done", "step", "digest", "still_masked", "ema_weights")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    UNMASKING_STEP_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STILL_MASKED_FIELD_NUMBER: _ClassVar[int]
    EMA_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    tokens: TokenBatch
    unmasking_step: int
    done: bool
    step: int
    digest: bytes
    still_masked: _containers.RepeatedScalarFieldContainer[int]
    ema_weights: bool
    def __init__(self, tokens: _Optional[_Union[TokenBatch, _Mapping]] = ..., unmasking_step: _Optional[int] = ..., done: _Optional[bool] = ..., step: _Optional[int] = ..., digest: _Optional[bytes] = ..., still_masked: _Optional[_Iterable[int]] = ..., ema_weights: _Optional[bool] = ...) -> None: ...

class CheckpointInfo(_message.Message):
    __slots__ = ("name", "lineage", "step", "digest", "size_bytes", "files", "create_time", "labels", "score")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    name: str
    lineage: int
    step: int
    digest: bytes
    size_bytes: int
    files: _containers.RepeatedCompositeFieldContainer[CheckpointFile]
    create_time: _timestamp_pb2.Timestamp
    labels: _containers.ScalarMap[str, str]
    score: float
    def __init__(self, name: _Optional[str] = ..., lineage: _Optional[int] = ..., step: _Optional[int] = ..., digest: _Optional[bytes] = ..., size_bytes: _Optional[int] = ..., files: _Optional[_Iterable[_Union[CheckpointFile, _Mapping]]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., labels: _Optional[_Mapping[str, str]] = ..., score: _Optional[float] = ...) -> None: ...

class CheckpointFile(_message.Message):
    __slots__ = ("name", "size_bytes", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    sha256: bytes
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class CheckpointRequest(_message.Message):
    __slots__ = ("request_id", "name", "labels", "score", "expected_lineage", "expected_step")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_LINEAGE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_STEP_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    name: str
    labels: _containers.ScalarMap[str, str]
    score: float
    expected_lineage: int
    expected_step: int
    def __init__(self, request_id: _Optional[str] = ..., name: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., score: _Optional[float] = ..., expected_lineage: _Optional[int] = ..., expected_step: _Optional[int] = ...) -> None: ...

class CheckpointResponse(_message.Message):
    __slots__ = ("checkpoint",)
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    checkpoint: CheckpointInfo
    def __init__(self, checkpoint: _Optional[_Union[CheckpointInfo, _Mapping]] = ...) -> None: ...

class ListCheckpointsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListCheckpointsResponse(_message.Message):
    __slots__ = ("checkpoints", "next_page_token")
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    checkpoints: _containers.RepeatedCompositeFieldContainer[CheckpointInfo]
    next_page_token: str
    def __init__(self, checkpoints: _Optional[_Iterable[_Union[CheckpointInfo, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class RestoreCheckpointRequest(_message.Message):
    __slots__ = ("request_id", "name", "expected_lineage", "expected_step")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_LINEAGE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_STEP_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    name: str
    expected_lineage: int
    expected_step: int
    def __init__(self, request_id: _Optional[str] = ..., name: _Optional[str] = ..., expected_lineage: _Optional[int] = ..., expected_step: _Optional[int] = ...) -> None: ...

class RestoreCheckpointResponse(_message.Message):
    __slots__ = ("lineage", "step", "digest")
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    lineage: int
    step: int
    digest: bytes
    def __init__(self, lineage: _Optional[int] = ..., step: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class DeleteCheckpointRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteCheckpointResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DownloadCheckpointRequest(_message.Message):
    __slots__ = ("name", "weights_only", "file", "offset_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_ONLY_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    weights_only: bool
    file: str
    offset_bytes: int
    def __init__(self, name: _Optional[str] = ..., weights_only: _Optional[bool] = ..., file: _Optional[str] = ..., offset_bytes: _Optional[int] = ...) -> None: ...

class DownloadCheckpointResponse(_message.Message):
    __slots__ = ("file", "offset_bytes", "data", "crc32")
    FILE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    file: CheckpointFile
    offset_bytes: int
    data: bytes
    crc32: int
    def __init__(self, file: _Optional[_Union[CheckpointFile, _Mapping]] = ..., offset_bytes: _Optional[int] = ..., data: _Optional[bytes] = ..., crc32: _Optional[int] = ...) -> None: ...

class Tokenizer(_message.Message):
    __slots__ = ("name", "file", "document_start", "document_end")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_START_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_END_FIELD_NUMBER: _ClassVar[int]
    name: str
    file: bytes
    document_start: _containers.RepeatedScalarFieldContainer[int]
    document_end: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., file: _Optional[bytes] = ..., document_start: _Optional[_Iterable[int]] = ..., document_end: _Optional[_Iterable[int]] = ...) -> None: ...

class KeepTokenizerRequest(_message.Message):
    __slots__ = ("tokenizer",)
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    tokenizer: Tokenizer
    def __init__(self, tokenizer: _Optional[_Union[Tokenizer, _Mapping]] = ...) -> None: ...

class KeepTokenizerResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetTokenizerRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetTokenizerResponse(_message.Message):
    __slots__ = ("tokenizer",)
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    tokenizer: Tokenizer
    def __init__(self, tokenizer: _Optional[_Union[Tokenizer, _Mapping]] = ...) -> None: ...

class ListStepsRequest(_message.Message):
    __slots__ = ("run_id", "lineage", "first_step", "last_step", "page_size", "page_token")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    lineage: int
    first_step: int
    last_step: int
    page_size: int
    page_token: str
    def __init__(self, run_id: _Optional[str] = ..., lineage: _Optional[int] = ..., first_step: _Optional[int] = ..., last_step: _Optional[int] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListStepsResponse(_message.Message):
    __slots__ = ("steps", "next_page_token", "run_id", "lineage", "parent_lineage", "start_step", "checkpoint")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    PARENT_LINEAGE_FIELD_NUMBER: _ClassVar[int]
    START_STEP_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedCompositeFieldContainer[RecordedStep]
    next_page_token: str
    run_id: str
    lineage: int
    parent_lineage: int
    start_step: int
    checkpoint: str
    def __init__(self, steps: _Optional[_Iterable[_Union[RecordedStep, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., run_id: _Optional[str] = ..., lineage: _Optional[int] = ..., parent_lineage: _Optional[int] = ..., start_step: _Optional[int] = ..., checkpoint: _Optional[str] = ...) -> None: ...

class RecordedStep(_message.Message):
    __slots__ = ("step", "outcome", "losses", "gradient_norm", "digest")
    STEP_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    step: int
    outcome: StepOutcome
    losses: Losses
    gradient_norm: float
    digest: bytes
    def __init__(self, step: _Optional[int] = ..., outcome: _Optional[_Union[StepOutcome, str]] = ..., losses: _Optional[_Union[Losses, _Mapping]] = ..., gradient_norm: _Optional[float] = ..., digest: _Optional[bytes] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("state", "state_time", "waiting_for", "run_id", "lineage", "step", "durable_step", "digest", "queue_length", "queue_limit", "steps_per_second", "tokens_per_second", "last_error", "writer", "epoch", "model", "limits", "newest_checkpoint", "versions", "uptime", "tokenizer", "inexact_replays", "data", "digest_version", "newest_step", "steps_total", "tokens_total", "step_seconds", "recovery_seconds", "events_dropped", "refused_calls", "device_share", "step_timeout_seconds", "mirror")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class DataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class StepsTotalEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class RecoverySecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class EventsDroppedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class RefusedCallsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    STATE_FIELD_NUMBER: _ClassVar[int]
    STATE_TIME_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DURABLE_STEP_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    QUEUE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    QUEUE_LIMIT_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    LAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    WRITER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    NEWEST_CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    INEXACT_REPLAYS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    DIGEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    NEWEST_STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RECOVERY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_DROPPED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_CALLS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_SHARE_FIELD_NUMBER: _ClassVar[int]
    STEP_TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MIRROR_FIELD_NUMBER: _ClassVar[int]
    state: RunState
    state_time: _timestamp_pb2.Timestamp
    waiting_for: str
    run_id: str
    lineage: int
    step: int
    durable_step: int
    digest: bytes
    queue_length: int
    queue_limit: int
    steps_per_second: float
    tokens_per_second: float
    last_error: str
    writer: str
    epoch: int
    model: ModelInfo
    limits: Limits
    newest_checkpoint: CheckpointInfo
    versions: _containers.ScalarMap[str, str]
    uptime: _duration_pb2.Duration
    tokenizer: str
    inexact_replays: _containers.RepeatedCompositeFieldContainer[InexactReplay]
    data: _containers.ScalarMap[str, str]
    digest_version: int
    newest_step: NewestStep
    steps_total: _containers.ScalarMap[str, int]
    tokens_total: int
    step_seconds: StepSeconds
    recovery_seconds: _containers.ScalarMap[str, float]
    events_dropped: _containers.ScalarMap[str, int]
    refused_calls: _containers.ScalarMap[str, int]
    device_share: DeviceShare
    step_timeout_seconds: float
    mirror: MirrorStatus
    def __init__(self, state: _Optional[_Union[RunState, str]] = ..., state_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., waiting_for: _Optional[str] = ..., run_id: _Optional[str] = ..., lineage: _Optional[int] = ..., step: _Optional[int] = ..., durable_step: _Optional[int] = ..., digest: _Optional[bytes] = ..., queue_length: _Optional[int] = ..., queue_limit: _Optional[int] = ..., steps_per_second: _Optional[float] = ..., tokens_per_second: _Optional[float] = ..., last_error: _Optional[str] = ..., writer: _Optional[str] = ..., epoch: _Optional[int] = ..., model: _Optional[_Union[ModelInfo, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., newest_checkpoint: _Optional[_Union[CheckpointInfo, _Mapping]] = ..., versions: _Optional[_Mapping[str, str]] = ..., uptime: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., tokenizer: _Optional[str] = ..., inexact_replays: _Optional[_Iterable[_Union[InexactReplay, _Mapping]]] = ..., data: _Optional[_Mapping[str, str]] = ..., digest_version: _Optional[int] = ..., newest_step: _Optional[_Union[NewestStep, _Mapping]] = ..., steps_total: _Optional[_Mapping[str, int]] = ..., tokens_total: _Optional[int] = ..., step_seconds: _Optional[_Union[StepSeconds, _Mapping]] = ..., recovery_seconds: _Optional[_Mapping[str, float]] = ..., events_dropped: _Optional[_Mapping[str, int]] = ..., refused_calls: _Optional[_Mapping[str, int]] = ..., device_share: _Optional[_Union[DeviceShare, _Mapping]] = ..., step_timeout_seconds: _Optional[float] = ..., mirror: _Optional[_Union[MirrorStatus, _Mapping]] = ...) -> None: ...

class NewestStep(_message.Message):
    __slots__ = ("step", "outcome", "losses", "gradient_norm", "learning_rate")
    STEP_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    step: int
    outcome: StepOutcome
    losses: Losses
    gradient_norm: float
    learning_rate: float
    def __init__(self, step: _Optional[int] = ..., outcome: _Optional[_Union[StepOutcome, str]] = ..., losses: _Optional[_Union[Losses, _Mapping]] = ..., gradient_norm: _Optional[float] = ..., learning_rate: _Optional[float] = ...) -> None: ...

class StepSeconds(_message.Message):
    __slots__ = ("queue_seconds", "compute_seconds", "commit_seconds")
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMMIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    queue_seconds: float
    compute_seconds: float
    commit_seconds: float
    def __init__(self, queue_seconds: _Optional[float] = ..., compute_seconds: _Optional[float] = ..., commit_seconds: _Optional[float] = ...) -> None: ...

class DeviceShare(_message.Message):
    __slots__ = ("step_seconds", "read_seconds", "owed_seconds", "waiting_reads", "refused_reads", "ended_reads")
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    READ_SECONDS_FIELD_NUMBER: _ClassVar[int]
    OWED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WAITING_READS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_READS_FIELD_NUMBER: _ClassVar[int]
    ENDED_READS_FIELD_NUMBER: _ClassVar[int]
    step_seconds: float
    read_seconds: float
    owed_seconds: float
    waiting_reads: int
    refused_reads: int
    ended_reads: int
    def __init__(self, step_seconds: _Optional[float] = ..., read_seconds: _Optional[float] = ..., owed_seconds: _Optional[float] = ..., waiting_reads: _Optional[int] = ..., refused_reads: _Optional[int] = ..., ended_reads: _Optional[int] = ...) -> None: ...

class MirrorStatus(_message.Message):
    __slots__ = ("address", "acknowledge", "lineage", "step", "segment", "seconds_since_segment", "checkpoint", "problem", "restored", "uploaded_bytes", "failures")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGE_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_SINCE_SEGMENT_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    UPLOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    address: str
    acknowledge: str
    lineage: int
    step: int
    segment: int
    seconds_since_segment: float
    checkpoint: str
    problem: str
    restored: str
    uploaded_bytes: int
    failures: int
    def __init__(self, address: _Optional[str] = ..., acknowledge: _Optional[str] = ..., lineage: _Optional[int] = ..., step: _Optional[int] = ..., segment: _Optional[int] = ..., seconds_since_segment: _Optional[float] = ..., checkpoint: _Optional[str] = ..., problem: _Optional[str] = ..., restored: _Optional[str] = ..., uploaded_bytes: _Optional[int] = ..., failures: _Optional[int] = ...) -> None: ...
