"""The repository itself: names that others rely on, and pages that say what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import maskwire

ROOT = Path(__file__).resolve().parent.parent


def test_a_changed_proto_is_found_stale(tmp_path: Path) -> None:
    copy = tmp_path / "proto" / "maskwire" / "v1"
    copy.mkdir(parents=True)
    source = (ROOT / "proto" / "maskwire" / "v1" / "training_service.proto").read_text()
    (copy / "training_service.proto").write_text(source.replace("bytes digest = 5;", "bytes digest = 55;", 1))
    (tmp_path / "proto" / "generate.py").write_text((ROOT / "proto" / "generate.py").read_text())
    stubs = tmp_path / "client" / "maskwire" / "v1"
    stubs.mkdir(parents=True)
    for path in (ROOT / "client" / "maskwire" / "v1").glob("*_pb2*"):
        (stubs / path.name).write_bytes(path.read_bytes())
    done = subprocess.run(
        [sys.executable, str(tmp_path / "proto" / "generate.py"), "--check"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "make proto" in done.stderr


def test_the_architecture_page_names_only_what_the_sources_define(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from structure import missing

    assert missing((ROOT / "docs" / "architecture.md").read_text()) == []
    gone = "`engine/gone.py`, `engine/queue.py` (`Queue.gone`, `Queue.pop`), `Gone.method`"
    assert missing(gone) == ["engine/gone.py", "engine/queue.py: Queue.gone", "Queue.gone", "Gone.method"]


def test_every_reason_has_an_entry_with_its_cure() -> None:
    from maskwire.errors import REASONS as CLIENT_REASONS
    from maskwire_server.errors import REASONS

    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    entries = dict(re.findall(r"^### (\S+)\n(.+?)(?=\n#|\Z)", text, re.MULTILINE | re.DOTALL))
    from_the_connection = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "TLS"}
    from_the_client = {"FORKED", "OTHER_EVENT_LOOP", "UNRESOLVED"}
    assert set(entries) == set(REASONS) | from_the_connection | from_the_client
    assert set(CLIENT_REASONS) == set(REASONS), "the client knows every reason of the server"
    assert all(len(words.split()) >= 4 for words in entries.values())


def test_the_comment_of_each_rpc_names_its_reasons_with_their_status() -> None:
    from maskwire.v1 import training_service_pb2 as pb
    from maskwire_server.errors import REASONS

    comments: dict[str, str] = {}
    for path in (ROOT / "proto" / "maskwire" / "v1").glob("*.proto"):
        for comment, name in re.findall(r"((?:^  //.*\n)+)  rpc (\w+)\(", path.read_text(), re.MULTILINE):
            comments[name] = re.sub(r"\n\s*// ?", "\n", f"\n{comment.rstrip()}")
    assert set(comments) == set(pb.DESCRIPTOR.services_by_name["TrainingService"].methods_by_name)
    for name, comment in comments.items():
        assert re.search(r"^OK: ", comment, re.MULTILINE), name
        answers = re.findall(r"\b([A-Z]+(?:_[A-Z]+)*)\s\(([A-Z_,\s]+)\)", comment)
        assert name == "GetStatus" or answers, name
        for status, reasons in answers:
            for reason in re.split(r",\s", reasons):
                assert REASONS[reason].status == status, f"{name}: {status} ({reason})"


def test_the_version_is_one() -> None:
    assert maskwire.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_the_make_targets_that_people_use_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("venv", "demo", "test", "lint", "proto", "docs", "image", "bench", "robustness"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_dependency_is_pinned_for_the_tests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {re.split(r"[=<>]", line)[0] for line in lines if line and not line.startswith("#")}
    wanted = [
        *project["dependencies"],
        *(d for extra in project["optional-dependencies"].values() for d in extra),
    ]
    names = {re.split(r"[\[=<>]", entry)[0] for entry in wanted} - {"maskwire"}
    assert names <= pinned, names - pinned
