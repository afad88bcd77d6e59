"""What a job that was killed owed, the next one makes up for: evaluations, their checkpoints, and metrics."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fork_server
import grpc
import numpy as np
import pytest
from serving import ServerProcess

import maskwire
import maskwire.aio
from maskwire.errors import InvalidRequestError, WrongRunError
from maskwire.v1 import training_service_pb2 as pb

Serve = Callable[..., ServerProcess]
MASKWIRE = str(Path(sys.executable).with_name("maskwire"))

JOB = """
import asyncio, os, signal, sys
import numpy as np
import maskwire, maskwire.aio

address, kind, kill, until = *sys.argv[1:4], int(sys.argv[4])
data = maskwire.TokenData([np.arange(20, 60)] * 4, length=16, batch_size=4)
options = dict(until_step=until, eval_every=10, save_best=True, progress=False)

def blocking():
    with maskwire.connect(address) as trainer:
        def evaluate(trainer):
            found = None if kill == "before" else trainer.evaluate(data, rows=4, draws=2)
            if kill and trainer.step == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return found
        return trainer.fit(data, evaluate=evaluate, **options)

async def awaited():
    async with await maskwire.aio.connect(address) as trainer:
        async def evaluate(trainer):
            found = None if kill == "before" else await trainer.evaluate(data, rows=4, draws=2)
            if kill and trainer.step == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return found
        return await trainer.fit(data, evaluate=evaluate, **options)

done = blocking() if kind == "blocking" else asyncio.run(awaited())
print([found.step for found in done.evaluations])
"""


def job(server: ServerProcess, kind: str, kill: str = "", until: int = 40) -> str:
    done = fork_server.run([sys.executable, "-c", JOB, server.address, kind, kill, str(until)], text=True)
    assert done.returncode == (-9 if kill else 0), done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
@pytest.mark.parametrize("server_too", [False, True], ids=["the job alone", "and the server"])
def test_an_evaluation_whose_job_was_killed_happens_in_the_next_call(
    serve: Serve, kind: str, server_too: bool
) -> None:
    server = serve(seconds=0)
    # Killed with the result in its hands: nobody has seen it. The checkpoint of the best is owed as well.
    job(server, kind, kill="behind", until=40)
    if server_too:
        server.kill()
        server.start()
    assert job(server, kind) == "[20, 30, 40]"
    with maskwire.attach(server.address) as client:
        scored = {info.step for info in client.checkpoints() if info.score is not None}
        assert scored, "the best was saved"
    assert job(server, kind) == "[]", "each once"
    if server_too:
        server.kill()
        server.start()
    assert job(server, kind) == "[]"


def test_an_evaluation_at_the_last_step_is_owed_too(serve: Serve) -> None:
    server = serve(seconds=0)
    job(server, "blocking", kill="behind", until=20)
    assert job(server, "asyncio", until=20) == "[20]"
    assert job(server, "blocking", until=20) == "[]"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_have_every_step_once_and_in_order_whatever_was_killed(serve: Serve, tmp_path: Path) -> None:
    server = serve(seconds=0.001)
    text = tmp_path / "data" / "one.txt"
    text.parent.mkdir()
    text.write_bytes(b"some text, and more of it. " * 100)
    metrics = tmp_path / "metrics.jsonl"

    def command() -> list[str]:
        return [
            MASKWIRE, "train", str(text), "--until-step", "200", "--length", "16", "--batch-size", "4",
            "--window", "8", "--metrics", str(metrics), "--target", server.address, "--json",
        ]  # fmt: skip

    draw = random.Random(3)
    for number in range(4):
        before = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        enough = before + draw.randrange(2, 30)
        running = fork_server.Process(command(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < enough:
            assert running.poll() is None
            assert time.monotonic() < deadline
        running.kill()
        running.communicate()
        if number == 1:  # killed while a line was written
            whole = metrics.read_bytes()
            metrics.write_bytes(whole[: len(whole) - draw.randrange(1, 60)])
        if number == 2:
            server.kill()
            server.start()
    assert fork_server.run(command()).returncode == 0
    lines = lines_of(metrics)
    assert [line["step"] for line in lines] == list(range(1, 201))
    with maskwire.attach(server.address) as client:
        recorded = list(client.list_steps())
        assert [(line["digest"], line["loss"]) for line in lines] == [
            (step.digest.hex(), step.losses.loss) for step in recorded
        ]
        assert {(line["run_id"], line["lineage"]) for line in lines} == {(client.status().run_id, 1)}
        # After a restore the same command trains the steps again, and the file says so.
        restored = next(info for info in client.checkpoints() if info.step == 0)
        client.restore(restored.name)
    assert fork_server.run(command()).returncode == 0
    begun, *again = lines_of(metrics)[len(lines) :]
    assert (begun["event"], begun["lineage"], begun["step"]) == ("restored", 2, 0)
    assert begun["checkpoint"] == restored.name
    assert [(line["lineage"], line["step"]) for line in again] == [(2, step) for step in range(1, 201)]


def test_both_clients_list_steps_over_as_many_pages_as_it_takes(serve: Serve) -> None:
    server = serve(seconds=0)
    with maskwire.connect(server.address) as trainer:
        futures = [trainer.submit(np.full((1, 4), 20 + n % 50)) for n in range(260)]
        results = [future.result() for future in futures]
        listed = list(trainer.list_steps(run_id=trainer.run_id, lineage=1))
        assert [(step.step, step.digest, step.losses) for step in listed] == [
            (result.step, result.digest, result.losses) for result in results
        ]
        assert [step.step for step in trainer.list_steps(first_step=7, last_step=9)] == [7, 8, 9]
        page = trainer.steps_page(page_size=1000)
        assert (len(page.steps), bool(page.next_page_token)) == (250, True)
        rest = trainer.steps_page(page_token=page.next_page_token)
        assert ([step.step for step in rest.steps], rest.next_page_token) == (list(range(251, 261)), "")
        for wrong in ({"lineage": 2}, {"run_id": "other"}):
            with pytest.raises(WrongRunError, match="newest lineage is 1"):
                trainer.steps_page(**wrong)
        for options in (
            {"first_step": -1}, {"last_step": -1}, {"lineage": -1}, {"page_size": -1},
            {"first_step": 5, "last_step": 4}, {"page_token": "x"}, {"page_token": "é"},
            {"page_token": page.next_page_token, "first_step": 255},
            {"page_token": page.next_page_token, "last_step": 250},
        ):  # fmt: skip
            with pytest.raises(InvalidRequestError) as refused:
                trainer.steps_page(**options)
            assert refused.value.field in options

    async def awaited() -> list[Any]:
        client = maskwire.aio.attach(server.address)
        async with client:
            return [step async for step in client.list_steps(first_step=100)]

    import asyncio

    assert asyncio.run(awaited()) == listed[99:]


def test_a_page_token_stays_on_its_lineage_when_a_restore_comes_between(serve: Serve) -> None:
    server = serve(seconds=0)
    with maskwire.connect(server.address) as trainer:
        for n in range(4):
            trainer.train_step(np.full((1, 4), 20 + n))
        first = trainer.steps_page(page_size=2)
        trainer.checkpoint("four")
        trainer.restore("four")
        second = trainer.steps_page(page_size=2, page_token=first.next_page_token)
        assert (second.lineage, [step.step for step in second.steps]) == (1, [3, 4])
        assert trainer.steps_page().checkpoint == "four"


def test_the_list_of_steps_for_a_client_of_any_language(serve: Serve, stub: Any) -> None:
    server = serve(seconds=0)
    service = stub(server)
    with maskwire.connect(server.address) as trainer:
        trainer.train_step(np.full((1, 4), 7))  # not finite
    answer = service.ListSteps(pb.ListStepsRequest(), timeout=20)
    (step,) = answer.steps
    assert (step.step, step.outcome) == (1, pb.STEP_OUTCOME_SKIPPED_NON_FINITE)
    assert np.isnan(step.losses.loss)
    assert not step.HasField("gradient_norm")
    assert not step.losses.HasField("critic_loss")
    assert (answer.lineage, answer.parent_lineage, answer.start_step, answer.checkpoint) == (1, 0, 0, "")
    with pytest.raises(grpc.RpcError):
        service.OpenSession(pb.OpenSessionRequest(client_name="a", nonce="b", evaluated_step=-1), timeout=20)
