"""`python -m bench`: measure, print, and write docs/benchmarks.md and .json.

--quick takes about 5 minutes and writes nothing; --only P2,P3 measures some, and replaces their rows.
L1, L3 and M3, what is learned, are measured by --only L1,L3,M3 alone. P10 and R11 need a GPU: --gpu --out DIR
takes at most 6 minutes, prints their table last and writes gpu.json and gpu.png into DIR.
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
    parser.add_argument("--quick", action="store_true", help="fewer rounds, nothing is written")
    parser.add_argument("--only", default="", help="targets, P1,P2,…")
    parser.add_argument("--gpu", action="store_true", help="P10 and R11 alone, on one GPU")
    parser.add_argument("--out", type=Path, help="with --gpu: the folder of its table and picture")
    parser.add_argument("--device", default="cuda", help="with --gpu --quick: cpu shows that it runs")
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
    """Measure P10 and R11; exit status 1 when nothing was measured, 2 without a device."""
    if device != "cpu" and not torch.cuda.is_available():
        print(
            "bench: --gpu needs a CUDA device, torch finds none; --gpu --quick --device cpu is a trial",
            file=sys.stderr,
        )
        return 2
    if device == "cpu" and not quick:
        print("bench: on a CPU --gpu would take hours; add --quick", file=sys.stderr)
        return 2
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # before minutes are spent on figures that would have no place
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
    except OSError as error:  # the table is printed all the same
        unwritten = f"bench: --out {out} cannot be written: {error.strerror}"
    print(described(about), markdown(rows), sep="\n\n", flush=True)
    if unwritten is not None:
        print(unwritten, file=sys.stderr)
    return 0 if unwritten is None and any(row.value is not None for row in rows) else 1


def end_servers(*_: object) -> NoReturn:
    """On SIGTERM: no server outlives the measurement, nor keeps its memory on the device."""
    for server in list(Server.every):
        server.end()
    sys.exit(143)


def replaced(before: list[dict[str, Any]], rows: list[Row], left: set[str]) -> list[Row]:
    """The rows from before, those that were measured again in their places, new ones where they belong.

    `left` are the targets of suites that did not run; another one's rows that did not come again are gone.
    """
    new = {(row.name, row.what): row for row in rows}
    kept = [
        new.pop((row["name"], row["what"]), Row(**row))
        for row in before
        if row["name"] in left or (row["name"], row["what"]) in new
    ]
    return sorted([*kept, *new.values()], key=lambda row: row.name)


def machine() -> dict[str, str]:
    """What the figures belong to."""
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
    if "--gpu" in sys.argv:  # a client whose time was over may still ask for its server: nobody waits for it
        os._exit(code)
    sys.exit(code)
