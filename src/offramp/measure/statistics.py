"""Intervals and tests for shares, means and paired differences. Standard library and torch only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from offramp.core.certificate import Estimate
from offramp.core.errors import InvalidInput


def _check_counts(successes: int, trials: int, level: float) -> None:
    if trials < 1 or not 0 <= successes <= trials:
        raise InvalidInput(f"successes must be within 0..trials and trials >= 1, got {successes} of {trials}.")
    _check_level(level)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InvalidInput(f"level must be inside (0, 1), got {level}.")


def _z(level: float) -> float:
    return NormalDist().inv_cdf(0.5 + level / 2)


def wilson(successes: int, trials: int, level: float = 0.95) -> Estimate:
    """Share with Wilson's score interval (Wilson 1927): good coverage on average, not guaranteed.

    Args:
        successes: 0 .. trials.
        trials: >= 1.
        level: two-sided coverage aimed at, in (0, 1).
    """
    _check_counts(successes, trials, level)
    z, p = _z(level), successes / trials
    scale = 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    # The exact ends at 0 and 1 are 0 and 1; rounding must not move them.
    return Estimate(p, 0.0 if successes == 0 else max(0.0, centre - half), 1.0 if successes == trials else min(1.0, centre + half), level)


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> Estimate:
    """Share with the exact interval of Clopper and Pearson (1934): coverage at least ``level`` for every true share.

    Args:
        successes: 0 .. trials.
        trials: >= 1.
        level: two-sided coverage, in (0, 1).
    """
    _check_counts(successes, trials, level)
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else _solve(lambda p: binomial_tail(successes, trials, p), tail)
    high = 1.0 if successes == trials else _solve(lambda p: binomial_tail(successes + 1, trials, p), 1 - tail)
    return Estimate(successes / trials, low, high, level)


def _solve(increasing: Callable[[float], float], target: float) -> float:
    """The p in [0, 1] at which an increasing function reaches ``target``, by bisection to double precision."""
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        if increasing(middle) < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def binomial_tail(at_least: int, trials: int, p: float) -> float:
    """P(X >= at_least) for X ~ Binomial(trials, p), which is the regularised incomplete beta I_p(k, n - k + 1)."""
    if trials < 0 or not 0 <= p <= 1:
        raise InvalidInput(f"trials must be >= 0 and p in [0, 1], got {trials} and {p}.")
    if at_least <= 0:
        return 1.0
    if at_least > trials or p == 0:
        return 0.0
    return 1.0 if p == 1 else _incomplete_beta(at_least, trials - at_least + 1, p)


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b) by its continued fraction (DLMF 8.17.22), evaluated with Lentz's method on the side where it converges fast."""
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    fraction, c, d = 1.0, 1.0, 0.0
    for j in range(1, 100_000):  # about sqrt(max(a, b)) terms are needed
        m = j // 2
        if j % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / ((1 + term * d) or tiny)
        c = (1 + term / c) or tiny
        fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            return min(1.0, front / fraction)
    raise InvalidInput(f"The incomplete beta function did not converge at a={a}, b={b}, x={x}.")


def t_quantile(freedom: float, level: float = 0.95) -> float:
    """The t with ``P(|T| <= t) = level`` for Student's distribution.

    Args:
        freedom: degrees of freedom, > 0; need not be whole (Welch).
        level: two-sided, in (0, 1).
    """
    _check_level(level)
    if not (math.isfinite(freedom) and freedom > 0):
        raise InvalidInput(f"freedom must be a positive number, got {freedom}.")
    # P(|T| > t) = I_x(freedom / 2, 1 / 2) with x = freedom / (freedom + t^2), which rises with x (DLMF 8.17).
    x = _solve(lambda p: _incomplete_beta(freedom / 2, 0.5, p) if 0 < p < 1 else p, 1 - level)
    return math.sqrt(freedom * (1 - x) / x)


def binomial_slack(share: float, trials: int, level: float = 0.95) -> float:
    """How far an observed share may lie above the true one by chance alone.

    The smallest ``s = j / trials - share >= 0`` with ``P(X > j) <= 1 - level`` for X ~ Binomial(trials, share). A bound that is
    meant to fail at most ``delta`` of the time is refuted by ``v`` failures in ``n`` trials only if ``v / n > delta + slack``.

    Args:
        share: true share, in [0, 1].
        trials: >= 1.
        level: one-sided, in (0, 1).
    """
    _check_level(level)
    if trials < 1 or not 0 <= share <= 1:
        raise InvalidInput(f"share must be in [0, 1] and trials >= 1, got {share} and {trials}.")
    low, high = 0, trials  # P(X > trials) = 0, so `high` always qualifies
    while low < high:
        middle = (low + high) // 2
        if binomial_tail(middle + 1, trials, share) <= 1 - level:
            high = middle
        else:
            low = middle + 1
    return max(0.0, low / trials - share)


def _values(values: Tensor, name: str) -> Tensor:
    if values.ndim != 1 or values.numel() == 0:
        raise InvalidInput(f"{name} must be a non-empty vector [items], got shape {tuple(values.shape)}.")
    return values.detach().to("cpu", torch.float64)


def bootstrap_mean(values: Tensor, level: float = 0.95, *, draws: int = 2000, seed: int = 0) -> Estimate:
    """Mean with the percentile bootstrap interval (Efron 1979).

    Args:
        values: ``[N]``, at least one.
        level: two-sided, in (0, 1).
        draws: resamples, >= 1; time and memory traffic are ``draws * N``.
        seed: of the resampling.
    """
    _check_level(level)
    if draws < 1:
        raise InvalidInput(f"draws must be >= 1, got {draws}.")
    x = _values(values, "values")
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(draws, dtype=torch.float64)
    block = max(1, 2**22 // x.numel())
    for start in range(0, draws, block):
        count = min(block, draws - start)
        rows = torch.randint(x.numel(), (count, x.numel()), generator=generator)
        means[start : start + count] = x[rows].mean(1)
    low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return Estimate(float(x.mean()), low, high, level)


def bootstrap_difference(first: Tensor, second: Tensor, level: float = 0.95, *, draws: int = 2000, seed: int = 0) -> Estimate:
    """Mean of ``first - second`` over the same items, with the percentile bootstrap interval over items.

    Args:
        first: ``[N]``.
        second: ``[N]``, item by item beside ``first``.
        level: two-sided, in (0, 1).
        draws: resamples.
        seed: of the resampling.
    """
    a, b = _values(first, "first"), _values(second, "second")
    if a.shape != b.shape:
        raise InvalidInput(f"A paired difference needs the same items on both sides, got {a.numel()} and {b.numel()}.")
    return bootstrap_mean(a - b, level, draws=draws, seed=seed)


@dataclass(frozen=True)
class McNemar:
    """Exact test of whether two classifiers err equally often on the same items.

    Attributes:
        only_first: items that only the first gets right.
        only_second: items that only the second gets right.
        p_value: two-sided, exact.
    """

    only_first: int
    only_second: int
    p_value: float


def _discordant(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    for name, t in (("first", first), ("second", second)):
        if t.dtype != torch.bool or t.ndim != 1 or t.numel() == 0:
            raise InvalidInput(f"{name} must be a non-empty boolean vector [items] (right or wrong), got {t.dtype} {tuple(t.shape)}.")
    if first.shape != second.shape:
        raise InvalidInput(f"A paired comparison needs the same items on both sides, got {first.numel()} and {second.numel()}.")
    return first, second


def mcnemar(first: Tensor, second: Tensor) -> McNemar:
    """McNemar's exact test (1947): under equal error rates the discordant items split Binomial(n, 1/2).

    Args:
        first: ``[N]`` bool, whether the first is right.
        second: ``[N]`` bool, the same items.
    """
    a, b = _discordant(first, second)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = min(1.0, 2 * binomial_tail(max(only_a, only_b), only_a + only_b, 0.5))
    return McNemar(only_a, only_b, p)


def accuracy_drop(full: Tensor, adaptive: Tensor, level: float = 0.95) -> Estimate:
    """Accuracy of ``full`` minus accuracy of ``adaptive`` on the same items, with a paired score interval.

    Newcombe (1998), "Improved confidence intervals for the difference between binomial proportions based on paired data",
    method 10: the two Wilson intervals, squared and added with their correlation. Positive is a loss of accuracy.

    Args:
        full: ``[N]`` bool, whether the full model is right.
        adaptive: ``[N]`` bool, the same items.
        level: two-sided coverage aimed at, in (0, 1).
    """
    _check_level(level)
    a, b = _discordant(full, adaptive)
    n = a.numel()
    both, only_a = int((a & b).sum()), int((a & ~b).sum())
    only_b = int((b & ~a).sum())
    neither = n - both - only_a - only_b
    one, two = wilson(both + only_a, n, level), wilson(both + only_b, n, level)
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    phi = 0.0
    if margins > 0:
        covariance = both * neither - only_a * only_b
        # Newcombe's continuity correction, for positive association only.
        phi = (max(covariance - n / 2, 0.0) if covariance > 0 else float(covariance)) / math.sqrt(margins)
    down, up = (one.value - one.low, two.high - two.value), (one.high - one.value, two.value - two.low)
    low_half, high_half = (math.sqrt(max(0.0, u * u - 2 * phi * u * v + v * v)) for u, v in (down, up))
    drop = one.value - two.value
    return Estimate(drop, max(-1.0, drop - low_half), min(1.0, drop + high_half), level)
