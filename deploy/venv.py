"""Make `.venv` with everything that maskwire's demo, tests and checks need.

Run it with any Python; it checks the machine first and says what to do. Set TORCH_INDEX to an index
URL to take torch from there, a CPU build for instance. Extras named as arguments (`docs`) are added to the
existing environment, so that what only one make target needs does not delay the others.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "maskwire-stamp"
INPUTS = ("pyproject.toml", "constraints.txt", "deploy/venv.py")
OLDEST = (3, 11)
CPU_GB, CUDA_GB = 2, 8  # on disk, torch included


def main(*extras: str) -> int:
    """Entry point; exit status 1 when the machine lacks something."""
    status = make()
    for extra in extras:
        if status == 0:
            add(extra)
    return status


def make() -> int:
    """Make the environment, unless it is up to date."""
    wanted = stamp()
    made_from, index_then = recorded()
    # The index is remembered, so that a later `make test` without TORCH_INDEX does not fetch CUDA.
    index = os.environ.get("TORCH_INDEX", index_then)
    if made_from == wanted and index == index_then:
        return 0
    problem = missing(index)
    if problem:
        print(f"maskwire: {problem}", file=sys.stderr)
        return 1
    print(
        f"Setting up {VENV} (once, some minutes): about {'0.4' if index else '0.4 to 3'} GB to download, "
        "torch the most of it.\n"
        + (
            f"torch comes from {index}."
            if index
            else "On Linux torch comes with CUDA; for a small CPU build: "
            "TORCH_INDEX=https://download.pytorch.org/whl/cpu make demo"
        ),
        flush=True,
    )
    began = time.monotonic()
    STAMP.unlink(missing_ok=True)
    run(interpreter(), "-m", "venv", "--clear", str(VENV))
    install("--upgrade", "pip")  # the pip of Python 3.11 takes twice as long
    if index:
        print("  torch …", flush=True)
        install("--index-url", index, "torch")
    print("  the rest …" if index else "  everything …", flush=True)
    install("--editable", f"{ROOT}[dev]")
    STAMP.write_text(f"{wanted}\n{index}")
    print(f"Set up in {time.monotonic() - began:.0f} s.", flush=True)
    return 0


def add(extra: str) -> None:
    """Add an extra to the environment, unless it was added since the environment was made."""
    added = VENV / f"maskwire-{extra}-stamp"
    if not added.exists():
        print(f"Adding the extra {extra} to {VENV} (once) …", flush=True)
        install(*requirements(extra))
        added.touch()


def requirements(extra: str) -> list[str]:
    """What an extra consists of."""
    import tomllib  # not at the top: Python 3.10 has none, and is told first that it is too old

    with (ROOT / "pyproject.toml").open("rb") as file:
        extras: dict[str, list[str]] = tomllib.load(file)["project"]["optional-dependencies"]
    return extras[extra]


def install(*wanted: str) -> None:
    """Install packages into the environment, in the versions that the tests run with."""
    # Modules are compiled on import, if bytecode may be written (see the Makefile); most are never imported.
    pip = (
        str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"
    )  # fmt: skip
    run(*pip, "--constraint", str(ROOT / "constraints.txt"), *wanted)


def interpreter() -> str:
    """The Python that runs this script, or its base if it is that of the environment to be cleared."""
    if Path(sys.prefix).resolve() != VENV.resolve():
        return sys.executable
    return str(Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}"))


def stamp() -> str:
    """What the environment was made from."""
    sha = hashlib.sha256(sys.version.encode())
    for name in INPUTS:
        sha.update((ROOT / name).read_bytes())
    return sha.hexdigest()


def recorded() -> tuple[str, str]:
    """What the existing environment was made from, and torch's index; both empty if there is none."""
    if not STAMP.exists():
        return "", ""
    made_from, _, index = STAMP.read_text().partition("\n")
    return made_from, index


def missing(index: str) -> str | None:
    """What this machine lacks, and what to do about it."""
    if sys.version_info < OLDEST:
        return (
            f"Python {OLDEST[0]}.{OLDEST[1]} or newer is needed, this is {sys.version.split()[0]}; "
            "name another with `make PYTHON=python3.12 …`"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        return f"Python's venv module is missing; on Debian or Ubuntu: apt install python{version}-venv"
    free = shutil.disk_usage(ROOT).free / 1e9
    need = CPU_GB if index or sys.platform != "linux" else CUDA_GB
    if free < CPU_GB:
        return f"{need} GB of free disk are needed in {ROOT}, {free:.1f} GB are left; free some and try again"
    if free < need:
        print(
            f"maskwire: only {free:.1f} GB of disk are free, torch with CUDA needs about {need}; "
            "TORCH_INDEX takes a smaller build",
            file=sys.stderr,
        )
    return None


def run(*command: str) -> None:
    """Run a command; end with what it printed when it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        print(
            f"maskwire: `{' '.join(command)}` failed (see above). Is the package index within reach? "
            "Run the same make command again to resume.",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
