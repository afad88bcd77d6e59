"""The campaign's table in docs/robustness.md."""

from __future__ import annotations

import os
import platform
from collections import Counter
from typing import Any

import grpc
from robustness.processes import ROOT

from maskwire import __version__

PAGE = ROOT / "docs" / "robustness.md"
BEGIN, END = "<!-- table -->", "<!-- end -->"


def write_report(notes: dict[str, Any], planned: dict[str, Counter[str]], failed: Counter[str]) -> None:
    """Put what the notes hold between the page's marks.

    `planned`: the cases of each target, by the size of the campaign; `failed`: those that did not hold.
    """
    before, rest = PAGE.read_text().split(BEGIN)
    kept, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(notes, planned, failed, rows(kept))}\n{END}{after}")
    print(f"written: {PAGE.relative_to(ROOT)}")


def rows(table: str) -> dict[str, str]:
    """The rows of a table by their targets."""
    return {line.split()[1]: line for line in table.splitlines() if line.startswith("| R")}


def table(
    notes: dict[str, Any], planned: dict[str, Counter[str]], failed: Counter[str], kept: dict[str, str]
) -> str:
    """One row a target: of its whole campaign, or of the short one where that alone was run.

    `kept` are the rows of before: those of targets that the notes do not have stay.
    """
    groups: dict[str, dict[str, list[tuple[str, Any]]]] = {}
    for key, note in notes.items():
        size, target, name = key.split(" ", 2)
        groups.setdefault(target, {}).setdefault(size, []).append((name, note))
    lines = [
        f"{os.cpu_count()} cores, {platform.machine()}, python {platform.python_version()}, maskwire "
        f"{__version__}, grpcio {grpc.__version__}.",
        "",
        "| | injected | cases | lost, doubled, or wrong | took | on |",
        "|---|---|---|---|---|---|",
    ]
    for target in sorted({*groups, *planned["full"]}, key=lambda name: int(name[1:])):
        sizes = groups.get(target, {})
        size = "full" if "full" in sizes else "short"
        items = sizes.get(size, [])
        if not items and failed[target]:
            wrong = f"in {failed[target]} cases"
            lines.append(f"| {target} | nothing held | 0 of {planned['full'][target]} | {wrong} | | |")
            continue
        if not items:
            lines.append(kept.get(target, f"| {target} | not run | 0 of {planned['full'][target]} | | | |"))
            continue
        seconds = sum(note["seconds"] for _, note in items)
        took = f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"
        done = f"{len(items)} of {planned[size][target]}" + (
            ", the short campaign" if size == "short" else ""
        )
        wrong = f"in {failed[target]} cases" if failed[target] else "0"
        last = max(note["date"] for _, note in items)
        revisions = sorted({note["revision"] for _, note in items if note.get("revision")})
        on = ", ".join([last, *revisions])
        lines.append(f"| {target} | {_WORDS[target](items)} | {done} | {wrong} | {took} | {on} |")
    return "\n".join(lines)


def _r1(items: list[tuple[str, Any]]) -> str:
    faults: Counter[str] = Counter()
    for _, note in items:
        faults.update(note["found"]["faults"])
    steps = sum(note["found"]["steps"] for _, note in items)
    kinds = ", ".join(f"{count:,} × {kind}" for kind, count in faults.most_common())
    return f"{len(items)} seeds, {steps:,} steps, {sum(faults.values()):,} faults: {kinds}"


def _r2(items: list[tuple[str, Any]]) -> str:
    runs = sum(note["found"]["runs"] for _, note in items)
    reached = sum(note["found"]["reached"] for _, note in items)
    places = len({name.split()[0] for name, _ in items})
    faults = f"kill −9, EIO, ENOSPC and a delay at {places} failpoints"
    return f"{faults}: {runs:,} runs, the fault met in {reached:,}"


def _r3(items: list[tuple[str, Any]]) -> str:
    found = items[0][1]["found"]
    return (
        f"{found['calls']} recorded writes, flushes, renames and deletions of a run with "
        f"{found['saved']} checkpoints, {found['collected']} of them deleted; after each, a kill −9 and "
        "power losses with all, each single piece, or random parts of what was not flushed missing: "
        f"{found['crashes']:,} recoveries"
    )


def _r4(items: list[tuple[str, Any]]) -> str:
    totals: Counter[str] = Counter()
    for _, note in items:
        for tally in note["found"]["files"].values():
            totals.update(tally)
    files = len(items[0][1]["found"]["files"])
    ends = ", ".join(f"{count:,} {words}" for words, count in totals.most_common())
    return f"{sum(totals.values()):,} flips, cuts, deletions and swaps in {files} files: {ends}"


def _r5(items: list[tuple[str, Any]]) -> str:
    runs = sum(note["found"]["runs"] for _, note in items)
    size = f"{runs:,} runs of {items[0][1]['found']['operations']} operations"
    return f"{size}, crashes at the places of a step and of the journal and full disks among them"


def _r6(items: list[tuple[str, Any]]) -> str:
    inside = sum(note["found"]["requests"] for name, note in items if name.startswith("in"))
    wire = sum(note["found"]["requests"] for name, note in items if name.startswith("over"))
    grown = max(note["found"]["memory grew by MiB"] for _, note in items)
    size = f"{inside:,} malformed requests in process, {wire:,} over the wire"
    return f"{size}: no crash, no UNKNOWN, memory +{grown} MiB"


def _r7(items: list[tuple[str, Any]]) -> str:
    found = items[0][1]["found"]
    return (
        f"{found['calls']:,} calls, a tenth cancelled: memory {found['MiB per 100,000 calls']:+} MiB per "
        f"100,000, threads {found['threads'][0][1]} → {found['threads'][1][1]}, descriptors "
        f"{found['descriptors'][0][1]} → {found['descriptors'][1][1]}"
    )


def _r8(items: list[tuple[str, Any]]) -> str:
    count = sum(note["found"]["terminations"] for _, note in items)
    busy = sum(note["found"]["while training"] for _, note in items)
    return f"SIGTERM at {count} random instants, {busy} of them while training: exit 0 each time"


def _r9(items: list[tuple[str, Any]]) -> str:
    return f"{len(items)} planted bugs: {len(items)} caught"


def _r12(items: list[tuple[str, Any]]) -> str:
    found = dict(items)
    at = [note["found"] for name, note in items if name.startswith("rank ")]
    words = f"a rank of two killed at {sum(each['places'] for each in at)} failpoints"
    words += f" ({sum(each['reached'] for each in at)} reached)"
    if "random instants" in found:
        random = found["random instants"]["found"]
        words += f" and at {random['kills']} random instants, back in {random['slowest']:.0f} s at most"
        if "restarts" in random:
            words += f", {random['restarts']} restarts in a row"
    if "hung follower" in found:
        words += "; one that hangs is ended with its group"
    if "frozen leader" in found:
        frozen = found["frozen leader"]["found"]
        words += f"; a frozen leader noticed in {frozen['noticed']:.0f} s, back in {frozen['back']:.0f} s"
    if "idle" in found:
        idle = found["idle"]["found"]
        words += f"; {idle['idle']:.0f} s of idleness with all limits at {idle['limits']} s: no restart"
    if "wire" in found:
        sent = found["wire"]["found"]
        words += (
            "; the wire was not scanned: " + sent["skipped"]
            if "skipped" in sent
            else (f"; {sent['messages']:,} messages of ranks, {sent['MB']:.0f} MB: no pickle")
        )
    if "network" in found:
        cut = found["network"]["found"]
        words += f"; two hosts cut apart: noticed in {cut['noticed']:.0f} s, back {cut['back']:.0f} s later"
    return words


def _r13(items: list[tuple[str, Any]]) -> str:
    found = {name: note["found"] for name, note in items}
    words = []
    if "parity" in found:
        steps = found["parity"]["steps"]
        words.append(f"2, 3 and 4 ranks beside one process, {steps} steps of each scenario")
    if "other layouts" in found:
        words.append(f"saved on 2 x 2 ranks, continued on {found['other layouts']['layouts']} other layouts")
    return "; ".join(words)


def _r14(items: list[tuple[str, Any]]) -> str:
    found = [(name, note["found"]) for name, note in items]
    instants = sum(each["instants"] for _, each in found if "instants" in each)
    lost = {
        mode: max(max(each["lost"]) for name, each in found if "lost" in each and name.endswith(mode))
        for mode in ("local", "mirrored")
    }
    faults: Counter[str] = Counter()
    for _, each in found:
        faults.update(each.get("faults", {}))
    kinds = ", ".join(f"{count:,} × {kind}" for kind, count in faults.most_common())
    runs = sum(each["runs"] for _, each in found if "runs" in each)
    reached = sum(each["reached"] for _, each in found if "reached" in each)
    takeovers = sum(each["takeovers"] for _, each in found if "takeovers" in each)
    return (
        f"the machine lost at {instants} instants, the run restored from an S3 address alone: acknowledged "
        f"steps lost: {lost['mirrored']} with `mirrored`, at most {lost['local']} with `local`, all of the "
        f"last segment; {sum(faults.values()):,} requests to the store that failed: {kinds}; a kill, EIO or "
        f"a delay at the mirror's failpoints: {runs} runs, met in {reached}; a second server took over "
        f"{takeovers} times, the first ended with its next segment"
    )


_WORDS = {
    "R1": _r1, "R2": _r2, "R3": _r3, "R4": _r4, "R5": _r5, "R6": _r6, "R7": _r7, "R8": _r8, "R9": _r9,
    "R12": _r12, "R13": _r13, "R14": _r14,
}  # fmt: skip
