"""Generate the Python stubs from the proto files, or with --check find committed ones that are stale."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

PROTO = Path(__file__).resolve().parent
CLIENT = PROTO.parent / "client"
SOURCE = "maskwire/v1/training_service.proto"


def generate(out: Path) -> list[Path]:
    """Write the stubs under `out`, and return their paths relative to it."""
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}"]
    command += [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([*command, SOURCE], check=True)
    return sorted(path.relative_to(out) for path in out.rglob("*_pb2*.py*"))


def stale() -> list[str]:
    """Names of committed stubs that differ from what the proto files generate."""
    with tempfile.TemporaryDirectory() as fresh:
        paths = generate(Path(fresh))
        return [
            str(path)
            for path in paths
            if not (CLIENT / path).exists()
            or (CLIENT / path).read_bytes() != (Path(fresh) / path).read_bytes()
        ]


def main() -> int:
    """Entry point; exit status 1 when --check finds stale stubs."""
    if sys.argv[1:] == ["--check"]:
        names = stale()
        if names:
            print(f"stale stubs: {', '.join(names)}; run `make proto` and commit the result", file=sys.stderr)
        return 1 if names else 0
    generate(CLIENT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
