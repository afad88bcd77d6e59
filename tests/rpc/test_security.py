"""Access over a real port: each method of the service, with valid, invalid and missing credentials."""

from __future__ import annotations

import stat
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fork_server
import grpc
import numpy as np
import psutil
import pytest
from certificates import EXPIRED, TOKENS, Authority, bearer, token_files
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from serving import COUNTING, ServerProcess, wait_until

import maskwire
from maskwire.errors import PermissionDeniedError, TlsError, UnauthenticatedError, UnavailableError
from maskwire.v1 import training_service_pb2 as pb
from maskwire.v1 import training_service_pb2_grpc as pb_grpc
from maskwire_server.rpc.auth import REQUIRED_ROLES

Serve = Callable[..., ServerProcess]
METHODS = [method.name for method in pb.DESCRIPTOR.services_by_name["TrainingService"].methods]
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
HEALTH = "/grpc.health.v1.Health/Check"
ROLES = ["read", "train", "admin"]


def path_of(method: str) -> str:
    return method if method.startswith("/") else f"/maskwire.v1.TrainingService/{method}"


def ask(channel: grpc.Channel, method: str, metadata: Any = (), body: bytes = b"") -> grpc.RpcError | None:
    """Call a method of any kind, and return its error or None."""
    call = channel.stream_stream(path_of(method))
    try:
        list(call(iter([body]), metadata=metadata, timeout=20))
    except grpc.RpcError as error:
        return error
    return None


def never() -> Iterator[bytes]:
    """A request stream that stays open."""
    threading.Event().wait(20)
    yield b""


def reason_of(error: Any) -> str:
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    return info.reason if status is not None and status.details[0].Unpack(info) else ""


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("secrets")


@pytest.fixture(scope="module")
def authority(secrets: Path) -> Authority:
    return Authority(secrets / "ours")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, secrets: Path, authority: Authority) -> Iterator[Any]:
    """TLS and tokens around the counter trainer, with all telemetry, and with a mirror if it is installed."""
    pair = authority.issue("server", "localhost", "127.0.0.1")
    mirror = {"storage__mirror": f"file://{secrets / 'mirror'}"} if find_spec("fsspec") else {}
    made = ServerProcess(
        tmp_path_factory.mktemp("secure"), [*COUNTING, "0"], model__num_tokens="257", model__mask_id="256",
        serve__tls_certificate=pair.cert, serve__tls_key=pair.key, **token_files(secrets / "tokens"),
        telemetry__metrics_address=":0", telemetry__tensorboard="true", telemetry__log_format="json",
        **mirror,
    )  # fmt: skip
    made.forked = False  # the variable below is read when a process starts
    made.environment["MALLOC_ARENA_MAX"] = "1"  # otherwise each thread keeps a pool of freed memory
    made.start()
    yield made
    assert made.stop() == 0


def secure_channel(server: ServerProcess, authority: Authority) -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials(Path(authority.ca).read_bytes())
    return grpc.secure_channel(server.address, credentials)


def test_every_method_has_a_required_role() -> None:
    assert set(REQUIRED_ROLES) == set(METHODS)


@pytest.mark.parametrize("method", [*METHODS, REFLECTION, HEALTH, "Unheard"])
@pytest.mark.parametrize(
    "metadata",
    [
        [], bearer("wrong-token-0123456789abcdef"), bearer(EXPIRED), bearer(""), bearer(TOKENS["admin"][:-1]),
        [("authorization", TOKENS["admin"])], [("authorization", f"Basic {TOKENS['admin']}")],
        bearer(TOKENS["admin"]) * 2,
    ],
    ids=["none", "wrong", "expired", "empty", "cut", "no scheme", "another scheme", "twice"],
)  # fmt: skip
def test_every_method_rejects_a_call_without_a_valid_token(
    server: ServerProcess, authority: Authority, method: str, metadata: Any
) -> None:
    with secure_channel(server, authority) as channel:
        error: Any = ask(channel, method, metadata)
    assert error is not None
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED, error.details()
    assert reason_of(error) == "UNAUTHENTICATED"
    assert not any(token in error.details() for token in TOKENS.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("role", ROLES)
def test_each_role_may_call_the_methods_that_require_it_or_a_lower_one(
    server: ServerProcess, authority: Authority, method: str, role: str
) -> None:
    allowed = ROLES.index(role) >= REQUIRED_ROLES[method] - 1
    with secure_channel(server, authority) as channel:
        error: Any = ask(channel, method, bearer(TOKENS[role]))
    denied = error is not None and error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert denied is not allowed
    if denied:
        assert reason_of(error) == "PERMISSION_DENIED"
        assert f"this token has role {role}" in error.details()
    elif error is not None:
        assert error.code() is not grpc.StatusCode.UNAUTHENTICATED


def test_health_and_reflection_require_the_role_read(server: ServerProcess, authority: Authority) -> None:
    with secure_channel(server, authority) as channel:
        for method in (HEALTH, REFLECTION):
            assert ask(channel, method, bearer(TOKENS["read"])) is None


def test_open_reflection_streams_block_no_other_method(server: ServerProcess, authority: Authority) -> None:
    with secure_channel(server, authority) as channel:
        stream = channel.stream_stream(REFLECTION)
        idle = [stream(never(), metadata=bearer(TOKENS["read"])) for _ in range(120)]
        time.sleep(0.5)
        for method in ("ListCheckpoints", "GetStatus", HEALTH):
            assert ask(channel, method, bearer(TOKENS["read"])) is None
        for call in idle:
            call.cancel()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fault", ["plaintext", "another authority", "no authority"])
def test_no_method_is_reachable_without_tls_that_both_sides_trust(
    server: ServerProcess, secrets: Path, method: str, fault: str
) -> None:
    if fault == "plaintext":
        channel = grpc.insecure_channel(server.address)
    else:
        roots = Path(Authority(secrets / "other").ca).read_bytes() if fault == "another authority" else None
        channel = grpc.secure_channel(server.address, grpc.ssl_channel_credentials(roots))
    with channel:
        error: Any = ask(channel, method, bearer(TOKENS["admin"]))
    assert error is not None
    assert error.code() is grpc.StatusCode.UNAVAILABLE


def test_the_client_reports_the_reason_of_a_tls_failure_without_retries(
    server: ServerProcess, secrets: Path, authority: Authority
) -> None:
    other = Authority(secrets / "other")
    token = TOKENS["train"]
    with pytest.raises(TlsError, match="not signed by an authority"):
        maskwire.connect(server.address, ca=other.ca, token=token)
    with pytest.raises(TlsError, match="for another name"):
        maskwire.connect(server.address, ca=authority.ca, server_name="example.org", token=token)
    with pytest.raises(
        UnavailableError, match=r"\(socket closed; if the server wants TLS.*--ca.*tls=True, --tls"
    ):
        maskwire.connect(server.address, token=token, retry_for=0.1)
    with pytest.raises(UnauthenticatedError, match="authorization: Bearer"):
        maskwire.connect(server.address, ca=authority.ca)
    done = subprocess.run(
        [sys.executable, "-m", "maskwire", "status", "-t", server.address, "--ca", str(authority.ca)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 6
    assert "give the file that holds it (--token-file, or MASKWIRE_TOKEN_FILE)" in done.stderr
    with pytest.raises(PermissionDeniedError, match="requires a token of role train"):
        maskwire.connect(server.address, ca=authority.ca, token=TOKENS["read"])
    with maskwire.attach(server.address, ca=authority.ca, token=TOKENS["read"]) as client:
        assert client.status().state.name == "SERVING"
    with maskwire.connect(server.address, ca=authority.ca, token=token) as trainer:
        assert trainer.train_step(np.ones((2, 4), dtype=int)).step == trainer.step


def test_an_expired_certificate_and_one_for_another_name_give_different_errors(
    serve: Serve, authority: Authority, tmp_path: Path
) -> None:
    for pair, words in (
        (authority.issue("expired", "127.0.0.1", expired=True), "has expired"),
        (authority.issue("elsewhere", "elsewhere.example"), "for another name"),
    ):
        server = serve(
            words.replace(" ", "-"), seconds=0, serve__tls_certificate=pair.cert, serve__tls_key=pair.key
        )
        for method in METHODS:
            with secure_channel(server, authority) as channel:
                error: Any = ask(channel, method)
            assert error.code() is grpc.StatusCode.UNAVAILABLE, method
        with pytest.raises(TlsError, match=words):
            maskwire.connect(server.address, ca=authority.ca)
    with maskwire.connect(server.address, ca=authority.ca, server_name="elsewhere.example") as trainer:
        assert trainer.step == 0


def test_client_certificates_are_required_when_configured(
    serve: Serve, secrets: Path, authority: Authority
) -> None:
    pair = authority.issue("mutual", "127.0.0.1")
    server = serve(
        seconds=0,
        serve__tls_certificate=pair.cert,
        serve__tls_key=pair.key,
        serve__tls_client_ca=authority.ca,
    )
    stranger = Authority(secrets / "stranger").issue("client", "a@example.org")
    late = authority.issue("late", "a@example.org", expired=True)
    for options in ({}, {"cert": stranger.cert, "key": stranger.key}, {"cert": late.cert, "key": late.key}):
        for method in METHODS:
            credentials = grpc.ssl_channel_credentials(
                Path(authority.ca).read_bytes(),
                *([Path(options["key"]).read_bytes(), Path(options["cert"]).read_bytes()] if options else []),
            )
            with grpc.secure_channel(server.address, credentials) as channel:
                error: Any = ask(channel, method)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(UnavailableError, match="client certificate"):
            maskwire.connect(server.address, ca=authority.ca, retry_for=0.1, **options)
    ours = authority.issue("client", "a@example.org")
    with maskwire.connect(server.address, ca=authority.ca, cert=ours.cert, key=ours.key) as trainer:
        assert trainer.train_step(np.ones((2, 4), dtype=int)).step == 1


def test_bodies_of_64_mib_are_rejected_unread(server: ServerProcess, authority: Authority) -> None:
    process = psutil.Process(server.process.pid)
    body = bytes(64 * 2**20 - 2**16)
    grown = []
    with grpc.secure_channel(
        server.address, grpc.ssl_channel_credentials(Path(authority.ca).read_bytes()),
        options=[("grpc.max_send_message_length", -1)],
    ) as channel:  # fmt: skip
        ask(channel, "GetStatus", bearer(TOKENS["read"]))
        before = process.memory_info().rss
        for attempt in range(144):
            call = channel.unary_unary(path_of(("TrainStep", HEALTH, "DownloadCheckpoint")[attempt % 3]))
            with pytest.raises(grpc.RpcError) as raised:
                call(body, timeout=30)
            assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
            grown.append((process.memory_info().rss - before) / 2**20)
            # The allocator keeps the memory of bodies that were in flight, up to a limit.
            level = attempt >= 35 and statistics.median(grown[-12:]) - statistics.median(grown[-24:-12]) < 16
            if level:
                break
    # A body that is read takes 3.5 times its size, 224 MiB; one in flight takes at most its size.
    assert max(grown) < 192, f"the server grew by {max(grown):.0f} MiB"
    assert level, f"the server keeps growing: {grown}"


def test_tokens_are_never_logged(server: ServerProcess) -> None:
    text = server.log.read_text()
    assert not any(token in text for token in [*TOKENS.values(), EXPIRED])


def test_only_the_owner_can_open_a_unix_socket_and_it_requires_no_token(
    serve: Serve, tmp_path: Path, secrets: Path
) -> None:
    path = tmp_path / "maskwire.sock"
    server = serve(seconds=0, serve__socket=str(path), **token_files(secrets / "tokens"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with maskwire.connect(f"unix:{path}") as trainer:
        assert trainer.train_step(np.ones((2, 4), dtype=int)).step == 1
    with pytest.raises(UnauthenticatedError):
        maskwire.attach(server.address, retry_for=1).status()
    command = [str(Path(server._command[0]).with_name("maskwire")), "health", "--target", f"unix:{path}"]
    assert fork_server.run(command).returncode == 0
    server.kill()
    assert path.exists(), "a killed server leaves its socket"
    server.start()
    with maskwire.attach(f"unix:{path}") as client:
        assert client.status().step == 1
    assert server.stop() == 0
    assert not path.exists()


def test_a_server_can_listen_on_a_unix_socket_alone(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "only.sock"
    server = serve(seconds=0, serve__address=f"unix:{path}")
    assert server.address == f"unix:{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert psutil.Process(server.process.pid).net_connections("tcp") == []
    with maskwire.connect(server.address) as trainer:
        assert trainer.train_step(np.ones((2, 4), dtype=int)).step == 1
    other = ServerProcess(tmp_path / "other", server._command[:3], serve__address=f"unix:{path}")
    done = fork_server.run(other._command, text=True)
    assert done.returncode == 2
    assert "another server listens" in done.stderr
    assert server.stop() == 0


def test_a_trainer_over_tls_resumes_after_the_server_is_killed(
    serve: Serve, authority: Authority, secrets: Path
) -> None:
    pair = authority.issue("killed", "127.0.0.1")
    server = serve(
        seconds=0,
        serve__tls_certificate=pair.cert,
        serve__tls_key=pair.key,
        **token_files(secrets / "tokens"),
    )
    with maskwire.connect(
        server.address, ca=authority.ca, token_file=secrets / "tokens" / "train", on_wait=lambda _: None
    ) as trainer:
        trainer.train_step(np.ones((2, 4), dtype=int))
        server.kill()
        server._command.append(f"--set=serve.address={server.address}")
        server.start()
        began = time.monotonic()
        assert trainer.train_step(np.ones((2, 4), dtype=int)).step == 2
        assert time.monotonic() - began < 30


def test_a_token_has_a_limited_number_of_evaluations_that_wait(serve: Serve, secrets: Path) -> None:
    server = serve(held=True, serve__max_reads_per_credential="1", **token_files(secrets / "tokens"))
    batch = pb.TokenBatch(data=bytes(8), shape=[2, 4], dtype=pb.DATA_TYPE_UINT8)
    with grpc.insecure_channel(server.address) as channel:

        def call(method: str, request: Any, role: str) -> Any:
            stub = getattr(pb_grpc.TrainingServiceStub(channel), method)
            return stub.future(request, timeout=60, metadata=bearer(TOKENS[role]))

        step = call("TrainStep", pb.TrainStepRequest(batch=batch), "train")
        server.wait_for_step()
        first = call("EvalLoss", pb.EvalLossRequest(batch=batch), "read")
        status = pb_grpc.TrainingServiceStub(channel).GetStatus
        asked = {"request": pb.GetStatusRequest(), "metadata": bearer(TOKENS["read"])}
        wait_until(lambda: status(**asked).device_share.waiting_reads == 1, "the first to wait")
        refused = call("EvalLoss", pb.EvalLossRequest(batch=batch), "read").exception()
        assert (reason_of(refused), refused.code()) == ("QUEUE_FULL", grpc.StatusCode.RESOURCE_EXHAUSTED)
        other = call("EvalLoss", pb.EvalLossRequest(batch=batch), "train")
        wait_until(lambda: status(**asked).device_share.waiting_reads == 2, "the other token's to wait")
        assert status(**asked).device_share.refused_reads == 1
        server.release()
        assert [step.result().step, first.result().step, other.result().step] == [1, 1, 1]
