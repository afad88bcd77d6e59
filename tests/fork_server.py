"""Processes forked from one that has torch, gRPC and maskwire imported.

A start costs a tenth of a second of processor time; importing torch again would cost five. The child runs
its program (a script, `-m MODULE` or `-c CODE`) as an interpreter would: as `__main__`, with its own
arguments, environment, streams, working directory, process id, exit handlers and exit code.

Each test process starts one fork server when it first needs one, and the fork server ends with it. It has a
single thread and has opened no channel, so forking is safe.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import itertools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
PRELOADED = (
    "counter", "faults", "maskwire.aio", "maskwire.cli", "maskwire_server.app", "maskwire_server.cli",
    "maskwire_server.weight_import_export", "maskwire_server.training.models.x_transformers_import",
    "maskwire_server.training.trainer",
    "rich.live", "rich.progress", "rich.table", "einops._torch_specific",
)  # fmt: skip
FIXED = ("PYTHON", "LD_", "MALLOC_", "OMP_", "MKL_", "CUDA", "TORCH")
"""Beginnings of variables that a process reads when it starts or imports: those of the fork server stay."""
OPTIONS = {"stdin", "stdout", "stderr", "text", "cwd", "env", "bufsize"}
"""The options of subprocess.Popen that a forked process takes."""
_SIZE = 2**20


class Connection:
    """The fork server of this process, as a client sees it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._socket: socket.socket | None = None

    def fork(self, command: list[str], cwd: str, environment: dict[str, str], streams: Sequence[int]) -> int:
        """Fork a child that runs a script, and return its process id."""
        order = {"command": command, "cwd": cwd, "environment": environment}
        return int(self._ask(order, streams)["pid"])

    def preload(self, *names: str, environment: dict[str, str]) -> None:
        """Import modules that few tests need, for the children from now on."""
        self._ask({"import": names, "environment": environment})

    def reap(self, pid: int) -> int:
        """The exit code of a child that has ended; minus the signal that killed it."""
        return int(self._ask({"reap": pid})["code"])

    def _ask(self, order: dict[str, Any], streams: Sequence[int] = ()) -> dict[str, Any]:
        with self._lock:
            if self._socket is None:
                self._socket = self._start()
            number = next(self._numbers)
            message = json.dumps({"number": number, **order}).encode()
            socket.send_fds(self._socket, [message], streams)
            while True:
                answer = json.loads(self._socket.recv(_SIZE) or "null")
                if answer is None:
                    raise RuntimeError("the fork server has ended; its output is above")
                if answer["number"] == number:  # not of a call that was interrupted
                    return dict(answer)

    @staticmethod
    def _start() -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # not a terminal: the children's output is buffered as in a pipe
                pass_fds=[theirs.fileno()],
                env={**os.environ, **ONE_THREAD},
            )
        process.returncode = 0  # nobody waits for it: it ends when this process does
        atexit.register(ours.close)
        return ours


CONNECTION = Connection()


class Forked(subprocess.Popen[Any]):
    """A `subprocess.Popen` for a Python program; `command` may begin with this interpreter.

    Overrides how CPython's Popen starts its child and waits for it. The rest is inherited.
    """

    def __init__(self, command: Sequence[str | bytes | Path], **options: Any) -> None:
        if unknown := options.keys() - OPTIONS:
            raise ValueError(f"a forked process takes no {sorted(unknown)}: start the command itself")
        environment = options.pop("env", None) or {**os.environ, **ONE_THREAD}
        for name in {*environment, *os.environ}:
            ours = ONE_THREAD.get(name, os.environ.get(name))
            if name.startswith(FIXED) and environment.get(name) != ours:
                raise ValueError(f"{name} cannot be changed in a forked process: start the command itself")
        super().__init__(command, env=environment, **options)

    def _execute_child(self, *arguments: Any) -> None:
        command, cwd, environment = arguments[0], arguments[5], arguments[6]
        reading_in, _, _, writing_out, _, writing_error = arguments[10:16]
        streams = [reading_in, writing_out, writing_error]
        words = [os.fsdecode(word) for word in command]
        self.pid = CONNECTION.fork(
            words[1:] if words[0] == sys.executable else words,
            str(Path.cwd() / os.fsdecode(cwd or "")),
            environment,
            [inherited if given == -1 else given for inherited, given in enumerate(streams)],
        )
        self._descriptor = os.pidfd_open(self.pid)
        self._child_created = True
        self._close_pipe_fds(*arguments[10:16])

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            waiting = select.poll()
            waiting.register(self._descriptor, select.POLLIN)
            if not waiting.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            with self._waitpid_lock:
                if self.returncode is None:
                    self.returncode = CONNECTION.reap(self.pid)
                    os.close(self._descriptor)
        return self.returncode

    def _internal_poll(self, _deadstate: int | None = None) -> int | None:
        try:
            return self._wait(0)
        except subprocess.TimeoutExpired:
            return None


def waits_by_descriptor() -> bool:
    """Whether this system can wait for a process that is not a child: Linux since 5.3."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


Process: Any = Forked if waits_by_descriptor() else subprocess.Popen
"""Elsewhere, an ordinary process."""


def run(
    command: Sequence[str | bytes | Path], *, timeout: float = 100, check: bool = False, **options: Any
) -> subprocess.CompletedProcess[Any]:
    """Like `subprocess.run`; captures what the program says, unless told otherwise."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    with Process(command, **options) as process:
        try:
            out, error = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, out, error)
    if check:
        done.check_returncode()
    return done


def seconds_since_boot() -> float:
    """The clock of process start times; 0 where the system has none, so that every process is newer."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return 0.0 if clock is None else time.clock_gettime(clock)


def kill_children(since: float) -> None:
    """Kill the children of this process, and theirs, that started since then; the fork servers stay."""
    boot, tick = psutil.boot_time(), 0.01  # start times are whole ticks
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            words = " ".join(child.cmdline())
            keeps = "multiprocessing." in words or "fork_server.py" in words  # its resource tracker too
            for process in (*child.children(recursive=True), *([] if keeps else [child])):
                if process.create_time() - boot > since - tick:
                    process.kill()


def serve(orders: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork a child for each order; returns, in the child, its order and its streams."""
    while True:
        message, streams, _, _ = socket.recv_fds(orders, _SIZE, 3)
        if not message:
            os._exit(0)
        order = json.loads(message)
        if "import" in order:
            os.environ.update(order["environment"])
            for name in order["import"]:
                importlib.import_module(name)
            gc.freeze()
            answer = {}
        elif "reap" in order:
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(order["reap"], 0)[1])}
        else:
            answer = {"pid": os.fork()}
            if answer["pid"] == 0:
                return order, streams
            for stream in streams:
                os.close(stream)
        orders.send(json.dumps({"number": order["number"], **answer}).encode())


class End:
    """The end of a child. The interpreter's own would spend half a second on freeing every module."""

    code: int | None = None

    @classmethod
    def leave(cls) -> None:
        """The last exit handler; where the exit code is not known, the interpreter ends by itself."""
        if cls.code is not None and "coverage" not in sys.modules:  # which writes later what it measured
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(cls.code)


def main() -> None:
    """Serve; in a child, run the script to its end."""
    orders = socket.socket(fileno=int(sys.argv[1]))
    atexit.register(End.leave)  # handlers run in reverse order
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends pytest, and this process with it
    order, streams = serve(orders)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    orders.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["cwd"])
    sys.modules["numpy"].random.seed()  # Python's own generator does it by itself
    try:
        run_program(order["command"])
        End.code = 0
    except SystemExit as end:
        End.code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise


def run_program(words: list[str]) -> None:
    """Run what an interpreter would run for these words behind its name."""
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], str(Path.cwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    code = words[0] == "-c"
    sys.argv = [words[0], *words[1 + code :]]
    sys.path[0] = "" if code else str(Path(words[0]).parent)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    if not code:
        module.__file__ = words[0]
    text = words[1] if code else Path(words[0]).read_bytes()
    exec(compile(text, "<string>" if code else words[0], "exec"), module.__dict__)


if __name__ == "__main__":
    main()
