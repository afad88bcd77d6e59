"""Saves of a run: name and write checkpoints, and delete them by retention or on request."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from maskwire.v1.values import InexactReplay
from maskwire_server.checkpoints import retention
from maskwire_server.checkpoints.catalogue import Catalogue
from maskwire_server.checkpoints.files import Snapshot
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.config import CheckpointsConfig
from maskwire_server.errors import Refused, is_shortage
from maskwire_server.journal import inexact_replays
from maskwire_server.journal.ancestry import ancestry
from maskwire_server.journal.records import Lineage, Stretch
from maskwire_server.manifest import Manifest
from maskwire_server.position import HistoryPosition
from maskwire_server.requests import AUTOMATIC_NAME, SaveRequest
from maskwire_server.results import CheckpointInfo

log = logging.getLogger(__name__)


def kept_sections(configuration: dict[str, Any]) -> dict[str, Any]:
    """Select the sections of a configuration that a checkpoint's manifest records."""
    kept = ("model", "objective", "optimizer")
    return {section: configuration[section] for section in kept if section in configuration}


class Saver:
    """Names, writes and deletes checkpoints. `write`, `collect` and `delete` are called one at a time."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        catalogue: Catalogue,
        settings: CheckpointsConfig,
        configuration: dict[str, Any],
        versions: dict[str, str],
        clock: Callable[[], float],
    ) -> None:
        self._checkpoints = checkpoints
        self._catalogue = catalogue
        self._settings = settings
        self._configuration = kept_sections(configuration)
        self._versions = versions
        self._clock = clock
        self.inexact_replays: tuple[InexactReplay, ...] = ()
        """The inexact replays of the run, which manifests list."""
        self.newest: CheckpointInfo | None = None
        """The run's own newest checkpoint, as of the last `refresh`."""

    def refresh(self) -> None:
        """Set `newest` to the newest checkpoint of the run's own history."""
        self.newest = next((manifest.info for manifest in self._checkpoints.own()), None)

    def find(self, request: SaveRequest) -> CheckpointInfo | None:
        """Return the checkpoint that an earlier attempt of this request saved, or None.

        Raises Refused if the name is taken, or if the request id was used with other arguments.
        """
        if request.request_id is not None:
            for manifest in self._checkpoints.own():
                if manifest.request_id == request.request_id and self._checkpoints.named(manifest.info.name):
                    return _same(request, manifest.info)
        if request.name is not None and self._checkpoints.named(request.name):
            raise Refused(
                "CHECKPOINT_EXISTS",
                f"the checkpoint name {request.name!r} is taken; choose another name, or leave it out and "
                "the server chooses one",
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
        """Write a snapshot as a checkpoint, and return its description. Raises Refused.

        `position` must be durable, and the journal must have recorded `save_id`.
        """
        self._catalogue.expect(position, save_id)
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
        info = self._write(request, manifest, snapshot)
        self.refresh()
        return info

    def collect(self, lineages: dict[int, Lineage], lineage: int) -> list[Stretch]:
        """Delete checkpoints that retention does not keep; return the steps whose batches can be dropped.

        The checkpoints that a restart would fall back on are first read again from the disk. If one is
        damaged, it is renamed and nothing is deleted. The next save checks again, with other checkpoints.
        """
        try:
            own = self._checkpoints.own()
            if not self._fallbacks_are_intact(own, lineages, lineage):
                return []
            for name in retention.collectable(own, lineages, lineage, self._settings):
                self._collect(name)
        except OSError as error:
            log.error("retention could not delete checkpoints (%s); the next save tries again", error)
            return []
        return retention.droppable(own, lineages, lineage)

    def _fallbacks_are_intact(self, own: list[Manifest], lineages: dict[int, Lineage], lineage: int) -> bool:
        intact = True
        for manifest in retention.on_path(own, ancestry(lineages, lineage))[: retention.FALLBACKS]:
            problem = self._checkpoints.damage(manifest)
            if problem is not None:
                log.error(
                    "a checkpoint that a restart would need is damaged: "
                    "no old checkpoint or batch is deleted until the next save"
                )
                self._set_aside(manifest.info.name, problem)
                intact = False
        return intact

    def _collect(self, name: str) -> None:
        try:
            if not self._checkpoints.delete(name):
                log.info("checkpoint %s deleted by retention", name)
        except OSError as error:  # the next start removes what is left of it
            log.error(
                "retention could not delete checkpoint %s (%s); the next save or restart tries again",
                name,
                error,
            )

    def _set_damaged_aside(self, lineages: dict[int, Lineage], lineage: int) -> None:
        """Rename damaged checkpoints, newest first, until there are enough intact ones for a restart."""
        intact = 0
        for manifest in retention.on_path(self._checkpoints.own(), ancestry(lineages, lineage)):
            if intact == retention.FALLBACKS:
                break
            if self._checkpoints.verified(manifest):
                intact += 1
            else:
                self._set_aside(manifest.info.name, "its files were changed")

    def _write(self, request: SaveRequest, manifest: Manifest, snapshot: Snapshot) -> CheckpointInfo:
        saved = self.find(request)  # again, because another save may have been faster
        if saved is not None:
            return saved
        if request.name is None:
            for existing in self._checkpoints.own():
                if not _is(existing, manifest):
                    continue
                problem = self._checkpoints.damage(existing)
                if problem is None:
                    return existing.info
                self._set_aside(existing.info.name, problem)
            manifest = self._free_name(manifest)
        began = self._clock()
        info = self._checkpoints.write(snapshot, manifest).info
        log.info(
            "checkpoint %s saved: %.1f MB in %.1f s", info.name, info.size_bytes / 1e6, self._clock() - began
        )
        return info

    def _free_name(self, manifest: Manifest) -> Manifest:
        """Return the manifest with an unused name. Another request may have saved the same state before."""
        name, number = manifest.info.name, 1
        while self._checkpoints.taken(name):
            number += 1
            name = f"{manifest.info.name}-{number}"
        return replace(manifest, info=replace(manifest.info, name=name))

    def _set_aside(self, name: str, problem: str) -> None:
        try:
            aside = self._checkpoints.set_aside(name)
        except FileNotFoundError:
            log.error(
                "checkpoint %s was removed from checkpoints/ while the server ran; delete checkpoints with "
                "`maskwire checkpoint delete` instead",
                name,
            )
        else:
            log.error(
                "checkpoint %s is damaged (%s) and was renamed to checkpoints/%s; check the server's disk",
                name,
                problem,
                aside,
            )
        self.refresh()

    def delete(self, name: str, lineages: dict[int, Lineage], lineage: int) -> None:
        """Delete a checkpoint on request. Raises Refused if it is needed, in use, or cannot be deleted."""
        self._checkpoints.get(name)
        self._set_damaged_aside(lineages, lineage)  # so that a restart is not expected to use them
        why = retention.needed(self._checkpoints.own(), lineages, lineage).get(name)
        cure = "save another checkpoint first"
        try:
            in_use = "" if why is not None else self._checkpoints.delete(name)
        except OSError as error:
            if is_shortage(error):
                raise
            raise Refused(
                "CHECKPOINT_FAILED",
                f"checkpoint {name!r} could not be deleted ({error.strerror or error}); check the server's "
                "disk, then delete it again",
                name=name,
            ) from error
        if in_use:
            why, cure = in_use, "wait, or save another checkpoint first"
        if why is not None:
            raise Refused(
                "CHECKPOINT_NEEDED", f"checkpoint {name!r} cannot be deleted: {why}; {cure}",
                name=name, why=why,
            )  # fmt: skip
        log.info("checkpoint %s deleted on request", name)


def _is(saved: Manifest, wanted: Manifest) -> bool:
    """Whether `saved` has a generated name and is what the save `wanted` would write."""
    one, other = saved.info, wanted.info
    return (
        (one.lineage, one.step, one.digest) == (other.lineage, other.step, other.digest)
        and AUTOMATIC_NAME.fullmatch(one.name) is not None
        and (saved.automatic, saved.request_id, one.labels, one.score)
        == (wanted.automatic, wanted.request_id, other.labels, other.score)
    )


def _same(request: SaveRequest, saved: CheckpointInfo) -> CheckpointInfo:
    """Return `saved`, which has this request's id. Raises Refused if it was saved with other arguments."""
    generated = AUTOMATIC_NAME.fullmatch(saved.name) is not None
    name_fits = generated if request.name is None else request.name == saved.name
    if not name_fits or request.labels != saved.labels or request.score != saved.score:
        raise Refused(
            "PAYLOAD_MISMATCH",
            f"this request id was used to save checkpoint {saved.name!r} with other arguments; use a new id "
            "for a new request",
            name=saved.name,
        )
    return saved
