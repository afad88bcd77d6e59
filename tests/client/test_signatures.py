"""Both clients have the same calls, with the same arguments and docstrings."""

from __future__ import annotations

import ast
import asyncio
import inspect
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import maskwire.aio
import maskwire.client
import maskwire.data
import maskwire.data.prepare
import maskwire.loggers
from maskwire.protocol.evaluation_plan import combine
from maskwire.protocol.fit import fit
from maskwire.protocol.sessionless_calls import Calls
from maskwire.protocol.writer import Writer
from maskwire.signatures import keep_signature, refuse_unknown_keywords

FunctionDef = ast.FunctionDef | ast.AsyncFunctionDef

PAIRS = [
    (maskwire.client, maskwire.aio, ["attach", "connect"]),
    (maskwire.client.Client, maskwire.aio.Client, []),
    (maskwire.client.Trainer, maskwire.aio.Trainer, []),
]


def public(kind: Any) -> list[str]:
    return [name for name in dir(kind) if not name.startswith("_")]


def names_of(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def declared(definition: FunctionDef) -> str:
    """The parameters as written in the source, whatever `keep_signature` makes of them."""
    return ast.unparse(definition.args)


def definitions(module: ModuleType) -> dict[str, FunctionDef]:
    """The public functions and methods that a module's source defines, by their names in the module."""
    found: dict[str, FunctionDef] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for each in inside:
            if isinstance(each, FunctionDef) and not each.name.startswith("_"):
                found[prefix + each.name] = each
    return found


BLOCKING, AWAITED = definitions(maskwire.client), definitions(maskwire.aio)


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


def test_what_both_clients_write_themselves_is_found() -> None:
    both = {"attach", "connect", "Client.close", "Trainer.train_step", "Trainer.submit", "Trainer.restore",
            "Trainer.close"}  # fmt: skip
    assert AWAITED.keys() == both
    assert BLOCKING.keys() == both | {"run_fit"}


@pytest.mark.parametrize("name", sorted(AWAITED))
def test_a_method_written_in_both_clients_declares_the_same_parameters(name: str) -> None:
    assert declared(BLOCKING[name]) == declared(AWAITED[name])


@pytest.mark.parametrize("client", [BLOCKING, AWAITED], ids=["blocking", "asyncio"])
def test_restore_declares_the_parameters_of_its_operation(client: dict[str, FunctionDef]) -> None:
    operation = ast.parse(textwrap.dedent(inspect.getsource(Writer.restore))).body[0]
    assert isinstance(operation, FunctionDef)
    assert declared(client["Trainer.restore"]) == declared(operation)


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
    written = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(drifted)))).body[0]
    assert isinstance(written, FunctionDef)
    assert declared(written) == "name: str, *, rating: float=0.0"


MADE_BY_OTHERS = {"Client", "Trainer"}
"""Classes whose constructors are not public: `attach` and `connect` call them."""
CHECKS_ITSELF = {"WandB", "Trackio"}
"""Their options are those of a package (tests/client/test_loggers.py)."""


def public_calls() -> Iterator[tuple[str, Any, bool]]:
    """Each public callable with its name in messages, and whether it needs an object to be called on."""
    packages: list[ModuleType] = [maskwire, maskwire.data, maskwire.loggers]
    found = [getattr(package, name) for package in packages for name in package.__all__]  # type: ignore[attr-defined]
    aio = [getattr(maskwire.aio, name) for name in ("attach", "connect", "Client", "Trainer")]
    for one in dict.fromkeys([*found, *aio, maskwire.data.prepare.prepare, combine]):
        if inspect.isfunction(one):
            yield one.__name__, one, False
        if not inspect.isclass(one) or inspect.isabstract(one):
            continue
        if one.__name__ not in MADE_BY_OTHERS | CHECKS_ITSELF:
            yield one.__name__, one, False
        for name in public(one):
            if inspect.isfunction(member := getattr(one, name)):
                yield name, member, True


def keywords(call: Any) -> list[str]:
    """The keywords of a call: its parameters, and the keys of its typed options."""
    found = []
    for one in inspect.signature(call).parameters.values():
        if one.kind is one.VAR_KEYWORD:
            kind = one.annotation.removeprefix("Unpack[").removesuffix("]")
            homes = [maskwire.protocol.option_types, maskwire.credentials]
            (options,) = {getattr(home, kind) for home in homes if hasattr(home, kind)}
            found += options.__annotations__
        elif one.kind is not one.VAR_POSITIONAL and one.name not in ("self", "trainer"):
            found.append(one.name)
    return found


def refused(call: Any, bound: bool, keyword: str) -> None:
    """Raise TypeError if the call names the keyword that was meant by a mistyped one."""
    answer = call(*([object()] if bound else []), **{keyword: 1})
    if inspect.iscoroutine(answer):
        asyncio.run(answer)


CALLS = list(public_calls())


@pytest.mark.parametrize(
    ("name", "call", "bound"), CALLS, ids=[f"{call.__module__}.{call.__qualname__}" for _, call, _ in CALLS]
)
def test_each_public_call_names_itself_and_the_keyword_that_was_probably_meant(
    name: str, call: Any, bound: bool
) -> None:
    for keyword in keywords(call):
        mistyped = keyword + keyword[-1]
        words = rf"^{name}\(\) has no argument '{mistyped}': did you mean '{keyword}'\? The call takes "
        with pytest.raises(TypeError, match=words):
            refused(call, bound, mistyped)
    if keywords(call):
        with pytest.raises(TypeError, match=rf"^{name}\(\) has no argument 'xyzzy': the call takes "):
            refused(call, bound, "xyzzy")


def test_the_public_calls_are_all_found() -> None:
    names = {call.__qualname__ for _, call, _ in CALLS}
    assert names > {
        "open_data",
        "prepare",
        "combine",
        "connect",
        "attach",
        "Batch",
        "CsvFile",
        "StopTraining",
    }
    assert names > {"TokenData.split", "TokenData.steps_of", "Trainer.submit", "Calls.evaluate", "fit"}


def test_a_call_with_checked_keywords_keeps_what_others_read_from_it() -> None:
    async def example(name: str, *, score: float = 0.0) -> None:
        """Save."""

    made = refuse_unknown_keywords(example)
    assert inspect.iscoroutinefunction(made)
    assert (made.__name__, made.__doc__) == ("example", "Save.")
    assert inspect.signature(made) == inspect.signature(example)

    @refuse_unknown_keywords
    class Named:
        def __init__(self, size: int) -> None:
            self.size = size

        def first(self, count: int = 1) -> int:
            return self.size + count

    class Derived(Named): ...

    assert list(inspect.signature(Named).parameters) == ["size"]
    assert Named(2).first(count=3) == 5
    with pytest.raises(TypeError, match=r"^Derived\(\) has no argument 'sise': did you mean 'size'"):
        Derived(sise=1)  # type: ignore[call-arg]
