"""A masking schedule that the user wrote: the same numbers as a built-in one, and clear refusals."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from maskwire_server.batch import Batch, Modes, Prompts
from maskwire_server.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ServeConfig
from maskwire_server.errors import ConfigError
from maskwire_server.results import EvalOptions, GenerateOptions
from maskwire_server.training import masking_schedule, masking_schedule_function
from maskwire_server.training.trainer import TorchTrainer

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: torch.cos(math.pi / 2 * t),
    "quadratic": lambda t: (1 - t) ** 2,
}
CODE = """
import math
import torch
def linear(t): return 1 - t
def cosine(t): return torch.cos(math.pi / 2 * t)
def quadratic(t): return (1 - t) ** 2
def cubic(t): return (1 - t) ** 3
def jump(t): return torch.where(t < 0.5, 1 - t / 4, (1 - t) / 2)
def half(t): return torch.where(t < 0.5, 1 - t, (1 - t) / 2)
"""


@pytest.fixture(scope="module", autouse=True)
def _code(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("code")
    (folder / "user_schedules").mkdir()
    (folder / "user_schedules" / "mine.py").write_text(CODE)
    sys.path.append(str(folder))


@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_built_in_schedule_as_a_function_has_the_same_weights(name: str, masking: str) -> None:
    own, built_in = masking_schedule.schedule_of(FUNCTIONS[name], name), masking_schedule.SCHEDULES[name]
    for n in (1, 2, 7, 64, 513):
        k = torch.arange(1, n + 1) if masking == "exact" else torch.unique(torch.tensor([1, (n + 1) // 2, n]))
        ours, theirs = (
            masking_schedule.elbo_weights(schedule, masking, k, torch.full_like(k, n))
            for schedule in (own, built_in)
        )
        assert torch.allclose(ours, theirs, rtol=1e-11, atol=0)
    t = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    n = torch.randint(0, 600, (1000,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(*(masking_schedule.exact_counts(schedule, t, n) for schedule in (own, built_in)))


def kink(t: Tensor) -> Tensor:
    """Half of the decrease in the first fifth, none in the next two, the rest in the last three."""
    return torch.where(t < 0.2, 1 - 2.5 * t, torch.where(t < 0.4, 0.5, 0.5 * (1 - t) / 0.6))


def test_a_schedule_may_be_constant_for_a_while() -> None:
    own = masking_schedule.schedule_of(kink)
    # By hand: of n = 4 positions, 4 are masked until t = .1, 3 until .2, 2 until .7, where m = 1/4.
    k = torch.tensor([4, 3, 2, 1])
    found = masking_schedule.exact_probabilities(own, k, torch.full_like(k, 4))
    assert found.tolist() == pytest.approx([0.1, 0.1, 0.5, 0.3], abs=1e-12)


def test_quadrature_is_exact_to_1e_6_with_kinks_and_1e_11_without() -> None:
    # On a linear piece of slope -a, dt = dm / a, and the integral over m is a sum of the binomial:
    # int_x^1 C(n,k) m^k (1-m)^(n-k) dm = P(Bin(n+1, x) <= k) / (n+1).
    def tail(n: int, k: int, x: float) -> float:
        return sum(math.comb(n + 1, j) * x**j * (1 - x) ** (n + 1 - j) for j in range(k + 1)) / (n + 1)

    own = masking_schedule.schedule_of(kink)
    for n in (1, 8, 64, 300):
        k = torch.unique(torch.tensor([1, (n + 2) // 3, (n + 1) // 2, n]))
        found = masking_schedule.bernoulli_probabilities(own, k, torch.full_like(k, n))
        expected = []
        for count in k.tolist():
            steep = tail(n, count, 0.5) * 0.4
            flat = math.comb(n, count) * 0.5**n * 0.2
            slow = (1 / (n + 1) - tail(n, count, 0.5)) * 1.2
            expected.append(steep + flat + slow)
        assert found.tolist() == pytest.approx(expected, rel=1e-6)
    cubic = masking_schedule.schedule_of(lambda t: (1 - t) ** 3)
    # int C(n,k) m^k (1-m)^(n-k) (1/3) m^(-2/3) dm = C(n,k) B(k + 1/3, n - k + 1) / 3
    for n, count in ((8, 1), (8, 8), (64, 3), (300, 150)):
        log_beta = math.lgamma(count + 1 / 3) + math.lgamma(n - count + 1) - math.lgamma(n + 4 / 3)
        expected_one = math.comb(n, count) * math.exp(log_beta) / 3
        one = masking_schedule.bernoulli_probabilities(cubic, torch.tensor([count]), torch.tensor([n]))
        assert float(one) == pytest.approx(expected_one, rel=1e-11)


BAD: dict[str, tuple[object, str]] = {
    "no function": (3, "must be a function that takes a tensor of times, got int"),
    "an error": (lambda _: 1 / 0, r"1001 times in \[0, 1\], but raised ZeroDivisionError: division by zero"),
    "a number": (lambda _: 0.5, r"fp64 tensor of shape \[1001\].*got float"),
    "a scalar": (lambda t: 1 - t.mean(), r"shape \[1001\] for times of that shape, got shape \[\]"),
    "fp32": (lambda t: 1 - t.float(), "got float32 on cpu; compute in fp64 on the CPU"),
    "nan": (lambda t: torch.where(t > 0.5, math.nan, 1 - t), r"must be finite, got m\(0.501\) = nan"),
    "infinite": (lambda t: -t.log(), r"must be finite, got m\(0\) = inf"),
    "starts at a half": (lambda t: (1 - t) / 2, r"m\(0\) = 1 within 1e-6, got m\(0\) = 0.5"),
    "the wrong way": (lambda t: t, r"m\(0\) = 1 within 1e-6, got m\(0\) = 0"),
    "ends above 0": (lambda t: 1 - t / 2, r"m\(1\) = 0 within 1e-6, got m\(1\) = 0.5"),
    "above 1": (lambda t: (1 - t) * (1 + 2 * t), r"in \[0, 1\], got m\(0.001\) = 1.000998"),
    "rises": (
        lambda t: (1 - t) * (1 - 0.5 * torch.sin(4 * math.pi * t) ** 2),
        r"must never rise with time, got m\(0.1\d+\) = .* and then m\(0.1",
    ),
    "random": (
        lambda t: (1 - t - 1e-4 * torch.rand_like(t) * t * (1 - t)).sort(descending=True).values,
        r"must be deterministic, but two calls with the same times differ: m\(0\.\d+\) is .* and ",
    ),
    "the times of the call": (lambda t: 1 - t.argsort().double() / 1000, "from its own time alone.*m\\("),
    "the number of times": (
        lambda t: (1 - t) ** (1 + (t.numel() < 9)), r"from its own time alone.*m\(0.5\) is 0.5 and 0.25",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_function_that_is_no_schedule_is_refused_with_time_and_value(case: str) -> None:
    function, words = BAD[case]
    with pytest.raises(ValueError, match=f"(?s)^its_name .*{words}"):
        masking_schedule.schedule_of(function, "its_name")


def test_a_function_may_change_its_argument_in_place() -> None:
    own = masking_schedule.schedule_of(lambda t: t.neg_().add_(1))
    t = torch.tensor([0.25, 0.5], dtype=torch.float64)
    assert own.fraction(t).tolist() == [0.75, 0.5]
    assert t.tolist() == [0.25, 0.5]


def test_a_jump_is_refused_with_the_bound_and_allowed_without() -> None:
    jump = ObjectiveConfig(schedule="user_schedules.mine:jump")
    with pytest.raises(
        ConfigError, match=r"mine:jump must be continuous.*never masks 26 of 100: m jumps at t = 0.5;"
    ):
        masking_schedule.fingerprint(jump, 100)
    masking_schedule.fingerprint(jump.model_copy(update={"weighting": "masked_mean"}), 100)

    half = ObjectiveConfig(schedule="user_schedules.mine:half")  # from 1/2 to 1/4
    with pytest.raises(ConfigError, match=r"never masks 2 of 4: m jumps at t = 0\.5;"):
        masking_schedule.fingerprint(half, 5)


def test_a_jump_is_refused_exactly_if_a_row_of_some_length_misses_a_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(0)
    refused = 0
    for case in range(60):
        n = int(random.integers(1, 24))
        top = random.random()
        bottom = top * random.random() if case % 2 else max(0.0, top - 2 * random.random() / n)
        schedule = masking_schedule.schedule_of(
            lambda t, top=top, bottom=bottom: torch.where(
                t < 0.5, 1 - 2 * t * (1 - top), 2 * (1 - t) * bottom
            )
        )
        monkeypatch.setattr(masking_schedule, "named", lambda _, found=schedule: found)
        # Count k of r is missing if the values that m skips, from bottom to top, include ((k-1)/r, k/r].
        # Count 1 is never missing: where m is 0, one position is masked.
        missing = any(
            bottom <= (k - 1) / r and k / r <= top for r in range(1, n + 1) for k in range(2, r + 1)
        )
        if missing:
            refused += 1
            with pytest.raises(ConfigError, match="must be continuous"):
                masking_schedule.fingerprint(ObjectiveConfig(schedule="linear"), n)
        else:
            masking_schedule.fingerprint(ObjectiveConfig(schedule="linear"), n)
    assert 15 < refused < 45


MISSING = {
    "no_such_package.schedules:m": "no module 'no_such_package' in the current folder .* or set PYTHONPATH",
    "user_schedules.nowhere:m": "no module 'user_schedules.nowhere'",
    "user_schedules.mine:nothing": r"module 'user_schedules.mine' \(.*mine.py\) has no 'nothing'",
    "json.decoder.inner:m": "no module 'json.decoder.inner'|importing 'json.decoder.inner' failed",
}


@pytest.mark.parametrize("name", MISSING)
def test_what_cannot_be_imported_is_named_in_one_line(name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"^objective.schedule: '{name}' cannot be imported: .*{MISSING[name]}"
    ):
        masking_schedule.named(name)


def test_an_error_of_the_module_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, code, words in (
        ("broken_a", "raise ValueError('first\\nsecond')", "importing 'broken_a' failed: ValueError: first"),
        (
            "broken_b",
            "import not_installed_here",
            "importing 'broken_b' failed: ModuleNotFoundError: No module",
        ),
        ("broken_c", "import sys; sys.exit(3)", "importing 'broken_c' failed: SystemExit: 3"),
        ("broken_d", "def m(", "importing 'broken_d' failed: SyntaxError: "),
    ):
        Path(f"{name}.py").write_text(code)
        with pytest.raises(ConfigError) as raised:
            masking_schedule.named(f"{name}:m")
        assert words in str(raised.value)
        assert "\n" not in str(raised.value)


def test_the_fingerprint_tells_functions_apart_and_ignores_rounding() -> None:
    def of(function: Callable[[Tensor], Tensor]) -> str:
        return masking_schedule_function.fingerprint(masking_schedule.schedule_of(function).fraction)

    every = [of(function) for function in FUNCTIONS.values()]
    assert len(set(every)) == 3
    assert every == [
        masking_schedule_function.fingerprint(s.fraction) for s in masking_schedule.SCHEDULES.values()
    ]
    assert of(lambda t: 1 - t - 1e-5 * t * (1 - t)) != every[0]
    for function, expected in zip(FUNCTIONS.values(), every, strict=True):
        for change in (-1e-14, -1e-15, 1e-15, 1e-14):
            assert of(lambda t, f=function, c=change: f(t) * (1 + c)) == expected  # type: ignore[misc]
    # A constant: a release that computes it differently could not open the runs of this one.
    assert every[0] == "dfb86456a6b9af483cc8f76bffe9c4c9b20160783448842907dc7ad3491ce18c"


MODEL = {"num_tokens": 9, "mask_id": 8, "max_seq_len": 12, "dim": 32, "depth": 1, "heads": 2, "dim_head": 16}


def trainer(schedule: str, masking: str) -> TorchTrainer:
    return TorchTrainer(
        ModelConfig(**MODEL),  # type: ignore[arg-type]
        ObjectiveConfig(schedule=schedule, masking=masking),
        OptimizerConfig(),
        ServeConfig(threads=1),
        seed=0,
    )


@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_training_evaluation_and_generation_equal_those_of_the_built_in(name: str, masking: str) -> None:
    ours, theirs = trainer(f"user_schedules.mine:{name}", masking), trainer(name, masking)
    rows = Batch(np.random.default_rng(0).integers(0, 8, (6, 12)), 6, 12)
    for step in (1, 2):
        losses = [each.train_step(1, step, rows, Modes()).losses.loss for each in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    found = [each.eval_loss(rows, EvalOptions(tuple(range(6)))) for each in (ours, theirs)]
    assert found[0].nats_per_token == pytest.approx(found[1].nats_per_token, rel=1e-6)
    assert found[0].losses.loss == pytest.approx(found[1].losses.loss, rel=1e-6)
    options = GenerateOptions((1, 2), steps=5)
    states = [
        [s.still_masked for s in each.generate(Prompts.nothing(2, 12), options)] for each in (ours, theirs)
    ]
    assert states[0] == states[1]
    assert f"user_schedules.mine:{name} schedule" in ours.info.objective


def test_configuring_a_function_imports_neither_torch_nor_the_code() -> None:
    code = (
        "import sys; from maskwire_server.config import load; "
        "load(None, objective={'schedule': 'antigravity:fly'});"
        "print([name for name in ('torch', 'antigravity') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
