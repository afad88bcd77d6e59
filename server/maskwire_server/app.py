"""The server process: builds the parts of the server and joins them."""

from __future__ import annotations

import logging
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from maskwire._version import __version__
from maskwire_server import served_config, tokenizer_files
from maskwire_server.config import Config
from maskwire_server.engine.engine import Engine
from maskwire_server.engine.setup import Setup
from maskwire_server.engine.trainer_interface import Trainer
from maskwire_server.errors import ConfigError, Refused, RunDirectoryError
from maskwire_server.recovery import point_in_time
from maskwire_server.recovery.replay import InexactReplayError
from maskwire_server.rpc.server import Server

log = logging.getLogger(__name__)

EXIT_CONFIG, EXIT_RUN_DIRECTORY, EXIT_INEXACT, EXIT_SLOW, EXIT_OUTPUT, EXIT_FAILURE = 2, 3, 4, 5, 7, 70
EXIT_CODES = {  # acknowledged steps are safe in each case
    0: "success; `serve` stopped cleanly",
    1: "`check`: the model does not fit in memory; `verify`: something is damaged",
    EXIT_CONFIG: "the configuration, a certificate or a token file is invalid; stderr says what is wrong",
    EXIT_RUN_DIRECTORY: "the run directory cannot be used: another server uses it, it is damaged, or the run "
    "has another model, objective or seed than the configuration",
    EXIT_INEXACT: "a recomputed step gave another result than the recorded one",
    EXIT_SLOW: "stopped, but the running step took longer than `serve.drain_seconds`; start the server again",
    EXIT_OUTPUT: "the command finished, but its output could not be written to stdout (a full disk?)",
    EXIT_FAILURE: "an unexpected error, which the log describes; start the server again",
}


def serve(
    config: Config,
    *,
    factory: Callable[[], Trainer] | None = None,
    accept_inexact_replay: bool = False,
    accept_lost_history: int | None = None,
) -> int:
    """Serve one run until SIGTERM or SIGINT, and return the exit code.

    `factory` builds the trainer on the device thread. Default: the configured trainer.
    """
    began = time.monotonic()
    stop = threading.Event()
    _on_signals(stop)
    try:
        config = served_config.completed(config)
    except RunDirectoryError as error:
        say(error)
        return EXIT_RUN_DIRECTORY
    except ConfigError as error:
        say(error)
        return EXIT_CONFIG
    log.info("run directory: %s", config.run.dir.absolute())
    setup = Setup(
        factory or trainer_factory(config),
        config.run.dir,
        seed=config.run.seed,
        canonical=config.canonical(),
        configuration=config.as_json(),
        serve=config.serve,
        checkpoints=config.checkpoints,
        versions={"maskwire": __version__, "python": platform.python_version()},
        pretrained=config.model.huggingface is not None and config.model.huggingface.pretrained,
        accept_inexact_replay=accept_inexact_replay,
        accept_lost_history=accept_lost_history,
        identity=served_config.identity(config),
    )
    engine = Engine(setup, _die)
    try:
        server = Server(engine, config.serve)
    except ConfigError as error:
        say(error)
        engine.close()
        return EXIT_CONFIG
    engine.on_state(server.on_state)
    try:
        address = server.start()  # before recovery, so that status and liveness answer during it
        engine.start()
        while not stop.is_set():
            try:
                engine.wait_serving(0.2)
                break
            except TimeoutError:
                continue
        else:
            return _leave(0)  # no request was admitted yet
        tokenizer_files.keep(config)
        if not stop.is_set():
            log.info("ready after %.1f s", time.monotonic() - began)
            print(f"maskwire-server listening on {address}", flush=True)
        while not stop.wait(0.5):  # Python runs signal handlers on this thread
            pass
        return _stop(engine, server, config.serve.drain_seconds)
    except ConfigError as error:
        return _fail(engine, server, EXIT_CONFIG, error)
    except InexactReplayError as error:
        return _fail(engine, server, EXIT_INEXACT, error)
    except RunDirectoryError as error:
        return _fail(engine, server, EXIT_RUN_DIRECTORY, error)
    except Exception:
        log.exception("the server failed to start")
        return _leave(EXIT_FAILURE)


def rewind(config: Config, to_step: int, out: Path | None, *, accept_inexact_replay: bool = False) -> int:
    """Compute a run again up to a step, and return the exit code."""
    try:
        config = served_config.completed(config)
        info, inexact = point_in_time.rewind(
            config.run.dir,
            trainer_factory(config),
            config.as_json(),
            seed=config.run.seed,
            canonical=config.canonical(),
            to_step=to_step,
            out=out,
            accept_inexact=accept_inexact_replay,
            tell=log.info,
        )
    except InexactReplayError as error:
        say(error)
        return EXIT_INEXACT
    except ConfigError as error:
        say(error)
        return EXIT_CONFIG
    except (RunDirectoryError, Refused, ValueError, OSError) as error:
        say(error)
        return EXIT_RUN_DIRECTORY
    where = f"; its state is in {out}" if out is not None else ""
    exact = (
        f"{inexact} step{'s' * (inexact != 1)} gave other losses than recorded" if inexact else "as recorded"
    )
    print(f"step {info.step}, digest {info.digest.hex()}: {exact}{where}", flush=True)
    return 0


def trainer_factory(config: Config) -> Callable[[], Trainer]:
    """A function that builds the configured trainer. Call it on the device thread."""

    def build() -> Trainer:
        # torch too is imported on the device thread, because its thread pools belong to the thread that first
        # uses them.
        began = time.monotonic()
        from maskwire_server.training.trainer import TorchTrainer

        log.info("imported torch in %.1f s", time.monotonic() - began)
        return TorchTrainer(config.model, config.objective, config.optimizer, config.serve, config.run.seed)

    return build


def _on_signals(stop: threading.Event) -> None:
    def handle(number: int, _: FrameType | None) -> None:
        if stop.is_set():
            log.warning(
                "second %s: exiting at once; acknowledged steps are durable", signal.Signals(number).name
            )
            _leave(EXIT_SLOW)
        log.info("%s: stopping; acknowledged steps are durable", signal.Signals(number).name)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def _stop(engine: Engine, server: Server, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    if not engine.drain(seconds):
        log.error("the running step took longer than serve.drain_seconds = %g; exiting without it", seconds)
        return _leave(EXIT_SLOW)
    server.stop(min(1.0, max(0.0, deadline - time.monotonic())))
    engine.close()
    log.info("stopped")
    return 0


def _fail(engine: Engine, server: Server, code: int, error: Exception) -> int:
    say(error)
    server.stop(0)
    engine.close()
    return code


def say(error: Exception) -> None:
    """Print an error to stderr, one line for each problem."""
    for line in str(error).splitlines():
        print(f"maskwire-server: {line}", file=sys.stderr)


def _die(error: BaseException) -> None:
    print(
        f"maskwire-server: {type(error).__name__}; see the log above; start the server again to resume",
        file=sys.stderr,
    )
    _leave(EXIT_FAILURE)


def _leave(code: int) -> NoReturn:
    """Exit without waiting for other threads, for example one that computes."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
