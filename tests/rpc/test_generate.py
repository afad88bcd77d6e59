"""Generate over a real port: streams, refusals by name, cancellation, and the end of the server."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fork_server
import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from serving import ServerProcess

import maskwire
from maskwire.errors import UnavailableError, read_failure
from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1 import training_service_pb2_grpc as pb_grpc

Serve = Callable[..., ServerProcess]
Stub = Callable[[ServerProcess], Any]


def prompts(rows: list[list[int]], **fields: Any) -> pb.TokenBatch:
    data = np.array(rows, dtype=np.int32)
    return pb.TokenBatch(
        **{"data": data.tobytes(), "shape": data.shape, "dtype": pb.DATA_TYPE_INT32, **fields}
    )


def rows_of(answer: pb.GenerateResponse) -> np.ndarray[Any, Any]:
    assert answer.tokens.dtype == pb.DATA_TYPE_UINT8
    return np.frombuffer(answer.tokens.data, dtype=np.uint8).reshape(tuple(answer.tokens.shape))


def test_a_bare_call_gets_the_finished_rows(shared: ServerProcess, stub: Stub) -> None:
    service = stub(shared)
    status = service.GetStatus(pb.GetStatusRequest())
    (answer,) = service.Generate(pb.GenerateRequest(count=3), timeout=30)
    assert rows_of(answer).shape == (3, 32)
    assert rows_of(answer).max() < 16
    assert answer.done
    assert answer.unmasking_step == 32
    assert (answer.step, answer.digest) == (status.step, status.digest)
    (again,) = service.Generate(pb.GenerateRequest(count=3), timeout=30)
    assert again == answer, "the same seed, the same rows"
    (other,) = service.Generate(pb.GenerateRequest(count=2, seed=1), timeout=30)
    assert (rows_of(other) == rows_of(answer)[1:]).all(), "row 0 of seed 1 is row 1 of seed 0"


def test_each_step_is_streamed(shared: ServerProcess, stub: Stub) -> None:
    service = stub(shared)
    wanted = pb.GenerateRequest(count=2, length=12, steps=5, stream_steps=True)
    answers = list(service.Generate(wanted, timeout=30))
    assert [answer.unmasking_step for answer in answers] == [1, 2, 3, 4, 5]
    assert [answer.done for answer in answers] == [False] * 4 + [True]
    assert [list(answer.still_masked) for answer in answers] == [[n, n] for n in (9, 7, 4, 2, 0)]
    for answer in answers:
        assert ((rows_of(answer) == 16).sum(1) == list(answer.still_masked)).all()


def test_ragged_prompts_come_back_untouched_and_filled(shared: ServerProcess, stub: Stub) -> None:
    ids = np.array([1, 2, 16, 9, 16, 16, 3], dtype=np.uint8)
    batch = pb.TokenBatch(data=ids.tobytes(), shape=[2, 4], dtype=pb.DATA_TYPE_UINT8, lengths=[3, 4])
    (answer,) = stub(shared).Generate(pb.GenerateRequest(prompts=batch), timeout=30)
    filled = np.frombuffer(answer.tokens.data, dtype=np.uint8)
    assert list(answer.tokens.lengths) == [3, 4]
    assert (filled[ids != 16] == ids[ids != 16]).all()
    assert filled.max() < 16
    # The same with a mask: whatever the gaps hold is not looked at.
    marked = pb.TokenBatch(
        data=np.where(ids == 16, 200, ids).astype(np.uint8).tobytes(), shape=[2, 4],
        dtype=pb.DATA_TYPE_UINT8, lengths=[3, 4], prompt_mask=bytes([0b10010011]),
    )  # fmt: skip
    (same,) = stub(shared).Generate(pb.GenerateRequest(prompts=marked), timeout=30)
    assert same == answer
    (first,) = stub(shared).Generate(pb.GenerateRequest(prompts=batch, count=1), timeout=30)
    assert list(first.tokens.lengths) == [3]


def test_padding_by_the_pad_id_is_padding(serve: Serve, stub: Stub) -> None:
    server = serve(model__pad_id="0")
    batch = prompts([[1, 16, 16, 2], [3, 16, 0, 0]])
    (answer,) = stub(server).Generate(pb.GenerateRequest(prompts=batch), timeout=30)
    rows = rows_of(answer)
    assert rows[:, 0].tolist() == [1, 3]
    assert rows[1, 2:].tolist() == [0, 0]
    assert 0 not in rows[0]
    assert not np.isin(rows, 16).any()


def test_prompts_computed_at_a_width_come_back_at_their_own(shared: ServerProcess, stub: Stub) -> None:
    service = stub(shared)
    wide = prompts([[1, 16, 16, 16, 16], [16, 16, 3, 16, 16]])
    (whole,) = service.Generate(pb.GenerateRequest(prompts=prompts([[1, 16, 2], [16, 16, 3]]), length=32))
    assert list(whole.tokens.shape) == [2, 3]
    (one,) = service.Generate(pb.GenerateRequest(prompts=prompts([[16, 16, 3]]), length=32, seed=1))
    assert (rows_of(one) == rows_of(whole)[1:]).all(), "the same seed, prompt and width"
    (own,) = service.Generate(pb.GenerateRequest(prompts=wide, length=5))
    (given,) = service.Generate(pb.GenerateRequest(prompts=wide))
    assert (rows_of(own) == rows_of(given)).all()


R = pb.GenerateRequest
GOOD = [[1, 16, 2], [16, 16, 3]]
CASES: dict[str, tuple[pb.GenerateRequest, str, list[str]]] = {
    "no rows": (R(), "count", ["at least 1", "got 0"]),
    "a negative count": (R(count=-1), "count", ["-1"]),
    "a row too long": (R(count=1, length=33), "length", ["1 to 32", "33"]),
    "a negative length": (R(count=1, length=-1), "length", ["-1"]),
    "too many tokens": (R(count=2**20, length=2), "count", ["at most 1048576", "serve.max_batch_tokens"]),
    "too many steps": (R(count=1, steps=1025), "steps", ["1 to 1024", "serve.max_generation_steps"]),
    "negative steps": (R(count=1, steps=-1), "steps", ["-1"]),
    "an unknown order": (R(count=1, order=9), "order", ["GenerationOrder", "9"]),
    "a critic that is not there": (R(count=1, order=pb.GENERATION_ORDER_CRITIC), "order",
                                   ["needs a critic", "objective.critic"]),
    "a temperature below 0": (R(count=1, temperature=-0.1), "temperature", ["at least 0", "-0.1"]),
    "a temperature that is none": (R(count=1, temperature=math.nan), "temperature", ["nan"]),
    "an infinite temperature": (R(count=1, temperature=math.inf), "temperature", ["finite"]),
    "a choice temperature that is none": (R(count=1, choice_temperature=math.nan), "choice_temperature",
                                          ["nan"]),
    "a start temperature below 0": (R(count=1, start_temperature=-1), "start_temperature",
                                    ["at least 0", "-1.0"]),
    "a start temperature that is none": (R(count=1, start_temperature=math.nan), "start_temperature",
                                         ["nan"]),
    "an infinite start temperature": (R(count=1, start_temperature=math.inf), "start_temperature",
                                      ["finite"]),
    "two temperatures": (R(count=1, start_temperature=2, temperature=1), "start_temperature",
                         ["exclude each other", "2.0 and 1.0", "leave out temperature"]),
    "a negative filter_thres": (R(count=1, filter_thres=-0.1), "filter_thres", ["at least 0", "-0.1"]),
    "a filter_thres of 1": (R(count=1, filter_thres=1), "filter_thres", ["below 1", "1.0"]),
    "a filter_thres that is none": (R(count=1, filter_thres=math.nan), "filter_thres", ["nan"]),
    "a negative top_k beside a filter_thres": (R(count=1, top_k=-1, filter_thres=0.5), "top_k", ["-1"]),
    "a negative top_k": (R(count=1, top_k=-1), "top_k", ["-1"]),
    "a top_p of 0": (R(count=1, top_p=0), "top_p", ["above 0", "0.0"]),
    "a top_p above 1": (R(count=1, top_p=1.5), "top_p", ["1.5"]),
    "a top_p that is none": (R(count=1, top_p=math.nan), "top_p", ["nan"]),
    "remasking in random order": (R(count=1, remasking=True), "remasking",
                                  ["'confidence' or 'critic'", "random"]),
    "an unknown mode": (R(count=1, self_cond_mode=3), "self_cond_mode", ["SelfCondMode", "3"]),
    "seeds for other rows": (R(count=2, row_seeds=[1]), "row_seeds", ["one seed per row (2)", "got 1"]),
    "a seed without room": (R(count=2, seed=2**63 - 1), "seed", ["each of the 2 rows"]),
    "prompts at less than their width": (R(prompts=prompts(GOOD), length=2), "length",
                                         ["3 (the length of the prompts)", "got 2"]),
    "prompts at more than the model's": (R(prompts=prompts(GOOD), length=33), "length", ["to 32", "got 33"]),
    "more rows than prompts": (R(prompts=prompts(GOOD), count=3), "count", ["1 to 2", "got 3"]),
    "prompts without a gap": (R(prompts=prompts([[1, 2]])), "prompts", ["at least one position to sample"]),
    "an id of no datum": (R(prompts=prompts([[1, 16], [99, 16]])), "prompts.data",
                          ["row 1, column 0 is 99", "0 to 16"]),
    "a given mask id": (R(prompts=prompts([[1, 16]], prompt_mask=b"\x02")), "prompts.data",
                        ["row 0, column 1 is 16", "the mask id"]),
    "prompts of one dimension": (R(prompts=prompts(GOOD, shape=[6])), "prompts.shape", ["[rows, columns]"]),
    "prompts too long": (R(prompts=prompts([[16] * 33])), "prompts.shape", ["at most 32"]),
    "prompts without a type": (R(prompts=prompts(GOOD, dtype=0)), "prompts.dtype", ["DATA_TYPE_UINT8"]),
    "too few bytes": (R(prompts=prompts(GOOD, data=b"123")), "prompts.data", ["24 bytes", "got 3"]),
    "lengths of other rows": (
        R(prompts=prompts(GOOD, lengths=[3])), "prompts.lengths", ["one length per row (2)"]),
    "a mask of another size": (R(prompts=prompts(GOOD, prompt_mask=b"12")), "prompts.prompt_mask",
                               ["1 bytes", "got 2"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_input_is_refused_by_name(shared: ServerProcess, stub: Stub, case: str) -> None:
    wanted, field, words = CASES[case]
    with pytest.raises(grpc.RpcError) as raised:
        next(stub(shared).Generate(wanted, timeout=30))
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(raised.value)
    assert status is not None
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details if detail.Is(bad.DESCRIPTOR))
    assert [violation.field for violation in bad.field_violations] == [field]
    assert raised.value.details().startswith(field)
    for word in words:
        assert word in raised.value.details()


def test_every_order_and_option_travels(serve: Serve) -> None:
    server = serve(objective__critic="self", objective__self_cond="true", optimizer__ema_decay="0.9")
    with maskwire.connect(server.address) as trainer:
        trainer.train_step(np.random.default_rng(0).integers(0, 16, (4, 16)))
        found = {}
        for order in ("random", "confidence", "margin", "entropy", "critic"):
            result = trainer.generate(
                count=4, length=16, order=order, steps=4, temperature=0.9, top_k=8, top_p=0.9,
                choice_temperature=0.5, remasking=order in ("confidence", "critic"), self_cond_mode="carry",
                row_seeds=[7, 8, 9, 7],
            )  # fmt: skip
            assert result.unmasking_step == 4
            assert result.ema_weights
            assert isinstance(result.tokens, np.ndarray)
            assert (result.tokens[0] == result.tokens[3]).all()
            assert result.tokens.max() < 16
            found[order] = result.tokens.tobytes()
        assert len(set(found.values())) > 1
        assert not trainer.generate(count=1, raw_weights=True).ema_weights


def test_a_falling_temperature_and_a_share_of_the_vocabulary_travel(shared: ServerProcess) -> None:
    with maskwire.attach(shared.address) as client:

        def of(**options: Any) -> Any:
            return client.generate(count=8, length=16, **options).tokens

        # The temperature of pass 1 of 1 is 0, as that of a start temperature of 0 is in each pass.
        assert (of(start_temperature=5.0, steps=1) == of(temperature=0, steps=1)).all()
        assert (of(start_temperature=0.0, steps=4) == of(temperature=0, steps=4)).all()
        falling = of(start_temperature=2.0, steps=4)
        assert (falling != of(temperature=2.0, steps=4)).any()
        assert (falling != of(temperature=0, steps=4)).any()
        states = list(client.generate_steps(count=8, length=16, start_temperature=2.0, steps=4))
        assert (states[-1].tokens == falling).all()
        # 12 positions stay masked after pass 1 of 4, which has temperature 2 (1 - 1/4).
        first = next(client.generate_steps(count=8, length=16, temperature=1.5, steps=4))
        assert (states[0].tokens == first.tokens).all()
        # Of 17 ids, ceil(.3 * 17) = 6 are kept; the smaller of the two numbers applies.
        assert (of(filter_thres=0.7) == of(top_k=6)).all()
        assert (of(filter_thres=0.7, top_k=3) == of(top_k=3)).all()
        assert (of(filter_thres=0.7, top_k=9, top_p=0.5) == of(top_k=6, top_p=0.5)).all()
        assert (of(filter_thres=0.999) == of(top_k=1)).all()
        assert (of(filter_thres=0.0) == of()).all(), "nothing is dropped"
        assert (of(start_temperature=None, filter_thres=None, temperature=None) == of()).all()

    async def main() -> Any:
        async with maskwire.aio.attach(shared.address) as awaited:
            return (await awaited.generate(count=8, length=16, start_temperature=2.0, steps=4)).tokens

    assert (asyncio.run(main()) == falling).all()


def test_the_command_takes_a_falling_temperature_and_a_share(shared: ServerProcess) -> None:
    program = str(Path(sys.executable).with_name("maskwire"))
    options = ["--count=2", "--length=16", "--steps=4", "--json", f"--target={shared.address}"]
    asked = ["--start-temperature=2", "--filter-thres=0.7"]
    done = fork_server.run([program, "generate", *options, *asked], text=True, check=True)
    with maskwire.attach(shared.address) as client:
        found = client.generate(count=2, length=16, steps=4, start_temperature=2.0, filter_thres=0.7)
        plain = client.generate(count=2, length=16, steps=4)
    assert json.loads(done.stdout)["tokens"] == found.tokens.tolist()
    done = fork_server.run([program, "generate", *options], text=True, check=True)
    assert json.loads(done.stdout)["tokens"] == plain.tokens.tolist()
    refused = fork_server.run([program, "generate", *options, *asked, "--temperature=1"], text=True)
    assert refused.returncode != 0
    assert "start_temperature and temperature exclude each other, got 2.0 and 1.0" in refused.stderr


def test_a_generation_beside_a_writer_names_a_step_of_its_history(serve: Serve) -> None:
    server = serve(seconds=0.002)
    digests: dict[int, bytes] = {}
    with maskwire.connect(server.address) as trainer, maskwire.attach(server.address) as reader:
        stop = threading.Event()

        def write() -> None:
            while not stop.is_set():
                result = trainer.train_step(np.full((2, 8), 20))
                digests[result.step] = result.digest

        writer = threading.Thread(target=write)
        writer.start()
        found = [list(reader.generate_steps(count=2, length=6)) for _ in range(10)]
        stop.set()
        writer.join()
    for states in found:
        assert len({(state.step, state.digest) for state in states}) == 1
        assert [len(states), states[-1].done] == [6, True]
        if states[0].step:
            assert digests[states[0].step] == states[0].digest
    assert found[-1][0].step > found[0][0].step


@pytest.mark.parametrize("how", ["cancel", "deadline", "closed channel", "left iterator"])
def test_a_stream_that_nobody_reads_any_more_gives_the_device_back(serve: Serve, how: str) -> None:
    server = serve(seconds=0.1)
    wanted = pb.GenerateRequest(count=1, length=500, stream_steps=True)
    with grpc.insecure_channel(server.address) as channel:
        service = pb_grpc.TrainingServiceStub(channel)
        if how == "left iterator":
            with maskwire.attach(server.address) as client:
                for state in client.generate_steps(count=1, length=500):
                    if state.unmasking_step == 2:
                        break
        else:
            stream = service.Generate(wanted, timeout=4 if how == "deadline" else 60)
            assert next(stream).unmasking_step == 1
            if how == "cancel":
                stream.cancel()
            elif how == "deadline":
                with pytest.raises(grpc.RpcError, match="Deadline"):
                    list(stream)
    with maskwire.connect(server.address) as trainer:
        assert trainer.train_step(np.full((2, 8), 20)).step == 1
    # 500 passes were wanted; after the step no further one is made.
    passes = server.log.read_text().count("generation pass")
    assert passes < 100
    time.sleep(0.5)
    log = server.log.read_text()
    assert log.count("generation pass") == passes
    assert "Traceback" not in log


def test_sigterm_ends_a_generation_and_the_client_hears_why(serve: Serve) -> None:
    server = serve(seconds=0.1)
    with maskwire.attach(server.address, retry_for=0) as client:
        states = client.generate_steps(count=1, length=500)
        assert next(states).unmasking_step == 1
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(UnavailableError) as raised:
            list(states)
        assert raised.value.reason == "DRAINING"
    assert server._reap() == 0, "a second signal would not wait"


def test_streams_that_are_not_read_leave_room_for_others(serve: Serve, stub: Stub) -> None:
    server = serve(seconds=0.2)
    service = stub(server)
    wanted = pb.GenerateRequest(count=1, length=500, stream_steps=True)
    streams = [service.Generate(wanted, timeout=60) for _ in range(8)]
    failure = None
    # Until all eight have arrived: one before them is answered, one among them waits behind them.
    while failure is None or failure.error.reason == "DEADLINE_EXCEEDED":
        try:
            next(service.Generate(pb.GenerateRequest(count=1, length=1), timeout=0.3))
        except grpc.RpcError as error:
            failure = read_failure(error)
    assert failure.error.reason == "QUEUE_FULL"
    assert failure.retryable
    for stream in streams:
        stream.cancel()
    with maskwire.connect(server.address) as trainer:
        assert trainer.train_step(np.full((2, 8), 20)).step == 1
