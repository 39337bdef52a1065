"""How good generated images are: distances between sets of features, fidelity to the full model's images, and what is only noise.

Everything here is array code over features ``[N, D]`` or images; which network gives the features is the caller's choice, and every
figure is a figure *in those features*. Two things are kept apart, because caches and exits can change one and not the other:
*fidelity* compares image by image with what the full model makes of the same noise (`psnr`, `relative_l2`), *quality* compares sets of
images with real ones (`fid`, `kid`, `precision_recall`, `density_coverage`).

A Fréchet distance of N images is too large by about a constant over N, more so in more dimensions; `fid_floor` measures that on real
images, and `fid_difference` and `seed_difference` say how far two distances differ by chance.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.core.bundle import load_bundle, save_bundle
from offramp.core.certificate import Estimate
from offramp.core.errors import ArtifactError, FingerprintMismatch, InvalidInput
from offramp.measure.statistics import t_quantile

_KIND = "feature-statistics"


def _features(values: Tensor, name: str, least: int = 1) -> Tensor:
    """``[N, D]`` float64 on the device it came on, N at least ``least``, every number finite."""
    if not isinstance(values, Tensor) or values.ndim != 2 or values.shape[1] == 0 or not values.is_floating_point():
        given = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise InvalidInput(f"{name} must be floating-point features [items, dimensions], got {given}.")
    if len(values) < least:
        raise InvalidInput(f"{name} needs at least {least} items, got {len(values)}.")
    x = values.detach().double()
    if not bool(x.isfinite().all()):
        rows = int((~x.isfinite().all(1)).sum())
        raise InvalidInput(f"{name} holds NaN or infinity in {rows} of {len(x)} items; look at the images they were made from.")
    return x


def _same_width(a: Tensor, b: Tensor, names: str) -> None:
    if a.shape[1] != b.shape[1]:
        raise InvalidInput(f"{names} must come from one feature network, got {a.shape[1]} and {b.shape[1]} dimensions.")


# ------------------------------------------------------------------------------------------------ mean and covariance


@dataclass(frozen=True)
class FeatureStatistics:
    """What the Fréchet distance needs of a set of images, whatever its size.

    Attributes:
        count: items, >= 1.
        mean: ``[D]`` float64 on the CPU.
        covariance: ``[D, D]`` float64 on the CPU, symmetric, divided by ``count - 1``; zeros for one item.
        network: fingerprint of the network that gave the features, or ``""``; statistics of different networks are not compared.
    """

    count: int
    mean: Tensor
    covariance: Tensor
    network: str = ""

    def __post_init__(self) -> None:
        d = self.mean.numel()
        if self.mean.ndim != 1 or d == 0 or self.covariance.shape != (d, d):
            raise InvalidInput(
                f"mean must be [D] and covariance [D, D] with D >= 1, got {tuple(self.mean.shape)} and {tuple(self.covariance.shape)}."
            )
        if self.count < 1:
            raise InvalidInput(f"Statistics need at least one item, got count {self.count}.")
        for name in ("mean", "covariance"):
            value: Tensor = getattr(self, name)
            if value.dtype != torch.float64 or value.device.type != "cpu" or not bool(value.isfinite().all()):
                raise InvalidInput(f"{name} must be finite float64 on the CPU, got {value.dtype} on {value.device}.")

    @property
    def dimensions(self) -> int:
        return self.mean.numel()

    @classmethod
    def of(cls, features: Tensor | Iterable[Tensor], network: str = "") -> FeatureStatistics:
        """Mean and covariance of features, all at once or batch by batch; batches may be on any device.

        Args:
            features: ``[N, D]``, or an iterable of such batches, with at least one item.
            network: fingerprint of the network that gave them.
        """
        total: FeatureStatistics | None = None
        for batch in [features] if isinstance(features, Tensor) else features:
            x = _features(batch, "features")
            mean = x.mean(0)
            spread = (x - mean).T @ (x - mean) / max(len(x) - 1, 1)
            part = cls(len(x), mean.cpu(), spread.cpu(), network)
            total = part if total is None else total.merge(part)
        if total is None:
            raise InvalidInput("features is an iterable without a single batch; statistics need at least one item.")
        return total

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Statistics of both sets together, exact up to rounding (Chan, Golub and LeVeque 1979, eq. 2.1)."""
        _comparable(self, other)
        count = self.count + other.count
        gap = other.mean - self.mean
        scatter = self.covariance * (self.count - 1) + other.covariance * (other.count - 1)
        scatter = scatter + torch.outer(gap, gap) * (self.count * other.count / count)
        return FeatureStatistics(count, self.mean + gap * (other.count / count), scatter / max(count - 1, 1), self.network or other.network)

    def save(self, folder: str | os.PathLike[str], name: str = "features") -> None:
        """Write ``<name>.json`` and ``<name>.safetensors`` into ``folder``, atomically."""
        content = {"count": self.count, "dimensions": self.dimensions, "network": self.network}
        save_bundle(folder, name, _KIND, content, {"mean": self.mean, "covariance": self.covariance})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], name: str = "features") -> FeatureStatistics:
        """Read what `save` wrote.

        Raises:
            ArtifactError: a file is missing, truncated, altered or foreign.
        """
        content, tensors = load_bundle(folder, name, _KIND)
        try:
            return cls(int(content["count"]), tensors["mean"], tensors["covariance"], str(content["network"]))
        except (KeyError, TypeError, InvalidInput) as error:
            raise ArtifactError(f"{folder}/{name}.json is not complete: {error}.") from error


def _comparable(a: FeatureStatistics, b: FeatureStatistics) -> None:
    if a.dimensions != b.dimensions:
        raise InvalidInput(f"Statistics of one feature network are needed, got {a.dimensions} and {b.dimensions} dimensions.")
    if a.network and b.network and a.network != b.network:
        raise FingerprintMismatch(
            f"The statistics come from two feature networks ({a.network[:12]}... and {b.network[:12]}...); distances between them mean "
            "nothing. Compute both with one network."
        )


# ------------------------------------------------------------------------------------------------ Fréchet distance


def _factor(covariance: Tensor) -> Tensor:
    """F ``[D, D]`` with ``F F^T = covariance``; what rounding made negative is taken for zero."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * values.clamp(min=0).sqrt()


def _frechet(mean_a: Tensor, factor_a: Tensor, mean_b: Tensor, factor_b: Tensor) -> float:
    """Distance from means and factors of covariances.

    ``tr (A^1/2 B A^1/2)^1/2`` is the sum of the singular values of ``F_A^T F_B``: the eigenvalues of the symmetric product are their
    squares. Taking the singular values spares the root of a rounding error, which is 1e-8 where the error is 1e-16.
    """
    cross = torch.linalg.svdvals(factor_a.T @ factor_b).sum()
    spread = factor_a.square().sum() + factor_b.square().sum() - 2 * cross
    return max(0.0, float((mean_a - mean_b).square().sum() + spread))


def fid(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Fréchet distance of two Gaussians with these means and covariances (Heusel et al. 2017, eq. 6); symmetric, 0 for equal ones.

    Args:
        a: at least two items; fewer items than dimensions give a singular covariance, and a distance that is mostly bias.
        b: the same features.

    Raises:
        InvalidInput: fewer than two items or different dimensions.
        FingerprintMismatch: features of different networks.
    """
    _comparable(a, b)
    if min(a.count, b.count) < 2:
        raise InvalidInput(f"A Fréchet distance needs at least two items on each side, got {a.count} and {b.count}.")
    return _frechet(a.mean, _factor(a.covariance), b.mean, _factor(b.covariance))


@dataclass(frozen=True)
class FidFloor:
    """Fréchet distance between disjoint sets of real images: what images as good as real ones would get.

    Attributes:
        values: one for each random draw of the sets.
        count: items of the one set.
        reference: items of the other.
    """

    values: tuple[float, ...]
    count: int
    reference: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over draws; they share items, so it is somewhat too small. 0 for one draw."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def at(self, count: int, reference: int) -> float:
        """The mean floor carried over to other sizes by its leading term, proportional to ``1 / count + 1 / reference``.

        For sets larger than the real images allow to draw twice. Chong and Forsyth (2020) give the 1/N law of the bias.
        """
        if min(count, reference) < 2:
            raise InvalidInput(f"count and reference must be >= 2, got {count} and {reference}.")
        return self.mean * (1 / count + 1 / reference) / (1 / self.count + 1 / self.reference)


def fid_floor(real: Tensor, count: int, reference: int | None = None, *, draws: int = 10, seed: int = 0) -> FidFloor:
    """The bias of a distance at ``count`` images, estimated on real images against other real images.

    Args:
        real: ``[N, D]`` features of real images.
        count: images as many as will be generated, >= 2.
        reference: images on the other side, disjoint from the first; as many by default.
        draws: random splits, >= 1; a few dominant directions of the features make single draws differ widely.
        seed: of the splits.

    Raises:
        InvalidInput: ``count + reference`` is more than there are; draw fewer and use `FidFloor.at`.
    """
    x = _features(real, "real", 4)
    other = count if reference is None else reference
    if min(count, other) < 2 or draws < 1:
        raise InvalidInput(f"count and reference must be >= 2 and draws >= 1, got {count}, {other} and {draws}.")
    if count + other > len(x):
        raise InvalidInput(
            f"{count} and {other} disjoint images were asked for, there are {len(x)}. Draw fewer and carry the floor over with FidFloor.at."
        )
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(draws):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        values.append(fid(FeatureStatistics.of(x[order[:count]]), FeatureStatistics.of(x[order[count : count + other]])))
    return FidFloor(tuple(values), count, other)


# ------------------------------------------------------------------------------------------------ chance


class _Groups:
    """Items in random groups, so that resampling costs a sum over groups instead of one over items."""

    def __init__(self, x: Tensor, order: Tensor, groups: int) -> None:
        self.centre = x.mean(0)
        parts = (x - self.centre)[order.to(x.device)].tensor_split(groups)
        self.count = torch.tensor([len(p) for p in parts], dtype=torch.float64)
        self.sums = torch.stack([p.sum(0) for p in parts]).cpu()
        self.squares = torch.stack([p.T @ p for p in parts]).cpu()
        self.centre = self.centre.cpu()

    def distance(self, weights: Tensor, mean: Tensor, factor: Tensor) -> float:
        """Distance to (mean, factor) with each group taken ``weights[g]`` times."""
        n = float(weights @ self.count)
        shift = weights @ self.sums / n
        square = torch.tensordot(weights, self.squares, dims=1) / n
        covariance = (square - torch.outer(shift, shift)) * (n / (n - 1))
        return _frechet(self.centre + shift, _factor(covariance), mean, factor)


def fid_difference(
    first: Tensor,
    second: Tensor,
    reference: FeatureStatistics,
    level: float = 0.95,
    *,
    paired: bool = True,
    draws: int = 200,
    groups: int = 200,
    seed: int = 0,
) -> Estimate:
    """``fid(first, reference) - fid(second, reference)`` with a bootstrap interval over images; negative where the first is better.

    The basic bootstrap interval (Davison and Hinkley 1997, section 5.2): a resample has the bias of a sample once more, and this interval
    takes it off instead of adding it. Images are resampled in random groups, which gives the same spread for less work. The
    reference is taken as given; the spread over trainings is another matter, see `seed_difference`.

    Args:
        first: ``[N, D]`` features of generated images.
        second: ``[M, D]`` features of others.
        reference: of real images.
        level: two-sided, in (0, 1).
        paired: row i of both was made from the same noise (then M = N), so that both are resampled together.
        draws: resamples, >= 20.
        groups: of images, >= 10; as many as there are images if those are fewer.
        seed: of groups and resamples.
    """
    a, b = _features(first, "first", 10), _features(second, "second", 10)
    _same_width(a, b, "first and second")
    if a.shape[1] != reference.dimensions:
        raise InvalidInput(f"first has {a.shape[1]} dimensions, the reference {reference.dimensions}: use one feature network.")
    if not 0 < level < 1 or draws < 20 or groups < 10:
        raise InvalidInput(f"level must be inside (0, 1), draws >= 20 and groups >= 10, got {level}, {draws} and {groups}.")
    if paired and len(a) != len(b):
        raise InvalidInput(f"Paired images are equally many, got {len(a)} and {len(b)}. Give paired=False if their noise differs.")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(a), generator=generator)
    one = _Groups(a, order, min(groups, len(a)))
    two = _Groups(b, order if paired else torch.randperm(len(b), generator=generator), min(groups, len(b)))
    mean, factor = reference.mean, _factor(reference.covariance)

    def taken(of: _Groups) -> Tensor:
        drawn = torch.randint(len(of.count), (len(of.count),), generator=generator)
        return torch.bincount(drawn, minlength=len(of.count)).double()

    value = one.distance(torch.ones_like(one.count), mean, factor) - two.distance(torch.ones_like(two.count), mean, factor)
    found = []
    for _ in range(draws):
        weights = taken(one)
        found.append(one.distance(weights, mean, factor) - two.distance(weights if paired else taken(two), mean, factor))
    tails = torch.tensor([(1 + level) / 2, (1 - level) / 2], dtype=torch.float64)
    high, low = torch.quantile(torch.tensor(found, dtype=torch.float64), tails).tolist()
    return Estimate(value, 2 * value - high, 2 * value - low, level)


def seed_difference(first: Sequence[float], second: Sequence[float], level: float = 0.95, *, paired: bool = True) -> Estimate:
    """Mean of ``first`` minus mean of ``second`` over repetitions, with a t interval.

    Args:
        first: a figure of each repetition, at least two.
        second: the same of another system.
        level: two-sided, in (0, 1).
        paired: repetition i of both shares its seed; otherwise Welch's interval (1947), which needs no equal spread.
    """
    if len(first) < 2 or len(second) < 2 or not all(math.isfinite(v) for v in (*first, *second)):
        raise InvalidInput(f"At least two finite figures on each side are needed to see a spread, got {list(first)} and {list(second)}.")
    if paired:
        if len(first) != len(second):
            raise InvalidInput(f"Paired repetitions are equally many, got {len(first)} and {len(second)}. Give paired=False otherwise.")
        gaps = [a - b for a, b in zip(first, second, strict=True)]
        mean, error, freedom = statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps)), len(gaps) - 1.0
    else:
        mean = statistics.fmean(first) - statistics.fmean(second)
        u, v = statistics.variance(first) / len(first), statistics.variance(second) / len(second)
        error = math.sqrt(u + v)
        freedom = (u + v) ** 2 / (u * u / (len(first) - 1) + v * v / (len(second) - 1)) if u + v > 0 else len(first) + len(second) - 2.0
    half = t_quantile(freedom, level) * error
    return Estimate(mean, mean - half, mean + half, level)


def outside_spread(difference: Estimate) -> bool:
    """Whether a difference is more than chance: its interval leaves 0 out. Only then is one system called better than another."""
    return difference.low > 0 or difference.high < 0


# ------------------------------------------------------------------------------------------------ kernel distance


@dataclass(frozen=True)
class KernelDistance:
    """Kernel distance over random subsets.

    Attributes:
        mean: over subsets; unbiased, so it may be a little below 0.
        spread: standard deviation over subsets, of one subset's figure and not of the mean; 0 for one subset.
        subsets: how many.
        size: items of each side in a subset.
    """

    mean: float
    spread: float
    subsets: int
    size: int


def kid(features_a: Tensor, features_b: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> KernelDistance:
    """Squared maximum mean discrepancy with the kernel ``(x . y / D + 1)^3``, unbiased (Binkowski et al. 2018, section 4).

    Unlike the Fréchet distance it has no bias that depends on the number of images.

    Args:
        features_a: ``[N, D]``.
        features_b: ``[M, D]``.
        subsets: random subsets, without replacement inside each, >= 1.
        size: items per side of a subset, >= 2; all where fewer are there.
        seed: of the subsets.
    """
    a, b = _features(features_a, "features_a", 2), _features(features_b, "features_b", 2)
    _same_width(a, b, "features_a and features_b")
    b = b.to(a.device)
    if subsets < 1 or size < 2:
        raise InvalidInput(f"subsets must be >= 1 and size >= 2, got {subsets} and {size}.")
    n = min(size, len(a), len(b))
    if n == len(a) == len(b):
        subsets = 1  # every subset would be everything
    generator = torch.Generator().manual_seed(seed)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        base = (x @ y.T).div_(x.shape[1]).add_(1)
        return base * base * base

    found = []
    for _ in range(subsets):
        x = a[torch.randperm(len(a), generator=generator)[:n].to(a.device)]
        y = b[torch.randperm(len(b), generator=generator)[:n].to(b.device)]
        xx, yy = kernel(x, x), kernel(y, y)
        within = xx.sum() - xx.diagonal().sum() + yy.sum() - yy.diagonal().sum()
        found.append(float(within / (n * (n - 1)) - 2 * kernel(x, y).mean()))
    return KernelDistance(statistics.fmean(found), statistics.stdev(found) if subsets > 1 else 0.0, subsets, n)


# ------------------------------------------------------------------------------------------------ neighbourhoods


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1].

    Attributes:
        precision: generated images that lie among the real ones: are they good?
        recall: real images that lie among the generated ones: are they all there?
    """

    precision: float
    recall: float


@dataclass(frozen=True)
class DensityCoverage:
    """Two figures that outliers cannot raise much.

    Attributes:
        density: real neighbourhoods that hold a generated image, counted with multiplicity over what is expected; >= 0, about 1 if both
            sets are alike, and possibly above 1.
        coverage: share of real images with a generated one in their neighbourhood, in [0, 1]; ``1 - 2^-k`` if both sets are alike
            and equally many.
    """

    density: float
    coverage: float


class _Balls:
    """Every item of a set with the ball that reaches its k-th nearest other item."""

    def __init__(self, centres: Tensor, k: int, chunk: int, slack: float) -> None:
        self.centres, self.chunk = centres, chunk
        radii = []
        for start in range(0, len(centres), chunk):
            rows = centres[start : start + chunk]
            d = _squared(rows, centres)
            here = torch.arange(len(rows), device=d.device)
            d[here, start + here] = math.inf  # not its own neighbour
            radii.append(d.topk(k, dim=1, largest=False).values[:, -1])
        # Rounding may not move an item out of the ball of its own copy.
        self.squared_radii = torch.cat(radii) + slack

    def holding(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """How many balls hold each item ``[N]`` int64, and whether each ball holds any item ``[M]`` bool."""
        counts, any_item = [], torch.zeros(len(self.centres), dtype=torch.bool, device=self.centres.device)
        for start in range(0, len(items), self.chunk):
            inside = _squared(items[start : start + self.chunk], self.centres) <= self.squared_radii
            counts.append(inside.sum(1))
            any_item |= inside.any(0)
        return torch.cat(counts), any_item


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances ``[N, M]``."""
    return torch.addmm(y.square().sum(1)[None], x, y.T, alpha=-2).add_(x.square().sum(1)[:, None])


def _both(real: Tensor, generated: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor, float]:
    """Both sets, moved so that little is lost to rounding, and the rounding error of a squared distance."""
    if k < 1 or chunk < 1:
        raise InvalidInput(f"k and chunk must be >= 1, got {k} and {chunk}.")
    a, b = _features(real, "real", k + 1), _features(generated, "generated", k + 1)
    _same_width(a, b, "real and generated")
    centre = a.mean(0)
    a, b = a - centre, b.to(a.device) - centre
    largest = float(torch.cat([a.square().sum(1), b.square().sum(1)]).max())
    return a, b, 4 * a.shape[1] * torch.finfo(torch.float64).eps * largest


def precision_recall(real: Tensor, generated: Tensor, k: int = 3, *, chunk: int = 1024) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2): membership in the other set's k-nearest-neighbour balls.

    Both depend on the number of images; compare only figures of equal N, M and k.

    Args:
        real: ``[N, D]`` features, N > k.
        generated: ``[M, D]`` features, M > k.
        k: neighbour that a ball reaches.
        chunk: rows at a time; memory is about ``24 * chunk * max(N, M)`` bytes, the result is the same.
    """
    a, b, slack = _both(real, generated, k, chunk)
    in_real, _ = _Balls(a, k, chunk, slack).holding(b)
    in_generated, _ = _Balls(b, k, chunk, slack).holding(a)
    return PrecisionRecall(float((in_real > 0).double().mean()), float((in_generated > 0).double().mean()))


def density_coverage(real: Tensor, generated: Tensor, k: int = 5, *, chunk: int = 1024) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020, eq. 3 and 4): only real images have balls, so that a generated outlier has no large one.

    Args:
        real: ``[N, D]`` features, N > k.
        generated: ``[M, D]`` features, M > k.
        k: neighbour that a ball reaches.
        chunk: as in `precision_recall`.
    """
    a, b, slack = _both(real, generated, k, chunk)
    counts, covered = _Balls(a, k, chunk, slack).holding(b)
    return DensityCoverage(float(counts.sum()) / (k * len(b)), float(covered.double().mean()))


# ------------------------------------------------------------------------------------------------ image by image


def _pairs(images: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if images.shape != reference.shape or images.ndim < 2 or images.numel() == 0:
        raise InvalidInput(
            f"Both sides must be the same non-empty [items, ...], image by image, got {tuple(images.shape)} and {tuple(reference.shape)}."
        )
    return images.detach().double().flatten(1), reference.detach().double().flatten(1)


def psnr(images: Tensor, reference: Tensor, data_range: float) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, ``[B]`` float64; infinite where both are equal.

    Args:
        images: ``[B, ...]``.
        reference: ``[B, ...]``, e.g. the full model's images from the same noise.
        data_range: largest minus smallest possible value, > 0: 2 for images in [-1, 1], 255 for bytes.
    """
    if not (math.isfinite(data_range) and data_range > 0):
        raise InvalidInput(f"data_range must be a positive number (2 for images in [-1, 1]), got {data_range}.")
    a, b = _pairs(images, reference)
    return 20 * math.log10(data_range) - 10 * (a - b).square().mean(1).log10()


def relative_l2(images: Tensor, reference: Tensor) -> Tensor:
    """``|images - reference| / |reference|`` of each item, ``[B]`` float64; of images, features or states.

    0 where both are zero, infinite where only the reference is.
    """
    a, b = _pairs(images, reference)
    gap = (a - b).norm(dim=1)
    return torch.where(gap == 0, gap, gap / b.norm(dim=1))


# ------------------------------------------------------------------------------------------------ what the step alone says


def _depths(depth: Tensor) -> Tensor:
    if depth.ndim != 2 or depth.numel() == 0:
        raise InvalidInput(f"depth must be [samples, steps], got {tuple(depth.shape)}.")
    x = depth.detach().to("cpu", torch.float64)
    if not bool(x.isfinite().all()):
        raise InvalidInput("depth holds NaN or infinity; it is the depth run (blocks, or a share of them) of every sample at every step.")
    return x


def explained_by_step(depth: Tensor) -> float:
    """R squared of depth on the step: the share of its variance over samples and steps that a schedule could have known, in [0, 1].

    At 1 every sample does the same and the per-sample rule is a schedule. Depths drawn blindly give about ``1 / S`` and not 0, for S
    samples. A depth that never varies is explained: 1.

    Args:
        depth: ``[S, T]`` of S samples at T steps (noise levels), in any unit.
    """
    x = _depths(depth)
    total = (x - x.mean()).square().sum()
    within = (x - x.mean(0)).square().sum()
    scale = x.square().sum()
    if float(total) <= 1e-20 * float(scale):  # a constant, up to rounding
        return 1.0
    return max(0.0, 1 - float(within / total))


def variance_within_step(depth: Tensor) -> Tensor:
    """``[T]`` float64 variance of depth across samples at each step, in the square of its unit: what is decided per sample.

    Args:
        depth: ``[S, T]``.
    """
    return _depths(depth).var(0, correction=0)
