"""The wheel as its users get it: a clean environment, no extras, and a server somewhere else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "rpc"))

from serving import ServerProcess

ROOT = Path(__file__).resolve().parent.parent
COUNTING = [sys.executable, str(ROOT / "tests" / "rpc" / "counting_server.py"), "0"]
PROGRAM = """
import sys
import maskwire
import numpy as np

with maskwire.connect(sys.argv[1]) as trainer:
    result = trainer.train_step(np.full((4, 16), 65))
    trainer.checkpoint("from-the-wheel")
    print(result.step, trainer.eval_loss(np.full((4, 16), 65)).step)
heavy = {"torch", "maskwire_server", "typer", "rich"} & set(sys.modules)
assert not heavy, heavy
"""


def run(*command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=600, check=False
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def pip(clean: Path) -> list[object]:
    """This environment's pip, for another one."""
    return [sys.executable, "-m", "pip", "--python", clean / "python"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done = run(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, check=False
    )
    if done.returncode:
        pytest.skip("no wheel can be built here: the build's own needs (hatchling) are out of reach")
    return next(folder.glob("maskwire-*.whl"))


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel and what it needs, and nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    done = run(
        *pip(folder / "bin"),
        "install",
        "--quiet",
        "--constraint",
        ROOT / "constraints.txt",
        wheel,
        check=False,
    )
    if done.returncode:
        pytest.skip("the client's dependencies are out of reach here: no package index answers")
    return folder / "bin"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    made = ServerProcess(
        tmp_path_factory.mktemp("server"), COUNTING, model__num_tokens="257", model__mask_id="256"
    ).start()
    yield made
    assert made.stop() == 0


def test_the_wheel_holds_both_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"maskwire", "maskwire_server"}
    assert {
        "maskwire/py.typed",
        "maskwire/v1/training_service_pb2.pyi",
        "maskwire_server/py.typed",
        "maskwire_server/training/gauss_legendre_4096.npy",
    } <= set(names)


def test_the_client_trains_without_torch(clean: Path, server: ServerProcess) -> None:
    installed = run(*pip(clean), "list", "--format", "freeze").stdout
    assert "torch" not in installed
    step, seen = run(clean / "python", "-c", PROGRAM, server.address).stdout.split()
    assert step == seen
    assert "SERVING" in run(clean / "maskwire", "status", "--target", server.address).stdout
    assert run(clean / "python", "-m", "maskwire", "health", "--target", server.address).returncode == 0


@pytest.mark.parametrize("arguments", [["serve"], ["init"], ["check"]])
def test_the_server_command_says_which_extra_to_install(clean: Path, arguments: list[str]) -> None:
    done = run(clean / "maskwire-server", *arguments, check=False)
    assert done.returncode == 2
    assert 'pip install "maskwire[server]"' in done.stderr
    assert "torch" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_documented_size_is_what_is_installed(clean: Path) -> None:
    site = next((clean.parent / "lib").glob("python*/site-packages"))
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
    text = (ROOT / "docs" / "quickstart.md").read_text()
    documented = float(text.partition("<!-- size: ")[2].partition(" ")[0])
    assert abs(size / 1e6 - documented) < 0.2 * documented, f"{size / 1e6:.0f} MB are installed"
