"""What a user asks for. Targets are data; `calibrate` turns one into a plan, `All` asks for several at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from offramp.core.errors import InvalidInput


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise InvalidInput(f"{name} must be a positive finite number, got {value}.")


@dataclass(frozen=True)
class MeanCost:
    """Mean FLOPs per item at most ``fraction`` of the full model's.

    Attributes:
        fraction: share of the FLOPs of the model without heads, > 0. Never leaving costs slightly more than 1, for the heads.
    """

    fraction: float

    def __post_init__(self) -> None:
        _positive("MeanCost.fraction", self.fraction)


@dataclass(frozen=True)
class Risk:
    """A limit on quality loss; with ``delta`` it holds with probability at least ``1 - delta`` over the calibration items.

    Exactly one of the three limits is given, in (0, 1).

    Attributes:
        max_drop: mean loss above the full model's (for 0/1 error: accuracy given up). Needs labels.
        max_error: mean loss. Needs labels.
        max_disagreement: share of items answered otherwise than by the full model. Needs no labels.
        delta: allowed probability that the promise fails, in (0, 1).
        in_expectation: bound the expected risk over the draw of calibration items (CRC) instead; ``delta`` is then unused.
        signed: for ``max_drop``, let items that the early exit gets right and the full model wrong offset the others. ``False``
            counts only harm, which is stricter ("never worse").
    """

    max_drop: float | None = None
    max_error: float | None = None
    max_disagreement: float | None = None
    delta: float = 0.1
    in_expectation: bool = False
    signed: bool = True

    def __post_init__(self) -> None:
        given = {n: getattr(self, n) for n in ("max_drop", "max_error", "max_disagreement") if getattr(self, n) is not None}
        if len(given) != 1:
            raise InvalidInput(f"Risk needs exactly one of max_drop, max_error and max_disagreement, got {list(given) or 'none'}.")
        for name, value in [*given.items(), ("delta", self.delta)]:
            if not 0 < value < 1:
                raise InvalidInput(f"Risk.{name} must lie inside (0, 1), got {value}.")

    @property
    def name(self) -> str:
        """Which limit is set: ``max_drop``, ``max_error`` or ``max_disagreement``."""
        return next(n for n in ("max_drop", "max_error", "max_disagreement") if getattr(self, n) is not None)

    @property
    def limit(self) -> float:
        return float(getattr(self, self.name))


@dataclass(frozen=True)
class Latency:
    """Time until an item's answer is ready, by the trace's latency table. Exactly one limit is given.

    Attributes:
        mean_ms: limit on the mean over items, milliseconds.
        p95_ms: limit that at least 95 % of the items keep, milliseconds.
        batch_size: items that enter together, >= 1. The time to exit k is that of the whole batch up to there, without the time
            that compaction saves; it errs on the slow side.
    """

    mean_ms: float | None = None
    p95_ms: float | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        if (self.mean_ms is None) == (self.p95_ms is None):
            raise InvalidInput(f"Latency needs exactly one of mean_ms and p95_ms, got {self.mean_ms} and {self.p95_ms}.")
        _positive(f"Latency.{self.name}", self.limit)
        if self.batch_size < 1:
            raise InvalidInput(f"Latency.batch_size must be at least 1, got {self.batch_size}.")

    @property
    def name(self) -> str:
        return "mean_ms" if self.mean_ms is not None else "p95_ms"

    @property
    def limit(self) -> float:
        return float(getattr(self, self.name))


@dataclass(frozen=True)
class PeakCost:
    """A hard cap: no item ever goes deeper than the deepest exit whose cost is within ``fraction`` of the full model's FLOPs.

    Alone it gives a shallower model without early leaving; with another target (`All`) exits before the cap are used too.
    """

    fraction: float

    def __post_init__(self) -> None:
        _positive("PeakCost.fraction", self.fraction)


@dataclass(frozen=True)
class Utility:
    """Maximise ``quality - beta * mean cost``, quality = 1 - mean loss, cost as a fraction of the full model's FLOPs.

    Attributes:
        beta: price of the full model's FLOPs in units of loss, >= 0. 0.05 gives up 5 points of accuracy to save everything.
    """

    beta: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise InvalidInput(f"Utility.beta must be a finite number >= 0, got {self.beta}.")


@dataclass(frozen=True)
class ExitShares:
    """Given shares of the items leave at each exit, the most ready first.

    Attributes:
        shares: K numbers >= 0 that sum to 1, the model's own output last.
    """

    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(float(s) for s in self.shares))
        if not self.shares or any(not s >= 0 for s in self.shares) or abs(sum(self.shares) - 1) > 1e-6:
            raise InvalidInput(f"ExitShares needs non-negative shares that sum to 1, got {self.shares}.")


@runtime_checkable
class MeanAndCovariance(Protocol):
    """Statistics of a set of features, as `offramp.measure.image_quality.FeatureStatistics` holds them."""

    @property
    def count(self) -> int:
        """Items, >= 1."""
        ...

    @property
    def mean(self) -> Tensor:
        """``[D]``."""
        ...

    @property
    def covariance(self) -> Tensor:
        """``[D, D]``."""
        ...


@dataclass(frozen=True, eq=False)
class Quality:
    """Generated images whose Fréchet distance to real ones (FID) is at most a little above the full model's, at the least cost.

    For diffusion methods. Every setting that is looked at is run, from the same noise and conditions as the full model; a FID is in the
    features that are given here and compares with another only in the same features, reference and number of images. What is found is an
    estimate: a FID of finitely many images is biased and varies by chance, and the certificate says by how much.

    Attributes:
        max_fid_increase: limit on FID minus the full model's FID, finite and >= 0, in units of squared features.
        features: from images ``[B, C, H, W]`` float32 (what the sampler gives: of a pipeline in [0, 1]) to features ``[B, D]``. A module is
            put in evaluation mode and gets images on its device.
        reference: of real images: features ``[M, D]``, or their `offramp.measure.image_quality.FeatureStatistics`.
        samples: images that each FID is computed of, more than D and at least 10; as many again are held out. More of them make smaller
            differences visible.
        level: of the interval for the increase, in (0, 1).
    """

    max_fid_increase: float
    features: Callable[[Tensor], Tensor]
    reference: Tensor | MeanAndCovariance = field(repr=False)
    samples: int = 5000
    level: float = 0.95

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_fid_increase) and self.max_fid_increase >= 0):
            raise InvalidInput(
                f"Quality.max_fid_increase is how much the FID may rise above the full model's, a finite number >= 0; got "
                f"{self.max_fid_increase}. 0 asks for images that measure no worse."
            )
        if not callable(self.features):
            raise InvalidInput(
                f"Quality.features is a function from images [B, C, H, W] to features [B, D], such as a classifier without its last layer; "
                f"got {type(self.features).__name__}."
            )
        if not 0 < self.level < 1:
            raise InvalidInput(f"Quality.level must lie inside (0, 1), got {self.level}.")
        count, width = self._size()
        if self.samples < 10 or min(self.samples, count) <= width:
            raise InvalidInput(
                f"A Fréchet distance in {width} dimensions needs more than {width} images on each side, and 10 at least, or its "
                f"covariance is singular; got samples={self.samples} and {count} real images. Give more, or features of fewer dimensions."
            )

    @property
    def dimensions(self) -> int:
        """D."""
        return self._size()[1]

    def _size(self) -> tuple[int, int]:
        """Real images and dimensions of their features."""
        given = self.reference
        if isinstance(given, Tensor):
            if given.ndim != 2 or 0 in given.shape or not given.is_floating_point() or not bool(given.isfinite().all()):
                raise InvalidInput(
                    "Quality.reference are finite floating-point features [M, D] of real images, or their FeatureStatistics; got "
                    f"{given.dtype} {tuple(given.shape)}{'' if given.isfinite().all() else ' with NaN or infinity'}. Run real images "
                    "through the features first."
                )
            return int(given.shape[0]), int(given.shape[1])
        if not isinstance(given, MeanAndCovariance):
            raise InvalidInput(
                f"Quality.reference are features [M, D] of real images, or their FeatureStatistics; got {type(given).__name__}."
            )
        return given.count, given.mean.numel()


@dataclass(frozen=True, init=False)
class All:
    """Every target at once: `PeakCost`, any number of `MeanCost` and `Latency`, and at most one `Risk`.

    Among the settings that meet all, the one with the lowest loss is chosen. `Utility` and `ExitShares` determine the
    thresholds alone and combine with `PeakCost` only in the case of `Utility`.
    """

    targets: tuple[Target, ...] = field(default=())

    def __init__(self, *parts: Target, targets: tuple[Target, ...] = ()) -> None:
        flat: list[Target] = []
        for part in (*parts, *targets):
            flat.extend(part.targets if isinstance(part, All) else [part])
        if not flat:
            raise InvalidInput("All needs at least one target.")
        for part in flat:
            if not isinstance(part, (MeanCost, Risk, Latency, PeakCost, Utility, ExitShares)):
                raise InvalidInput(f"All combines targets, got {part!r}.")
        whole = [p for p in flat if isinstance(p, (Utility, ExitShares))]
        rest = [p for p in flat if not isinstance(p, (Utility, PeakCost))] if whole else []
        if len(whole) > 1 or len(rest) > (1 if whole and isinstance(whole[0], ExitShares) and len(flat) == 1 else 0):
            raise InvalidInput(f"{type(whole[0]).__name__} determines the thresholds by itself and cannot be combined so: {flat}.")
        if sum(isinstance(p, Risk) for p in flat) > 1:
            raise InvalidInput("All takes at most one Risk: two would share one delta. Certify the stricter one.")
        object.__setattr__(self, "targets", tuple(flat))


Target: TypeAlias = MeanCost | Risk | Latency | PeakCost | Utility | ExitShares | All
