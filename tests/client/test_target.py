"""A server's address: what can never work is refused at once, what may start is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest

import maskwire
import maskwire.aio
from maskwire.errors import Failure, MaskwireError, UnavailableError, UnresolvedError, read_failure
from maskwire.protocol.effects import Call, Notify, Pause
from maskwire.protocol.retry import RetryPolicy
from maskwire.protocol.sessionless_calls import Calls
from maskwire.target import check_target
from maskwire.v1 import training_service_pb2 as pb


@pytest.mark.parametrize(
    "target",
    [
        "127.0.0.1:50051", "localhost:1", "box.example:65535", "[::1]:50051", "[fe80::1%eth0]:50051",
        "my_service:50051", "0.0.0.0:50051", "unix:/tmp/a.sock", "unix:///tmp/a b.sock", "unix:a.sock",
        "unix-abstract:name", "ipv4:127.0.0.1:1,10.0.0.1:2", "ipv6:[::1]:1", "dns:box.example:1",
        "dns:///box.example:1", "vsock:2:50051", "dns:[::1]:1", "dns://10.0.0.1:53/box.example:1",
    ],
)  # fmt: skip
def test_what_grpc_can_reach_is_let_through(target: str) -> None:
    check_target(target)


@pytest.mark.parametrize(
    ("target", "right"),
    [
        ("http://127.0.0.1:50051", "leave http:// out: 127.0.0.1:50051"),
        ("HTTPS://box.example:443/", r"leave HTTPS:// out: box\.example:443, with TLS"),
        ("grpc://box.example", r"leave grpc:// out: box\.example:50051, or its port"),
        ("grpcs://me@[::1]:7/v1", r"leave grpcs:// out: \[::1\]:7, with TLS"),
        ("tcp://", "leave tcp:// out"),
        ("127.0.0.1:50051/", "after the port: 127.0.0.1:50051"),
        ("box:1/v1?x=2", "after the port: box:1"),
        (":50051", "the host is missing: 127.0.0.1:50051"),
        ("50051", "the host is missing: 127.0.0.1:50051"),
        ("127.0.0.1", "the port is missing: 127.0.0.1:50051"),
        ("localhost:", "the port is missing"),
        ("127.0.0.1:99999", "1 to 65535, not 99999"),
        ("127.0.0.1:0", "1 to 65535, not 0"),
        ("127.0.0.1:-1", "1 to 65535, not -1"),
        ("127.0.0.1:٥٠", "1 to 65535"),
        ("box:http", "1 to 65535, not http"),
        ("::1:50051", r"in brackets: \[::1\]:50051"),
        ("::1", r"in brackets: \[::1\]:50051"),
        ("[::1]", r"the port is missing: \[::1\]:50051"),
        ("[::1:50051", "in brackets looks like"),
        ("[box]:50051", "in brackets looks like"),
        ("a:1:2", "more than one port"),
        ("127.0.0.1:50051\n", "leave the space out: 127.0.0.1:50051"),
        ("127.0.0.1: 50051", "leave the space out: 127.0.0.1:50051"),
        ("", "give the server's address"),
        (" \n", "give the server's address"),
        ("unix:", "the path is missing"),
        ("unix://" + "a" * 108, "at most 107 bytes, got 108"),
        ("ipv4:127.0.0.1", "the port is missing"),
        ("ipv4:127.0.0.1:1,10.0.0.1:70000", "not 70000"),
        ("ipv6:::1", "in brackets"),
        ("dns:///box:99999", "not 99999"),
        ("dns:///", "the host is missing"),
        ("dns:localhost", "the port is missing: localhost:50051"),
        ("dns:///localhost", "the port is missing: localhost:50051"),
        ("dns:[::1]", r"the port is missing: \[::1\]:50051"),
        ("DNS:///box:7", "leave DNS:// out: box:7"),
        ("passthrough:///box:7", "leave passthrough:// out: box:7"),
        ("unix-abstract:", "the name is missing: unix-abstract:NAME"),
        ("unix://tmp/foo.sock", "for a host: unix:/tmp/foo.sock or unix:tmp/foo.sock"),
        ("unix://foo.sock", "for a host: unix:/foo.sock"),
        ("ipv4:localhost:5", "in numbers, not localhost; leave ipv4: out: localhost:5"),
        ("ipv6:127.0.0.1:5", "in numbers, not 127.0.0.1"),
        ("vsock:", "vsock:CID:PORT"),
        ("vsock:1", "vsock:CID:PORT"),
        ("xds:foo", "GRPC_XDS_BOOTSTRAP or .*give HOST:PORT"),
        ("xds:///foo", "GRPC_XDS_BOOTSTRAP or .*give HOST:PORT"),
    ],
)
def test_what_can_never_work_is_refused_with_what_would_be_right(target: str, right: str) -> None:
    for package in (maskwire, maskwire.aio):
        with pytest.raises(ValueError, match=f"target must be HOST:PORT or unix:PATH, got .*{right}"):
            package.attach(target)
    with pytest.raises(ValueError, match=right):
        maskwire.connect(target)


def test_xds_is_let_through_where_it_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPC_XDS_BOOTSTRAP", "/etc/xds.json")
    check_target("xds:///trainer")
    with pytest.raises(ValueError, match="xds:///NAME"):
        check_target("xds:trainer")


def test_what_is_no_text_is_named() -> None:
    with pytest.raises(TypeError, match="got tuple"):
        maskwire.attach(("127.0.0.1", 50051))  # type: ignore[arg-type]


class Unreached(grpc.RpcError):
    """What a stub raises when nothing answers."""

    def __init__(self, text: str) -> None:
        self._text = text

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return self._text

    def trailing_metadata(self) -> tuple[Any, ...]:
        return ()


NO_NAME = read_failure(Unreached("errors resolving box:1: [address lookup failed: Domain name not found]"))
REFUSED = read_failure(Unreached("failed to connect to all addresses; last error: Connection refused"))
MAY_START = [
    REFUSED,
    # A headless service of Kubernetes whose pods are not ready: the name is there, without an address.
    read_failure(Unreached("errors resolving box:1: [DNS server returned answer with no data]")),
    read_failure(Unreached("errors resolving box:1: [Timeout while contacting DNS servers]")),
    read_failure(Unreached("errors resolving box:1: [Temporary failure in name resolution]")),
]


class Operation:
    """A status call, answer by answer, in a time of its own."""

    def __init__(self, retry_for: float = 60.0) -> None:
        self.now = 0.0
        policy = RetryPolicy(retry_for, 1.0)
        self.waits: list[str] = []
        self.asking = Calls("box:1", policy, self.waits.append, lambda: self.now)

    def ask(self, *answers: Any, seconds: float = 1.0, call: str = "status") -> str:
        """Give one answer after another, `seconds` apart; how the call ends."""
        asked = getattr(self.asking, call)()
        try:
            effect = asked.send(None)
            for answer in answers:
                assert isinstance(effect, Call)
                self.now += seconds
                effect = asked.send(answer)
                if isinstance(effect, Notify):
                    effect.function()
                    effect = asked.send(None)
                if isinstance(effect, Pause):
                    effect = asked.send(None)
        except StopIteration:
            return "answered"
        except MaskwireError as error:
            return f"{type(error).__name__} {error.reason}: {error}"
        return "asks again"


def answer(reason: str) -> Failure:
    return Failure(UnavailableError(f"{reason} said the server", reason=reason), True, retry_after=1.0)


def test_a_name_that_does_not_exist_is_refused_at_once() -> None:
    ended = Operation().ask(NO_NAME)
    assert ended.startswith("UnresolvedError UNRESOLVED: the target's host name does not resolve")
    assert "Domain name not found" in ended


@pytest.mark.parametrize("failure", MAY_START, ids=["refused", "no data", "timeout", "temporary"])
def test_a_server_that_may_start_is_waited_for(failure: Failure) -> None:
    assert Operation().ask(*[failure] * 50) == "asks again"
    assert Operation().ask(*[failure] * 50, pb.GetStatusResponse()) == "answered"


def test_a_name_that_was_reached_before_is_waited_for() -> None:
    operation = Operation()
    assert operation.ask(pb.GetStatusResponse()) == "answered"
    assert operation.ask(*[NO_NAME] * 50) == "asks again"
    operation = Operation()
    assert operation.ask(answer("RECOVERING"), *[NO_NAME] * 50) == "asks again"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Failed to connect to "
            "remote host: Connection refused",
            "connection refused",
        ),
        (
            "connections to all backends failing; last error: UNAVAILABLE: ipv6:%5B::1%5D:1: connection "
            "attempt timed out before receiving SETTINGS frame",
            "connection attempt timed out before receiving SETTINGS frame",
        ),
        ("the server said: wait", "the server said: wait"),
    ],
)
def test_a_server_that_does_not_answer_is_reported_with_the_last_cause_alone(text: str, cause: str) -> None:
    operation = Operation(retry_for=5)
    ended = operation.ask(*[read_failure(Unreached(text))] * 5)
    assert operation.waits == [f"waiting for box:1: {cause}"]
    assert f"did not answer within 5 s ({cause}); is" in ended


def test_waits_that_overlap_count_once() -> None:
    operation = Operation()
    calls = operation.asking
    operation.ask(*[REFUSED] * 4, pb.GetStatusResponse())
    assert calls.seconds_waited == 5
    calls._count_wait(began=2.0)
    assert calls.seconds_waited == 5
    operation.ask(pb.GetStatusResponse())
    assert calls.seconds_waited == 5, "an answer at once is no wait"


@pytest.mark.parametrize("reason", ["HELD", "QUEUE_FULL", "RECOVERING"])
def test_the_end_of_the_patience_names_the_last_answer(reason: str) -> None:
    ended = Operation(retry_for=5).ask(*[answer(reason)] * 5)
    assert ended == (
        f"UnavailableError {reason}: box:1 still answers {reason} after 5 s: {reason} said the server; "
        "`maskwire status -t box:1` shows what it is waiting for"
    )
    ended = Operation(retry_for=5).ask(answer(reason), *[REFUSED] * 4)
    assert "did not answer within 5 s (connection refused)" in ended
    assert ended.endswith(f"address right? Its last answer, 4 s ago, was {reason}: {reason} said the server")


def test_the_end_of_the_patience_says_what_was_asked_for_and_where_to_look() -> None:
    ended = Operation(retry_for=3).ask(*[REFUSED] * 3, seconds=1.4)
    assert "box:1 did not answer within 3 s (" in ended, "not the 4.2 s that it took"
    assert ended.endswith("is the server running and the address right?"), "the status was what was asked"
    ended = Operation(retry_for=3).ask(*[REFUSED] * 3, seconds=1.4, call="checkpoints")
    assert ended.endswith("the address right? `maskwire status -t box:1` shows its state.")


@pytest.mark.parametrize("advice", ["", "; retry", "; retry with the same request id"])
def test_a_waiting_client_leaves_out_the_advice_to_retry(advice: str) -> None:
    refused = Failure(UnavailableError(f"the server is recovering{advice}", reason="RECOVERING"), True)
    operation = Operation(retry_for=5)
    ended = operation.ask(*[refused] * 5)
    assert operation.waits == ["waiting for box:1: the server is recovering"]
    assert "after 5 s: the server is recovering; `maskwire status" in ended


def test_a_misspelt_host_is_refused_by_both_clients_whatever_their_patience() -> None:
    async def ask() -> None:
        async with maskwire.aio.attach("a..b:1", retry_for=1e6) as client:
            await client.status()

    def blocking() -> None:
        with maskwire.attach("a..b:1", retry_for=1e6) as client:
            client.status()

    asks: list[Callable[[], Any]] = [blocking, lambda: maskwire.connect("a..b:1", retry_for=1e6)]
    for call in [*asks, lambda: asyncio.run(ask())]:
        with pytest.raises(UnresolvedError, match="does not resolve"):
            call()
