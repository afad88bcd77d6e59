"""Checkpoints of a run: named, written, collected by retention, deleted on request."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from maskwire_server.checkpoints import retention
from maskwire_server.checkpoints.store import Checkpoints, Snapshot
from maskwire_server.config import CheckpointsConfig
from maskwire_server.errors import Refused, is_shortage
from maskwire_server.journal import inexact_replays
from maskwire_server.journal.lineage import ancestry
from maskwire_server.journal.records import Lineage, Stretch
from maskwire_server.manifest import Manifest
from maskwire_server.position import HistoryPosition
from maskwire_server.requests import AUTOMATIC_NAME, SaveRequest
from maskwire_server.results import CheckpointInfo, InexactReplay

log = logging.getLogger(__name__)

KEPT_SECTIONS = ("model", "objective", "optimizer")


class Saver:
    """Names, writes, collects and deletes checkpoints; one call of `write`, `save` and `delete` at a time."""

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
        self.inexact_replays: tuple[InexactReplay, ...] = ()
        """What manifests tell of the history."""
        self.newest: CheckpointInfo | None = None
        """The newest of the run's own; None until `refresh`."""

    def refresh(self) -> None:
        """Look which checkpoint of the run's own is the newest."""
        try:
            self.newest = next((manifest.info for manifest in self._checkpoints.own()), None)
        except OSError as error:  # what was the newest may be so still
            log.warning("the folder of checkpoints could not be read: %s", error)

    def find(self, request: SaveRequest) -> CheckpointInfo | None:
        """The checkpoint that this request saved already; Refused when its name is taken."""
        if request.request_id is not None:
            for manifest in self._checkpoints.own():
                if manifest.request_id == request.request_id:
                    return _same(request, manifest.info)
        if any(manifest.info.name == request.name for manifest in self._checkpoints.all()):
            raise Refused(
                "CHECKPOINT_EXISTS",
                f"the name {request.name!r} is taken; choose another, or leave it empty for one of the "
                "server's",
                name=request.name,
            )
        return None

    def write(
        self,
        request: SaveRequest,
        automatic: bool,
        snapshot: Snapshot,
        position: HistoryPosition,
        save_id: str,
        lineages: dict[int, Lineage],
    ) -> CheckpointInfo:
        """Write the snapshot of a durable position, and collect what retention lets go.

        The journal has recorded `save_id`. Raises Refused.
        """
        self._checkpoints.expect(position, save_id)
        kind = "step" if request.score is None else "best"
        name = request.name or f"{kind}-{position.step:09d}" + (
            f"-lineage-{position.lineage}" if position.lineage > 1 else ""
        )
        info = CheckpointInfo(
            name, position.lineage, position.step, position.digest, (), time.time(), request.labels,
            request.score,
        )  # fmt: skip
        manifest = Manifest(
            info,
            position.run_id,
            automatic or (request.name is None and request.score is not None),
            request.request_id,
            self._configuration,
            self._versions,
            inexact_replays.within(self.inexact_replays, ancestry(lineages, position.lineage)),
            save_id,
        )
        written = self._write(request, manifest, snapshot)
        try:
            self._collect(lineages, position.lineage)
        except OSError as error:  # what was saved is saved; the next save collects
            log.error("checkpoints could not be collected: %s", error)
        return written

    def _collect(self, lineages: dict[int, Lineage], lineage: int) -> None:
        """Delete what retention lets go, once those that stay for a start were found intact."""
        self._verify(lineages, lineage)
        for name in retention.collectable(self._checkpoints.own(), lineages, lineage, self._settings):
            try:
                if self._checkpoints.delete(name):
                    log.info("checkpoint %s collected", name)
            except OSError as error:  # the next start sweeps what is left of it
                log.error("checkpoint %s could not be collected: %s", name, error)

    def _verify(self, lineages: dict[int, Lineage], lineage: int) -> None:
        """Read those that a start may need, and set the damaged ones aside, until enough are intact."""
        whole = 0
        for manifest in retention.on_path(self._checkpoints.own(), ancestry(lineages, lineage)):
            if whole == retention.FALLBACKS:
                break
            if self._checkpoints.verified(manifest):
                whole += 1
            else:
                self._set_aside(manifest.info.name)

    def droppable(self, lineages: dict[int, Lineage], lineage: int) -> list[Stretch]:
        """The steps whose batches are not needed: only the run's own checkpoints, found intact, count."""
        try:
            intact = [manifest for manifest in self._checkpoints.own() if self._checkpoints.intact(manifest)]
        except OSError as error:  # the next save drops them
            log.warning("the folder of checkpoints could not be read: %s", error)
            return []
        return retention.droppable(intact, lineages, lineage)

    def _write(self, request: SaveRequest, manifest: Manifest, snapshot: Snapshot) -> CheckpointInfo:
        saved = self.find(request)  # again: another save can have come first meanwhile
        if saved is not None:
            return saved
        if request.name is None:
            for existing in self._checkpoints.own():
                if not _is(existing, manifest):
                    continue
                if self._checkpoints.verified(existing):
                    return existing.info
                self._set_aside(existing.info.name)
            manifest = self._free_name(manifest)
        began = self._clock()
        info = self._checkpoints.write(snapshot, manifest).info
        log.info(
            "checkpoint %s saved: %.1f MB in %.1f s", info.name, info.size_bytes / 1e6, self._clock() - began
        )
        return info

    def _free_name(self, manifest: Manifest) -> Manifest:
        """The same under a name that is free: the state may be saved already, for somebody else."""
        taken = {existing.info.name for existing in self._checkpoints.all()}
        name, number = manifest.info.name, 1
        while name in taken or self._checkpoints.foreign(name):
            number += 1
            name = f"{manifest.info.name}-{number}"
        return replace(manifest, info=replace(manifest.info, name=name))

    def _set_aside(self, name: str) -> None:
        aside = self._checkpoints.set_aside(name)
        log.warning("checkpoint %s is damaged, and was moved to %s", name, aside)

    def delete(self, name: str, lineages: dict[int, Lineage], lineage: int) -> None:
        """Delete a checkpoint on request; Refused when something needs it."""
        self._checkpoints.get(name)
        self._verify(lineages, lineage)  # one that is damaged is none of those that a start may need
        why = retention.needed(self._checkpoints.own(), lineages, lineage).get(name)
        try:
            gone = why is not None or self._checkpoints.delete(name)
        except OSError as error:
            if is_shortage(error):
                raise
            raise Refused(
                "CHECKPOINT_FAILED",
                f"checkpoint {name!r} could not be deleted ({error.strerror or error}); look at the disk",
                name=name,
            ) from error
        if not gone:
            why = "it is being downloaded, or was a minute ago, or the run was restored to it"
        if why is not None:
            raise Refused(
                "CHECKPOINT_NEEDED", f"checkpoint {name!r} stays: {why}; save another first, or wait",
                name=name, why=why,
            )  # fmt: skip
        log.info("checkpoint %s deleted on request", name)


def _is(saved: Manifest, wanted: Manifest) -> bool:
    """Whether an unnamed save is of the state, and for the purpose, that one was made for."""
    one, other = saved.info, wanted.info
    return (
        (one.lineage, one.step, one.digest) == (other.lineage, other.step, other.digest)
        and AUTOMATIC_NAME.fullmatch(one.name) is not None
        and (saved.automatic, saved.request_id, one.labels, one.score)
        == (wanted.automatic, wanted.request_id, other.labels, other.score)
    )


def _same(request: SaveRequest, saved: CheckpointInfo) -> CheckpointInfo:
    """What the request id saved; Refused when it came with other arguments then."""
    generated = AUTOMATIC_NAME.fullmatch(saved.name) is not None
    name_fits = generated if request.name is None else request.name == saved.name
    if not name_fits or request.labels != saved.labels or request.score != saved.score:
        raise Refused(
            "PAYLOAD_MISMATCH",
            f"this request id saved checkpoint {saved.name!r} with other arguments; make a new id for a new "
            "request",
            name=saved.name,
        )
    return saved
