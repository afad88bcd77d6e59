"""The environment fingerprint: software, hardware and settings that a step's result depends on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from maskwire_server.journal.journal import Journal

FINGERPRINT = (
    "torch", "device", "threads", "precision", "compile", "deterministic", "micro_batch_tokens", "world_size",
    "nccl", "nccl_algo", "nccl_proto", "transformers", "peft", "x-transformers", "factory",
)  # fmt: skip
NUMERICS = "fingerprint.numerics"
"""The key of the numerics version. Steps of another version are compared within the replay's tolerance."""


def fingerprint(versions: dict[str, str]) -> dict[str, Any]:
    """Return those of a trainer's `versions` that results depend on, with keys `fingerprint.NAME`."""
    return {f"fingerprint.{name}": versions[name] for name in (*FINGERPRINT, "numerics") if name in versions}


def reproducible(settings: dict[str, Any]) -> bool:
    """Whether a step computed again under these settings gives the same bytes. True if none are recorded."""
    deterministic = settings.get("fingerprint.deterministic", "yes") == "yes"
    return bool(deterministic and settings.get("fingerprint.compile", "off") == "off")


def numerics_version(settings: dict[str, Any]) -> int:
    """The numerics version in recorded settings; 1 if it is absent, because version 1 was not recorded."""
    return int(settings.get(NUMERICS, 1))


def numerics(configuration: dict[str, Any], versions: dict[str, str]) -> dict[str, Any]:
    """Return the [optimizer] section and the fingerprint of this environment as one flat dictionary."""
    optimizer = {f"optimizer.{key}": value for key, value in configuration.get("optimizer", {}).items()}
    return optimizer | fingerprint(versions)


def pinned_threads(journal: Journal) -> int | None:
    """The number of threads that the run was last computed with; None if none was recorded."""
    last = journal.last_event("configuration")
    threads = None if last is None else last[1].get("fingerprint.threads")
    return None if threads is None else int(threads)


def record_start(journal: Journal, versions: dict[str, str], settings: dict[str, Any]) -> int:
    """Record the start of a server and return the id of its configuration. Call it within a transaction."""
    last = journal.last_event("configuration")
    journal.add_event("instance", {"versions": versions})
    if last is not None and last[1] == settings:
        return last[0]
    return journal.add_event("configuration", settings)


def replayable(
    journal: Journal, settings: dict[str, Any], configure: Callable[[dict[str, Any], int], None]
) -> bool:
    """Whether this server can recompute the steps that the previous server computed."""
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
    """The keys, other than that of the numerics version, whose values differ between two fingerprints."""
    return [
        key
        for key in sorted(was.keys() & settings.keys())  # an older version recorded fewer keys
        if key.startswith("fingerprint.") and key != NUMERICS and was[key] != settings[key]
    ]


def trainer_settings(settings: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Return what a trainer is configured with: the [optimizer] section and the numerics version."""
    prefix = "optimizer."
    section = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
    return section, numerics_version(settings)
