"""Bounds against values computed independently (exact sums, closed forms), and their order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from offramp.budget import WSR, Bentkus, ClopperPearson, Hoeffding, HoeffdingBentkus, Sample
from offramp.budget.bounds import binomial_cdf, default_bound, incomplete_beta
from offramp.core.errors import InvalidInput
from offramp.core.trace import RiskTable

ALL = [Hoeffding(), Bentkus(), HoeffdingBentkus(), ClopperPearson(), WSR()]


def exact_cdf(k: int, n: int, p: float) -> float:
    return math.fsum(math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(k + 1))


@pytest.mark.parametrize(("n", "p"), [(1, 0.3), (10, 0.05), (10, 0.95), (57, 0.5), (400, 0.02)])
def test_binomial_cdf_equals_the_sum(n: int, p: float) -> None:
    ks = np.arange(-1, n + 1)
    want = [exact_cdf(int(k), n, p) if k >= 0 else 0.0 for k in ks]
    assert binomial_cdf(ks, n, np.full(ks.size, p)) == pytest.approx(want, rel=1e-9, abs=1e-14)


def test_binomial_cdf_of_a_million() -> None:
    # The Edgeworth expansion to the skewness term is good to about 1e-6 there.
    n, p = 1_000_000, 0.05
    for z in (-2.0, 0.0, 1.5):
        k = math.floor(n * p + z * math.sqrt(n * p * (1 - p)))
        shifted = (k + 0.5 - n * p) / math.sqrt(n * p * (1 - p))
        density = math.exp(-(shifted**2) / 2) / math.sqrt(2 * math.pi)
        skew = (1 - 2 * p) / math.sqrt(n * p * (1 - p))
        want = 0.5 * math.erfc(-shifted / math.sqrt(2)) - skew / 6 * (shifted**2 - 1) * density
        assert binomial_cdf(np.array([k]), n, np.array([p]))[0] == pytest.approx(want, abs=3e-6)


def test_incomplete_beta_closed_forms() -> None:
    x = np.linspace(0, 1, 11)
    assert incomplete_beta(1.0, 1.0, x) == pytest.approx(x)
    assert incomplete_beta(2.0, 1.0, x) == pytest.approx(x**2)
    assert incomplete_beta(1.0, 3.0, x) == pytest.approx(1 - (1 - x) ** 3)


def test_clopper_pearson_known_value() -> None:
    # 0 errors in n: the bound solves (1 - u)^n = delta.
    got = ClopperPearson().upper(Sample.of(np.zeros(50)), 0.05)[0]
    assert got == pytest.approx(1 - 0.05 ** (1 / 50), rel=1e-6)
    with pytest.raises(InvalidInput, match="two end values"):
        ClopperPearson().p_value(Sample.of(np.full(5, 0.5)), 0.6)


def test_hoeffding_known_value() -> None:
    x = np.tile([0.0, 1.0], 50)
    assert Hoeffding().p_value(Sample.of(x), 0.6)[0] == pytest.approx(math.exp(-2 * 100 * 0.01))
    assert Hoeffding().upper(Sample.of(x), 0.1)[0] == pytest.approx(0.5 + math.sqrt(math.log(10) / 200), abs=1e-6)


@pytest.mark.parametrize("bound", ALL, ids=lambda b: type(b).__name__)
def test_p_value_and_upper_bound_agree(bound: Hoeffding) -> None:
    x = (np.random.default_rng(0).random((300, 4)) < [0.01, 0.05, 0.3, 0.9]).astype(float)
    sample = Sample.of(x)
    upper = bound.upper(sample, 0.1)
    assert np.all(upper >= sample.mean) and np.all(upper <= 1)
    for j, u in enumerate(upper):
        if sample.mean[j] + 1e-6 < u < 0.999:  # a bound below the sample mean is raised to it
            assert bound.p_value(sample.at(j), u + 1e-4)[0] <= 0.1
            assert bound.p_value(sample.at(j), u - 1e-4)[0] > 0.1


@pytest.mark.parametrize("bound", ALL, ids=lambda b: type(b).__name__)
def test_p_value_falls_as_the_limit_rises(bound: Hoeffding) -> None:
    sample = Sample.of((np.random.default_rng(1).random(500) < 0.1).astype(float))
    p = [bound.p_value(sample, a)[0] for a in np.linspace(0.01, 0.99, 60)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(p))
    assert bound.p_value(sample, 0.0)[0] == 1 and bound.p_value(sample, 1.0)[0] == 0


def test_exact_is_tightest_and_betting_beats_means_on_a_quiet_gap() -> None:
    g = np.random.default_rng(2)
    binary = Sample.of((g.random(1000) < 0.05).astype(float))
    exact, hb, plain = (b.upper(binary, 0.1)[0] for b in (ClopperPearson(), HoeffdingBentkus(), Hoeffding()))
    assert exact < hb < plain
    gap = g.choice([-1.0, 0, 1.0], p=[0.01, 0.98, 0.01], size=4000)
    quiet = Sample.of(gap, low=-1, high=1)
    assert WSR().upper(quiet, 0.1)[0] < 0.012 < 0.025 < HoeffdingBentkus().upper(quiet, 0.1)[0]
    assert isinstance(default_bound(binary), ClopperPearson) and isinstance(default_bound(quiet), WSR)


def test_blocks_lose_little() -> None:
    gap = np.random.default_rng(3).choice([-1.0, 0, 1.0], p=[0.02, 0.95, 0.03], size=40_000)
    items = Sample.of(gap, low=-1, high=1)
    x = items.blocks.reshape(4000, 10).mean(axis=1, keepdims=True)
    blocks = Sample(items.mean, items.items, x, -1, 1)
    assert WSR().upper(blocks, 0.1)[0] == pytest.approx(WSR().upper(items, 0.1)[0], abs=4e-4)


def test_sample_refuses_losses_outside_their_range() -> None:
    with pytest.raises(InvalidInput, match="must lie in"):
        Sample.of(np.array([0.0, 1.5]))
    with pytest.raises(InvalidInput):
        Sample.of(np.empty(0))


def test_sample_of_a_risk_table() -> None:
    table = RiskTable(torch.zeros(2, 3), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.zeros(2, 2), (-1.0, 1.0))
    sample = Sample.of_table(table)
    assert sample.natural(sample.mean).tolist() == [0, 0] and sample.low == -1
