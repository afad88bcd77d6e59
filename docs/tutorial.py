"""Run the code of a tutorial page, block after block, as a reader would.

    .venv/bin/python docs/tutorial.py own-corpus FOLDER        runs it in FOLDER, at the sizes of the page

The tests run every page this way, for fewer steps. A page consists of

- blocks without a language: commands, each run until it ends. `maskwire-server serve` runs on; another `serve`
  and the words "Stop the server" in the text stop it as Ctrl-C does;
- `python`: a program of its own;
- `toml`: the file that its first line names, as `# maskwire.toml`;
- `text`: what the block before it prints. Each line must be found in the output, with any numbers, hashes and
  names of files; `…` stands for anything;
- `sh`: commands that need something which a test has not, such as the network or a cluster. They are not run.

Output that depends on what a model has learned is indented and not compared.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).resolve().parent / "tutorials"
ROOT = TUTORIALS.parent.parent
READY = "maskwire-server listening on "
ADDRESS = r"(127\.0\.0\.1|localhost):50051"
SHELL = {"|", "||", "&&", ">", "&"}
"""A line with one of these words is left to bash."""
_PARTS = re.compile(r"^```(\w*)\n(.*?)^```$|(Stop the server)", re.MULTILINE | re.DOTALL)
_VARIES = re.compile(r"\b[0-9a-f]{7,}\b|\d[\d,.:]*(?:e[+-]?\d+)?")


class TutorialError(Exception):
    """The page says something else than what happens."""


def blocks(page: str) -> list[tuple[str, str]]:
    """The page's blocks in order, each with its kind; ("stop", "") where the text stops the server."""
    return [("stop", "") if stop else (kind, code) for kind, code, stop in _PARTS.findall(page)]


def commands(code: str) -> list[str]:
    """The commands of a block, without comments and blank lines."""
    lines = re.sub(r"\\\n\s*", "", code).splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def missing(expected: str, output: str) -> list[str]:
    """The lines that the output lacks, whatever numbers are in them."""
    said = [_without_numbers(line) for line in output.splitlines()]
    return [line for line in expected.splitlines() if not any(_found(line, each) for each in said)]


def _without_numbers(line: str) -> str:
    return " ".join(_VARIES.sub("#", line).split())


def _found(line: str, said: str) -> bool:
    parts = [re.escape(_without_numbers(part)) for part in line.split("…")]
    return re.search(".*".join(parts), said) is not None


class Tutorial:
    """A page, the folder that it runs in, and its server."""

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        shorter: Mapping[str, str] | None = None,
        start: Any = subprocess.Popen,
        settings: Iterable[str] = (),
    ) -> None:
        """`shorter`: what to run in place of words of the page; all of them must be in it. `settings`: for `serve`."""
        self.page = (TUTORIALS / f"{name}.md").read_text()
        self.folder = folder
        self.output: list[str] = []
        """What each block printed."""
        self._start = start
        self._shorter = dict(shorter or {})
        self._flags = [f"--set={each}" for each in ("serve.address=127.0.0.1:0", *settings)]
        self._binaries = Path(sys.executable).parent
        self._environment = {
            **os.environ,
            "PATH": f"{self._binaries}:{os.environ['PATH']}",
            "COLUMNS": "120",
            "HF_HUB_OFFLINE": "1",
        }
        self._server: Any = None
        self._log = folder / ".server.log"
        self._address = "127.0.0.1:50051"
        for words in self._shorter:
            if words not in self.page:
                raise TutorialError(f"{name}.md does not contain {words!r}")

    def run(self) -> str:
        """Run all blocks, and return what they printed."""
        try:
            for kind, code in blocks(self.page):
                self._block(kind, code)
        finally:
            self._stop()
        return "".join(self.output)

    def _block(self, kind: str, code: str) -> None:
        if kind == "stop":
            self._stop()
        elif kind == "text":
            if lacking := missing(code, self.output[-1]):
                raise TutorialError(f"not printed: {lacking}; what was:\n{self.output[-1]}")
        elif kind != "sh":
            for old, new in self._shorter.items():
                code = code.replace(old, new)
            code = re.sub(ADDRESS, self._address, code)
            if kind == "python":
                self.output.append(self._finish([sys.executable, "-c", code]))
            elif kind == "toml":
                name = code.splitlines()[0].removeprefix("# ")
                (self.folder / name).write_text(code)
            elif kind == "":
                self.output.append("".join(self._command(line) for line in commands(code)))
            else:
                raise TutorialError(f"a block of an unknown kind: {kind}")

    def _command(self, line: str) -> str:
        try:
            words = shlex.split(line)
        except ValueError:
            words = [""]
        if words[0] == "export":
            for word in words[1:]:
                name, _, value = word.partition("=")
                self._environment[name] = value
            return ""
        if words[:2] == ["maskwire-server", "serve"]:
            return self._serve(words)
        if words[0] in ("maskwire", "maskwire-server") and not set(words) & SHELL:
            command = [str(self._binaries / words[0]), *words[1:]]
            return self._watch(command) if "--watch" in words else self._finish(command)
        return self._finish(["bash", "-euo", "pipefail", "-c", line])

    def _serve(self, words: list[str]) -> str:
        self._stop()
        before = self._log.stat().st_size if self._log.exists() else 0
        command = [str(self._binaries / words[0]), *words[1:], *self._flags]
        with self._log.open("a") as log:
            self._server = self._open(command, stdout=subprocess.PIPE, stderr=log)
        line = str(self._server.stdout.readline())
        said = self._log.read_text()[before:]
        if not line.startswith(READY):
            raise TutorialError(f"the server did not start: {said}")
        self._address = line.removeprefix(READY).strip()
        self._environment["MASKWIRE_TARGET"] = self._address
        return line + said

    def _stop(self) -> None:
        if self._server is not None:
            self._server.send_signal(signal.SIGINT)
            code = self._server.wait(60)
            self._server.stdout.close()
            self._server = None
            if code != 0:
                raise TutorialError(f"the server ended with exit code {code}: {self._log.read_text()}")

    def _watch(self, command: list[str]) -> str:
        """A command that ends with Ctrl-C, which it gets once it has printed something."""
        with self._open(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            first = process.stdout.readline()
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            return str(first + process.stdout.read())

    def _finish(self, command: list[str]) -> str:
        python = command[0].startswith(str(self._binaries))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with self._open(command, python=python, **pipes) as process:
            said = str(process.communicate()[0])
        if process.returncode != 0:
            raise TutorialError(f"exit code {process.returncode}: {shlex.join(command)}\n{said}")
        return said

    def _open(self, command: list[str], *, python: bool = True, **streams: Any) -> Any:
        start = self._start if python else subprocess.Popen
        return start(command, cwd=self.folder, env=self._environment, text=True, **streams)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Run a tutorial page at its stated sizes.")
    parser.add_argument("page", choices=sorted(path.stem for path in TUTORIALS.glob("*.md")))
    parser.add_argument("folder", type=Path, help="an empty folder, which is created")
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a setting for each `serve`",
    )
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    tutorial = Tutorial(arguments.page, arguments.folder.resolve(), settings=arguments.settings)
    begun = time.monotonic()
    try:
        tutorial.run()
    finally:
        print("\n---\n".join(tutorial.output))
        print(f"{time.monotonic() - begun:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
