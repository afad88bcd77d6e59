"""Checks of the arguments of calls. Their errors say what to pass instead."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

_PADDING = (
    "mark padding at the end of rows with lengths=[...], or pass rows that differ in length; mark positions "
    "of a prompt, which are never masked, with prompt_mask= (bool, True at these positions)"
)
# Names in other libraries, and their names here, if the call has such an argument.
_OTHER_NAMES = {
    "lr": "learning_rate",
    "max_length": "length",
    "max_new_tokens": "length",
    "seq_len": "length",
    "num_samples": "count",
    "num_return_sequences": "count",
    "num_rows": "rows",
    "num_steps": "steps",
    "num_draws": "draws",
    "seeds": "row_seeds",
    "use_tls": "tls",
    "secure": "tls",
    "ca_file": "ca",
    "password": "token",
    "epochs": "until_step",
    "max_steps": "until_step",
    "callback": "callbacks",
    "logger": "callbacks",
    "loggers": "callbacks",
    "save_every": "checkpoint_every",
    "evaluate_every": "eval_every",
    "dir": "folder",
}
_ADVICE = {
    "attention_mask": _PADDING,
    "padding_mask": _PADDING,
    "key_padding_mask": _PADDING,
    "mask": _PADDING + "; the server draws which tokens are masked",
    "labels": "leave it out: the server masks the tokens itself, and uses the original tokens as labels",
    "input_ids": "pass the token ids as the first argument",
}
_ADVICE_OF_CALLS = {
    "attach": dict.fromkeys(
        ("name", "takeover", "window", "on_takeover"),
        "attach() opens no session; leave this argument out, or use connect()",
    )
}


def check_options(call: str, given: Iterable[str], known: Iterable[str], also: Iterable[str] = ()) -> None:
    """Raise TypeError for the first unknown keyword argument, and suggest the one that was probably meant.

    call: The name of the called function.
    given: The names of the keyword arguments that were passed.
    known: The names that are allowed.
    also: The names of the function's other arguments, which are suggested too.
    """
    known = list(known)
    for name in given:
        if name not in known:
            cure = _ADVICE_OF_CALLS.get(call, {}).get(name) or _meant(name, [*also, *known])
            raise TypeError(f"{call}() has no argument {name!r}: {cure}")


def _meant(name: str, known: list[str]) -> str:
    if name in _ADVICE:
        return _ADVICE[name]
    other = _OTHER_NAMES.get(name)
    near = [other] if other in known else difflib.get_close_matches(name, known, n=1)
    every = ", ".join(known) or "none"
    return f"did you mean {near[0]!r}? The call takes {every}" if near else f"the call takes {every}"


def check_whole(name: str, value: Any, least: int, most: int | None = None, *, cure: str = "") -> None:
    """Raise ValueError unless a value is an integer from `least` to `most`; True, False and 8.0 are not."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number of at least {least}{cure}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}{cure}, got {value}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most:,}, got {value}")


def check_real(name: str, value: Any, cure: str = "") -> None:
    """Raise TypeError unless a value is an integer or a float. True and False are refused."""
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number{cure}, got {value!r}")


def check_str(name: str, value: Any, cure: str = "") -> None:
    """Raise TypeError unless a value is a str."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str{cure}, got {value!r}")


def check_labels(labels: Any) -> None:
    """Raise TypeError unless `labels` is None or a mapping of str to str."""
    if labels is None:
        return
    if not isinstance(labels, Mapping):
        raise TypeError(f'labels must map str to str, such as {{"name": "value"}}, got {labels!r}')
    for key, value in labels.items():
        check_str("the name of a label", key)
        check_str(f"the label {key!r}", value, cure=f", such as str({value!r})")


def check_expected(**expected: Any) -> None:
    """Raise ValueError unless each argument, such as `expected_step`, is None or an integer of at least 0."""
    for name, value in expected.items():
        if value is not None:
            check_whole(name, value, 0, cure=", or None")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless a value is True or False, because a text such as "no" would count as True."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_function(name: str, value: Any, *, awaited: bool = False) -> None:
    """Raise TypeError unless a value is a function or None. Coroutine functions are allowed if `awaited`."""
    if value is None:
        return
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {value!r}")
    if not awaited and any(
        inspect.iscoroutinefunction(one) or inspect.isasyncgenfunction(one)
        for one in (value, getattr(value, "__call__", None))  # noqa: B004
    ):
        raise TypeError(
            f"{name} is a coroutine function, which this call does not await: use a plain function (def); "
            "only callbacks of fit in the asyncio client (maskwire.aio) may be coroutine functions"
        )


def check_rows(tokens: Any, name: str = "tokens") -> None:
    """Raise TypeError for an object that is not rows of token ids, such as a text or a tokenizer's output."""
    if isinstance(tokens, Mapping) or hasattr(tokens, "input_ids"):
        raise TypeError(
            f"{name} must be rows of token ids, got {type(tokens).__name__}: pass its 'input_ids', with "
            "lengths=attention_mask.sum(1) if the rows are padded on the right"
        )
    if isinstance(tokens, Sequence) and tokens and hasattr(tokens[0], "segment_ids"):
        raise TypeError(
            f"{name} must be rows of token ids or one maskwire.Batch, got several: train_step(batches=[...]) "
            "trains on several as one batch"
        )
    if isinstance(tokens, str | bytes):
        raise TypeError(
            f"{name} must be rows of token ids, got {type(tokens).__name__}: encode the text; for a model of "
            "bytes pass [list(text.encode())]"
        )
    if not any(hasattr(tokens, name) for name in ("__getitem__", "__array__", "detach")):
        raise TypeError(
            f"{name} must be rows of token ids, as an array of shape [rows, columns] or a list of rows, got "
            f"{type(tokens).__name__}"
        )


def check_not_given(beside: str, **about: Any) -> None:
    """Raise TypeError for an argument that belongs in a `Batch`. `beside` names what was given with it."""
    for name, value in about.items():
        if value is not None:
            raise TypeError(f"{name} cannot be given with {beside}: use maskwire.Batch(rows, {name}=...)")


def check_data(call: str, data: Any) -> None:
    """Raise TypeError unless `data` has a method `batch`. The error says how to make such data."""
    if callable(getattr(data, "batch", None)):
        return
    kind = type(data).__name__
    if isinstance(data, str) or hasattr(data, "__fspath__"):
        cure = f"open it with maskwire.open_data({str(data)!r}, length=..., batch_size=...)"
    elif hasattr(data, "__next__") or hasattr(data, "batch_size"):
        cure = (
            "an iterator cannot resume where a run stopped. Pass its documents to "
            "maskwire.TokenData(documents, length=..., batch_size=...), or write a class whose batch(step) "
            "returns the rows of a step; to train on what it yields, call train_step for each batch"
        )
    else:
        cure = "pass its documents to maskwire.TokenData(documents, length=..., batch_size=...)"
    raise TypeError(f"{call} needs data whose batch(step) returns the rows of a step, got {kind}: {cure}")


def call_back(name: str, function: Callable[..., T], *arguments: Any) -> T:
    """Call a user's function and return its result.

    A StopIteration of the function is converted to RuntimeError, because it would end the calling generator.
    """
    try:
        return function(*arguments)
    except StopIteration as error:
        raise RuntimeError(
            f"{name} raised StopIteration, most often from next() on an iterator that has ended: catch the "
            "exception there; to end fit early, raise maskwire.StopTraining instead"
        ) from error
