"""A run directory of any name works at every start, or is refused before anything is written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fork_server
import numpy as np
import pytest
from serving import TINY

import maskwire
import maskwire_server
from maskwire_server import config
from maskwire_server.config import template
from maskwire_server.errors import RunDirectoryError
from maskwire_server.journal import disk
from maskwire_server.journal.run_directory import refuse_leftovers
from maskwire_server.recovery import imported_run

SERVER = str(Path(sys.executable).with_name("maskwire-server"))
OF_VOLUMES = (
    "lost+found/", ".Trash-1000/", "$RECYCLE.BIN/", "System Volume Information/", ".DS_Store", "._a",
    "Thumbs.db",
)  # fmt: skip
TOKENS = np.arange(16).reshape(2, 8)


def command(*arguments: str | bytes, cwd: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    return fork_server.run([SERVER, *arguments], cwd=cwd)


def leave(folder: Path) -> None:
    """What a volume's root holds by itself."""
    folder.mkdir(parents=True)
    for name in OF_VOLUMES:
        if name.endswith("/"):
            (folder / name).mkdir(mode=0)
        else:
            (folder / name).touch()


@pytest.mark.parametrize(
    ("name", "prepare"),
    [
        ("a b\nc?mode=ro#d%20e&f'é\x7f", lambda _: None),
        ("file:x", leave),
    ],
    ids=["odd-characters", "volume"],
)
def test_two_starts_and_every_command(
    serve: Callable[..., object], tmp_path: Path, name: str, prepare: Callable[[Path], None]
) -> None:
    run_dir = tmp_path / name / "run"
    prepare(run_dir)
    server = serve(name, checkpoints__every_steps="1")
    for step in (1, 2):
        with maskwire.connect(server.address) as trainer:
            assert trainer.train_step(TOKENS).step == step
        assert server.stop() == 0
        if step == 1:
            server.start()
    verified = command("verify", "--run-dir", str(run_dir))
    assert verified.returncode == 0, verified.stderr
    assert b"nothing is damaged" in verified.stdout
    shown = command("inspect", "1", "--run-dir", str(run_dir))
    assert shown.returncode == 0, shown.stderr
    out = tmp_path / name / "out"
    exported = command("export", str(out), "--run-dir", str(run_dir))
    assert exported.returncode == 0, exported.stderr
    assert maskwire_server.load(out).mask_id == int(TINY["model.mask_id"])


def test_a_path_that_is_not_utf_8_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    place = os.fsencode(tmp_path) + b"/caf\xe9"
    for words in (["serve", "--address", "127.0.0.1:0"], ["check"]):
        done = command(*words, "--run-dir", place)
        assert done.returncode == 2
        assert b"run.dir: the path must be UTF-8, got b'" in done.stderr
        assert b"Traceback" not in done.stderr
    state = tmp_path / "x.safetensors"
    assert command("import-x-transformers", str(state), "--run-dir", place).returncode == 2
    assert not Path(os.fsdecode(place)).exists()
    for words in (["verify"], ["inspect", "1"], ["export", str(tmp_path / "out")]):
        done = command(*words, "--run-dir", place)
        assert done.returncode == 3
        assert b"Traceback" not in done.stderr


def test_a_relative_run_directory_works_where_the_working_directory_is_not_utf_8(tmp_path: Path) -> None:
    place = os.fsencode(tmp_path) + b"/caf\xe9"
    Path(os.fsdecode(place)).mkdir()
    # Not from the fork server: these two starts import everything themselves.
    run_dir = "file:run?mode=memory"  # a URI to SQLite, if it took one
    settings = [f"--set={key}={value}" for key, value in TINY.items()]
    for start in (1, 2):
        with subprocess.Popen(
            [SERVER, "serve", "--run-dir", run_dir, *settings], stdout=subprocess.PIPE, text=True, cwd=place
        ) as process:
            assert process.stdout is not None
            address = process.stdout.readline().split()[-1]
            with maskwire.connect(address) as trainer:
                assert trainer.train_step(TOKENS).step == start
            process.send_signal(signal.SIGKILL if start == 1 else signal.SIGTERM)
            assert process.wait(60) == (-signal.SIGKILL if start == 1 else 0)
    done = command("export", "out", "--run-dir", run_dir, cwd=place)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [*OF_VOLUMES, ".Trash-0/", ".Trashes/", "aquota.user", "desktop.ini"])
def test_what_a_volume_holds_by_itself_is_no_leftover(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    refuse_leftovers(tmp_path)


def test_a_folder_for_checkpoints_may_be_there_before_the_run_if_it_is_empty(tmp_path: Path) -> None:
    """It can be a link to a folder that several hosts share."""
    shared, run_dir = tmp_path / "shared", tmp_path / "run"
    shared.mkdir()
    run_dir.mkdir()
    (run_dir / "checkpoints").symlink_to(shared)
    refuse_leftovers(run_dir)
    (shared / "step-000000100").mkdir()
    with pytest.raises(RunDirectoryError, match="has checkpoints but no journal"):
        refuse_leftovers(run_dir)


@pytest.mark.parametrize("name", ["checkpoints", "data.txt", "lost", "Trash-1000", "journal"])
def test_other_leftovers_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / name).touch()
    with pytest.raises(RunDirectoryError, match=name):
        refuse_leftovers(tmp_path)


def test_an_import_into_a_volumes_root_is_refused_before_anything_is_computed() -> None:
    def never() -> None:
        raise AssertionError("it was computed")

    for root in (Path("/proc"), Path("/")):
        with pytest.raises(RunDirectoryError, match=r"it is the root of a volume; choose a folder in it"):
            imported_run.begin(
                root, never, {}, seed=0, canonical=b"", versions={}, labels={}, texts={}  # type: ignore[arg-type]
            )  # fmt: skip


def test_a_written_configuration_holds_any_path(tmp_path: Path) -> None:
    for name in ("a\nb", 'a"b\\c', "a\x7fb\tc", "é#?% '"):
        whole = config.load(None, run={"dir": tmp_path / name})
        file = tmp_path / "c.toml"
        file.write_text(template.written(whole))
        assert config.load(file).run.dir == tmp_path / name


def test_a_network_file_system_is_seen_whatever_its_mount_point_is_called() -> None:
    def mounted(name: bytes) -> str:
        return os.fsdecode(b"24 1 0:1 / / rw - ext4 a rw\n30 24 0:2 / /n/" + name + b" rw - nfs4 b rw\n")

    for escaped, name in (
        (rb"a\040b", b"a b"), (rb"a\012b", b"a\nb"), (rb"a\134b", rb"a\b"), ("é".encode(), "é".encode()),
        (b"caf\xe9", b"caf\xe9"), ("a\x85b\u2028c\u00a0d".encode(), "a\x85b\u2028c\u00a0d".encode()),
    ):  # fmt: skip
        place = Path(os.fsdecode(b"/n/" + name + b"/run"))
        assert disk.network_file_system(place, mounted(escaped)) == "nfs4", name
    assert disk.network_file_system(Path("/n/c"), mounted(b"a")) is None


@pytest.mark.parametrize("name", ["a b", "é", "it's & more"])
def test_a_socket_of_any_printable_name_is_listened_on(
    serve: Callable[..., object], tmp_path: Path, name: str
) -> None:
    path = Path("/tmp") / f"{tmp_path.name[:8]}-{os.getpid()}-{name}"
    server = serve(seconds=0, serve__address=f"unix:{path}")
    for _ in (1, 2):
        with maskwire.connect(f"unix:{path}") as trainer:
            trainer.status()
        assert server.stop() == 0
        assert not path.exists()
        server.start()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (b"a\nb", b"printable UTF-8"), (b"caf\xe9", b"printable UTF-8"),
        (b"a?b", b"must not contain ?, # or %"), (b"a#b", b"must not contain ?, # or %"),
        (b"a%20b", b"must not contain ?, # or %"), (b"x" * 101, b"at most 100 bytes"),
    ],
    ids=repr,
)  # fmt: skip
def test_another_socket_is_refused_before_anything_is_written(
    tmp_path: Path, name: bytes, words: bytes
) -> None:
    run_dir = tmp_path / "run"
    done = command("serve", "--run-dir", str(run_dir), "--set", b"serve.socket=/tmp/" + name,
                   "--address", "127.0.0.1:0")  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert b"Traceback" not in done.stderr
    assert not run_dir.exists()
