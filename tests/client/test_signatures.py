"""Both clients have the same calls, with the same arguments and docstrings."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import maskwire.aio
import maskwire.client
from maskwire.protocol.fit import fit
from maskwire.protocol.sessionless_calls import Calls
from maskwire.protocol.writer import Writer
from maskwire.signatures import keep_signature

PAIRS = [
    (maskwire.client, maskwire.aio, ["attach", "connect"]),
    (maskwire.client.Client, maskwire.aio.Client, []),
    (maskwire.client.Trainer, maskwire.aio.Trainer, []),
]


def public(kind: Any) -> list[str]:
    return [name for name in dir(kind) if not name.startswith("_")]


def names_of(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def declared(function: Any) -> list[inspect.Parameter]:
    """The parameters as written in the source, whatever `keep_signature` says."""
    code = getattr(function, "__signature__", None)
    try:
        if code is not None:
            del function.__signature__
        return list(inspect.signature(function).parameters.values())
    finally:
        if code is not None:
            function.__signature__ = code


@pytest.mark.parametrize(("blocking", "awaited", "names"), PAIRS, ids=["functions", "Client", "Trainer"])
def test_both_clients_have_the_same_calls_arguments_and_docstrings(
    blocking: Any, awaited: Any, names: list[str]
) -> None:
    assert names or public(blocking) == public(awaited)
    for name in names or public(blocking):
        one, other = getattr(blocking, name), getattr(awaited, name)
        assert inspect.getdoc(one), name
        assert inspect.getdoc(one) == inspect.getdoc(other), name
        if inspect.isfunction(one):
            parameters = inspect.signature(one).parameters
            assert list(parameters.values()) == list(inspect.signature(other).parameters.values()), name


@pytest.mark.parametrize(
    "name", ["connect", "attach", "Client.close", "Trainer.train_step", "Trainer.submit", "Trainer.close"]
)
def test_a_method_written_in_both_clients_declares_the_same_parameters(name: str) -> None:
    one, other = maskwire.client, maskwire.aio
    for part in name.split("."):
        one, other = getattr(one, part), getattr(other, part)
    assert declared(one) == declared(other)


@pytest.mark.parametrize("trainer", [maskwire.client.Trainer, maskwire.aio.Trainer])
def test_a_call_has_the_arguments_and_docstring_of_its_operation(trainer: Any) -> None:
    for name in public(Writer):
        source, made = getattr(Writer, name), getattr(trainer, name, None)
        if inspect.isfunction(source) and inspect.isfunction(made):
            assert inspect.getdoc(made) == inspect.getdoc(source), name
            assert names_of(made) == names_of(source), name
    assert set(public(Calls)) <= set(public(trainer))
    assert inspect.getdoc(trainer.fit) == inspect.getdoc(fit)
    assert names_of(trainer.fit) == names_of(fit)


@pytest.mark.parametrize(
    ("name", "blocking", "awaited"),
    [
        ("train_step", "results.StepResult", "results.StepResult"),
        ("submit", "Future[results.StepResult]", "asyncio.Future[results.StepResult]"),
        ("eval_loss", "results.EvalResult", "results.EvalResult"),
        ("checkpoints", "list[results.CheckpointInfo]", "list[results.CheckpointInfo]"),
        ("list_steps", "Iterator[results.RecordedStep]", "AsyncIterator[results.RecordedStep]"),
        ("generate_steps", "Iterator[results.GenerateResult]", "AsyncIterator[results.GenerateResult]"),
        ("restore", "results.RestoreResult", "results.RestoreResult"),
        ("fit", "FitResult", "FitResult"),
        ("settle", "None", "None"),
        ("close", "None", "None"),
    ],
)
def test_a_signature_says_what_the_call_returns(name: str, blocking: str, awaited: str) -> None:
    for trainer, returned in ((maskwire.client.Trainer, blocking), (maskwire.aio.Trainer, awaited)):
        assert inspect.signature(getattr(trainer, name)).return_annotation == returned
        assert getattr(trainer, name).__annotations__["return"] == returned


@pytest.mark.parametrize("name", ["attach", "connect"])
def test_functions_of_the_asyncio_client_belong_to_its_module(name: str) -> None:
    function = getattr(maskwire.aio, name)
    assert (function.__module__, function.__qualname__) == ("maskwire.aio", name)
    returned = inspect.signature(function).return_annotation
    assert getattr(maskwire.aio, returned) in (maskwire.aio.Client, maskwire.aio.Trainer)


def test_parameters_that_drift_apart_are_found() -> None:
    def source(name: str, *, score: float = 0.0) -> None:
        """Save."""

    @keep_signature(source)
    def drifted(name: str, *, rating: float = 0.0) -> None: ...

    assert inspect.signature(drifted).parameters == inspect.signature(source).parameters
    assert declared(drifted) != declared(source)
