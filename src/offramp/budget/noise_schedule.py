"""Depth by noise level: how much of a denoiser runs at a level of noise, the same for every sample.

Levels are log signal-to-noise ratios, ``ln(alpha^2 / sigma^2)``: low is pure noise, high is nearly clean. A schedule over levels, unlike
one over step numbers, serves any sampler and any number of steps, and flows as well as diffusions. Of all schedules for a cost,
`schedule_search` finds the best.

Shapes: ``B`` bins, ``S`` steps of a sampler.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from offramp.budget.replay import F64
from offramp.core.errors import InvalidInput
from offramp.core.noise import noise_share

Levels: TypeAlias = Sequence[float] | NDArray[np.floating] | Tensor

PUBLISHED_DEPTHS = (28, 28, 24, 24, 20, 20, 16, 16, 12, 12)
"""Blocks of DiT-XL/2 (28) that run in each tenth of the time steps, nearly clean first (Moon et al. 2024, the released schedule)."""

# ------------------------------------------------------------------------------------------------------------------------- bins


def as_levels(levels: Levels) -> F64:
    """Levels ``[S]`` as an array; they may be infinite.

    Raises:
        InvalidInput: none, not in a row, or NaN.
    """
    raw = levels.detach().cpu().double().numpy() if isinstance(levels, Tensor) else np.asarray(levels, np.float64)
    if raw.ndim != 1 or raw.size == 0 or np.isnan(raw).any():
        raise InvalidInput(f"levels must be one or more log signal-to-noise ratios in a row, none of them NaN; got shape {raw.shape}.")
    return raw


def edge_between(low: float, high: float) -> float:
    """An edge above level ``low`` and below ``high``, in the middle by `noise_share`: a level must not change bins by rounding.

    In a rectified flow that is the middle in time. The middle of two log-SNRs would hang on where pure noise, whose log-SNR is minus
    infinity, happens to be cut off.
    """
    share = sum(noise_share(min(max(x, -1e3), 1e3)) for x in (low, high)) / 2
    edge = 2 * (math.log1p(-share) - math.log(share)) if 0 < share < 1 else math.nan
    if low < edge < high:
        return edge
    # Shares that round to 0 or 1 have no middle; an infinite end counts as 2 away.
    return ((high - 2 if low == -math.inf else low) + (low + 2 if high == math.inf else high)) / 2


@dataclass(frozen=True)
class NoiseBins:
    """Intervals of the log signal-to-noise ratio, from pure noise to nearly clean. The first and the last are open-ended.

    Attributes:
        edges: ascending, finite; one fewer than there are bins. A level on an edge belongs to the cleaner bin.
    """

    edges: tuple[float, ...]

    def __post_init__(self) -> None:
        edges = tuple(float(e) for e in self.edges)
        if not all(map(math.isfinite, edges)) or any(a >= b for a, b in pairwise(edges)):
            raise InvalidInput(f"edges must be finite and strictly ascending log signal-to-noise ratios, got {self.edges}.")
        object.__setattr__(self, "edges", edges)

    @property
    def size(self) -> int:
        """Number of bins."""
        return len(self.edges) + 1

    def bin_of(self, log_snr: float) -> int:
        """The bin of a level, 0 for the noisiest; levels may be infinite (pure noise, clean).

        Raises:
            InvalidInput: not a number.
        """
        if math.isnan(log_snr):
            raise InvalidInput("The noise level is not a number.")
        return bisect_right(self.edges, log_snr)

    def bins_of(self, levels: Levels) -> NDArray[np.int64]:
        """The bin of each level ``[S]``."""
        return np.searchsorted(np.asarray(self.edges), as_levels(levels), side="right").astype(np.int64)

    def counts(self, levels: Levels) -> tuple[int, ...]:
        """How many of a sampler's levels fall in each bin: the weights for `best_schedule`."""
        return tuple(np.bincount(self.bins_of(levels), minlength=self.size).tolist())

    @classmethod
    def equal_shares(cls, levels: Levels, size: int) -> NoiseBins:
        """Bins that hold as nearly equal numbers of a sampler's steps as can be; edges lie midway between two levels.

        Args:
            levels: ``[S]`` of the sampler's steps, in any order; levels that occur twice (second-order samplers) stay together.
            size: number of bins, from 1 to the number of distinct levels.

        Raises:
            InvalidInput: an argument is out of range.
        """
        distinct, count = np.unique(as_levels(levels), return_counts=True)
        if not 1 <= size <= distinct.size:
            raise InvalidInput(f"size must be from 1 to the {distinct.size} distinct levels, got {size}.")
        below = np.cumsum(count)
        ends: list[int] = []
        for k in range(1, size):
            first, last = (ends[-1] + 1 if ends else 0), distinct.size - 1 - (size - k)
            ends.append(first + int(np.argmin(np.abs(below[first : last + 1] - k * below[-1] / size))))
        return cls(tuple(edge_between(float(distinct[e]), float(distinct[e + 1])) for e in ends))

    @classmethod
    def by_timestep(cls, levels: Levels, size: int = 10) -> NoiseBins:
        """Bins that are equal parts of the training time steps, as published schedules have them.

        Args:
            levels: ``[T]`` level of every training step from t = 0 (nearly clean), falling: ``VariancePreserving.levels``, or what another
                scale's ``log_snr`` gives for them.
            size: number of bins, from 1 to T.

        Raises:
            InvalidInput: the levels rise, are equal on either side of an edge, or the size is out of range.
        """
        fall = as_levels(levels)
        starts = [-(-k * fall.size // size) for k in range(size - 1, 0, -1)]
        if np.any(fall[1:] > fall[:-1]) or not 1 <= size <= fall.size or any(fall[t] == fall[t - 1] for t in starts):
            raise InvalidInput(
                f"levels must fall with the time step (t = 0 first) so that {size} bins of equal time differ; size must be from "
                f"1 to the number of levels, {fall.size}."
            )
        return cls(tuple(edge_between(float(fall[t]), float(fall[t - 1])) for t in starts))


# ------------------------------------------------------------------------------------------------------------------------ schedule


@dataclass(frozen=True)
class DepthByNoise:
    """Which depth runs at which level of noise.

    Attributes:
        bins: B intervals of the level.
        depths: B whole numbers >= 0, noisiest bin first: blocks that run, or indices into a list of options.
    """

    bins: NoiseBins
    depths: tuple[int, ...]

    def __post_init__(self) -> None:
        depths = tuple(self.depths)
        if len(depths) != self.bins.size or any(isinstance(d, bool) or int(d) != d or d < 0 for d in depths):
            raise InvalidInput(f"depths must be one whole number >= 0 for each of {self.bins.size} bins, noisiest first; got {depths}.")
        object.__setattr__(self, "depths", tuple(int(d) for d in depths))

    def depth(self, log_snr: float) -> int:
        """Depth at a level."""
        return self.depths[self.bins.bin_of(log_snr)]

    def depths_at(self, levels: Levels) -> tuple[int, ...]:
        """Depth at each level of a sampler ``[S]``, in its order."""
        return tuple(self.depths[b] for b in self.bins.bins_of(levels))

    @property
    def monotone(self) -> bool:
        """Whether depth never falls from noisy to clean."""
        return all(a <= b for a, b in pairwise(self.depths))

    def mean_cost(self, levels: Levels, cost: Sequence[float] | Mapping[int, float]) -> float:
        """Mean over a sampler's steps.

        Args:
            levels: ``[S]`` of its steps.
            cost: cost of a step at depth d is ``cost[d]``; any unit.

        Raises:
            InvalidInput: a depth that is used has no cost.
        """
        used = self.depths_at(levels)
        missing = sorted({d for d in used if (d not in cost if isinstance(cost, Mapping) else d >= len(cost))})
        if missing:
            raise InvalidInput(f"cost has no entry for depth {missing}: give cost[d] for every depth that is used.")
        return math.fsum(float(cost[d]) for d in used) / len(used)


def published_schedule(blocks: int, bins: NoiseBins) -> DepthByNoise:
    """The one schedule that ASE released (Moon et al. 2024, "A Simple Early Exiting Framework", DiT-XL/2), for a model of any depth.

    The list gives blocks of 28 for each tenth of the time steps: all of them near the data, fewer than half near pure noise. For another
    depth every entry keeps its share, rounded to the nearest block, halves up, at least one.

    Args:
        blocks: of the model, at least 1.
        bins: ten, of equal time: `NoiseBins.by_timestep`.

    Raises:
        InvalidInput: an argument is out of range.
    """
    if blocks < 1 or bins.size != len(PUBLISHED_DEPTHS):
        raise InvalidInput(f"The published schedule needs blocks >= 1 and {len(PUBLISHED_DEPTHS)} bins, got {blocks} and {bins.size}.")
    full = PUBLISHED_DEPTHS[0]
    return DepthByNoise(bins, tuple(max(1, (2 * d * blocks + full) // (2 * full)) for d in reversed(PUBLISHED_DEPTHS)))
