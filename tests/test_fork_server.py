"""A forked process is a process like any other, as far as a test can tell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fork_server
import psutil
import pytest

STARTS = [fork_server.Forked, subprocess.Popen]
pytestmark = pytest.mark.skipif(
    fork_server.Process is subprocess.Popen, reason="this system cannot wait for what is not its child"
)
DEFAULT = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('whole', flush=False)", (0, "whole\n", "")),
        ("raise SystemExit(7)", (7, "", "")),
        ("raise SystemExit('in words')", (1, "", "in words\n")),
        ("import os; os._exit(5)", (5, "", "")),
        ("import atexit; atexit.register(print, 'last'); print('first')", (0, "first\nlast\n", "")),
        ("import threading as t; t.Timer(0.01, print, ['a thread']).start()", (0, "a thread\n", "")),
        ("import os; os.kill(os.getpid(), 9)", (-9, "", "")),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", (-15, "", "")),
        (f"{DEFAULT}; signal.raise_signal(signal.SIGINT)", (-2, "", "KeyboardInterrupt\n")),
        ("1 / 0", (1, "", "ZeroDivisionError: division by zero\n")),
        ("import sys; print(sys.argv, __name__, repr(sys.path[0]))", (0, "['-c', 'é'] __main__ ''\n", "")),
        ("import os; print(os.getcwd(), os.environ['A'], 'B' in os.environ)", (0, "/ a False\n", "")),
        ("print(input())", (0, "what it reads\n", "")),
    ],
)
@pytest.mark.parametrize("start", STARTS)
def test_its_end_is_that_of_an_interpreter(
    start: Any, code: str, expected: tuple[int, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    monkeypatch.setenv("B", "b")
    environment = {**{name: value for name, value in os.environ.items() if name != "B"}, "A": "a"}
    with start([sys.executable, "-c", code, "é"], **pipes, text=True, cwd="/", env=environment) as process:
        out, error = process.communicate("what it reads\n")
    assert (process.returncode, out, error.splitlines(keepends=True)[-1:]) == (
        expected[0], expected[1], [expected[2]] if expected[2] else [],
    )  # fmt: skip


@pytest.mark.parametrize("start", STARTS)
def test_it_is_signalled_and_waited_for_by_its_process_id(start: Any) -> None:
    code = "import os; print(os.getpid(), flush=True); input()"
    process = start([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert int(process.stdout.readline()) == process.pid
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(signal.SIGSTOP)
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            pass
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
        assert process.poll() == -signal.SIGKILL
        assert not psutil.pid_exists(process.pid), "reaped"
        process.kill()  # does nothing


def test_scripts_and_modules_run_as_main(tmp_path: Path) -> None:
    script = tmp_path / "beside" / "script.py"
    script.parent.mkdir()
    (script.parent / "neighbour.py").write_text("NAME = 'found'")
    script.write_text("import neighbour, sys; print(neighbour.NAME, sys.argv[1:], __name__, __file__)")
    done = fork_server.run([script, "a", b"b"], text=True, check=True)
    assert done.stdout == f"found ['a', 'b'] __main__ {script}\n"
    assert fork_server.run([sys.executable, script], text=True).stdout.startswith("found []")
    done = fork_server.run([sys.executable, "-m", "json.tool", "--help"], text=True, check=True)
    assert "json.tool" in done.stdout


def test_what_a_forked_process_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes no \['preexec_fn', 'start_new_session'\]"):
        fork_server.Process(["script.py"], preexec_fn=print, start_new_session=True)
    with pytest.raises(ValueError, match="OMP_NUM_THREADS cannot be changed in a forked process"):
        fork_server.Process(["script.py"], env={**os.environ, "OMP_NUM_THREADS": "7"})


def test_two_draw_differently() -> None:
    code = "import numpy, random; print(random.random(), numpy.random.random())"
    first, second = (fork_server.run([sys.executable, "-c", code]).stdout.split() for _ in range(2))
    assert not set(first) & set(second)


def test_a_failed_test_loses_its_own_and_not_those_of_fixtures() -> None:
    waits = [sys.executable, "-c", "input()"]
    with fork_server.Process(waits, stdin=subprocess.PIPE) as kept:
        time.sleep(0.05)  # start times are whole ticks of the system's clock
        began = fork_server.seconds_since_boot()
        lost = fork_server.Process(waits, stdin=subprocess.PIPE)
        fork_server.kill_children(began)
        lost.communicate()
        assert (lost.returncode, kept.poll()) == (-signal.SIGKILL, None)
    assert fork_server.run([sys.executable, "-c", "print(1)"]).stdout == b"1\n"


def test_an_interrupted_call_leaves_the_connection_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    fork_server.run([sys.executable, "-c", ""])
    with monkeypatch.context() as patch:
        patch.setattr(fork_server.json, "loads", interrupt)  # the answer is on its way
        with pytest.raises(Interrupted):
            fork_server.Process([sys.executable, "-c", ""])
    assert fork_server.run([sys.executable, "-c", "print(1)"]).stdout == b"1\n"
