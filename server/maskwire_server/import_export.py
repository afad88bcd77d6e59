"""The commands `import-x-transformers` and `export`."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
from pathlib import Path
from typing import Literal

from maskwire._version import __version__
from maskwire_server.app import EXIT_CONFIG, EXIT_RUN_DIRECTORY, say, trainer_factory
from maskwire_server.checkpoints.membership import Membership
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.completion import with_schedule
from maskwire_server.config import Config, template
from maskwire_server.engine.trainer_interface import Trainer
from maskwire_server.errors import ConfigError, Refused, RunDirectoryError
from maskwire_server.manifest import MANIFEST, Manifest
from maskwire_server.recovery import boot, imported_run
from maskwire_server.results import WEIGHT_FILES

CONFIG_FILE = "maskwire.toml"
"""The configuration with which to serve an imported run, in its run directory."""


def import_x_transformers(config: Config, source: Path, *, gains: Literal["auto", "offset", "plain"]) -> int:
    """Start a run from the weights of an x-transformers state dict, and return the exit code."""
    from maskwire_server.training.models import state_dict, x_transformers

    try:
        tensors = state_dict.read(source)
        found = x_transformers.import_state_dict(tensors, config.model, config.objective, gains=gains)
        sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    except (ValueError, OSError) as error:
        say(error)
        return EXIT_CONFIG
    imported = config.model_copy(update={"model": found.model, "objective": found.objective})
    try:
        config = with_schedule(imported, config)
    except (ConfigError, RunDirectoryError) as error:
        say(error)
        return EXIT_CONFIG

    def build() -> Trainer:
        trainer = trainer_factory(config)()
        trainer.adopt(found.weights)  # type: ignore[attr-defined]
        return trainer

    try:
        info = imported_run.begin(
            config.run.dir,
            build,
            config.model_dump(mode="json"),
            seed=config.run.seed,
            canonical=config.canonical(),
            versions={"maskwire": __version__, "python": platform.python_version()},
            # Labels are sent to clients, so they must be UTF-8.
            labels={
                "source": os.fsencode(source.name).decode(errors="backslashreplace")[:256],
                "source-sha256": sha256,
            },
            texts={CONFIG_FILE: template.written(config)},
        )
    except RunDirectoryError as error:
        say(error)
        return EXIT_RUN_DIRECTORY
    except ConfigError as error:
        say(error)
        return EXIT_CONFIG
    count = sum(tensor.numel() for tensor in found.weights.values())
    parts = [f"{count:,} weights"]
    parts += ["self-conditioning"] if found.objective.self_cond else []
    parts += [f"a {found.objective.critic} critic"] if found.objective.critic != "none" else []
    print(
        f"imported {', '.join(parts)} as checkpoint {info.name!r} of step 0\n"
        f"next: maskwire-server serve --config {shlex.quote(str(config.run.dir / CONFIG_FILE))} "
        f"--run-dir {shlex.quote(str(config.run.dir))}",
        flush=True,
    )
    return 0


def export(
    run_dir: Path,
    name: str | None,
    out: Path,
    *,
    to: Literal["maskwire", "x-transformers"],
    weights: Literal["auto", "ema", "raw"],
) -> int:
    """Write the weights of a checkpoint to `out`, and return the exit code.

    `to` is the format: a folder for `maskwire_server.load`, or an x-transformers state dict in safetensors.
    """
    from maskwire_server.training.models import pretrained, state_dict, x_transformers_export

    checkpoints = Checkpoints(run_dir)
    try:
        manifest = _newest(run_dir, checkpoints) if name is None else checkpoints.get(name)
    except (Refused, RunDirectoryError) as error:
        say(error)
        return EXIT_RUN_DIRECTORY
    folder = checkpoints.path(manifest.info.name)
    try:
        if out.exists():
            raise ValueError(f"{out} exists; choose another name")
        module = pretrained.load(folder, weights=weights)  # checks the SHA-256 hashes
        fits = ""
        if to == "x-transformers":
            state = x_transformers_export.export_state_dict(
                module.config, module.objective, module.networks.state_dict()
            )
            state_dict.write(out, state)
            fits = f"\nthe network that it fits: {x_transformers_export.constructor(module.config)}"
        else:
            draft = out.with_name(f"{out.name}.part")
            draft.mkdir(parents=True)
            kept = [file.name for file in manifest.info.files if file.name in WEIGHT_FILES]
            for file in [*kept, MANIFEST]:
                shutil.copyfile(folder / file, draft / file)
            draft.rename(out)
    except (ValueError, OSError) as error:
        say(error)
        return EXIT_CONFIG
    print(f"{out}: checkpoint {manifest.info.name!r}, step {manifest.info.step}, for {to}{fits}", flush=True)
    return 0


def _newest(run_dir: Path, checkpoints: Checkpoints) -> Manifest:
    """The newest checkpoint of the run. Checkpoints copied from other runs are only used by name."""
    found = checkpoints.all()
    with contextlib.suppress(RunDirectoryError):  # a server uses the journal, or there is no journal
        journal = boot.open_recorded(run_dir)
        try:
            membership = Membership()
            membership.look_up(journal, found)
            found = [manifest for manifest in found if membership.problem(manifest) is None]
        finally:
            journal.close()
    if not found:
        raise RunDirectoryError(
            f"{run_dir} has no complete checkpoint of its run; name one with --checkpoint"
        )
    runs = sorted({manifest.run_id for manifest in found})
    if len(runs) > 1:
        raise RunDirectoryError(
            f"{run_dir} has checkpoints of several runs ({', '.join(runs)}); name one with --checkpoint"
        )
    return found[0]
