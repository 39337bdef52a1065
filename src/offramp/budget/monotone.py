"""A rising map from a signal to the error it predicts, fitted without a formula.

Caches decide by a cheap signal, such as how far a block's input has moved, and need the error that reuse would bring. A polynomial through
calibration points (TeaCache, Liu et al. 2024) need not rise: where it falls, no change at all costs more than some, and outside its range
it may go below zero, after which nothing is ever computed again. An isotonic map can do neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from offramp.budget.replay import F64
from offramp.core.errors import InvalidInput


def isotonic(values: ArrayLike, weight: ArrayLike | None = None) -> F64:
    """The non-decreasing sequence nearest to ``values`` in weighted squares: pool adjacent violators (Ayer et al. 1955).

    Args:
        values: ``[N]`` finite.
        weight: ``[N]`` above 0; ones by default.

    Raises:
        InvalidInput: shapes differ, a value is not finite or a weight is not above 0.
    """
    y = np.asarray(values, np.float64)
    w = np.ones_like(y) if weight is None else np.asarray(weight, np.float64)
    if y.ndim != 1 or y.shape != w.shape or not np.isfinite(y).all() or not (np.isfinite(w).all() and (w > 0).all()):
        raise InvalidInput(f"isotonic needs finite values [N] and weights [N] above 0, got shapes {y.shape} and {w.shape}.")
    means: list[float] = []
    weights: list[float] = []
    sizes: list[int] = []
    for value, own in zip(y.tolist(), w.tolist(), strict=True):
        size = 1
        while means and means[-1] >= value:
            total = weights[-1] + own
            value = (means.pop() * weights[-1] + value * own) / total
            weights.pop()
            own, size = total, size + sizes.pop()
        means.append(value)
        weights.append(own)
        sizes.append(size)
    return np.repeat(np.array(means, np.float64), np.array(sizes, np.int64))


@lru_cache(maxsize=64)
def _knots(knots: MonotoneMap, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(v, dtype=dtype, device=device) for v in (knots.signal, knots.error))  # type: ignore[return-value]


@dataclass(frozen=True)
class MonotoneMap:
    """A piecewise linear, non-decreasing map through knots, constant beyond them.

    Attributes:
        signal: knots, strictly ascending; the first and the last are the range that was fitted.
        error: predicted there, non-decreasing.
        items: pairs it was fitted on; 0 if it was given.
        explained: share of the errors' variance that it explains on those pairs, at most 1. Near 0 the signal says nothing, and
            a cache that follows it is no better than a fixed schedule.
    """

    signal: tuple[float, ...]
    error: tuple[float, ...]
    items: int = 0
    explained: float = 0.0

    def __post_init__(self) -> None:
        signal, error = (tuple(float(v) for v in values) for values in (self.signal, self.error))
        rising = all(a < b for a, b in pairwise(signal)) and all(a <= b for a, b in pairwise(error))
        if not signal or len(signal) != len(error) or not rising or not all(map(math.isfinite, (*signal, *error))):
            raise InvalidInput(f"A map needs finite knots, as many signals (ascending) as errors (not falling); got {signal} and {error}.")
        object.__setattr__(self, "signal", signal)
        object.__setattr__(self, "error", error)

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest signal that was fitted."""
        return self.signal[0], self.signal[-1]

    @classmethod
    def fit(cls, signal: ArrayLike | Tensor, error: ArrayLike | Tensor, weight: ArrayLike | Tensor | None = None) -> MonotoneMap:
        """Isotonic regression of error on signal.

        Args:
            signal: ``[N]`` finite.
            error: ``[N]`` finite, measured where the signal was.
            weight: ``[N]`` >= 0, such as the number of elements behind each pair; ones by default.

        Raises:
            InvalidInput: shapes differ, a number is not finite, or no weight is above 0.
        """
        x, y = _numbers(signal, "signal"), _numbers(error, "error")
        w = np.ones_like(x) if weight is None else _numbers(weight, "weight")
        if not x.shape == y.shape == w.shape or not (w >= 0).all() or not w.any():
            raise InvalidInput(f"signal, error and weight must be [N] alike with weights >= 0, got {x.shape}, {y.shape} and {w.shape}.")
        x, y, w = x[w > 0], y[w > 0], w[w > 0]
        # Equal signals predict one error: their mean.
        at, where = np.unique(x, return_inverse=True)
        mass = np.bincount(where, w)
        level = isotonic(np.bincount(where, w * y) / mass, mass)
        # Two knots carry a constant stretch, or one if it is a single signal.
        ends = np.flatnonzero(np.concatenate([[True], np.diff(level) > 0]) | np.concatenate([np.diff(level) > 0, [True]]))
        spread = float(np.sum(w * np.square(y - np.average(y, weights=w))))
        left = float(np.sum(w * np.square(y - level[where])))
        explained = 1 - left / spread if spread > 0 else 0.0
        return cls(tuple(at[ends].tolist()), tuple(level[ends].tolist()), int(x.size), explained)

    def predict(self, signal: ArrayLike | Tensor) -> Tensor:
        """Errors for signals of any shape, on their device; beyond the range that of its nearer end, and infinite for NaN.

        A floating tensor is answered in its own type, anything else in float64.
        """
        x = _floating(signal)
        at, level = _knots(self, x.device, torch.promote_types(x.dtype, torch.float32))
        wide = x.to(at.dtype).contiguous()
        low = (torch.searchsorted(at, wide, right=True) - 1).clamp(0, max(len(self.signal) - 2, 0))
        high = (low + 1).clamp(max=len(self.signal) - 1)
        # A map of one knot has no span; there the share is not used.
        share = ((wide - at[low]) / (at[high] - at[low]).clamp_min(torch.finfo(at.dtype).tiny)).clamp(0, 1)
        return torch.where(wide.isnan(), torch.inf, torch.lerp(level[low], level[high], share)).to(x.dtype)

    def outside(self, signal: ArrayLike | Tensor, *, below: bool = True) -> Tensor:
        """Where the map knows nothing (bool, alike): beyond the fitted range, or not a number. Compute there.

        Args:
            signal: any shape.
            below: also under the range. There the error of the smallest fitted signal is still an upper bound if error rises with
                signal, as the map assumes; ``False`` trusts that.
        """
        x = _floating(signal)
        inside = x <= self.signal[-1]
        return ~(inside & (x >= self.signal[0]) if below else inside)


def _floating(signal: ArrayLike | Tensor) -> Tensor:
    x = signal if isinstance(signal, Tensor) else torch.as_tensor(np.asarray(signal, np.float64))
    return x if x.is_floating_point() else x.double()


def _numbers(values: ArrayLike | Tensor, name: str) -> F64:
    out = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, np.float64)
    if out.ndim != 1 or out.size == 0 or not np.isfinite(out).all():
        raise InvalidInput(f"{name} must be one or more finite numbers in a row, got shape {out.shape}.")
    return out
