"""The demo, from an empty folder to a trained model and a picture.

DEMO_SECONDS is about how long it trains, 120 by default: faster machines do more steps, and slow ones take
longer for the minimum number of steps.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

import maskwire
from demo import report
from demo.generating import Writing
from demo.library import python_sources
from demo.server import ServerProcess
from maskwire.data.file_data import ByteData
from maskwire.results import EvalResult, StepResult

FOLDER = Path("demo-run")
MARK = "made-by-maskwire-demo"
CURVE, REPORT = FOLDER / "learning-curve.png", FOLDER / "report.html"
LENGTH, ROWS, HELD_OUT, EVAL_ROWS = 128, 8, 0.05, 128
EVALUATIONS = 5
PROBE_STEPS, FEWEST_STEPS = 40, 800
PEAK_RATE = 8e-3
CONFIG = f"""\
# A byte-level model small enough for two CPU cores: the best of docs/recipe.md.
[model]
num_tokens = 257   # 256 bytes and the mask id
mask_id = 256
max_seq_len = {LENGTH}
dim = 64
depth = 4
heads = 2
dim_head = 32
positions = "rotary"
norm = "rmsnorm"
qk_norm = true

[objective]
schedule = "quadratic"

[optimizer]
name = "muon"
ema_decay = 0.99

[checkpoints]
every_seconds = 10
"""

console = Console(highlight=False)


def main() -> int:
    """Entry point."""
    began = time.monotonic()
    seconds = float(os.environ.get("DEMO_SECONDS", "120"))
    say("[bold]maskwire demo[/bold]: a server that owns the model, a client that sends it text.\n")
    prepare_folder()
    training, held_out = sources()
    unigram = held_out.unigram_bits()
    say(
        f"Data: {len(training.files)} of the Python standard library's own source files, "
        f"{training.size / 1e6:.1f} MB; {len(held_out.files)} more are held out.\n"
        f"A model that knows only how often each byte occurs needs {unigram:.2f} bits per byte for those.\n"
    )
    config = FOLDER / "maskwire.toml"
    config.write_text(CONFIG)
    server = ServerProcess(FOLDER, config)
    writing = Writing(training, held_out, LENGTH)
    try:
        summary = run(server, training, held_out, writing, seconds, unigram)
    except KeyboardInterrupt:
        say("\nInterrupted. Nothing is left running; `make demo` starts again.")
        return 130
    finally:
        server.stop()
    summary["seconds"] = round(time.monotonic() - began, 1)
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    report.write(summary, writing, CURVE, REPORT)
    close(summary)
    return 0


def prepare_folder() -> None:
    """Make a new `demo-run`; one that the demo did not make is left alone."""
    if FOLDER.exists():
        if any(FOLDER.iterdir()) and not (FOLDER / MARK).exists():
            sys.exit(f"{FOLDER}/ exists and is not the demo's; move it away and run `make demo` again")
        shutil.rmtree(FOLDER)
    FOLDER.mkdir()
    (FOLDER / MARK).touch()


def sources() -> tuple[ByteData, ByteData]:
    """The standard library's sources without its tests: (training, held out)."""
    return ByteData(python_sources(), length=LENGTH, batch_size=ROWS).split(HELD_OUT)


def run(
    server: ServerProcess,
    training: ByteData,
    held_out: ByteData,
    writing: Writing,
    seconds: float,
    unigram: float,
) -> dict[str, Any]:
    """Train for about `seconds`, with a kill in the middle. Returns the figures."""
    say(f"Server up after {server.start():.1f} s on {server.address}, loopback only.")
    rows = held_out.spread(EVAL_ROWS)
    text_bytes = sum(len(row) for row in rows)
    metrics = FOLDER / "metrics.jsonl"
    killer = Killer(server)

    def evaluate(trainer: maskwire.Trainer) -> EvalResult:
        return trainer.eval_loss(rows, text_bytes=text_bytes)

    with maskwire.connect(server.address, name="demo", on_wait=killer.on_wait) as trainer:
        model = trainer.model
        say(f"Model: {model.parameters:,} parameters, {model.objective}.")
        start = evaluate(trainer)
        writing.untrained(trainer)
        say(f"Held out before training: {start.bits_per_byte:.2f} bits per byte. Measuring this machine …")
        probe = trainer.fit(
            training,
            until_step=PROBE_STEPS,
            metrics=metrics,
            learning_rate=lambda step: PEAK_RATE * step / PROBE_STEPS,
            progress=False,
        )
        total = max(FEWEST_STEPS, int(seconds * PROBE_STEPS / probe.seconds) // 10 * 10)
        killer.at_step = total // 2
        say(f"Training {total} steps of {ROWS} rows of {LENGTH} bytes. Half-way the server is killed.\n")
        result = trainer.fit(
            training,
            until_step=total,
            evaluate=evaluate,
            eval_every=max(1, total // EVALUATIONS),
            metrics=metrics,
            on_step=killer.on_step,
            learning_rate=lambda step: falling(step, total),
        )
        if result.interrupted:
            raise KeyboardInterrupt
        end = evaluate(trainer)
        writing.trained(trainer)
        saved = trainer.checkpoint("demo-end")
        digest = trainer.digest
    from demo.plot import learning_curve

    show_writing(writing)
    points = [start, *(found for found in result.evaluations if found.step < total), end]
    learning_curve(metrics, points, CURVE, unigram=unigram, killed_at=killer.at_step)
    assert start.bits_per_byte is not None
    assert end.bits_per_byte is not None
    return {
        "bits_per_byte_start": round(start.bits_per_byte, 4),
        "bits_per_byte_end": round(end.bits_per_byte, 4),
        "bits_per_byte_end_standard_error": round((end.standard_error or 0.0) / math.log(2), 4),
        "unigram_bits_per_byte": round(unigram, 4),
        "below_unigram": round(1 - end.bits_per_byte / unigram, 4),
        "samples_bits_per_byte_start": round(writing.before, 4),
        "samples_bits_per_byte_end": round(writing.after, 4),
        "real_text_bits_per_byte": round(writing.real, 4),
        "samples_fewer_bits": round(writing.fewer, 4),
        "steps": total,
        "tokens_per_second": round(PROBE_STEPS * ROWS * LENGTH / probe.seconds),
        "seconds_training": round(probe.seconds + result.seconds, 1),
        "parameters": model.parameters,
        "killed_at_step": killer.at_step,
        "restart_seconds": round(killer.restart_seconds, 2),
        "checkpoint": saved.name,
        "digest": digest.hex(),
    }


def falling(step: int, total: int) -> float:
    """Half a cosine: from the peak rate after the probe to 0 after the last step."""
    done = (step - PROBE_STEPS) / (total + 1 - PROBE_STEPS)
    return PEAK_RATE * (1 + math.cos(math.pi * done)) / 2


def show_writing(writing: Writing) -> None:
    """Samples, an infilling, and what a 4-gram model of held-out text thinks of them."""
    for number, text in enumerate(writing.texts, 1):
        say(f"\n[bold]Sample {number}[/bold], from nothing\n{escape(text)}")
    left, was, now, right = writing.filled
    say(
        f"\n[bold]A gap filled in[/bold] (in green; held-out text, which had {escape(repr(was))} there)\n"
        f"{escape(left)}[bold green]{escape(now)}[/bold green]{escape(right)}"
    )
    say(
        f"\nA 4-gram model of held-out text needs {writing.before:.2f} bits per byte for what the untrained "
        f"model writes and {writing.after:.2f} for these, {writing.fewer:.0%} fewer; for real text "
        f"{writing.real:.2f}."
    )


class Killer:
    """Kills the server while it trains and starts it again; the client resumes by itself."""

    def __init__(self, server: ServerProcess) -> None:
        self.at_step = 0
        self.restart_seconds = 0.0
        self._server = server
        self._thread: threading.Thread | None = None

    def on_step(self, result: StepResult) -> None:
        """Kill the server once, after step `at_step`."""
        if result.step == self.at_step and self._thread is None:
            self._thread = threading.Thread(target=self._strike)
            self._thread.start()

    def on_wait(self, text: str) -> None:
        """Print nothing while the client waits for the server: the demo says why it waits."""

    def _strike(self) -> None:
        self._server.kill()
        say(f"[red]kill -9[/red] of the server after step {self.at_step}; it starts again …")
        self.restart_seconds = self._server.start()
        say(
            f"[green]back[/green] after {self.restart_seconds:.1f} s: it loaded the newest checkpoint and "
            "recomputed the later steps from the journal. The client resumes where it was."
        )


def close(summary: dict[str, Any]) -> None:
    """What came out, and what to try next."""
    say(
        f"\n[bold]Held out: {summary['bits_per_byte_start']:.2f} → {summary['bits_per_byte_end']:.2f} bits "
        f"per byte[/bold] (± {summary['bits_per_byte_end_standard_error']:.2f}), "
        f"{summary['below_unigram']:.0%} below byte frequencies alone "
        f"({summary['unigram_bits_per_byte']:.2f}).\n"
        f"{summary['steps']} steps at {summary['tokens_per_second']:,} tokens/s; every acknowledged step "
        "survived the kill.\n\n"
        f"  {REPORT}          open it in a browser: the curve, the kill, a sample as it is unmasked\n"
        f"  {CURVE}   the picture\n"
        f"  {FOLDER}/summary.json         these figures\n"
        f"  {FOLDER}/metrics.jsonl        one line per step\n\n"
        "Next, with your own text (in two terminals, after `source .venv/bin/activate`):\n"
        "  maskwire-server init && maskwire-server serve --config maskwire.toml\n"
        "  maskwire train FOLDER --until-step 1000 --eval-every 200 && maskwire status\n"
        "From another machine: docs/deployment.md. From Python: the ten lines in README.md."
    )


def say(text: str) -> None:
    """Print a line."""
    console.print(text, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
