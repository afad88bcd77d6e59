"""Recognise maskwire's own files: runs, checkpoints, metrics, configurations, logs and printed results.

These files lie beside the texts when maskwire is run in the folder of the texts. A run must never train on
its own output, because its batches would then change while it trains.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePath

from maskwire.data.file_types import HEAD_BYTES

JOURNAL, CHECKPOINTS, LOCK, MANIFEST = "journal.sqlite", "checkpoints", "lock", "manifest.json"
_RUN_FILES = {LOCK, "computing", "data-tokenizer.json"}
_RUN_SUFFIXES = {".toml", ".log"}
_PARTIAL = re.compile(r"\.[0-9a-f]{12}\.part$|^manifest\.json\.part$")  # of a download
_TENSORS = ".safetensors"
# What loggers write: TensorBoard's event files, the folders of W&B's runs, and the header of a CSV file.
_EVENTS = ".tfevents."
_WANDB_RUN = re.compile(r"(offline-)?run-\d{8}_\d{6}-")
_CSV_HEADER = b"run_id,lineage,step,event,loss,"

SETTINGS = {
    "run": "dir seed",
    "model": "source num_tokens mask_id pad_id max_seq_len dim depth heads kv_heads dim_head ff_mult emb_dim "
    "dropout emb_dropout attn_dropout ff_dropout positions rotary_dim rotary_pairs rotary_base norm "
    "rms_norm_eps feed_forward ff_bias ff_down_bias qk_norm qk_norm_gain qk_norm_scale tied_embeddings "
    "x_transformers huggingface lora python weights_sha256",
    "objective": "preset schedule schedule_sha256 masking weighting no_replace_prob random_token_prob "
    "augment_prob self_cond self_cond_prob self_cond_start critic critic_loss_weight critic_labels",
    "optimizer": "name learning_rate warmup_steps schedule total_steps min_learning_rate weight_decay betas "
    "eps momentum clip_grad_norm ema_decay groups",
    "checkpoints": "every_steps every_seconds keep_last keep_every keep_best",
    "serve": "address socket allow_insecure tls_certificate tls_key tls_client_ca token_read_file "
    "token_train_file token_admin_file download_role reflection device precision compile deterministic "
    "threads durability keep_payloads reserve_bytes poison_after max_batch_tokens micro_batch_tokens "
    "activation_checkpointing max_message_bytes queue_limit window max_draws max_generation_steps "
    "max_read_tokens max_read_seconds max_reads_per_credential step_timeout_seconds session_idle_seconds "
    "gap_seconds drain_seconds",
    "distributed": "replicate shard rank_timeout_seconds checkpoints_by",
    "telemetry": "metrics_address tensorboard log_format",
    "storage": "mirror acknowledge segment_seconds segment_bytes",
}
"""The sections of the server's configuration and the keys of each."""

_TITLE = "# maskwire-server configuration."
_SECTION = re.compile(r"\[(\w+)\]\s*(#.*)?")
_SETTING = re.compile(r"(#\s*)?(\w+)\s*=")

_SERVER_LINE = re.compile(r"\d\d:\d\d:\d\d (DEBUG  |INFO   |WARNING|ERROR  |CRITICAL) (?P<message>.*)")
_SERVER_MESSAGE = re.compile(
    r"imported torch in [\d.]+ s|trainer built on |warmed up in |ready after [\d.]+ s|state [A-Z]+"
    r"|run [0-9a-f]{32} is at step |replayed \d+ steps? in |restored checkpoint "
    r"|(loaded )?checkpoint \S+ (\(step \d+\)|saved: |collected|deleted (by retention|on request))"
    r"|.*: stopping; (acknowledged steps are durable|what was acknowledged is safe)"
    r"|run directory: |no configuration file \(--config\)"
)
# Lines that commands print, in this version and earlier ones.
_PRINTED_LINE = re.compile(
    r"maskwire-server listening on \S+$"
    r"|step \d+/\d+  loss \S+  [\d,]+ tokens/s  -?\d+ s left"
    r"|step \d+(  loss \S+)?  [\d,]+ tokens/s  digest [0-9a-f]{16}"
    r"|step \d+: held out \S+ (± \S+ )?bits per token"
    r"|step \d+: checkpoint \S+$"
    r"|interrupted at step \d+; "
    r"|step \d+ \([\w ]+\), \d+ pass(es)?, digest [0-9a-f]{16}"
    r"|\s*step \d+: \d+ rows, \d+ tokens"
    r"|not taken as data: .*, which maskwire wrote"
    r"|skipped .*: (written by maskwire itself|hidden$|empty$|prepared data; |a link to |not a regular file$)"
    r"|skipped .*: no records with fields |.*: read as one text, with any header and field names in it; "
    r"|waiting for \S+: (UNAVAILABLE|DEADLINE_EXCEEDED|[A-Z_]+): "
    r"|nothing to train: the run is at step \d+"
    r"|restored \S+: training resumes from step \d+"
    r"|evaluating [\d,]+ rows|evaluating: \d+ of \d+ rows"
    r"|interrupted after [\d,]+ of [\d,]+ rows; "
    r"|│ state +│ [A-Z_]+ since |┃ name +┃ step +┃ lineage "
)
_ERROR_LINE = re.compile(r"maskwire: |\{\"(error|waiting)\": \"")

_RESULTS = (
    {"step", "digest", "loss", "tokens_per_second", "interrupted"},  # train
    {"losses", "nats_per_token", "by_masked_fraction"},  # eval
    {"tokens", "unmasking_step", "still_masked"},  # generate
    {"state", "run_id", "durable_step", "digest"},  # status
    {"name", "lineage", "step", "digest", "files"},  # checkpoint save, list
    {"lineage", "step", "digest"},  # checkpoint restore
    {"folder", "tokenizer", "num_tokens", "mask_id", "text_bytes"},  # data prepare
    {"file", "tokenizer", "document_start", "document_end"},  # data tokenizer
    {"error", "reason", "exit_code"},
)
_LARGEST_RESULT = 2**26  # bytes
_METRICS_KEYS = (
    {"run_id", "lineage", "step"},
    {"step", "outcome", "digest"},
    {"step", "eval_bits_per_token"},
)
_METRICS_LINE = re.compile(
    rb'\{"(step|run|run_id|lineage)": ("[^"]*"|\d+), "(loss|lineage|step|eval_bits_per_token)": '
)


class MaskwireOutput:
    """Distinguishes maskwire's own files from data; caches its findings about folders."""

    def __init__(self) -> None:
        self._runs: dict[Path, bool] = {}
        self._checkpoints: dict[Path, bool] = {}
        self._downloads: dict[Path, bool] = {}
        self._in_checkpoints: dict[Path, bool] = {}
        self._outputs = set(_outputs())

    def includes(self, path: Path, head: bytes) -> bool:
        """Whether maskwire wrote the file at `path`, which begins with `head`."""
        path = path.absolute()
        if self._is_checkpoint(path.parent) or self._in_run(path):
            return True
        if path.suffix == _TENSORS and self._is_download(path.parent):
            return True
        found = path.stat()
        if (found.st_dev, found.st_ino) in self._outputs or is_recognized(path, head, found.st_size):
            return True
        return _may_be_result(head, found.st_size) and _is_result(_first_line(path))

    def _in_run(self, path: Path) -> bool:
        folder = path.parent
        if self._is_run(folder):
            return path.name in _RUN_FILES or path.suffix in _RUN_SUFFIXES
        if folder not in self._in_checkpoints:
            chain = (folder, *folder.parents)
            self._in_checkpoints[folder] = any(
                inner.name == CHECKPOINTS and self._is_run(outer)
                for inner, outer in itertools.pairwise(chain)
            )
        return self._in_checkpoints[folder]

    def _is_run(self, folder: Path) -> bool:
        if folder not in self._runs:
            without_journal = (folder / LOCK).is_file() and (folder / CHECKPOINTS).is_dir()
            self._runs[folder] = without_journal or (folder / JOURNAL).is_file()
        return self._runs[folder]

    def _is_download(self, folder: Path) -> bool:
        """Whether a folder holds an unfinished download of a checkpoint."""
        if folder not in self._downloads:
            self._downloads[folder] = any(_PARTIAL.search(path.name) for path in folder.glob("*.part"))
        return self._downloads[folder]

    def _is_checkpoint(self, folder: Path) -> bool:
        if folder not in self._checkpoints:
            self._checkpoints[folder] = _holds_manifest(folder / MANIFEST)
        return self._checkpoints[folder]


def is_recognized(path: PurePath, head: bytes, size: int) -> bool:
    """Whether the name or the first bytes of a file show that maskwire wrote it."""
    if path.name.startswith(JOURNAL) or _EVENTS in path.name or _PARTIAL.search(path.name):
        return True
    if any(_WANDB_RUN.match(part) for part in path.parts) or is_metrics(head):
        return True
    text = head.decode(errors="replace")
    if is_configuration(text) or _is_log(text):
        return True
    return _may_be_result(head, size) and _is_result(head.split(b"\n", 1)[0])


def _holds_manifest(path: Path) -> bool:
    try:
        return b'"manifest_sha256"' in path.read_bytes()
    except OSError:
        return False


def _outputs() -> Iterator[tuple[int, int]]:
    """Yield device and inode of the files that stdout and stderr go to, as in `maskwire train . > log`."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            found = os.fstat(descriptor)
            yield found.st_dev, found.st_ino


def is_metrics(head: bytes) -> bool:
    """Whether a file begins like one that `fit` writes: a `metrics` file, or the CSV file of a logger."""
    if head.startswith(_CSV_HEADER):
        return True
    if b'"step"' not in head:
        return False
    lines = head.splitlines()[:3]  # the first may be truncated by log rotation
    if any(_is_metrics_line(line) for line in lines):
        return True
    whole_file = len(head) < HEAD_BYTES  # then an incomplete line was cut off because the disk was full
    return whole_file and len(lines) == 1 and not _parsed(lines[0]) and bool(_METRICS_LINE.match(lines[0]))


def _is_metrics_line(line: bytes) -> bool:
    found = _parsed(line)
    return isinstance(found, dict) and any(keys <= set(found) for keys in _METRICS_KEYS)


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def is_configuration(head: str) -> bool:
    """Whether a text is a server configuration: it begins with the title, or has only known settings."""
    if head.startswith(_TITLE):
        return True
    section, settings = "", 0
    for line in head.splitlines()[: None if head.endswith("\n") else -1]:  # the last may be truncated
        if found := _SECTION.fullmatch(line):
            section = found[1]
            if section not in SETTINGS:
                return False
        elif (found := _SETTING.match(line)) and found[2] in SETTINGS.get(section, "").split():
            settings += 1
        elif line.strip() and line[0] not in '# \t"]':  # a quote or a bracket: a list over several lines
            return False
    return settings > 0


def _is_log(head: str) -> bool:
    """Whether a text begins like the server's log or like the messages of a command."""
    lines = [line for line in head.splitlines() if line.strip()]
    if any(map(_SERVER_LINE.fullmatch, lines[:3])):
        found = map(_SERVER_LINE.fullmatch, lines)
        if any(one and _SERVER_MESSAGE.match(one["message"]) for one in found):
            return True
    if any(_PRINTED_LINE.match(line) for line in lines[:3]):
        return True
    return bool(lines) and all(_ERROR_LINE.match(line) for line in lines)


def _may_be_result(head: bytes, size: int) -> bool:
    return head.startswith((b'{"', b'[{"')) and size <= _LARGEST_RESULT


def _first_line(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.readline()


def _is_result(line: bytes) -> bool:
    """Whether a line is a result that a command printed as JSON."""
    found = _parsed(line)
    one = found[0] if isinstance(found, list) and found else found
    return isinstance(one, dict) and any(
        keys == set(one) if len(keys) == 3 and "digest" in keys else keys <= set(one) for keys in _RESULTS
    )
