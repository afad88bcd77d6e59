"""Masking schedules, and the number of positions of a row that they mask.

m(t) is the masked fraction at time t in [0, 1). It is continuous and never increases; m(0) = 1 and m(1) = 0.
With *exact* masking, k = ceil(m(t) n) of the n positions of a row are masked, so that, for a uniform t,

    P(k) = P(k-1 < m(t) n <= k) = m^-1((k-1)/n) - m^-1(k/n),

where m^-1(y) is the first time at which m <= y.

With *Bernoulli* masking, k is binomial with probability m(t): P_B(k) = int_0^1 C(n,k) m^k (1-m)^(n-k) dt.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maskwire_server.config import ObjectiveConfig
from maskwire_server.errors import ConfigError
from maskwire_server.training import masking_schedule_function
from maskwire_server.training.quadrature import gauss_legendre
from maskwire_server.training.user_code import import_object

_NEVER = 1e-12
"""A count of masked positions with this probability or less is never drawn in practice."""


@dataclass(frozen=True)
class Schedule:
    """A masked fraction m and its inverse, on fp64 tensors."""

    name: str
    fraction: Callable[[Tensor], Tensor]
    """m: t -> masked fraction."""
    inverse: Callable[[Tensor], Tensor]
    """m^-1: masked fraction -> t."""


LINEAR = Schedule("linear", lambda t: 1 - t, lambda m: 1 - m)
COSINE = Schedule(
    "cosine", lambda t: torch.cos(math.pi / 2 * t), lambda m: torch.arccos(m.clamp(-1, 1)) * (2 / math.pi)
)
QUADRATIC = Schedule("quadratic", lambda t: (1 - t).square(), lambda m: 1 - m.sqrt())
SCHEDULES = {schedule.name: schedule for schedule in (LINEAR, COSINE, QUADRATIC)}


def schedule_of(function: object, name: str = "custom") -> Schedule:
    """Make a schedule from a user's function m(t), and derive its inverse. Raises ValueError for a bad m."""
    fraction = masking_schedule_function.checked(function, name)
    return Schedule(name, fraction, masking_schedule_function.inverse_of(fraction))


@functools.cache
def named(name: str) -> Schedule:
    """The schedule that `objective.schedule` names. Raises ConfigError."""
    if name in SCHEDULES:
        return SCHEDULES[name]
    function = import_object("objective.schedule", name)
    try:
        return schedule_of(function, name)
    except ValueError as error:
        raise ConfigError(f"objective.schedule: {error}") from error


def fingerprint(config: ObjectiveConfig, n: int) -> str:
    """Check the configured schedule for rows of up to n positions, and return its fingerprint.

    Raises ConfigError if the weighting is elbo and some number of masked positions never occurs, because the
    bound is a sum over all these numbers.
    """
    schedule = named(config.schedule)
    if config.weighting == "elbo":
        for k, length in _counts_that_may_be_missing(schedule, config.masking, n):
            probabilities = exact_probabilities if config.masking == "exact" else bernoulli_probabilities
            absent = (probabilities(schedule, k, torch.full_like(k, length)) <= _NEVER).nonzero()
            if len(absent):
                missing = int(k[absent[0, 0]])
                t = float(schedule.inverse(torch.tensor([missing / length], dtype=torch.float64))[0])
                raise ConfigError(
                    f"objective.schedule: {schedule.name} must be continuous with weighting elbo, which "
                    f"needs every count of masked positions, but it never masks {missing} of {length}: m "
                    f"jumps at t = {t:.6g}; remove the jump, or set objective.weighting = 'masked_mean'"
                )
    return masking_schedule_function.fingerprint(schedule.fraction)


def _counts_that_may_be_missing(schedule: Schedule, masking: str, n: int) -> Iterator[tuple[Tensor, int]]:
    """Counts k of masked positions and the length of their rows, so that all rows of up to n are covered.

    A jump of m removes count k of r <= n positions if it spans ((k-1)/r, k/r], so its height is at least
    1/n. It then spans a cell of the grid j/(2n) that lies in this interval. If it removes no count of n
    positions, its height is below 2/n, and r > n/2. A continuous m has no such cell, and n is enough.
    """
    if masking == "bernoulli":
        yield torch.tensor([1, (n + 1) // 2, n]), n
        return
    yield torch.arange(1, n + 1), n
    edges = torch.arange(2 * n + 1, dtype=torch.float64) / (2 * n)
    skipped = schedule.inverse(edges).diff().abs() <= _NEVER
    centres = (edges[:-1] + 1 / (4 * n))[skipped]
    for length in range(n - 1, n // 2, -1) if len(centres) else ():
        yield torch.unique(torch.ceil(centres * length).to(torch.int64)), length


def stratified_times(offset: float, permutation_b: Tensor) -> Tensor:
    """Draw one time in each of B equal intervals of [0, 1), for B rows in random order.

    t_i = (u + pi(i)/B) mod 1, with u = `offset` and pi = `permutation_b`: fp64, of shape [b].
    """
    rows = permutation_b.numel()
    # The result of the modulus can round up to exactly 1, where nothing would be masked.
    return ((offset + permutation_b.to(torch.float64) / rows) % 1.0).clamp(max=1 - 2.0**-53)


def exact_counts(schedule: Schedule, t_b: Tensor, n_b: Tensor) -> Tensor:
    """The number of positions of each row that exact masking masks: int64, of shape [b].

    k = clamp(ceil(m(t) n), 1, n), or 0 where n = 0.
    """
    k_b = torch.ceil(schedule.fraction(t_b) * n_b).to(torch.int64)
    return torch.minimum(k_b.clamp(min=1), n_b)


def exact_probabilities(schedule: Schedule, k_b: Tensor, n_b: Tensor) -> Tensor:
    """The probability P(k) that exact masking masks k of n positions, 1 <= k <= n: fp64, of shape [b]."""
    n = n_b.to(torch.float64)
    return schedule.inverse((k_b - 1) / n) - schedule.inverse(k_b / n)


@functools.lru_cache(maxsize=4096)
def _bernoulli_probability(schedule: Schedule, k: int, n: int) -> float:
    """The probability P_B(k) that Bernoulli masking masks k of n positions, by Gauss-Legendre quadrature.

    The integral is over s, with t = sin^2(pi s/2). The derivative of t vanishes at both ends, which makes
    the integrand smooth even if m has a square root there. The integrand is a peak of width about n^(-1/2),
    which thousands of points resolve.
    """
    s, weights = gauss_legendre()
    t = np.sin(np.pi / 2 * s) ** 2
    jacobian = np.pi / 2 * np.sin(np.pi * s)
    m = np.clip(schedule.fraction(torch.from_numpy(t)).numpy(), 1e-300, 1 - 1e-16)
    log_choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    density = np.exp(log_choose + k * np.log(m) + (n - k) * np.log1p(-m))
    return float((density * jacobian * weights).sum())


def bernoulli_probabilities(schedule: Schedule, k_b: Tensor, n_b: Tensor) -> Tensor:
    """The probability P_B(k) that Bernoulli masking masks k of n positions: fp64, of shape [b].

    For the linear schedule, it is int C(n,k) m^k (1-m)^(n-k) dm = 1/(n+1).
    """
    if schedule is LINEAR:
        return 1 / (n_b + 1).to(torch.float64)
    pairs = zip(k_b.tolist(), n_b.tolist(), strict=True)
    return torch.tensor([_bernoulli_probability(schedule, k, n) for k, n in pairs], dtype=torch.float64)


def elbo_weights(schedule: Schedule, masking: str, k_b: Tensor, n_b: Tensor) -> Tensor:
    """The weights of the rows' losses in the ELBO: w = 1/(k P(k)), or 0 where nothing is masked.

    An fp64 tensor of shape [b]. The negative ELBO of a row is sum over k of (1/k) E[sum of CE over a random
    set of k masked positions], the order-agnostic likelihood (Uria et al. 2014, Hoogeboom et al. 2022). If k
    is drawn with probability P(k), the weight 1/(k P(k)) makes the estimate unbiased.
    """
    masked = k_b > 0
    k, n = k_b.clamp(min=1), n_b.clamp(min=1)
    probabilities = exact_probabilities if masking == "exact" else bernoulli_probabilities
    return torch.where(masked, 1 / (k * probabilities(schedule, k, n)), 0.0)
