"""Files that maskwire wrote beside its run, by their content: configurations, logs, and printed results.

They lie among texts when somebody works in the folder of the texts, and none of them is data.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

SETTINGS = {
    "run": "dir seed",
    "model": "num_tokens mask_id pad_id max_seq_len dim depth heads dim_head ff_mult emb_dim dropout "
    "positions norm feed_forward qk_norm tied_embeddings",
    "objective": "preset schedule masking weighting no_replace_prob random_token_prob augment_prob "
    "self_cond self_cond_prob self_cond_start critic critic_loss_weight critic_labels",
    "optimizer": "name learning_rate warmup_steps schedule total_steps min_learning_rate weight_decay betas "
    "eps clip_grad_norm ema_decay",
    "checkpoints": "every_steps every_seconds keep_last keep_every keep_best",
    "serve": "address socket allow_insecure tls_certificate tls_key tls_client_ca token_read_file "
    "token_train_file token_admin_file download_role reflection device precision compile deterministic "
    "threads durability keep_payloads reserve_bytes poison_after max_batch_tokens micro_batch_tokens "
    "activation_checkpointing max_message_bytes queue_limit window max_draws max_generation_steps "
    "max_read_tokens session_idle_seconds gap_seconds drain_seconds",
}
"""The sections of the server's configuration, and their keys."""

_TITLE = "# maskwire-server configuration."
_SECTION = re.compile(r"\[(\w+)\]\s*(#.*)?")
_SETTING = re.compile(r"(#\s*)?(\w+)\s*=")

_SERVER_LINE = re.compile(r"\d\d:\d\d:\d\d (DEBUG  |INFO   |WARNING|ERROR  |CRITICAL) (?P<message>.*)")
_SERVER_MESSAGE = re.compile(
    r"imported torch in [\d.]+ s|trainer built on |warmed up in |ready after [\d.]+ s|state [A-Z]+"
    r"|run [0-9a-f]{32} is at step |replayed \d+ steps in |restored checkpoint "
    r"|(loaded )?checkpoint \S+ (\(step \d+\)|saved: |collected|deleted on request)"
    r"|.*: stopping; what was acknowledged is safe"
    r"|run directory: |no configuration file \(--config\)"
)
_PRINTED_LINE = re.compile(
    r"step \d+/\d+  loss \S+  [\d,]+ tokens/s  -?\d+ s left"
    r"|step \d+(  loss \S+)?  [\d,]+ tokens/s  digest [0-9a-f]{16}"
    r"|step \d+: held out \S+ (± \S+ )?bits per token"
    r"|step \d+: checkpoint \S+$"
    r"|interrupted at step \d+; the same command goes on from there"
    r"|step \d+ \([\w ]+\), \d+ passes, digest [0-9a-f]{16}"
    r"|\s*step \d+: \d+ rows, \d+ tokens"
    r"|not taken as data: .*, which maskwire wrote"
    r"|waiting for \S+: (UNAVAILABLE|DEADLINE_EXCEEDED|[A-Z_]+): "
    r"|nothing to train: the run is at step \d+"
    r"|evaluating [\d,]+ rows|evaluating: \d+ of \d+ rows"
    r"|interrupted after [\d,]+ of [\d,]+ rows; nothing was changed"
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
    {"error", "reason", "exit_code"},
)
_LONGEST_RESULT = 2**26  # bytes


def is_artifact(path: Path, head: bytes) -> bool:
    """Whether maskwire wrote a file that begins with `head`."""
    text = head.decode(errors="replace")
    return is_configuration(text) or _is_log(text) or _is_result(path, text)


def is_configuration(head: str) -> bool:
    """Whether a text is a configuration of the server: its title, or nothing but its settings."""
    if head.startswith(_TITLE):
        return True
    section, settings = "", 0
    for line in head.splitlines()[: None if head.endswith("\n") else -1]:  # the last may be cut
        if found := _SECTION.fullmatch(line):
            section = found[1]
            if section not in SETTINGS:
                return False
        elif (found := _SETTING.match(line)) and found[2] in SETTINGS.get(section, "").split():
            settings += 1
        elif line.strip() and line[0] not in '# \t"]':  # the last two of a list over several lines
            return False
    return settings > 0


def _is_log(head: str) -> bool:
    """Whether a text begins as the server's log does, or as what a command tells people."""
    lines = [line for line in head.splitlines() if line.strip()]
    found = [_SERVER_LINE.fullmatch(line) for line in lines]
    if any(found[:3]) and any(one and _SERVER_MESSAGE.match(one["message"]) for one in found):
        return True
    if any(_PRINTED_LINE.match(line) for line in lines[:3]):
        return True
    return bool(lines) and all(_ERROR_LINE.match(line) for line in lines)


def _is_result(path: Path, head: str) -> bool:
    """Whether the first line is a result that a command printed as JSON; it may be longer than the head."""
    if not head.startswith(('{"', '[{"')) or path.stat().st_size > _LONGEST_RESULT:
        return False
    with path.open("rb") as file:
        line = file.readline()
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    one = found[0] if isinstance(found, list) else found
    return isinstance(one, dict) and any(
        keys == set(one) if len(keys) == 3 and "digest" in keys else keys <= set(one) for keys in _RESULTS
    )
