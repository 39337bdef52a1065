"""Every statistic against a published or exactly computed value, and intervals against their coverage."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from offramp.core.errors import InvalidInput
from offramp.measure.statistics import (
    accuracy_drop,
    binomial_slack,
    binomial_tail,
    bootstrap_difference,
    bootstrap_mean,
    clopper_pearson,
    mcnemar,
    wilson,
)


def exact_tail(k: int, n: int, p: Fraction) -> Fraction:
    return sum((math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1)), Fraction(0))


@pytest.mark.parametrize("n", [1, 2, 7, 40])
@pytest.mark.parametrize("p", [Fraction(1, 100), Fraction(1, 3), Fraction(1, 2), Fraction(19, 20)])
def test_binomial_tail_equals_the_exact_sum(n: int, p: Fraction) -> None:
    for k in range(n + 2):
        assert binomial_tail(k, n, float(p)) == pytest.approx(float(exact_tail(k, n, p)), rel=1e-10, abs=1e-14)


def test_binomial_tail_of_a_million() -> None:
    # The median of Binomial(10^6, 1/2): P(X >= 500000) = 1/2 + P(X = 500000) / 2.
    at = math.exp(math.lgamma(1e6 + 1) - 2 * math.lgamma(5e5 + 1) - 1e6 * math.log(2))
    assert binomial_tail(500_000, 1_000_000, 0.5) == pytest.approx(0.5 + at / 2, abs=1e-8)


def test_wilson_known() -> None:
    # Newcombe (1998a), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for k, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]:
        found = wilson(k, n)
        assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    full = wilson(20, 20)
    assert full.high == 1.0 and full.low == pytest.approx(1 - 0.1611, abs=5e-5)


def test_clopper_pearson_known() -> None:
    # Newcombe (1998a), table I, and the closed forms at the ends.
    for k, n, low, high in [(81, 263, 0.2527, 0.3676), (15, 148, 0.0578, 0.1617), (1, 29, 0.0009, 0.1776)]:
        found = clopper_pearson(k, n)
        assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert clopper_pearson(0, 20).low == 0.0
    assert clopper_pearson(0, 20).high == pytest.approx(1 - 0.025 ** (1 / 20), rel=1e-9)
    assert clopper_pearson(20, 20).low == pytest.approx(0.025 ** (1 / 20), rel=1e-9)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5])
def test_clopper_pearson_coverage_is_exact(p: float) -> None:
    n = 30
    covered = 0.0
    for k in range(n + 1):
        interval = clopper_pearson(k, n)
        if interval.low <= p <= interval.high:
            covered += math.comb(n, k) * p**k * (1 - p) ** (n - k)
    assert 0.95 <= covered <= 1.0


def test_binomial_slack_is_the_smallest_that_works() -> None:
    slack = binomial_slack(0.1, 300)
    j = round((0.1 + slack) * 300)
    assert binomial_tail(j + 1, 300, 0.1) <= 0.05 < binomial_tail(j, 300, 0.1)
    assert slack == pytest.approx(0.03)
    assert binomial_slack(0.0, 100) == 0.0
    assert binomial_slack(1.0, 100) == 0.0
    assert binomial_slack(0.1, 30_000) < slack


def test_bootstrap_mean_matches_the_normal_interval() -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(1)) * 2 + 5
    found = bootstrap_mean(values, draws=4000)
    half = 1.96 * float(values.double().std()) / math.sqrt(2000)
    assert found.value == pytest.approx(float(values.double().mean()))
    assert found.low == pytest.approx(found.value - half, abs=0.15 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.15 * half)
    assert bootstrap_mean(values, draws=4000) == found  # seeded
    constant = bootstrap_mean(torch.full((7,), 3.0))
    assert (constant.value, constant.low, constant.high) == (3.0, 3.0, 3.0)


def test_bootstrap_difference_uses_the_pairing() -> None:
    generator = torch.Generator().manual_seed(2)
    difficulty = torch.randn(500, generator=generator) * 10
    other = difficulty - 0.5 + 0.1 * torch.randn(500, generator=generator)
    found = bootstrap_difference(difficulty, other)
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.05  # unpaired it would be about 2.5
    with pytest.raises(InvalidInput, match="500 and 3"):
        bootstrap_difference(difficulty, torch.zeros(3))


def cells(both: int, first: int, second: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    a = [True] * (both + first) + [False] * (second + neither)
    b = [True] * both + [False] * first + [True] * second + [False] * neither
    return torch.tensor(a), torch.tensor(b)


def test_mcnemar_known() -> None:
    found = mcnemar(*cells(36, 12, 2, 0))
    assert (found.only_first, found.only_second) == (12, 2)
    # Two-sided exact: 2 * (1 + 14 + 91) / 2^14.
    assert found.p_value == pytest.approx(2 * (1 + 14 + 91) / 2**14)
    assert mcnemar(*cells(10, 0, 0, 5)).p_value == 1.0
    assert mcnemar(*cells(10, 4, 4, 5)).p_value == 1.0


def test_accuracy_drop_known() -> None:
    # Newcombe (1998b), example 36, 12, 2, 0 of 50: 0.2 with 0.0569 to 0.3404 by method 10.
    found = accuracy_drop(*cells(36, 12, 2, 0))
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == (pytest.approx(0.0569, abs=5e-5), pytest.approx(0.3404, abs=5e-5))
    swapped = accuracy_drop(*reversed(cells(36, 12, 2, 0)))
    assert (swapped.low, swapped.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


def test_accuracy_drop_without_any_difference_keeps_a_width() -> None:
    found = accuracy_drop(*cells(90, 0, 0, 10))
    assert found.value == 0 and found.low < 0 < found.high


def test_accuracy_drop_coverage() -> None:
    generator = torch.Generator().manual_seed(3)
    chances = torch.tensor([0.85, 0.06, 0.02, 0.07])
    hits, trials = 0, 1500
    for _ in range(trials):
        drawn = torch.bincount(torch.multinomial(chances, 200, replacement=True, generator=generator), minlength=4).tolist()
        interval = accuracy_drop(*cells(*drawn))
        hits += interval.low <= 0.04 <= interval.high
    assert 0.935 <= hits / trials <= 0.985


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson(3, 2),
        lambda: wilson(0, 0),
        lambda: clopper_pearson(-1, 5),
        lambda: clopper_pearson(1, 5, level=1.0),
        lambda: binomial_slack(1.5, 10),
        lambda: binomial_tail(1, 5, -0.1),
        lambda: bootstrap_mean(torch.zeros(0)),
        lambda: bootstrap_mean(torch.zeros(3), draws=0),
        lambda: mcnemar(torch.ones(3), torch.ones(3)),
        lambda: accuracy_drop(torch.ones(3, dtype=torch.bool), torch.ones(4, dtype=torch.bool)),
    ],
)
def test_refusals(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidInput):
        call()
