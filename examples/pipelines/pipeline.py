"""A pipeline in plain Python: prepare, train, evaluate, gate on a bound, export.

    python examples/pipelines/pipeline.py WORK --texts texts --held-out held-out --until-step 1000 --bound 2.5

It runs the command `maskwire`, which takes the server, the certificates and the token from the environment
(MASKWIRE_TARGET, MASKWIRE_CA, MASKWIRE_TOKEN_FILE). Each finished stage leaves a record, WORK/STAGE.json.
Run the same command again after any interruption: it resumes at the first stage without a record. The gate
is checked in every run, because --bound may change. See docs/pipelines.md.

Exit codes: those of `maskwire` for the command that failed, or

    0    the weights are in WORK/model, and WORK/export.json describes them
    2    wrong usage, or WORK belongs to a pipeline with other arguments
    10   the gate is closed: the model is not good enough; this run exported nothing
    11   somebody else trained the run beyond --until-step, or restored it
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

USAGE, CLOSED, MOVED = 2, 10, 11
Record = dict[str, Any]


def prepare(work: Path, options: argparse.Namespace, _: dict[str, Record]) -> Record:
    """Tokenize the texts. A folder appears only once it is complete."""
    sizes = {}
    for name, texts in (("data", options.texts), ("held-out", options.held_out)):
        found = run(
            "data", "prepare", str(texts), "--out", str(work / name), "--tokenizer", options.tokenizer,
            "--force",
        )  # fmt: skip
        sizes[name] = found["tokens"]
    return {"tokens": sizes["data"], "held_out_tokens": sizes["held-out"]}


def train(work: Path, options: argparse.Namespace, _: dict[str, Record]) -> Record:
    """Train until the run is at --until-step, which is an absolute number, and save a checkpoint there."""
    named = ["--name", options.name] if options.name else []
    trained = run(
        "train", str(work / "data"), "--until-step", str(options.until_step), *named, *row_length(options),
        "--batch-size", str(options.batch_size),
    )  # fmt: skip
    check_step(trained, options.until_step)
    checkpoint = f"pipeline-{options.until_step}"
    saved = {each["name"]: each["digest"] for each in run("checkpoint", "list")}
    if saved.get(checkpoint) != trained["digest"]:
        check_step(run("checkpoint", "save", checkpoint), options.until_step)
    return {"step": trained["step"], "digest": trained["digest"], "checkpoint": checkpoint}


def evaluate(work: Path, options: argparse.Namespace, records: dict[str, Record]) -> Record:
    """Bits per token on the texts that were held out, with their standard error."""
    found = run("eval", str(work / "held-out"), "--rows", str(options.eval_rows), *row_length(options))
    if found["digest"] != records["train"]["digest"]:
        fail(MOVED, f"the run was trained or restored by somebody else, and is now at step {found['step']}")
    return {key: found[key] for key in ("step", "digest", "tokens", "bits_per_token", "standard_error")}


def gate(_: Path, options: argparse.Namespace, records: dict[str, Record]) -> Record:
    """Pass if the bits per token lie below --bound by two standard errors, which are in nats."""
    found = records["evaluate"]
    if found["bits_per_token"] is None or found["standard_error"] is None:
        fail(CLOSED, "the evaluation is not finite, or has one row only; raise --eval-rows")
    upper = found["bits_per_token"] + 2 * found["standard_error"] / math.log(2)
    if not upper <= options.bound:  # also if one is not a number
        fail(CLOSED, f"{upper:.4f} bits per token (with 2 standard errors) exceed --bound {options.bound:g}")
    return {"upper": upper, "bound": options.bound}


def export(work: Path, _: argparse.Namespace, records: dict[str, Record]) -> Record:
    """Download the weights. An interrupted download resumes."""
    name = records["train"]["checkpoint"]
    got = run("checkpoint", "download", name, "--weights", "--out", str(work / "model"))
    return {"folder": "model", "files": got["files"], **records["train"], **records["evaluate"]}


Stage = Callable[[Path, argparse.Namespace, dict[str, Record]], Record]
STAGES: tuple[Stage, ...] = (prepare, train, evaluate, gate, export)


def main(arguments: list[str] | None = None) -> int:
    """Run the gate, and the other stages that have no record yet."""
    options = parser().parse_args(arguments)
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, stop)
    # The bound may change: the gate is checked in every run. All other arguments must fit the records.
    fixed = {key: str(value) for key, value in vars(options).items() if key not in ("work", "bound", "name")}
    if not (work / "arguments.json").exists():
        write(work / "arguments.json", fixed)
    first = read(work / "arguments.json")
    if changed := sorted(key for key in fixed if first.get(key) != fixed[key]):
        fail(USAGE, f"{work} was started with another {', '.join(changed)}; choose another folder")
    records: dict[str, Record] = {}
    for stage in STAGES:
        name = stage.__name__
        path = work / f"{name}.json"
        if stage is gate or not path.exists():
            write(path, stage(work, options, records))
        records[name] = read(path)
        print(json.dumps({"stage": name, **records[name]}), flush=True)
    return 0


def read(path: Path) -> Record:
    """Read a record."""
    return dict(json.loads(path.read_text()))


def write(path: Path, result: Record) -> None:
    """Write a record atomically."""
    draft = path.with_name(path.name + ".draft")
    with draft.open("w") as file:
        json.dump(result, file)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)


def run(*words: str) -> Any:
    """Run a `maskwire` command with --json and return its result. If it fails, exit with its code."""
    program = shutil.which("maskwire") or str(Path(sys.executable).with_name("maskwire"))
    global _running, _starting
    _starting = True
    with subprocess.Popen([program, *words, "--json"], stdout=subprocess.PIPE, text=True) as _running:
        _starting = False
        if _stopped_by is not None:  # the signal came before `stop` could know the command
            _running.send_signal(_stopped_by)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the command as well, which ends cleanly
        output, _ = _running.communicate()
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = _running.returncode
    if code:
        print(f"pipeline: maskwire {words[0]} ended with exit code {code}", file=sys.stderr)
        raise SystemExit(code if code > 0 else 128 - code)
    return json.loads(output)


_running: subprocess.Popen[str] | None = None
_starting = False
_stopped_by: int | None = None


def stop(number: int, _: FrameType | None) -> None:
    """Pass SIGTERM on to the command that runs or starts, and end with its exit code."""
    global _stopped_by
    if _starting:
        _stopped_by = number
    elif _running is None or _running.poll() is not None:
        raise SystemExit(128 + number)
    else:
        _running.send_signal(number)


def check_step(found: Record, wanted: int) -> None:
    """Exit if the run is not at the step to which the pipeline trains it."""
    if found["step"] != wanted:
        fail(MOVED, f"the run is at step {found['step']}, not at --until-step {wanted}; use a separate run")


def fail(code: int, words: str) -> None:
    """Exit with an error."""
    print(f"pipeline: {words}", file=sys.stderr)
    raise SystemExit(code)


def row_length(options: argparse.Namespace) -> list[str]:
    """The option --length if it is given; without it, rows are as long as the model allows."""
    return [] if options.length is None else ["--length", str(options.length)]


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    made.add_argument("work", type=Path, help="folder for data, records and the exported model")
    made.add_argument("--texts", type=Path, required=True, help="texts to train on")
    made.add_argument("--held-out", type=Path, required=True, help="other texts, to evaluate on")
    made.add_argument("--until-step", type=int, required=True, help="train until the run is at this step")
    made.add_argument(
        "--bound", type=float, required=True, help="bits per token that the model must stay below"
    )
    made.add_argument("--tokenizer", default="bytes", help="bytes, or a tokenizer.json")
    made.add_argument("--length", type=int, help="tokens per row")
    made.add_argument("--batch-size", type=int, default=32, help="rows per batch")
    made.add_argument("--eval-rows", type=int, default=256, help="rows to evaluate")
    made.add_argument("--name", help="the job's name, if a scheduler may start it again on another machine")
    return made


if __name__ == "__main__":
    sys.exit(main())
