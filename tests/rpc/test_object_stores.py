"""Real servers, and a real S3 server in a process of its own: the run comes back from the address alone."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from robustness.expected import batch
from robustness.mirror_faults import FENCED, Job, expected_at, one_more, server_at, store
from robustness.object_store import BUCKET, FAULTS, Proxy, environment

import maskwire
from maskwire_server.errors import StoreError
from maskwire_server.journal.object_store import ObjectStore

# Looked up, not imported: the servers import them, and collecting the tests would take seconds longer.
pytestmark = [
    pytest.mark.skipif(find_spec("s3fs") is None, reason='needs: pip install "maskwire[storage]"'),
    pytest.mark.skipif(find_spec("moto") is None, reason="needs: pip install moto[s3] flask flask-cors"),
]


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with store() as proxy:
        yield proxy


@pytest.fixture
def s3(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    for name, value in environment(proxy.endpoint).items():
        monkeypatch.setenv(name, value)
    return ObjectStore(f"s3://{BUCKET}/objects")


def test_the_store_does_what_a_mirror_needs(s3: ObjectStore, tmp_path: Path) -> None:
    s3.probe()
    s3.create("segments/1", b"one")
    with pytest.raises(FileExistsError):
        s3.create("segments/1", b"other")
    assert s3.get("segments/1") == b"one"
    assert s3.get("segments/2") is None
    (tmp_path / "file").write_bytes(b"weights")
    s3.put_file("checkpoints/a/file", tmp_path / "file")
    s3.copy("checkpoints/a/file", "checkpoints/b/file")
    s3.get_file("checkpoints/b/file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"weights"
    assert s3.names("") == ["checkpoints/a/file", "checkpoints/b/file", "segments/1"]
    assert list(s3.get_all(["segments/1", "checkpoints/a/file"])) == [b"one", b"weights"]
    s3.delete("segments/1")
    s3.delete("segments/1")
    assert s3.names("segments") == []


@pytest.mark.parametrize("fault", FAULTS)
def test_after_any_fault_the_object_is_there_whole_or_not_at_all(
    s3: ObjectStore, proxy: Proxy, fault: str
) -> None:
    name, data = f"faults/{fault}", fault.encode() * 10_000
    proxy.fault = fault
    try:
        s3.create(name, data)
        done = True
    except (StoreError, FileExistsError):
        done = False
    finally:
        proxy.fault = ""
    found = s3.get(name)
    assert found in ((data,) if done else (data, None))
    if found is None:
        s3.create(name, data)


def test_a_lost_machine_comes_back_from_the_address_and_the_first_of_two_servers_ends(
    proxy: Proxy, tmp_path: Path
) -> None:
    acknowledge, job = "mirrored", Job(3)
    with server_at(tmp_path / "a", proxy, "sample", acknowledge) as first:
        assert first.start(), first.tail()
        training = threading.Thread(target=job.train, args=(first.address, 16), kwargs={"retry_for": 30})
        training.start()
        training.join()
        assert job.last == 16
        first.kill()
        shutil.rmtree(first.run_dir)
        assert first.start(), first.tail()
        expected = expected_at(first.address, 3)
        assert expected.step == 16
        one_more(first.address, expected, 3)
        with maskwire.attach(first.address) as client:
            status = client.status()
        assert status.mirror is not None
        assert "no acknowledged step is lost" in status.mirror.restored
        with server_at(tmp_path / "b", proxy, "sample", acknowledge) as second:
            assert second.start(), second.tail()
            fence(first.address)
            assert first.process is not None
            first.process.join(30)
            assert first.process.exitcode == FENCED
            assert "has taken the run over" in first.tail()
            one_more(second.address, expected_at(second.address, 3), 3)


def fence(address: str) -> None:
    """Train on a server that another one has taken over, until it notices."""
    with pytest.raises(maskwire.errors.MaskwireError):
        train_on(address)


def train_on(address: str) -> None:
    with maskwire.connect(address, name="late", takeover=True, retry_for=0.2, timeout=20) as late:
        for step in range(10_000):
            late.train_step(batch(9, step))
