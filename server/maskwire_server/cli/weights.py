"""`maskwire-server import-x-transformers` and `export`: import and export of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from maskwire_server.cli.options import (
    ConfigFile,
    RunDir,
    Settings,
    check_extra,
    loaded,
    stop,
)


def import_x_transformers(
    state_dict: Annotated[
        Path,
        typer.Argument(help="File written by safetensors or by torch.save(model.state_dict(), …)."),
    ],
    config: ConfigFile = None,
    run_dir: RunDir = None,
    settings: Settings = None,
    gains: Annotated[
        Literal["auto", "offset", "plain"],
        typer.Option(
            help="Whether a norm's gain is gamma + 1 (offset, x-transformers' default) or gamma (plain, "
            "norm_add_unit_offset=False). auto: offset, with an error if the values look like plain."
        ),
    ] = "auto",
) -> None:
    """Start a run from the weights of a model trained with x-transformers.

    The file holds the weights of a NonAutoregressiveWrapper or a TransformerWrapper(Encoder). Sizes, critic
    and self-conditioning are read from the weights. Set model.mask_id and the settings that the weights do
    not determine, such as the activation; the command names them. It also writes maskwire.toml to the run
    directory. Serve the run with this file.
    """
    chosen = loaded(config, run_dir, None, settings)
    from maskwire_server.weight_import_export import import_x_transformers as run

    raise typer.Exit(run(chosen, state_dict, gains=gains))


def export(
    out: Annotated[Path, typer.Argument(help="Folder to write, or file with --to x-transformers.")],
    run_dir: Annotated[Path | None, typer.Option("--run-dir", help="Run directory.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Name of the checkpoint. Default: newest.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder of a downloaded checkpoint, instead of --run-dir.")
    ] = None,
    to: Annotated[
        Literal["maskwire", "x-transformers", "huggingface", "peft"],
        typer.Option(
            help="maskwire: a folder for maskwire_server.load. x-transformers: the state dict of a "
            "NonAutoregressiveWrapper (.safetensors); prints the options of the model that it fits. "
            "huggingface: a folder for AutoModelForMaskedLM.from_pretrained, with the tokenizer's files. "
            "peft: a folder with the adapters, for PeftModel.from_pretrained."
        ),
    ] = "maskwire",
    weights: Annotated[
        Literal["auto", "ema", "raw"],
        typer.Option(
            help="The moving average (ema), the trained weights (raw), or those used in evaluation (auto). "
            "--to maskwire exports both."
        ),
    ] = "auto",
    merged: Annotated[
        bool, typer.Option("--merged", help="With --to huggingface: merge the adapters into the model.")
    ] = False,
) -> None:
    """Export the weights of a checkpoint for use without the server.

    A model of x-transformers or transformers is exported in the format of its library.
    """
    check_extra()
    from maskwire_server import weight_import_export

    if folder is not None:
        if run_dir is not None or checkpoint is not None:
            stop("--folder names the checkpoint; leave out --run-dir and --checkpoint")
        raise typer.Exit(
            weight_import_export.export_folder(folder, out, to=to, weights=weights, merged=merged)
        )
    if run_dir is None:
        stop("--run-dir must be set, or --folder for a downloaded checkpoint")
    raise typer.Exit(
        weight_import_export.export(run_dir, checkpoint, out, to=to, weights=weights, merged=merged)
    )
