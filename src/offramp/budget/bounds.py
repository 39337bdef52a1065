"""Bounds on the mean of a bounded loss from n independent items, as p-values and as upper confidence bounds.

Each bound answers two questions about the true mean ``R``: how surprising are these losses if ``R > alpha`` (`p_value`, valid: it is
at most ``u`` with probability at most ``u``), and which value does ``R`` exceed with probability at most ``delta`` (`upper`). They
hold at every sample size. Losses in ``[low, high]`` are mapped to [0, 1] first.

Which one: `ClopperPearson` is exact for losses that take two values; `WSR` adapts to the variance and is far tighter for a signed
accuracy gap, which is zero for most items; `HoeffdingBentkus` is the usual general choice and knows only the mean. For a gap in
[-1, 1], a bound that only knows the mean needs about ``2 ln(1/delta) / drop^2`` items to certify a drop (46,000 for one point at
delta 0.1). Empirical-Bernstein bounds are left out on purpose: a widespread form of it does not hold at its stated level.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offramp.budget.replay import F64, Bools, Floats
from offramp.core.errors import InvalidInput
from offramp.core.trace import RiskTable

# ------------------------------------------------------------------------------------------------------------------------ tails


def _lgamma(x: F64) -> F64:
    out: F64 = torch.lgamma(torch.from_numpy(np.ascontiguousarray(x, np.float64))).numpy()
    return out


def incomplete_beta(a: Floats | float, b: Floats | float, x: Floats | float) -> F64:
    """Regularised incomplete beta function I_x(a, b) for a, b > 0, by Lentz's continued fraction (DLMF 8.17.22)."""
    first, second, at = np.broadcast_arrays(np.asarray(a, np.float64), np.asarray(b, np.float64), np.asarray(x, np.float64))
    flip = at > (first + 1) / (first + second + 2)
    return _continued(np.where(flip, second, first), np.where(flip, first, second), np.where(flip, 1 - at, at), flip)


def _continued(a: F64, b: F64, x: F64, flip: Bools) -> F64:
    """I_x(a, b) where the fraction converges fast, or 1 minus it where the arguments were flipped."""
    inside = (x > 0) & (x < 1)
    z = np.where(inside, x, 0.5)
    with np.errstate(under="ignore"):
        front = np.exp(_lgamma(a + b) - _lgamma(a) - _lgamma(b) + a * np.log(z) + b * np.log1p(-z)) / a
    tiny = 1e-300
    c = np.ones_like(z)
    d = 1 - (a + b) * z / (a + 1)
    d = 1 / np.where(np.abs(d) < tiny, tiny, d)
    h = d.copy()
    for i in range(1, 200_000):
        even = i * (b - i) * z / ((a + 2 * i - 1) * (a + 2 * i))
        odd = -(a + i) * (a + b + i) * z / ((a + 2 * i) * (a + 2 * i + 1))
        for term in (even, odd):
            d = 1 + term * d
            c = 1 + term / c
            d = 1 / np.where(np.abs(d) < tiny, tiny, d)
            c = np.where(np.abs(c) < tiny, tiny, c)
            delta = d * c
            h = h * delta
        if np.all(np.abs(delta - 1) < 1e-14):
            break
    value = np.where(inside, front * h, np.where(x <= 0, 0.0, 1.0))
    result: F64 = np.clip(np.where(flip, 1 - value, value), 0.0, 1.0)
    return result


def binomial_cdf(k: Floats, n: int, p: Floats) -> F64:
    """P(Binomial(n, p) <= k), elementwise."""
    k, p = (np.array(v, np.float64) for v in np.broadcast_arrays(np.floor(k), p))
    safe = np.clip(k, 0, n - 1)
    inner = incomplete_beta(n - safe, safe + 1, 1 - p)
    out: F64 = np.where(k < 0, 0.0, np.where(k >= n, 1.0, inner))
    return out


# ---------------------------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class Sample:
    """Losses of M settings on the same n items, mapped to [0, 1].

    Attributes:
        mean: ``[M]`` mean over all items.
        items: n.
        blocks: ``[G, M]`` means over disjoint random blocks of items, in random order. A block mean has the same expectation and
            range as a loss, so a betting bound may read blocks in place of items; with G in the thousands nothing is lost.
        low: loss that 0 stands for.
        high: loss that 1 stands for.
        binary: whether every loss is ``low`` or ``high``.
    """

    mean: F64
    items: int
    blocks: F64
    low: float = 0.0
    high: float = 1.0
    binary: bool = False

    @classmethod
    def of(cls, losses: Floats | Tensor, *, low: float = 0.0, high: float = 1.0) -> Sample:
        """From losses ``[N]`` or ``[N, M]`` in ``[low, high]``, whose order must carry no information (shuffle sorted data).

        Raises:
            InvalidInput: no items, or losses outside the range.
        """
        raw = np.asarray(losses.detach().cpu() if isinstance(losses, Tensor) else losses, np.float64)
        if raw.ndim == 1:
            raw = raw[:, None]
        if raw.ndim != 2 or raw.shape[0] == 0 or not low < high:
            raise InvalidInput(f"losses must be [items] or [items, settings] with low < high, got {raw.shape} in [{low}, {high}].")
        if not (raw.min() >= low - 1e-9 and raw.max() <= high + 1e-9):
            raise InvalidInput(f"Losses must lie in [{low}, {high}], got values from {raw.min()} to {raw.max()}.")
        x = np.clip((raw - low) / (high - low), 0, 1)
        return cls(x.mean(axis=0), x.shape[0], x, low, high, bool(np.all((x == 0) | (x == 1))))

    @classmethod
    def of_table(cls, table: RiskTable, *, seed: int = 0) -> Sample:
        """From a `RiskTable`, its items shuffled."""
        order = np.random.default_rng(seed).permutation(table.loss.shape[0])
        return cls.of(table.loss.cpu().numpy()[order], low=table.loss_range[0], high=table.loss_range[1])

    def at(self, settings: slice | Bools | int) -> Sample:
        """The same for some settings."""
        chosen = slice(settings, settings + 1) if isinstance(settings, int) else settings
        return Sample(self.mean[chosen], self.items, self.blocks[:, chosen], self.low, self.high, self.binary)

    def scaled(self, loss: float) -> float:
        """A loss on the [0, 1] scale."""
        return (loss - self.low) / (self.high - self.low)

    def natural(self, scaled: F64) -> F64:
        """Back to the scale of the losses."""
        return self.low + scaled * (self.high - self.low)


class Bound(ABC):
    """A valid test of "the mean loss exceeds alpha" and the matching upper confidence bound. Subclasses are frozen data."""

    @abstractmethod
    def tail(self, sample: Sample, alpha: F64, level: float) -> F64:
        """p-values ``[M]`` at scaled limits ``[M]`` inside (0, 1)."""

    def p_value(self, sample: Sample, alpha: float, *, level: float = 0.1) -> F64:
        """p-values ``[M]`` of the hypotheses "mean loss > alpha".

        Args:
            sample: losses.
            alpha: limit, on the scale of the losses.
            level: where the p-value will be cut, in (0, 1). A bound may tune itself to it; it stays valid at any level.
        """
        a = sample.scaled(alpha)
        if a >= 1:
            return np.zeros_like(sample.mean)
        if a <= 0:
            return np.ones_like(sample.mean)
        out: F64 = np.minimum(self.tail(sample, np.full_like(sample.mean, a), level), 1.0)
        return out

    def upper(self, sample: Sample, delta: float) -> F64:
        """Upper confidence bounds ``[M]``: each is exceeded by the true mean with probability at most ``delta``."""
        low, high = np.clip(sample.mean, 0, 1), np.ones_like(sample.mean)
        for _ in range(40):
            middle = (low + high) / 2
            rejected = self.tail(sample, np.clip(middle, 1e-12, 1 - 1e-12), delta) <= delta
            high, low = np.where(rejected, middle, high), np.where(rejected, low, middle)
        return sample.natural(high)


@dataclass(frozen=True)
class Hoeffding(Bound):
    """``exp(-2 n (alpha - mean)^2)`` (Hoeffding 1963, theorem 1)."""

    def tail(self, sample: Sample, alpha: F64, level: float) -> F64:
        out: F64 = np.exp(-2 * sample.items * np.maximum(alpha - sample.mean, 0) ** 2)
        return out


@dataclass(frozen=True)
class Bentkus(Bound):
    """``e P(Binomial(n, alpha) <= ceil(n mean))`` (Bentkus 2004)."""

    def tail(self, sample: Sample, alpha: F64, level: float) -> F64:
        # The total is a float sum; a whole number plus rounding must not count as the next one.
        total = np.ceil(sample.items * sample.mean * (1 - 1e-12) - 1e-9)
        out: F64 = np.minimum(math.e * binomial_cdf(total, sample.items, alpha), 1.0)
        return out


@dataclass(frozen=True)
class HoeffdingBentkus(Bound):
    """The smaller of Bentkus' tail and Hoeffding's relative-entropy tail (Bates et al. 2021, section 3.1.1, theorem 1 of LTT)."""

    def tail(self, sample: Sample, alpha: F64, level: float) -> F64:
        m = np.minimum(sample.mean, alpha)
        with np.errstate(divide="ignore", invalid="ignore"):
            left = np.where(m > 0, m * np.log(m / alpha), 0.0)
            right = np.where(m < 1, (1 - m) * np.log((1 - m) / (1 - alpha)), 0.0)
        out: F64 = np.minimum(np.exp(-sample.items * (left + right)), Bentkus().tail(sample, alpha, level))
        return out


@dataclass(frozen=True)
class ClopperPearson(Bound):
    """``P(Binomial(n, alpha) <= errors)``: exact for losses that take two values (Clopper and Pearson 1934).

    Raises:
        InvalidInput: a loss lies between the two.
    """

    def tail(self, sample: Sample, alpha: F64, level: float) -> F64:
        if not sample.binary:
            raise InvalidInput("ClopperPearson needs losses that take only the two end values of their range. Use WSR or HoeffdingBentkus.")
        return binomial_cdf(np.rint(sample.items * sample.mean), sample.items, alpha)


@dataclass(frozen=True)
class WSR(Bound):
    """Betting bound of Waudby-Smith and Ramdas (2024, section 4, one-sided hedged capital).

    A gambler stakes part of the capital on each next loss being below alpha. If the mean is alpha or more the capital is a
    nonnegative supermartingale, so it ever reaches ``1/p`` with probability at most p (Ville). Stakes use the variance seen so far.

    Attributes:
        share: largest share of the capital at risk on one item, in (0, 1).
    """

    share: float = 0.75

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InvalidInput(f"WSR.share must lie inside (0, 1), got {self.share}.")

    def _stakes(self, sample: Sample, level: float) -> F64:
        """Stake ``[G, M]`` before the cap, each from earlier items only."""
        x = sample.blocks
        t = np.arange(1, x.shape[0] + 1, dtype=np.float64)[:, None]
        # A block mean varies less by the size of the block; the first guess of the variance says so.
        guess = 0.25 * x.shape[0] / sample.items
        centre = (0.5 + np.cumsum(x, axis=0)) / (t + 1)
        squares = np.square(x - centre)
        variance = (guess + np.cumsum(squares, axis=0) - squares) / t
        stakes: F64 = np.sqrt(2 * math.log(1 / level) / (x.shape[0] * variance))
        return stakes

    def _tail(self, x: F64, stakes: F64, alpha: F64) -> F64:
        log_capital = np.cumsum(np.log1p(-np.minimum(stakes, self.share / (1 - alpha)) * (x - alpha)), axis=0)
        out: F64 = np.exp(-np.maximum(log_capital.max(axis=0), 0))
        return out

    def tail(self, sample: Sample, alpha: F64, level: float) -> F64:
        return self._tail(sample.blocks, self._stakes(sample, level), alpha)

    def upper(self, sample: Sample, delta: float) -> F64:
        # Every factor of the capital grows with alpha, capped or not: alpha enters through -(x - alpha) and through
        # (x - alpha) / (1 - alpha), both monotone. So the limits that are not rejected form an interval and bisection finds its end,
        # or the sample mean if the end is below it.
        stakes = self._stakes(sample, delta)
        low, high = np.clip(sample.mean, 0, 1), np.ones_like(sample.mean)
        for _ in range(30):
            middle = (low + high) / 2
            rejected = self._tail(sample.blocks, stakes, np.clip(middle, 1e-12, 1 - 1e-9)) <= delta
            high, low = np.where(rejected, middle, high), np.where(rejected, low, middle)
        return sample.natural(high)


def default_bound(sample: Sample) -> Bound:
    """`ClopperPearson` where it is exact, else `WSR`."""
    return ClopperPearson() if sample.binary else WSR()
