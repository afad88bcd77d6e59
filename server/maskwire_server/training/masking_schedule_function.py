"""A masking schedule that the user wrote as a function m(t): its checks, its inverse and its fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from maskwire_server.training.user_code import one_line

Fraction = Callable[[Tensor], Tensor]
"""The function m. It maps times to masked fractions, fp64 in the shape of the times."""

INTERVALS = 1000
"""A schedule is checked at the times i/1000. At times that are binary fractions, the values of a polynomial
would be binary fractions too, and could lie exactly on the border between two units of the fingerprint."""
ENDS = 1e-6
"""How far m(0) may be from 1, m(1) from 0, and any value outside [0, 1]."""
_NOISE = 1e-9  # a rise up to this size counts as a rounding error
_PARTS, _ROUNDS = 16, 15  # 16^-15 = 2^-60, below the rounding error of a time


def grid() -> Tensor:
    """The 1,001 times i/1000 at which a schedule is checked, fp64 [1001]."""
    return torch.arange(INTERVALS + 1, dtype=torch.float64) / INTERVALS


def checked(function: object, name: str) -> Fraction:
    """Check the user's function m, and return it clamped to [0, 1].

    Raises ValueError if a check fails. If a value is wrong, the error shows the time and the value. m may be
    constant over an interval: P(k) in `masking_schedule` is still right, because the inverse of m gives the
    first time at which at most a given fraction is masked.
    """
    if not callable(function):
        raise ValueError(
            f"{name} must be a function that takes a tensor of times, got {type(function).__name__}"
        )
    times = grid()
    values = _values(function, name, times)
    _check_values(values, times, name)
    again = _values(function, name, times)
    if not torch.equal(values, again):
        raise ValueError(
            f"{name} must be deterministic, but two calls with the same times differ: "
            f"{_difference(values, again, times)}; it must not draw random numbers or keep state"
        )
    backwards = _values(function, name, times.flip(0)).flip(0)
    some = slice(None, None, INTERVALS // 4)
    alone = torch.cat([_values(function, name, time[None]) for time in times[some]])
    for others, at in ((backwards, slice(None)), (alone, some)):
        if not torch.allclose(values[at], others, rtol=0, atol=1e-12):
            raise ValueError(
                f"{name} must compute each value from its own time alone, but the values depend on the other "
                f"times of the call: {_difference(values[at], others, times[at])}"
            )

    def fraction(t: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = function(t.reshape(-1).clone())
        return found.reshape(t.shape).clamp(0, 1)

    return fraction


def _values(function: Callable[[Tensor], object], name: str, times: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            values = function(times.clone())
    except Exception as error:
        raise ValueError(
            f"{name} must accept a tensor of {times.numel()} times in [0, 1], but raised {one_line(error)}"
        ) from error
    expected = f"{name} must return an fp64 tensor of shape {list(times.shape)} for times of that shape"
    if not isinstance(values, Tensor):
        raise ValueError(f"{expected}, got {type(values).__name__}")
    if values.shape != times.shape:
        raise ValueError(f"{expected}, got shape {list(values.shape)}")
    if values.dtype != torch.float64 or values.device.type != "cpu":
        kind = str(values.dtype).removeprefix("torch.")
        raise ValueError(f"{expected}, got {kind} on {values.device}; compute in fp64 on the CPU")
    return values


def _check_values(values: Tensor, times: Tensor, name: str) -> None:
    def first(wrong: Tensor, rule: str) -> None:
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise ValueError(f"{name} must {rule}, got m({times[at]:g}) = {values[at]:.9g}")

    first(~values.isfinite(), "be finite")
    ends = torch.zeros_like(values, dtype=torch.bool)
    ends[0] = abs(values[0] - 1) > ENDS
    first(ends, "mask everything at time 0: m(0) = 1 within 1e-6")
    ends = torch.zeros_like(ends)
    ends[-1] = abs(values[-1]) > ENDS
    first(ends, "mask nothing at time 1: m(1) = 0 within 1e-6")
    first((values < -ENDS) | (values > 1 + ENDS), "be a fraction in [0, 1]")
    rises = values.diff() > _NOISE
    if bool(rises.any()):
        at = int(rises.nonzero()[0])
        raise ValueError(
            f"{name} must never rise with time, got m({times[at]:g}) = {values[at]:.9g} and then "
            f"m({times[at + 1]:g}) = {values[at + 1]:.9g}"
        )


def _difference(values: Tensor, others: Tensor, times: Tensor) -> str:
    at = int((values - others).abs().argmax())
    return f"m({times[at]:g}) is {values[at]:.9g} and {others[at]:.9g}"


def inverse_of(fraction: Fraction) -> Fraction:
    """The inverse of m. It maps a fraction to the first time at which at most that fraction is masked.

    The search works like bisection, but each round divides the interval into 16 parts instead of 2. This
    needs a quarter of the calls to m, and the overhead of the calls dominates when there are few rows.
    """
    inner = torch.arange(1, _PARTS, dtype=torch.float64)

    def inverse(target: Tensor) -> Tensor:
        low, width = torch.zeros_like(target), 1.0
        for _ in range(_ROUNDS):
            width /= _PARTS
            above = fraction(low[..., None] + width * inner) > target[..., None]
            low = low + width * above.sum(-1)
        # The inverse is exact at both ends, so that the P(k) add up to 1.
        return torch.where(target >= 1, 0.0, torch.where(target <= 0, 1.0, low + width / 2))

    return inverse


def fingerprint(fraction: Fraction) -> str:
    """The SHA-256, in hexadecimal, of the values of m at the times of `grid`.

    The values are rounded down to units of 2^-24. Another processor or version of torch may round the last
    bits of cos or exp differently, and this must not prevent a run from starting. The fingerprint changes
    only if a border between two units lies within the rounding error of a value: for the whole grid, the
    probability is below 1e-5. The offset keeps the values of simple functions away from the borders.
    """
    units = torch.floor(fraction(grid()) * 2**24 + 0.381966).to(torch.int32)
    return hashlib.sha256(units.numpy().astype("<i4").tobytes()).hexdigest()
