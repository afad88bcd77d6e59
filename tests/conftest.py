"""What every test gets: fixed seeds, and an end to the processes that a failed one left running."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import fork_server
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# `make test` draws the same examples every time, and no example fails because the machine is busy.
# `make model` looks for new ones.
settings.register_profile(
    "suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
if "MASKWIRE_MODEL_RUNS" not in os.environ:
    settings.load_profile("suite")

LONGEST = (
    "rpc/test_ranks.py", "robustness/test_samples.py", "server/training/test_trainer.py",
    "ranks/test_parity.py", "rpc/test_limits.py", "rpc/test_model_examples.py", "test_wheel.py",
    "server/training/test_generation.py",
    "server/recovery/test_inexact_replay.py", "rpc/test_jobs.py", "client/test_nonfatal_output.py",
    "rpc/test_sources.py", "server/training/test_dense_reference.py", "rpc/test_durability.py",
    "test_bench.py",
    "server/training/test_known_answers.py", "rpc/test_service_over_the_wire.py", "rpc/test_run_directory.py",
    "rpc/test_weights.py", "rpc/test_processes.py", "rpc/test_security.py",
    "server/training/test_importing.py", "test_suite.py", "rpc/test_made_up.py", "rpc/test_both_clients.py",
    "rpc/test_exchange.py", "rpc/test_docs.py", "test_laws.py", "test_fork_server.py",
    "rpc/test_evaluation.py", "test_scale.py",
)  # fmt: skip
"""The files that take ten seconds or more, the longest first."""
BEGAN = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    """The suite computes on the CPU wherever it runs; `pytest -m gpu` tests the GPU."""
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # torch.compile in this process: a pool of others would import torch in each.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files: one that comes last would leave the other workers idle."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Global generators start alike in every test, whichever ran before it in the same process."""
    random.seed(0)
    np.random.seed(0)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_log_levels() -> Iterator[None]:
    """A test that silences a logger does so for itself; the campaigns do."""
    loggers = [logging.getLogger(name) for name in ("maskwire", "maskwire_server")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    item.stash[BEGAN] = fork_server.seconds_since_boot()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Kill what a failed test started and would have ended itself; fixtures end their own processes."""
    if call.when == "call" and call.excinfo is not None and call.excinfo.type is not pytest.skip.Exception:
        fork_server.kill_children(since=item.stash[BEGAN])
    return (yield)
