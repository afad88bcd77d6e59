"""`python -m bench`: measure, print, and write docs/benchmarks.md and .json.

--quick takes about 5 minutes and writes nothing; --only P2,P3 measures only these and replaces their rows.
L1, L3 and M3 (what is learned) are measured only when named: --only L1,L3,M3. P10 and R11 need a GPU: --gpu
--out DIR takes at most 6 minutes, prints their table at the end and writes gpu.json and gpu.png into DIR.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch

from bench import (
    checkpoint,
    foreign_answers,
    foreign_models,
    generation,
    gpu,
    journal,
    learning,
    peer,
    picture,
    ragged,
    ranks,
    restart,
    serving,
    telemetry,
    training,
)
from bench.gpu_kills import Server
from bench.harness import Row, cores

DOCS = Path(__file__).resolve().parent.parent / "docs"
SUITES: dict[str, tuple[set[str], Callable[[bool], list[Row]]]] = {
    "serving": ({"P2", "P3"}, serving.measure),
    "training": ({"P1", "P7"}, training.measure),
    "peer": ({"P4", "P5", "P6"}, peer.measure),
    "rows of different lengths": ({"P11"}, ragged.measure),
    "journal": ({"P7"}, journal.measure),
    "restart": ({"P8"}, restart.measure),
    "checkpoint": ({"P9"}, checkpoint.measure),
    "generation": ({"G1"}, generation.measure),
    "telemetry": ({"P13"}, telemetry.measure),
    "several ranks": ({"P14"}, ranks.measure),
    "models of other libraries": ({"M1", "M2"}, foreign_models.measure),
}
LONG: dict[str, tuple[set[str], Callable[[bool], list[Row]]]] = {
    "learning": ({"L1", "L3"}, learning.measure),
    "models of other libraries through a server": ({"M3"}, foreign_answers.measure),
}
PACKAGES = ("maskwire", "torch", "grpcio", "protobuf", "numpy", "ray", "x-transformers", "transformers")


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; nothing is written")
    parser.add_argument("--only", default="", help="targets to measure, such as P1,P2")
    parser.add_argument("--gpu", action="store_true", help="P10 and R11 alone, on one GPU")
    parser.add_argument("--out", type=Path, help="with --gpu: the folder for its table and picture")
    parser.add_argument("--device", default="cuda", help="with --gpu --quick: cpu for a trial without a GPU")
    options = parser.parse_args(arguments)
    if options.gpu:
        return on_gpu(options.device, options.quick, options.out)
    wanted = {name for name in options.only.split(",") if name}
    rows: list[Row] = []
    began = time.monotonic()
    left: set[str] = set()
    for name, (targets, measure) in (SUITES | LONG).items():
        if (wanted and not wanted & targets) or (not wanted and name in LONG):
            left |= targets
            continue
        print(f"{name} …", file=sys.stderr, flush=True)
        rows += measure(options.quick)
    rows.sort(key=lambda row: row.name)
    for row in rows:
        row.on = time.strftime("%Y-%m-%d")
    about = machine()
    table = markdown(rows)
    print(table)
    print(f"{about['machine']}, {time.monotonic() - began:.0f} s")
    if not options.quick:
        rows = replaced(json.loads((DOCS / "benchmarks.json").read_text())["rows"], rows, left)
        table = markdown(rows)
        picture.overview(rows, DOCS / "images" / "benchmarks.png")
        (DOCS / "benchmarks.json").write_text(
            json.dumps({"machine": about, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1) + "\n"
        )
        path = DOCS / "benchmarks.md"
        before, mark, rest = path.read_text().partition("<!-- table -->\n")
        after = rest.partition("<!-- end -->\n")
        made = f"{mark}{described(about)}\n\n{table}\n{after[1]}"
        path.write_text(before + made + after[2])
    return 0


def on_gpu(device: str, quick: bool, out: Path | None) -> int:
    """Measure P10 and R11; exit status 1 if nothing was measured or written, 2 for wrong options."""
    if device != "cpu" and not torch.cuda.is_available():
        print(
            "bench: --gpu needs a CUDA device, torch finds none; for a trial: --gpu --quick --device cpu",
            file=sys.stderr,
        )
        return 2
    if device == "cpu" and not quick:
        print("bench: on a CPU --gpu would take hours; add --quick", file=sys.stderr)
        return 2
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # found before minutes are spent on figures that cannot be stored
            print(
                f"bench: --out {out} cannot be made ({error.strerror}); choose another folder",
                file=sys.stderr,
            )
            return 2
    signal.signal(signal.SIGTERM, end_servers)
    rows, found = gpu.measure(device, quick)
    for row in rows:
        row.on = time.strftime("%Y-%m-%d")
    about = machine() | found
    unwritten = None
    try:
        if out is not None:
            gpu.write(rows, about, out, picture.overview)
    except OSError as error:  # the table is still printed
        unwritten = f"bench: --out {out} cannot be written: {error.strerror}"
    print(described(about), markdown(rows), sep="\n\n", flush=True)
    if unwritten is not None:
        print(unwritten, file=sys.stderr)
    return 0 if unwritten is None and any(row.value is not None for row in rows) else 1


def end_servers(*_: object) -> NoReturn:
    """On SIGTERM, end all servers, so that none outlives the measurement or keeps device memory."""
    for server in list(Server.every):
        server.end()
    sys.exit(143)


def replaced(before: list[dict[str, Any]], rows: list[Row], left: set[str]) -> list[Row]:
    """The former rows, of which those that were measured again are replaced, and the new rows, in order.

    `left` has the targets of suites that did not run. Former rows of other targets are dropped unless they
    were measured again.
    """
    new = {(row.name, row.what): row for row in rows}
    kept = [
        new.pop((row["name"], row["what"]), Row(**row))
        for row in before
        if row["name"] in left or (row["name"], row["what"]) in new
    ]
    return sorted([*kept, *new.values()], key=lambda row: row.name)


def machine() -> dict[str, str]:
    """The machine and the versions that the figures were measured with."""
    found = {"machine": f"{cores()} cores, {platform.machine()}", "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def described(about: dict[str, str]) -> str:
    """The machine in a sentence."""
    rest = ", ".join(f"{name} {value}" for name, value in about.items() if name != "machine")
    return f"Measured with {about['machine']}, {rest}."


def markdown(rows: list[Row]) -> str:
    """The table."""
    lines = ["| | what | target | measured | spread | met | of | on |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        value = row.note or "not measured"
        if row.value is not None:
            value = f"**{row.value:.2f}**" + (f" ({row.note})" if row.note else "")
        spread = "" if row.low is None or row.high is None else f"{row.low:.2f} – {row.high:.2f}"
        met = "" if row.met is None else "yes" if row.met else "no"
        parts = ", ".join(f"{name} {number:,.4g}" for name, number in row.parts.items())
        lines.append(
            f"| {row.name} | {row.what} | {row.target} | {value} | {spread} | {met} | {parts} | {row.on} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    if "--gpu" in sys.argv:  # do not wait for a thread whose client still retries a killed server
        os._exit(code)
    sys.exit(code)
