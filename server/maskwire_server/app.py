"""The server process: builds the parts of the server and connects them."""

from __future__ import annotations

import faulthandler
import logging
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from maskwire._version import __version__
from maskwire_server import effective_config, tokenizer_files
from maskwire_server.checkpoints.rank_parts import PartFiles
from maskwire_server.checkpoints.store import Checkpoints
from maskwire_server.config import Config
from maskwire_server.engine import quarantine, step_timeout
from maskwire_server.engine.engine import Engine
from maskwire_server.engine.engine_options import EngineOptions
from maskwire_server.engine.trainer_interface import Trainer
from maskwire_server.engine.watchdog import Watchdog
from maskwire_server.error_output import say
from maskwire_server.errors import (
    ConfigError,
    DeviceLost,
    FencedError,
    Refused,
    RunDirectoryError,
)
from maskwire_server.exit_codes import (
    EXIT_CONFIG,
    EXIT_DEVICE,
    EXIT_FAILURE,
    EXIT_FENCED,
    EXIT_HUNG,
    EXIT_INEXACT,
    EXIT_RUN_DIRECTORY,
    EXIT_SLOW,
)
from maskwire_server.journal.object_store import ObjectStore
from maskwire_server.journal.run_directory import JOURNAL_FILE
from maskwire_server.ranks.launcher import note_loss
from maskwire_server.recovery import from_mirror, state_at_step
from maskwire_server.recovery.replay import InexactReplayError
from maskwire_server.rpc.server import Server
from maskwire_server.telemetry import start as telemetry
from maskwire_server.training.device_memory import device_memory

log = logging.getLogger(__name__)

LAST_SECONDS = 0.5
"""Seconds between the report that the process hangs and its exit."""


def serve(
    config: Config,
    *,
    factory: Callable[[Config], Trainer] | None = None,
    accept_inexact_replay: bool = False,
    accept_lost_history: int | None = None,
    finish: Callable[[int], int] = lambda code: code,
    last_error: str = "",
) -> int:
    """Serve one run until SIGTERM or SIGINT, and return the exit code.

    `factory` builds the trainer for a configuration, on the device thread (default: `build_trainer`). If the
    process exits before this function returns, and its launcher must not restart it, `finish` is called with
    the exit code, and returns the code to exit with. `last_error` says why earlier processes of the run
    ended; the status reports it.
    """
    began = time.monotonic()
    stop, reread = threading.Event(), threading.Event()
    _on_signals(stop, finish)
    if config.serve.certificate_files or config.serve.token_files:
        signal.signal(signal.SIGHUP, lambda *_: reread.set())
    try:
        store = None if config.storage.mirror is None else ObjectStore(config.storage.mirror)
        if store is not None:
            from_mirror.restore_journal(config, store, stop)
            if stop.is_set():
                return _leave(finish(0))
        config = effective_config.completed(config)
    except RunDirectoryError as error:
        say(error)
        return EXIT_RUN_DIRECTORY
    except ConfigError as error:
        say(error)
        return EXIT_CONFIG
    log.info("run directory: %s", config.run.dir.absolute())
    options = EngineOptions(
        partial(factory or build_trainer, config),
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
        identity=effective_config.identity(config),
        last_error=last_error,
        storage=config.storage,
        store=store,
    )
    engine = Engine(options, partial(_die, finish))
    try:
        server = Server(engine, config.serve, engine.events.publish)
        sources = telemetry.Sources(
            config.run.dir, JOURNAL_FILE, tokenizer_files.FOLDER, engine.status, device_memory,
            engine.kept_tokenizer.of_run,
        )  # fmt: skip
        telemetry.start(config.telemetry, sources, engine.events.subscribe)
    except ConfigError as error:
        say(error)
        engine.close()
        return EXIT_CONFIG
    engine.on_state(server.on_state)
    shortest = config.serve.step_timeout_seconds or step_timeout.LEAST_SECONDS
    watchdog = Watchdog(engine.progress, shortest, time.monotonic, partial(_hung, server))
    watchdog.start()
    try:
        address = server.start()  # before recovery, so that status and liveness answer during it
        engine.start()
        while not stop.is_set():
            try:
                engine.wait_serving(0.2)
                break
            except TimeoutError:
                _refresh(server, reread)
        else:
            return _leave(finish(0))  # no request was admitted yet
        tokenizer_files.keep(config)
        if not stop.is_set():
            log.info("ready after %.1f s", time.monotonic() - began)
            print(f"maskwire-server listening on {address}", flush=True)
        while not stop.wait(0.5):  # Python runs signal handlers on this thread
            _refresh(server, reread)
        return _stop(engine, server, config.serve.drain_seconds, finish)
    except ConfigError as error:
        return _fail(engine, server, EXIT_CONFIG, error)
    except InexactReplayError as error:
        return _fail(engine, server, EXIT_INEXACT, error)
    except FencedError as error:
        return _fail(engine, server, EXIT_FENCED, error)
    except RunDirectoryError as error:
        return _fail(engine, server, EXIT_RUN_DIRECTORY, error)
    except DeviceLost as error:
        _die(finish, error)
    except Exception:
        log.exception("the server failed to start")
        return _leave(EXIT_FAILURE)
    finally:
        watchdog.stop()


def serve_rank(
    config: Config, *, accept_inexact_replay: bool = False, accept_lost_history: int | None = None
) -> NoReturn:
    """Run as one rank of the group of processes that a launcher started, and never return.

    The leader serves the run. The other ranks compute what it orders.
    """
    from maskwire_server.ranks import follower, launcher, process_group
    from maskwire_server.ranks.build import build
    from maskwire_server.ranks.leader import LeaderTrainer, fatal
    from maskwire_server.ranks.liveness import GRACE_SECONDS
    from maskwire_server.ranks.orders import Order
    from maskwire_server.ranks.shard_saver import ShardSaver
    from maskwire_server.ranks.shared_folder import SavePlace

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the leader ends its followers
    try:
        member = process_group.join(config.distributed, config.serve)
    except ConfigError as error:  # every rank raises it
        say(error)
        _leave(launcher.note_exit(EXIT_CONFIG))
    saver = ShardSaver(member, PartFiles())

    def lead(completed: Config) -> Trainer:
        launcher.note_leader()  # signals are handled by now
        order = Order("build", completed.model_dump(mode="json"))
        with fatal(member, order):
            member.order(order)
        place = SavePlace(Checkpoints(completed.run.dir).folder, completed.distributed.checkpoints_by)
        return LeaderTrainer(build(member, completed), member, saver, place)

    def finish(code: int) -> int:
        code = launcher.note_exit(code)
        member.end()
        return code

    if not member.is_leader:
        try:
            follower.follow(member, lambda sections: build(member, Config(**sections)), saver)
        except ConfigError as error:  # if the leader raises it too, `liveness` has ended this process
            time.sleep(config.distributed.rank_timeout_seconds)
            say(error)
            _leave(launcher.note_exit(EXIT_CONFIG))
        except Exception:
            time.sleep(GRACE_SECONDS)
            log.exception("rank %d failed", member.place.rank)
        _leave(EXIT_FAILURE)
    if launcher.is_stopping():  # an earlier leader ended during the stop: there is nothing to serve
        _leave(finish(0))
    if launcher.batch_was_cleared():
        quarantine.forget(config.run.dir)
    code = serve(
        config,
        factory=lead,
        accept_inexact_replay=accept_inexact_replay,
        accept_lost_history=accept_lost_history,
        finish=finish,
        last_error=launcher.last_loss(),
    )
    _leave(finish(code))


def rewind(config: Config, to_step: int, out: Path | None, *, accept_inexact_replay: bool = False) -> int:
    """Recompute a run up to `to_step`, write the state to `out` if it is given, and return the exit code."""
    try:
        config = effective_config.completed(config)
        info, inexact = state_at_step.rewind(
            config.run.dir,
            partial(build_trainer, config),
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


def build_trainer(config: Config) -> Trainer:
    """Build the configured trainer. Must be called on the device thread."""
    # torch is imported on the device thread too, because its thread pools belong to the thread that first
    # uses them.
    began = time.monotonic()
    from maskwire_server.training.trainer import TorchTrainer

    log.info("imported torch in %.1f s", time.monotonic() - began)
    return TorchTrainer(config.model, config.objective, config.optimizer, config.serve, config.run.seed)


def _on_signals(stop: threading.Event, finish: Callable[[int], int]) -> None:
    def handle(number: int, _: FrameType | None) -> None:
        if stop.is_set():
            log.warning(
                "second %s: exiting at once; acknowledged steps are durable", signal.Signals(number).name
            )
            _leave(finish(EXIT_SLOW))
        log.info("%s: stopping; acknowledged steps are durable", signal.Signals(number).name)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def _refresh(server: Server, reread: threading.Event) -> None:
    """Read certificate and token files again if they have changed; after SIGHUP, read all of them at once."""
    now = reread.is_set()
    reread.clear()
    server.refresh_credentials(now=now)


def _stop(engine: Engine, server: Server, seconds: float, finish: Callable[[int], int]) -> int:
    deadline = time.monotonic() + seconds
    if not engine.drain(seconds):
        log.error(
            "the running step or the last checkpoint took longer than serve.drain_seconds = %g s; exiting "
            "without it; acknowledged steps are durable",
            seconds,
        )
        return _leave(finish(EXIT_SLOW))
    server.stop(min(1.0, max(0.0, deadline - time.monotonic())))
    engine.close()
    engine.events.close()
    log.info("stopped")
    return 0


def _fail(engine: Engine, server: Server, code: int, error: Exception) -> int:
    say(error)
    server.stop(0)
    engine.close()
    engine.events.close()
    return code


def _die(finish: Callable[[int], int], error: BaseException) -> NoReturn:
    if isinstance(error, FencedError):
        say(error)
        _leave(finish(EXIT_FENCED))
    say(f"{type(error).__name__}; see the log above; start the server again to resume")
    _leave(EXIT_DEVICE if isinstance(error, DeviceLost) else EXIT_FAILURE)


def _hung(server: Server, what: str) -> None:
    """End the process, because a hung call cannot be interrupted. Runs on the watchdog's thread."""
    # Exit even if this thread hangs too: the hung thread may hold the log's lock.
    faulthandler.dump_traceback_later(LAST_SECONDS * 10, exit=True)
    server.on_hang()
    note_loss(what)
    log.critical(
        "%s: the server exits with code %d, and a restart recovers the run; the stacks of all threads follow",
        what,
        EXIT_HUNG,
    )
    faulthandler.dump_traceback(all_threads=True)
    time.sleep(LAST_SECONDS)  # so that clients of the health service see the change before the exit
    _leave(EXIT_HUNG)


def _leave(code: int) -> NoReturn:
    """Exit without waiting for other threads, such as one that computes."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
