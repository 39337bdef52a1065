"""Risk control: choose among settings so that the true risk stays below a limit, with high probability or in expectation.

A *family* lists settings from strict to permissive without looking at the items that certify them. A *procedure* marks which of them
the items certify. `calibrate` then takes the cheapest certified one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from offramp.budget.bounds import WSR, Bound, Sample, default_bound
from offramp.budget.mean_cost import CostMethod, OptimalStopping, Problem
from offramp.budget.replay import F32, F64, Bools, Loss, PathCurve, path_curve
from offramp.core.errors import InvalidInput
from offramp.core.protocols import Rule

# --------------------------------------------------------------------------------------------------------------------- families


@dataclass(frozen=True)
class SharedThreshold:
    """One threshold for all exits on a fixed grid over the rule's range. Every item certifies, since no item shaped the grid.

    Half of the grid is even and half crowds towards the upper end, where confident networks put most scores.

    Attributes:
        size: number of thresholds, >= 2.
        low: lower end; the rule's when ``None``.
        high: upper end; the rule's when ``None``.
    """

    size: int = 200
    low: float | None = None
    high: float | None = None

    def settings(self, rule: Rule | None, exits: int) -> F64:
        """``[size + 1, exits]``, never leaving first.

        Raises:
            InvalidInput: the rule's range is unknown and none is given.
        """
        bounds = getattr(rule, "bounds", None)
        low, high = (
            (self.low, self.high)
            if bounds is None
            else (
                bounds[0] if self.low is None else self.low,
                bounds[1] if self.high is None else self.high,
            )
        )
        if low is None or high is None or not (np.isfinite(low) and np.isfinite(high) and low < high) or self.size < 2:
            raise InvalidInput(
                f"A fixed grid needs a finite range and at least two thresholds, got [{low}, {high}] and {self.size}. "
                f"{type(rule).__name__} does not state its range: give SharedThreshold(low=..., high=...), or use DesignedPath()."
            )
        even = (np.arange(self.size - self.size // 2) + 0.5) / (self.size - self.size // 2)
        crowded = np.geomspace(1e-5, 0.5, self.size // 2)
        grid = high - (high - low) * np.sort(np.concatenate([even, crowded]))
        out = np.full((self.size + 1, exits), -np.inf)
        out[0, :-1] = np.inf
        out[1:, :-1] = grid[:, None]
        return out


@dataclass(frozen=True)
class DesignedPath:
    """Threshold vectors shaped on a random part of the items and certified on the rest, so that the test stays valid.

    Attributes:
        design_share: part of the items that shapes the path, in (0, 1).
        seed: of the split.
        size: number of settings, >= 2.
        most: design items suffice at some point; the rest certifies.
        shape: the mean-cost method whose settings are followed from never leaving to leaving at once.
    """

    design_share: float = 0.3
    seed: int = 0
    size: int = 100
    most: int = 20_000
    shape: CostMethod = field(default_factory=OptimalStopping)

    def __post_init__(self) -> None:
        if not 0 < self.design_share < 1 or self.size < 2:
            raise InvalidInput(f"DesignedPath needs a share in (0, 1) and two or more settings, got {self.design_share} and {self.size}.")

    def split(self, items: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows that design and rows that certify, each ascending.

        Raises:
            InvalidInput: one part would be empty.
        """
        first = min(round(self.design_share * items), self.most)
        if first in (0, items):
            raise InvalidInput(f"{items} items cannot be split at {self.design_share} into two parts. Record more items.")
        chosen = np.zeros(items, bool)
        chosen[np.random.default_rng(self.seed).permutation(items)[:first]] = True
        return np.flatnonzero(chosen), np.flatnonzero(~chosen)


# ------------------------------------------------------------------------------------------------------------------- procedures


class Procedure(ABC):
    """Marks the settings that a sample certifies. Subclasses are frozen data.

    Attributes:
        family: where settings come from; ``None`` for `default_family`.
        guaranteed: whether a certified setting comes with a guarantee.
        monotone: whether losses are first made monotone along the path.
    """

    family: SharedThreshold | DesignedPath | None
    guaranteed: ClassVar[bool] = True
    monotone: ClassVar[bool] = False
    name: ClassVar[str]

    @abstractmethod
    def certify(self, sample: Sample, alpha: float, delta: float) -> Bools:
        """Whether each setting ``[M]`` (strict to permissive) is certified to have mean loss at most ``alpha``."""

    def describe(self, sample: Sample) -> str:
        return self.name


@dataclass(frozen=True)
class LTT(Procedure):
    """Learn then Test (Angelopoulos et al. 2021): settings are tested in a fixed order until one fails.

    From strict to permissive every setting is tested at level delta as long as all before it passed; the chance that any certified
    setting exceeds the limit is at most delta, whatever the shape of the risk curve. With several starts, evenly spaced, each runs at
    ``delta / starts``: useful where the strict end itself fails (an error limit that only earlier exits meet).

    Attributes:
        bound: p-values. ``None`` takes the exact binomial for 0/1 losses and `WSR` otherwise. `HoeffdingBentkus`, the original's,
            ignores the variance: it cannot certify a signed accuracy drop of one point with fewer than about 46,000 items.
        family: settings.
        starts: fixed sequences, >= 1.
    """

    bound: Bound | None = None
    family: SharedThreshold | DesignedPath | None = None
    starts: int = 1
    name = "LTT"

    def __post_init__(self) -> None:
        if self.starts < 1:
            raise InvalidInput(f"LTT.starts must be at least 1, got {self.starts}.")

    def certify(self, sample: Sample, alpha: float, delta: float) -> Bools:
        level = delta / self.starts
        passed = (self.bound or default_bound(sample)).p_value(sample, alpha, level=level) <= level
        out = np.zeros(passed.size, bool)
        for start in np.unique(np.linspace(0, passed.size, self.starts, endpoint=False).astype(int)):
            stop = start + int(np.argmin(np.append(passed[start:], False)))
            out[start:stop] = True
        return out

    def describe(self, sample: Sample) -> str:
        return f"LTT, {type(self.bound or default_bound(sample)).__name__}"


@dataclass(frozen=True)
class RCPS(Procedure):
    """Risk-controlling prediction sets (Bates et al. 2021): the most permissive setting such that the upper bound there and at all
    stricter settings is within the limit.

    An upper bound is within the limit exactly when the limit's p-value is at most delta, so it is decided by one test per setting
    and the bound's value is computed only where it is shown. On a grid with one start this equals `LTT` with the same bound.
    """

    bound: Bound = field(default_factory=WSR)
    family: SharedThreshold | DesignedPath | None = None
    name = "RCPS"

    def certify(self, sample: Sample, alpha: float, delta: float) -> Bools:
        out: Bools = np.logical_and.accumulate(self.bound.p_value(sample, alpha, level=delta) <= delta)
        return out

    def describe(self, sample: Sample) -> str:
        return f"RCPS, {type(self.bound).__name__}"


@dataclass(frozen=True)
class CRC(Procedure):
    """Conformal risk control (Angelopoulos et al. 2022): the expected risk, over calibration items and the next one, is at most the limit.

    The most permissive setting with ``(n mean + B) / (n + 1) <= alpha`` where B is the largest possible loss. The theorem needs losses
    that do not fall as settings get more permissive, so each item's loss is replaced by the largest that it meets at this or any
    stricter setting. For a drop this makes the positive part of it count, for an error also late mistakes: the result is conservative.
    An error limit further assumes that never leaving meets it.
    """

    family: SharedThreshold | DesignedPath | None = None
    monotone = True
    name = "CRC"

    def certify(self, sample: Sample, alpha: float, delta: float) -> Bools:
        n = sample.items
        out: Bools = np.logical_and.accumulate((n * sample.natural(sample.mean) + sample.high) / (n + 1) <= alpha + 1e-12)
        return out


def default_family(rule: Rule, items: int) -> SharedThreshold | DesignedPath:
    """The fixed grid when the rule states its range and there are fewer than 5,000 items, else `DesignedPath`.

    Either is sound. With few items, the ones set aside for design weaken the certificate by more than a vector gains over one shared
    threshold; with many they cost nothing, and a vector wins where scores differ in scale between exits.
    """
    if items < 5000 and getattr(rule, "bounds", None) is not None:
        return SharedThreshold()
    return DesignedPath()


# --------------------------------------------------------------------------------------------------------------------- evidence

MAX_BLOCKS = 16_384


@dataclass(frozen=True)
class Evidence:
    """A path with what the certifying items say about it.

    Attributes:
        path: ``[M, K]``.
        rows: certifying items (int64), or ``None`` for all.
        curve: mean costs and shares.
        sample: losses of the settings.
    """

    path: F64
    rows: NDArray[np.int64] | None
    curve: PathCurve
    sample: Sample


def gather_evidence(
    cols: F32, cost: F64, loss: Loss, rule: Rule, family: SharedThreshold | DesignedPath, *, monotone: bool = False, seed: int = 0
) -> Evidence:
    """Lay out the family's settings and measure them on the items that may certify.

    Args:
        cols: ``[K-1, N]`` scores.
        cost: ``[K]``.
        loss: ``[N, K]``.
        rule: for its range.
        family: settings.
        monotone: see `path_curve`.
        seed: of the order in which items are read.
    """
    n = cols.shape[1]
    rows: NDArray[np.int64] | None = None
    if isinstance(family, SharedThreshold):
        path = family.settings(rule, cols.shape[0] + 1)
    else:
        design, rows = family.split(n)
        own = loss.values[torch.from_numpy(design)]
        problem = Problem(np.ascontiguousarray(cols[:, design]), cost, float(cost[-1]), own)
        path = family.shape.path(problem, family.size)
    items = cols.shape[1] if rows is None else int(rows.size)
    groups = min(items, MAX_BLOCKS)
    # Data sets are often sorted by class; a betting bound reads items in sequence, so the sequence is shuffled.
    blocks = np.random.default_rng(seed).permutation(items) * groups // items
    curve = path_curve(cols, path, cost, loss.values, rows=rows, blocks=blocks, monotone=monotone)
    if curve.loss is None:
        raise InvalidInput("Risk control needs losses.")
    scale = loss.high - loss.low
    mean, each = (np.clip((v - loss.low) / scale, 0, 1) for v in (curve.mean_loss, curve.loss))
    sample = Sample(mean, items, each, loss.low, loss.high, loss.binary)
    return Evidence(path, rows, curve, sample)
