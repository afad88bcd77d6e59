"""deploy/secrets.sh: keys and tokens are closed to others at every moment; the image's user has its own."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "deploy" / "secrets.sh"
PUBLIC = {
    "server/ca.crt", "server/server.crt", "client/ca.crt", "client/client.crt", "admin/ca.crt",
    "admin/client.crt",
}  # fmt: skip
SECRET = {
    "ca.key", "server/server.key", "server/read.token", "server/train.token", "server/admin.token",
    "client/client.key", "client/read.token", "client/train.token", "admin/client.key", "admin/admin.token",
}  # fmt: skip

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


def make(folder: Path | str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it under the widest mask that there is."""
    return subprocess.run(
        ["bash", "-c", f'umask 000; exec "{SCRIPT}" "$@" server', "make", *options, str(folder)],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def modes(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("name", ["secrets", "with a space", "made/on the way", "completed/"])
def test_keys_and_tokens_are_closed_to_others(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    done = make(f"{tmp_path}/{name}", CONTAINER_UID=str(os.getuid()))
    assert done.returncode == 0, done.stderr
    assert modes(folder) == dict.fromkeys(SECRET, 0o600) | dict.fromkeys(PUBLIC, 0o644)
    assert {stat.S_IMODE(each.stat().st_mode) for each in (folder, *folder.iterdir()) if each.is_dir()} == {
        0o700
    }
    assert done.stderr == ""
    again = make(folder)
    assert again.returncode == 1
    assert "exists" in again.stderr


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_they_are_closed_from_their_first_byte(tmp_path: Path) -> None:
    log = tmp_path / "log"
    folder = tmp_path / "secrets"
    subprocess.run(
        ["strace", "-f", "-qq", "-o", str(log), "-e", "trace=open,openat,creat,umask,chmod,fchmod,fchmodat",
         "bash", "-c", f'umask 000; exec "{SCRIPT}" "$0"', str(folder)],
        capture_output=True, check=True,
    )  # fmt: skip
    masks: dict[str, int] = {}
    made = set()
    for line in log.read_text().splitlines():
        process = line.split()[0]
        if found := re.search(r"umask\((\w+)\)", line):
            masks[process] = int(found[1], 8)
        if "O_CREAT" in line and (found := re.search(r'"([^"]+\.(?:key|token))".*, (0\d+)\)', line)):
            # A child inherits the script's mask, which was set before the first child.
            mask = masks.get(process, next(m for m in masks.values() if m))
            assert int(found[2], 8) & ~mask & 0o077 == 0, line
            made.add(Path(found[1]).name)
        if "chmod" in line and re.search(r"\.(key|token)", line):
            assert re.search(r"0?600\)", line), line
    assert made == {"ca.key", "server.key", "client.key", "read.token", "train.token", "admin.token"}


def test_a_renewed_certificate_is_of_the_same_authority_and_the_rest_stays(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    owner = {"CONTAINER_UID": str(os.getuid())}
    assert make(folder, **owner).returncode == 0
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = make(folder, "--renew", **owner)
    assert done.returncode == 0, done.stderr
    changed = {
        str(path.relative_to(folder)) for path, content in files.items() if path.read_bytes() != content
    }
    assert changed == {"server/server.crt", "server/server.key"}
    assert modes(folder) == dict.fromkeys(SECRET, 0o600) | dict.fromkeys(PUBLIC, 0o644)
    authority = folder / "client" / "ca.crt"
    for name, purpose in (
        ("server/server", "sslserver"),
        ("client/client", "sslclient"),
        ("admin/client", "sslclient"),
    ):
        verified = subprocess.run(
            ["openssl", "verify", "-purpose", purpose, "-CAfile", authority, folder / f"{name}.crt"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert verified.returncode == 0, verified.stderr
    other = make(tmp_path / "other", "--renew")
    assert (other.returncode, "has no ca.key" in other.stderr) == (1, True)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files to another user")
def test_root_gives_the_servers_files_to_the_images_user_and_the_rest_to_who_called_sudo(
    tmp_path: Path,
) -> None:
    image_uid = re.search(r"useradd --uid (\d+)", (ROOT / "Dockerfile").read_text())
    assert image_uid is not None
    folder = tmp_path / "secrets"
    done = make(folder, SUDO_UID="1234", SUDO_GID="1235")
    assert done.returncode == 0, done.stderr
    for path in folder.rglob("*"):
        owner = int(image_uid[1]) if "server" in path.relative_to(folder).parts else 1234
        assert path.stat().st_uid == owner, path
    assert folder.stat().st_uid == 1234
    other = tmp_path / "other"
    assert make(other, CONTAINER_UID="4321").returncode == 0
    assert (other / "server" / "server.key").stat().st_uid == 4321


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_somebody_else_is_told_what_is_left_to_do() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        folder.chmod(0o777)  # pytest's own folders are closed to other users
        script = folder / "secrets.sh"
        shutil.copy(SCRIPT, script)
        script.chmod(0o755)
        done = subprocess.run(
            ["bash", str(script), str(folder / "secrets")],
            capture_output=True, text=True, check=False, user=4321, group=4321,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"sudo chown -R 10001:10001 '{folder}/secrets/server'" in done.stderr
        assert set(modes(folder / "secrets").values()) == {0o600, 0o644}
