"""The running server as its users meet it: a real process, a real port, real files."""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fork_server
import grpc
import numpy as np
import psutil
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from serving import ServerProcess, healthy, wait_until

import maskwire
from bench.sources import pairs
from maskwire.errors import (
    CheckpointError,
    ConflictError,
    FencedError,
    UnavailableError,
    WriterPresentError,
    WrongRunError,
)
from maskwire.v1 import training_service_pb2 as pb

Serve = Callable[..., ServerProcess]
Stub = Callable[[ServerProcess], Any]
PROTO = Path(__file__).resolve().parents[2] / "proto"


def tokens(seed: int, rows: int = 4, columns: int = 16, below: int = 16) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, below, (rows, columns))


def request(seed: int, **fields: Any) -> pb.TrainStepRequest:
    data = tokens(seed).astype(np.uint8)
    batch = pb.TokenBatch(data=data.tobytes(), shape=data.shape, dtype=pb.DATA_TYPE_UINT8)
    return pb.TrainStepRequest(batch=batch, **fields)


def test_the_bare_call_trains_and_reports_what_it_did(shared: ServerProcess, stub: Stub) -> None:
    service = stub(shared)
    before = service.GetStatus(pb.GetStatusRequest())
    answer = service.TrainStep(request(0), timeout=30)
    assert answer.step == before.step + 1
    assert answer.outcome == pb.STEP_OUTCOME_APPLIED
    assert answer.losses.loss > 0
    assert answer.losses.generator_loss == answer.losses.loss
    assert not answer.losses.HasField("critic_loss"), "absent without a critic, not 0"
    assert answer.metrics.maskable_tokens == 64
    assert 4 <= answer.metrics.masked_tokens <= 64
    assert answer.metrics.gradient_norm > 0
    assert len(answer.digest) == 32


def test_an_evaluation_changes_nothing_and_is_the_same_again(shared: ServerProcess, stub: Stub) -> None:
    service = stub(shared)
    batch = request(1).batch
    before = service.GetStatus(pb.GetStatusRequest())
    first = service.EvalLoss(pb.EvalLossRequest(batch=batch, text_bytes=64), timeout=30)
    again = service.EvalLoss(pb.EvalLossRequest(batch=batch, text_bytes=64), timeout=30)
    after = service.GetStatus(pb.GetStatusRequest())
    assert first == again
    assert (after.step, after.digest) == (before.step, before.digest)
    assert first.step == before.step
    assert first.draws == 16
    assert first.bits_per_byte == pytest.approx(first.bits_per_token)
    assert sum(row.nats for row in first.rows) / first.tokens == pytest.approx(first.nats_per_token)
    assert not first.HasField("critic_accuracy")


def test_critic_losses_and_modes_travel(serve: Serve) -> None:
    server = serve(objective__critic="self", objective__self_cond="true")
    with maskwire.connect(server.address) as trainer:
        assert trainer.model.has_critic
        both = trainer.train_step(tokens(0))
        assert both.generator_loss is not None
        assert both.critic_loss is not None
        assert both.loss == pytest.approx(both.generator_loss + both.critic_loss)
        generator = trainer.train_step(tokens(1), only_train_generator=True)
        assert (generator.critic_loss, generator.loss) == (None, generator.generator_loss)
        critic = trainer.train_step(tokens(2), only_train_critic=True, generator_sample_temperature=0.0)
        assert (critic.generator_loss, critic.loss) == (None, critic.critic_loss)
        found = trainer.eval_loss(tokens(3))
        assert found.critic_accuracy is not None
        assert found.losses.critic_loss is not None


def test_the_pairs_source_is_learnt_through_the_server(serve: Serve) -> None:
    # Each token of a uniform source of V = 8 symbols stands twice: the best negative ELBO is ln(8)/2.
    server = serve(
        model__num_tokens="9", model__mask_id="8", model__max_seq_len="8", model__dim="64", model__depth="2",
        model__dim_head="32", optimizer__learning_rate="0.005", optimizer__warmup_steps="20",
        optimizer__ema_decay="0.98",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    with maskwire.connect(server.address) as trainer:
        futures = [trainer.submit(pairs(rng, 64, 8, 8)) for _ in range(150)]
        assert [future.result().step for future in futures] == list(range(1, 151))
        found = trainer.eval_loss(pairs(rng, 512, 8, 8))
    assert found.nats_per_token == pytest.approx(np.log(8) / 2, rel=0.03)


def test_a_checkpoint_is_saved_listed_and_restored_on_a_new_lineage(serve: Serve) -> None:
    server = serve()
    with maskwire.connect(server.address) as trainer:
        first = [trainer.train_step(tokens(seed)) for seed in range(3)]
        saved = trainer.checkpoint("three", labels={"why": "test"})
        assert (saved.step, saved.digest, saved.labels) == (3, first[-1].digest, {"why": "test"})
        assert set(saved.files) == {"model.safetensors", "optimizer.safetensors"}
        with pytest.raises(CheckpointError, match="taken"):
            trainer.checkpoint("three")
        expected = trainer.eval_loss(tokens(9))
        trainer.train_step(tokens(3))
        assert trainer.eval_loss(tokens(9)).nats_per_token != expected.nats_per_token
        with pytest.raises(WrongRunError, match="expected_step is 3"):
            trainer.restore("three", expected_step=3)
        with pytest.raises(CheckpointError, match="no checkpoint is named 'four'"):
            trainer.restore("four")
        restored = trainer.restore("three", expected_step=4)
        assert (restored.lineage, restored.step) == (2, 3)
        assert trainer.eval_loss(tokens(9)).nats_per_token == expected.nats_per_token
        assert trainer.train_step(tokens(3)).step == 4
        names = [info.name for info in trainer.checkpoints()]
        assert names[-2:] == ["three", "step-000000000"]
        assert set(names[:-2]) <= {"step-000000003-lineage-2"}, "which the restore has saved, or saves"


def test_a_damaged_checkpoint_is_not_restored_and_a_half_one_does_not_exist(serve: Serve) -> None:
    server = serve()
    folder = server.folder / "run" / "checkpoints"
    with maskwire.connect(server.address) as trainer:
        trainer.train_step(tokens(0))
        trainer.checkpoint("whole")
        shutil.copytree(folder / "whole", folder / "half")
        (folder / "half" / "manifest.json").unlink()
        weights = folder / "whole" / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-5] ^= 1
        weights.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"model\.safetensors") as raised:
            trainer.restore("whole")
        assert raised.value.reason == "CHECKPOINT_DAMAGED"
        with pytest.raises(CheckpointError, match="no checkpoint"):
            trainer.restore("half")
        assert trainer.train_step(tokens(1)).step == 2, "nothing changed, training goes on"
    server.kill()
    server.start()  # passes the damaged one over, and computes both steps again
    with maskwire.connect(server.address) as trainer:
        assert trainer.step == 2
    assert "cannot be used and was moved to" in server.log.read_text()


def test_sigterm_saves_and_a_restart_goes_on_from_there(serve: Serve) -> None:
    server = serve()
    with maskwire.connect(server.address) as trainer:
        for seed in range(5):
            last = trainer.train_step(tokens(seed))
        expected = trainer.eval_loss(tokens(9))
    assert server.stop() == 0
    server.start()
    with maskwire.connect(server.address) as trainer:
        assert (trainer.step, trainer.digest) == (5, last.digest)
        assert trainer.eval_loss(tokens(9)) == expected
        assert trainer.checkpoints()[0].step == 5
    assert "replayed" not in server.log.read_text()


def test_kill_minus_nine_loses_no_acknowledged_step(serve: Serve) -> None:
    settings = {
        "objective__critic": "self", "objective__self_cond": "true", "optimizer__ema_decay": "0.9",
        "serve__micro_batch_tokens": "32",
    }  # fmt: skip
    calm = serve("calm", **settings)
    with maskwire.connect(calm.address) as trainer:
        expected = [trainer.train_step(tokens(seed)) for seed in range(8)]
        final = trainer.eval_loss(tokens(9))
    rough = serve("rough", **settings)
    with maskwire.connect(rough.address, on_wait=lambda _: None) as trainer:
        port, found = rough.address, []
        for seed in range(8):
            if seed in (3, 6):
                rough.kill()
                rough.address = port
                rough._command.append(f"--set=serve.address={port}")
                rough.start()
            found.append(trainer.train_step(tokens(seed)))
        again = trainer.eval_loss(tokens(9))
    assert [step.losses for step in found] == [step.losses for step in expected]
    assert again.nats_per_token == final.nats_per_token
    assert again.losses == final.losses


def test_two_clients_at_once_train_every_step_once(serve: Serve, stub: Stub) -> None:
    server = serve()
    services = [stub(server), stub(server)]
    with ThreadPoolExecutor(2) as threads:
        answers = list(
            threads.map(lambda i: services[i % 2].TrainStep(request(i, request_id=f"r{i}")), range(20))
        )
    assert sorted(answer.step for answer in answers) == list(range(1, 21))
    assert services[0].GetStatus(pb.GetStatusRequest()).step == 20


def test_only_one_client_writes_and_the_others_say_why(serve: Serve, stub: Stub) -> None:
    server = serve(seconds=0)
    with maskwire.connect(server.address, name="first") as first:
        with pytest.raises(WriterPresentError, match="'first' has a session open"):
            maskwire.connect(server.address, name="second")
        with pytest.raises(grpc.RpcError, match="'first' has a session"):
            stub(server).TrainStep(request(0))
        with maskwire.connect(server.address, name="second", takeover=True) as second:
            assert second.train_step(tokens(0)).step == 1
            with pytest.raises(FencedError, match=r"superseded|took over"):
                first.train_step(tokens(1))
            assert second.train_step(tokens(1)).step == 2


def test_a_request_id_is_applied_once_and_its_answer_survives_a_restart(serve: Serve, stub: Stub) -> None:
    server = serve(seconds=0)
    first = stub(server).TrainStep(request(0, request_id="once"))
    again = stub(server).TrainStep(request(0, request_id="once"))
    server.kill()
    server.start()
    late = stub(server).TrainStep(request(0, request_id="once"))
    assert not first.replayed
    assert again.replayed
    assert late.replayed
    assert first.losses == again.losses == late.losses
    assert first.digest == again.digest == late.digest
    with pytest.raises(grpc.RpcError, match="another payload"):
        stub(server).TrainStep(request(1, request_id="once"))
    assert stub(server).GetStatus(pb.GetStatusRequest()).step == 1


def test_a_client_that_disappears_in_a_step_leaves_nothing_behind(serve: Serve, stub: Stub) -> None:
    server = serve(seconds=0.1)
    service = stub(server)
    service.TrainStep(request(0))
    process = psutil.Process(server.process.pid)
    threads, descriptors = process.num_threads(), process.num_fds()
    for seed in range(1, 11):
        with grpc.insecure_channel(server.address) as channel:
            from maskwire.v1 import training_service_pb2_grpc as pb_grpc

            call = pb_grpc.TrainingServiceStub(channel).TrainStep.future(request(seed))
            server.wait_for_step(seed + 1)
            assert not call.done()
    assert healthy(server.address)
    answer = service.TrainStep(request(9), timeout=10)
    assert answer.step == 12
    settle(lambda: process.num_threads() <= threads + 4 and process.num_fds() <= descriptors)
    assert process.num_fds() <= descriptors
    assert process.num_threads() <= threads + 4  # workers of the pool, kept; not one for each client


def settle(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_full_queue_refuses_while_health_answers_and_then_trains_on(serve: Serve, stub: Stub) -> None:
    server = serve(seconds=0, serve__queue_limit="3")
    service = stub(server)
    service.TrainStep(request(0))
    process = psutil.Process(server.process.pid)
    descriptors = process.num_fds()
    server.hold()
    calls = [service.TrainStep.future(request(1, request_id="q1"))]
    server.wait_for_step(2)
    calls += [service.TrainStep.future(request(seed, request_id=f"q{seed}")) for seed in range(2, 12)]
    server.wait_for_arrivals(12)
    wait_until(lambda: service.GetStatus(pb.GetStatusRequest()).queue_length == 3, "a full queue")
    assert healthy(server.address), "although the device does nothing"
    server.release()
    outcomes = []
    for call in calls:
        try:
            outcomes.append(call.result().step)
        except grpc.RpcError as error:
            from maskwire.errors import read_failure

            failure = read_failure(error)
            assert failure.error.reason == "QUEUE_FULL"
            assert failure.retryable
            assert failure.retry_after == pytest.approx(0.1)
            outcomes.append(None)
    trained = [step for step in outcomes if step is not None]
    assert 4 <= len(trained) <= 6, "two on their way to the device, three that wait"
    assert service.TrainStep(request(99), timeout=10).step == max(trained) + 1
    settle(lambda: process.num_fds() <= descriptors)
    assert process.num_fds() <= descriptors


def test_a_step_behind_a_refused_one_is_numbered_again(serve: Serve) -> None:
    server = serve(seconds=0.02)
    with maskwire.connect(server.address) as trainer:
        good, bad = tokens(0, below=255), np.full((4, 16), 256)
        futures = [trainer.submit(rows) for rows in (good, bad, good, good, bad, good)]
        for refused in (1, 4):
            with pytest.raises(maskwire.MaskwireError, match="mask id"):
                futures[refused].result(timeout=20)
        assert [futures[i].result(timeout=20).step for i in (0, 2, 3, 5)] == [1, 2, 3, 4]


def test_a_step_that_is_taken_or_far_ahead_is_refused(serve: Serve, stub: Stub) -> None:
    server = serve(seconds=0, serve__gap_seconds="0.2")
    service = stub(server)
    service.TrainStep(request(0))
    for step, status in (
        (1, grpc.StatusCode.ALREADY_EXISTS),
        (100, grpc.StatusCode.OUT_OF_RANGE),
        (3, grpc.StatusCode.OUT_OF_RANGE),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            service.TrainStep(request(1, step=step))
        assert raised.value.code() is status
    assert service.TrainStep(request(1, step=2)).step == 2


def test_an_unexpected_failure_tells_an_error_id_and_nothing_else(serve: Serve, stub: Stub) -> None:
    server = serve(seconds=0)
    data = bytes([8]) * 16  # the counter trainer fails on it
    failing = pb.TrainStepRequest(batch=pb.TokenBatch(data=data, shape=[1, 16], dtype=pb.DATA_TYPE_UINT8))
    with pytest.raises(grpc.RpcError) as raised:
        stub(server).TrainStep(failing)
    assert raised.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(raised.value)
    assert "the secret of the failing batch" in server.log.read_text()
    assert stub(server).TrainStep(request(0)).step == 1


def test_three_steps_that_are_not_finite_halt_the_run_until_a_takeover(serve: Serve) -> None:
    server = serve(seconds=0)
    bad = np.full((2, 8), 7)  # the counter trainer's batch that is not finite
    with maskwire.connect(server.address) as trainer:
        outcomes = [trainer.train_step(bad).outcome.name for _ in range(3)]
        assert outcomes == ["SKIPPED_NON_FINITE"] * 3
        with pytest.raises(maskwire.MaskwireError, match="not finite") as raised:
            trainer.train_step(tokens(0))
        assert raised.value.reason == "HALTED"
        assert trainer.status().state.name == "HALTED"
    server.kill()
    server.start()
    with maskwire.connect(server.address) as trainer:
        assert trainer.status().state.name == "HALTED", "a restart does not forget"
    with maskwire.connect(server.address, takeover=True) as trainer:
        assert trainer.train_step(tokens(0)).step == 4


def test_a_second_server_on_the_port_or_the_directory_leaves_with_one_line(
    serve: Serve, tmp_path: Path
) -> None:
    server = serve(seconds=0)
    for settings, code, words in (
        ({"serve.address": server.address}, 2, "the port is taken"),
        ({"run.dir": str(server.folder / "run")}, 3, "uses this run directory"),
    ):
        other = ServerProcess(tmp_path / "other", server._command[:3])
        flags = [f"--set={key}={value}" for key, value in settings.items()]
        done = fork_server.run([*other._command, *flags], text=True)
        assert done.returncode == code, done.stderr
        assert words in done.stderr.splitlines()[-1]
    assert healthy(server.address)


def test_sigterm_in_the_middle_of_a_step_finishes_it(serve: Serve, stub: Stub) -> None:
    server = serve(held=True)
    call = stub(server).TrainStep.future(request(0))
    server.wait_for_step()
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "SIGTERM: stopping" in server.log.read_text(), "the signal to arrive")
    server.release()
    assert call.result().step == 1
    assert server._reap() == 0
    server.start()
    assert stub(server).GetStatus(pb.GetStatusRequest()).step == 1


def test_a_client_waits_for_a_server_that_comes_back_and_gives_up_when_told(serve: Serve) -> None:
    server = serve(seconds=0)
    waited: list[str] = []
    with maskwire.connect(server.address, on_wait=waited.append) as trainer:
        trainer.train_step(tokens(0))
        server.kill()
        server._command.append(f"--set=serve.address={server.address}")
        timer = threading.Timer(1.0, server.start)
        timer.start()
        assert trainer.train_step(tokens(1)).step == 2
        timer.join()
        assert any("waiting for" in text for text in waited)
        server.kill()
    with pytest.raises(UnavailableError, match="is the server running"):
        maskwire.connect(server.address, retry_for=0.3, timeout=0.5, on_wait=waited.append)


def test_a_foreign_client_trains_by_reflection_alone(shared: ServerProcess, stub: Stub) -> None:
    # No generated code: the descriptors come from the server.
    with grpc.insecure_channel(shared.address) as channel:
        pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        service = pool.FindServiceByName("maskwire.v1.TrainingService")
        method = service.FindMethodByName("TrainStep")
        request_type = message_factory.GetMessageClass(method.input_type)
        answer_type = message_factory.GetMessageClass(method.output_type)
        made = request_type()
        made.batch.data, made.batch.dtype = tokens(0).astype(np.uint8).tobytes(), 1
        made.batch.shape.extend([4, 16])
        call = channel.unary_unary(
            "/maskwire.v1.TrainingService/TrainStep",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer_type.FromString,
        )
        answer = call(made, timeout=30)
        assert answer.losses.loss > 0
        assert not answer.losses.HasField("critic_loss")


def test_every_rpc_of_the_descriptor_is_served(shared: ServerProcess) -> None:
    with grpc.insecure_channel(shared.address) as channel:
        for method in pb.DESCRIPTOR.services_by_name["TrainingService"].methods:
            call = channel.unary_stream(f"/maskwire.v1.TrainingService/{method.name}")
            answers = call(b"", timeout=30)
            with contextlib.suppress(grpc.RpcError):
                list(answers)
            code, details = answers.code(), answers.details()
            assert code is not grpc.StatusCode.UNKNOWN, f"{method.name}: {details}"
            assert "Method not found" not in details, method.name


def test_conflicts_reach_the_client_as_its_errors(serve: Serve, stub: Stub) -> None:
    server = serve(seconds=0)
    with maskwire.connect(server.address) as trainer:
        trainer.train_step(tokens(0))
        trainer._writer.acknowledged.position = 0, b"\0" * 32  # as after an answer that was lost for good
        with pytest.raises(ConflictError, match="step 1 was applied"):
            trainer.train_step(tokens(1))
