"""Saving while training goes on: one checkpoint at a time, written on a thread of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from maskwire_server.config import CheckpointsConfig
from maskwire_server.errors import Refused
from maskwire_server.requests import SaveRequest
from maskwire_server.results import CheckpointInfo
from maskwire_server.run.checkpoint import NAME, Checkpoints, Manifest, Snapshot, collectable

log = logging.getLogger(__name__)


class Saver:
    """Names, writes and collects checkpoints. Only the engine's thread calls it."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        settings: CheckpointsConfig,
        *,
        run_id: str,
        configuration: dict[str, Any],
        versions: dict[str, str],
        clock: Callable[[], float],
    ) -> None:
        self._checkpoints = checkpoints
        self._settings = settings
        self._run_id = run_id
        self._configuration = configuration
        self._versions = versions
        self._clock = clock
        self._saved_at = clock()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="maskwire-save")
        self.busy = False
        self.newest: Manifest | None = next(iter(checkpoints.all()), None)

    def due(self, step: int) -> bool:
        """Whether an automatic checkpoint is due after `step`."""
        every_steps, every_seconds = self._settings.every_steps, self._settings.every_seconds
        if self.busy:
            return False
        if every_steps is not None and step % every_steps == 0:
            return True
        return every_seconds is not None and self._clock() - self._saved_at >= every_seconds

    def find(self, request: SaveRequest) -> CheckpointInfo | None:
        """The checkpoint that this request saved already; Refused when its name is taken or malformed."""
        if request.request_id is not None:
            for manifest in self._checkpoints.all():
                if manifest.request_id == request.request_id:
                    return manifest.info
        if request.name is None:
            return None
        if not NAME.fullmatch(request.name):
            raise Refused(
                "INVALID_FIELD",
                f"name must match {NAME.pattern}, got {request.name!r}",
                fields={"name": f"must match {NAME.pattern}"},
                name=request.name,
            )
        if any(manifest.info.name == request.name for manifest in self._checkpoints.all()):
            raise Refused(
                "CHECKPOINT_EXISTS",
                f"the name {request.name!r} is taken; choose another, or leave it empty for one of the "
                "server's",
                name=request.name,
            )
        return None

    def begin(
        self,
        request: SaveRequest,
        snapshot: Snapshot,
        *,
        automatic: bool,
        lineage: int,
        step: int,
        digest: bytes,
    ) -> Future[Manifest]:
        """Write a snapshot of (lineage, step) in the background."""
        name = request.name or f"step-{step:09d}" + (f"-lineage-{lineage}" if lineage > 1 else "")
        if request.name is None:
            existing = [m for m in self._checkpoints.all() if m.info.name == name]
            if existing and existing[0].info.digest == digest:
                done: Future[Manifest] = Future()
                done.set_result(existing[0])
                return done
        manifest = Manifest(
            CheckpointInfo(name, lineage, step, digest, (), time.time(), request.labels),
            self._run_id,
            automatic,
            request.request_id,
            self._configuration,
            self._versions,
        )
        self.busy = True
        self._saved_at = self._clock()
        return self._threads.submit(self._checkpoints.write, snapshot, manifest)

    def finished(self, manifest: Manifest | None, lineage: int, pinned: set[str]) -> None:
        """The background write ended: note the newest, and collect what retention lets go."""
        self.busy = False
        if manifest is None:
            return
        self.newest = manifest
        log.info(
            "checkpoint %s saved (step %d, %.1f MB)",
            manifest.info.name,
            manifest.info.step,
            manifest.info.size_bytes / 1e6,
        )
        gone = collectable(
            self._checkpoints.all(),
            lineage=lineage,
            keep_last=self._settings.keep_last,
            keep_every=self._settings.keep_every,
            pinned=pinned,
        )
        for name in gone:
            self._checkpoints.delete(name)
            log.info("checkpoint %s collected", name)

    def covered_step(self, lineage: int) -> int | None:
        """The step of the lineage's second-newest whole checkpoint: older batches are not needed."""
        steps = [m.info.step for m in self._checkpoints.all() if m.info.lineage == lineage]
        return steps[1] if len(steps) > 1 else None

    def close(self) -> None:
        """Finish what is being written."""
        self._threads.shutdown(wait=True)
