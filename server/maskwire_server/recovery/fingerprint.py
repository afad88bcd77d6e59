"""The environment fingerprint: what a step's result depends on besides model, objective and seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from maskwire_server.journal.journal import Journal

FINGERPRINT = (
    "torch", "device", "threads", "precision", "compile", "deterministic", "micro_batch_tokens", "world_size",
    "nccl", "nccl_algo", "nccl_proto", "transformers", "peft", "x-transformers", "factory",
)  # fmt: skip
NUMERICS = "fingerprint.numerics"
"""The key of the server's numerics version. Steps of another version are replayed within the tolerance."""


def fingerprint(versions: dict[str, str]) -> dict[str, Any]:
    """The part of a trainer's versions that results depend on: software, hardware, threads."""
    return {f"fingerprint.{name}": versions[name] for name in (*FINGERPRINT, "numerics") if name in versions}


def reproducible(settings: dict[str, Any]) -> bool:
    """Whether the same steps give the same bytes again. True if nothing was recorded."""
    deterministic = settings.get("fingerprint.deterministic", "yes") == "yes"
    return bool(deterministic and settings.get("fingerprint.compile", "off") == "off")


def numerics_version(settings: dict[str, Any]) -> int:
    """The numerics version in recorded settings; 1 if there is none, as the first version recorded none."""
    return int(settings.get(NUMERICS, 1))


def numerics(configuration: dict[str, Any], versions: dict[str, str]) -> dict[str, Any]:
    """The [optimizer] section and the fingerprint of the actual environment."""
    optimizer = {f"optimizer.{key}": value for key, value in configuration.get("optimizer", {}).items()}
    return optimizer | fingerprint(versions)


def pinned_threads(journal: Journal) -> int | None:
    """The thread count that the run was last computed with; None when none was recorded."""
    last = journal.last_event("configuration")
    threads = None if last is None else last[1].get("fingerprint.threads")
    return None if threads is None else int(threads)


def record_start(journal: Journal, versions: dict[str, str], settings: dict[str, Any]) -> int:
    """Record, within a transaction, that a server instance starts; return the id of its configuration."""
    last = journal.last_event("configuration")
    journal.add_event("instance", {"versions": versions})
    if last is not None and last[1] == settings:
        return last[0]
    return journal.add_event("configuration", settings)


def replayable(
    journal: Journal, settings: dict[str, Any], configure: Callable[[dict[str, Any], int], None]
) -> bool:
    """Whether this server could recompute the steps of the previous one."""
    last = journal.last_event("configuration")
    if last is None:
        return True
    before, now = trainer_settings(last[1]), trainer_settings(settings)
    try:
        if before != now:
            configure(*before)
            configure(*now)
    except ValueError:
        return False
    return not changed_fingerprints(last[1], settings)


def changed_fingerprints(was: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Keys that both fingerprints contain with different values."""
    return [
        key
        for key in sorted(was.keys() & settings.keys())  # an older version recorded less
        if key.startswith("fingerprint.") and key != NUMERICS and was[key] != settings[key]
    ]


def trainer_settings(settings: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """What a trainer is configured with: the [optimizer] section and the numerics version."""
    prefix = "optimizer."
    section = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
    return section, numerics_version(settings)
