"""Saving while training goes on: one checkpoint at a time, written on a thread of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from maskwire_server.config import CheckpointsConfig
from maskwire_server.errors import Refused
from maskwire_server.manifest import Manifest
from maskwire_server.requests import SaveRequest
from maskwire_server.results import CheckpointInfo
from maskwire_server.run.checkpoint import Checkpoints, Snapshot, collectable
from maskwire_server.run.jobs import Save
from maskwire_server.run.journal import Journal
from maskwire_server.run.standing import Head
from maskwire_server.run.waiting import refuse

log = logging.getLogger(__name__)

KEPT_SECTIONS = ("model", "objective", "optimizer")


class Saver:
    """Names, writes and collects checkpoints. Only the engine's thread calls it."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        settings: CheckpointsConfig,
        configuration: dict[str, Any],
        versions: dict[str, str],
        clock: Callable[[], float],
    ) -> None:
        self._checkpoints = checkpoints
        self._settings = settings
        self._configuration = {
            section: configuration[section] for section in KEPT_SECTIONS if section in configuration
        }
        self._versions = versions
        self._clock = clock
        self._saved_at = clock()
        self._overdue = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="maskwire-save")
        self.busy = False
        """A snapshot is being made or written."""
        self.newest: CheckpointInfo | None = next((m.info for m in checkpoints.all()), None)

    def due(self, step: int) -> bool:
        """Whether an automatic checkpoint is due after `step`; one that must wait is made up for."""
        every_steps, every_seconds = self._settings.every_steps, self._settings.every_seconds
        if every_steps is not None and step % every_steps == 0:
            self._overdue = True
        if every_seconds is not None and self._clock() - self._saved_at >= every_seconds:
            self._overdue = True
        return self._overdue and not self.busy

    def find(self, request: SaveRequest) -> CheckpointInfo | None:
        """The checkpoint that this request saved already; Refused when its name is taken."""
        manifests = self._checkpoints.all()
        if request.request_id is not None:
            for manifest in manifests:
                if manifest.request_id == request.request_id:
                    return manifest.info
        if any(manifest.info.name == request.name for manifest in manifests):
            raise Refused(
                "CHECKPOINT_EXISTS",
                f"the name {request.name!r} is taken; choose another, or leave it empty for one of the "
                "server's",
                name=request.name,
            )
        return None

    def write(self, job: Save, snapshot: Snapshot, head: Head) -> Future[CheckpointInfo]:
        """Write a snapshot of the head's step in the background."""
        self.busy = True
        self._saved_at, self._overdue = self._clock(), False
        request = job.request
        name = request.name or f"step-{head.step:09d}" + (
            f"-lineage-{head.lineage}" if head.lineage > 1 else ""
        )
        manifest = Manifest(
            CheckpointInfo(name, head.lineage, head.step, head.digest, (), time.time(), request.labels),
            head.run_id,
            job.automatic,
            request.request_id,
            self._configuration,
            self._versions,
        )
        return self._thread.submit(self._write, request, manifest, snapshot)

    def _write(self, request: SaveRequest, manifest: Manifest, snapshot: Snapshot) -> CheckpointInfo:
        saved = self.find(request)  # again: another save can have come first meanwhile
        if saved is not None:
            return saved
        if request.name is None:
            for existing in self._checkpoints.all():
                if existing.info.name == manifest.info.name and existing.info.digest == manifest.info.digest:
                    return existing.info
        began = self._clock()
        info = self._checkpoints.write(snapshot, manifest).info
        log.info(
            "checkpoint %s saved: %.1f MB in %.1f s", info.name, info.size_bytes / 1e6, self._clock() - began
        )
        return info

    def finish(self, journal: Journal, lineage: int) -> int | None:
        """A background write ended well: collect what retention lets go.

        Returns the step of the lineage's second-newest checkpoint: older batches are not needed.
        """
        self.busy = False
        pinned = {line.checkpoint for line in journal.lineages().values() if line.checkpoint}
        gone = collectable(
            self._checkpoints.all(),
            lineage=lineage,
            keep_last=self._settings.keep_last,
            keep_every=self._settings.keep_every,
            pinned=pinned,
        )
        for name in gone:
            if self._checkpoints.delete(name):
                log.info("checkpoint %s collected", name)
        left = [m.info for m in self._checkpoints.all()]
        self.newest = next(iter(left), None)
        steps = [info.step for info in left if info.lineage == lineage]
        return steps[1] if len(steps) > 1 else None

    def give_up(self, job: Save, refusal: Refused) -> None:
        """A snapshot or its write failed; training goes on."""
        self.busy = False
        log.error("%s", refusal)
        for waiter in job.waiters:
            refuse(waiter, refusal)

    def close(self) -> None:
        """Finish what is being written."""
        self._thread.shutdown(wait=True)
