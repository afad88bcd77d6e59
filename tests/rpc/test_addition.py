"""The tutorial docs/tutorials/addition.md runs as it is written, for fewer steps."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from serving import ServerProcess
from typer.testing import CliRunner

from maskwire.cli import app
from maskwire_server.cli import app as server_app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorials" / "addition.md"
STEPS = 3


def test_the_tutorial_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    server: ServerProcess | None = None
    said = []
    try:
        for kind, code in re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
            if kind == "python":
                if server is not None:
                    code = code.replace("127.0.0.1:50051", server.address)
                    (tmp_path / "held-out.jsonl").write_text("")  # the prepared folder is enough
                exec(compile(code, "tutorial", "exec"), {"__name__": "tutorial"})
                said.append(capsys.readouterr().out)
                continue
            for line in code.replace("\\\n", "").splitlines():
                program, *words = shlex.split(line)
                if words[0] == "serve":
                    server = ServerProcess(tmp_path / "server")
                    binary = str(Path(sys.executable).with_name(program))
                    server._command = [
                        binary,
                        *words,
                        "--set=serve.address=127.0.0.1:0",
                        "--set=serve.threads=1",
                    ]
                    server.start()
                    continue
                if words[0] == "train":
                    words[words.index("--until-step") + 1] = str(STEPS)
                if words[0] in ("train", "generate"):
                    assert server is not None
                    words += ["--target", server.address]
                done = CliRunner().invoke(server_app if program == "maskwire-server" else app, words)
                assert done.exit_code == 0, done.output
                said.append(done.output)
    finally:
        if server is not None:
            server.stop()
    whole = "".join(said)
    training, held_out = map(int, re.findall(r"(\d+) sums to train on, (\d+) held out", whole)[0])
    assert training + held_out == 90 * 90
    assert held_out == 501
    assert f"step {STEPS}  loss" in whole
    assert "\n12+34=" in whole
    assert re.search(rf"\d% of {held_out} held-out sums are exact", whole)
