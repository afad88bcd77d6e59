"""Runs that older versions left when they were killed: see fixtures/write_runs.py."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import tarfile
from pathlib import Path
from typing import Any

from maskwire_server.config import Config
from maskwire_server.training.trainer import TorchTrainer

ARCHIVES = Path(__file__).resolve().parent / "fixtures" / "runs"
PRESETS = ("mdlm", "maskgit", "cmlm", "x-transformers")
SETTINGS: dict[str, Any] = {
    "optimizer": {"learning_rate": 0.01, "warmup_steps": 0},
    "checkpoints": {"every_seconds": 1e6},
    "serve": {"device": "cpu"},
}
"""What may change between restarts, as it was; model, objective and seed come from the record."""


def unpack(name: str, folder: Path) -> Path:
    """The run directory as the kill left it."""
    with tarfile.open(ARCHIVES / f"0.1.0-{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


class RecordedMachine(TorchTrainer):
    """Says that it runs on the CPU model and torch of the record: these tests run on any."""

    machine: dict[str, str]

    @property
    def versions(self) -> dict[str, str]:
        return {**super().versions, **self.machine}


def machine_of(run_dir: Path) -> dict[str, str]:
    """CPU model and torch that a run was recorded on, from a checkpoint's manifest."""
    found = json.loads((run_dir / "checkpoints" / "kept" / "manifest.json").read_text())["versions"]
    return {"torch": found["torch"], "device": found["device"]}


def trainer_on_its_machine(run_dir: Path, whole: Config, **changes: Any) -> RecordedMachine:
    kind = type("OnItsMachine", (RecordedMachine,), {"machine": machine_of(run_dir), **changes})
    made = kind(whole.model, whole.objective, whole.optimizer, whole.serve, whole.run.seed)
    assert isinstance(made, RecordedMachine)
    return made


def move_to_this_machine(run_dir: Path) -> None:
    """Say in the record that this machine wrote it: for commands, which build their own trainer."""
    import torch

    from maskwire_server.training.numerics import processor

    here = {"fingerprint.torch": torch.__version__, "fingerprint.device": f"cpu ({processor()})"}
    with contextlib.closing(sqlite3.connect(run_dir / "journal.sqlite")) as journal:
        rows = journal.execute("SELECT id, body FROM events WHERE kind = 'configuration'").fetchall()
        for event_id, body in rows:
            text = json.dumps({**json.loads(body[64:]), **here}, sort_keys=True)
            sealed = hashlib.sha256(text.encode()).hexdigest() + text
            journal.execute("UPDATE events SET body = ? WHERE id = ?", (sealed, event_id))
        journal.commit()
