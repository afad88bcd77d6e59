"""The commands `import-x-transformers` and `export`."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from maskwire._version import __version__
from maskwire_server import export_format, tokenizer_files
from maskwire_server.app import build_trainer
from maskwire_server.checkpoints.files import describe, write_manifest
from maskwire_server.checkpoints.provenance import Provenance
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.config import Config, recorded_sections, template
from maskwire_server.effective_config import with_schedule
from maskwire_server.error_output import say
from maskwire_server.errors import ConfigError, Refused, RunDirectoryError
from maskwire_server.exit_codes import EXIT_CONFIG, EXIT_RUN_DIRECTORY
from maskwire_server.export_format import Format
from maskwire_server.manifest import MANIFEST, SHARDED, WHOLE, Manifest
from maskwire_server.recovery import boot, imported_run
from maskwire_server.results import FROZEN_FILE, WEIGHT_FILES

CONFIG_FILE = "maskwire.toml"
"""The configuration with which to serve an imported run, in its run directory."""


def import_x_transformers(config: Config, source: Path, *, gains: Literal["auto", "offset", "plain"]) -> int:
    """Start a run from the weights of an x-transformers state dict, and return the exit code."""
    from maskwire_server.training.models import (
        weight_files,
        x_transformers_import,
        x_transformers_import_unchanged,
    )

    hosted = config.model.source == "x-transformers"
    try:
        if hosted and gains != "auto":
            raise ValueError(
                f"--gains is for the built-in encoder, got --gains {gains} and source x-transformers; set "
                "model.x_transformers.norm_add_unit_offset instead"
            )
        if config.model.source not in ("encoder", "x-transformers"):
            raise ValueError(
                f"model.source must be encoder or x-transformers for an import, got {config.model.source!r}"
            )
        tensors = weight_files.read(source)
        if hosted:
            found = x_transformers_import_unchanged.import_state_dict(tensors, config.model, config.objective)
        else:
            found = x_transformers_import.import_state_dict(
                tensors, config.model, config.objective, gains=gains
            )
        sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
        imported = config.model_copy(update={"model": found.model, "objective": found.objective})
        config = with_schedule(imported, config)
        trainer = build_trainer(config)
        trainer.adopt(found.weights)  # type: ignore[attr-defined]
        # The hash is not written to the configuration file, because the run records it.
        recorded = config.with_weights(trainer.begin())
    except (ConfigError, RunDirectoryError, ValueError, OSError) as error:
        say(error)
        return EXIT_CONFIG

    try:
        info = imported_run.begin(
            config.run.dir,
            lambda: trainer,
            recorded.as_json(),
            seed=config.run.seed,
            canonical=recorded.canonical(),
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
    to: Format,
    weights: Literal["auto", "ema", "raw"],
    merged: bool = False,
) -> int:
    """Write the weights of a run's checkpoint to `out`, and return the exit code.

    `name` is the checkpoint; None: the newest. `to` is the format: a folder for `maskwire_server.load`, an
    x-transformers state dict in safetensors, or a folder of transformers or peft. With `merged`, adapters are
    merged into the model's weights.
    """
    checkpoints = Checkpoints(run_dir)
    try:
        manifest = _newest(run_dir, checkpoints) if name is None else checkpoints.get(name)
    except (Refused, RunDirectoryError) as error:
        say(error)
        return EXIT_RUN_DIRECTORY
    return export_folder(checkpoints.path(manifest.info.name), out, to=to, weights=weights, merged=merged)


def export_folder(
    folder: Path, out: Path, *, to: Format, weights: Literal["auto", "ema", "raw"], merged: bool = False
) -> int:
    """Export the checkpoint in a folder, as `export` does. It may be downloaded, or in a run directory."""
    from maskwire_server.training.models import standalone_model

    try:
        if out.exists():
            raise ValueError(f"{out} already exists; choose another name")
        manifest = standalone_model.manifest(folder)
        model, _ = recorded_sections(manifest.configuration)
        export_format.check(model, to, merged=merged)
        notes = _write(folder, manifest, out, to=to, weights=weights, merged=merged)
    except (ConfigError, ValueError, OSError) as error:
        say(error)
        return EXIT_CONFIG
    parts = [f"{out}: checkpoint {manifest.info.name!r}, step {manifest.info.step}, for {to}", *notes]
    print("\n".join(parts), flush=True)
    return 0


def _write(
    folder: Path,
    manifest: Manifest,
    out: Path,
    *,
    to: Format,
    weights: Literal["auto", "ema", "raw"],
    merged: bool,
) -> list[str]:
    """Write one export, and return the lines to print about it. Raises ValueError and OSError."""
    from maskwire_server.training.models import exports, standalone_model

    if to == "maskwire":
        with _draft(out) as draft:
            if manifest.format == SHARDED:
                names = exports.write_whole(folder, manifest, draft)
                info = replace(manifest.info, files=tuple(describe(draft / name) for name in names))
                write_manifest(draft, replace(manifest, info=info, format=WHOLE))
                return []
            for file in manifest.info.files:
                if file.name in (*WEIGHT_FILES, FROZEN_FILE):
                    shutil.copyfile(folder / file.name, draft / file.name)
                    if describe(draft / file.name) != file:
                        raise ValueError(
                            f"{folder / file.name} does not match the manifest's SHA-256; copy the "
                            "checkpoint again"
                        )
            shutil.copyfile(folder / MANIFEST, draft / MANIFEST)
        return []
    module = standalone_model.load(folder, weights=weights)  # checks the SHA-256 hashes
    if to == "x-transformers":
        network = exports.write_state_dict(module, out)
        return [f"fits NonAutoregressiveWrapper(net, mask_id={module.config.mask_id}) with net = {network}"]
    found = tokenizer_files.files(folder.absolute().parent.parent / tokenizer_files.FOLDER)
    with _draft(out) as draft:
        if to == "peft":
            exports.write_adapters(module, draft)
        else:
            exports.write_folder(module, draft, merged=merged)
        tokenizer_files.copy(found, draft)
    notes = [f"left out: {', '.join(parts)}" for parts in [exports.left_out(module)] if parts]
    return notes + ["without a tokenizer: there is none in the run directory"] * (not found)


@contextlib.contextmanager
def _draft(out: Path) -> Iterator[Path]:
    """A new folder that is renamed to `out` if the `with` block succeeds, and removed otherwise."""
    draft = out.with_name(f"{out.name}.part")
    draft.mkdir(parents=True)
    try:
        yield draft
        draft.rename(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _newest(run_dir: Path, checkpoints: Checkpoints) -> Manifest:
    """The newest checkpoint of the run. Checkpoints from other runs must be named to be used."""
    found = checkpoints.all()
    with contextlib.suppress(RunDirectoryError):  # a server uses the journal, or there is no journal
        journal = boot.open_recorded(run_dir)
        try:
            provenance = Provenance()
            provenance.look_up(journal, found)
            found = [manifest for manifest in found if provenance.problem(manifest) is None]
        finally:
            journal.close()
    if not found:
        raise RunDirectoryError(
            f"{run_dir} has no complete checkpoint of its own run; save one, or name one of another run with "
            "--checkpoint"
        )
    runs = sorted({manifest.run_id for manifest in found})
    if len(runs) > 1:
        raise RunDirectoryError(
            f"{run_dir} has checkpoints of several runs ({', '.join(runs)}); name one with --checkpoint"
        )
    return found[0]
