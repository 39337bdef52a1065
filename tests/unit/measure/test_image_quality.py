"""Distances between sets of features against closed forms, their bias and spread by Monte Carlo, and what no order or chunk may change."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offramp.core.certificate import Estimate
from offramp.core.errors import ArtifactError, FingerprintMismatch, InvalidInput
from offramp.measure.image_quality import (
    FeatureStatistics,
    FidFloor,
    density_coverage,
    explained_by_step,
    fid,
    fid_difference,
    fid_floor,
    kid,
    outside_spread,
    precision_recall,
    psnr,
    relative_l2,
    seed_difference,
    variance_within_step,
)
from offramp.measure.statistics import t_quantile


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian(mean: Tensor, covariance: Tensor, count: int = 100) -> FeatureStatistics:
    return FeatureStatistics(count, mean.double(), covariance.double())


def spread(d: int, seed: int) -> Tensor:
    root = normal(d, d, seed=seed).double()
    return root @ root.T / d + 0.1 * torch.eye(d, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ statistics of features


@pytest.mark.parametrize("cuts", [[100], [1, 99], [50, 50], [33, 1, 1, 65]])
def test_batch_by_batch_is_all_at_once(cuts: list[int]) -> None:
    x = normal(100, 7) * 3 + 5
    whole, parts = FeatureStatistics.of(x), FeatureStatistics.of(x.split(cuts))
    assert parts.count == whole.count == 100
    torch.testing.assert_close(parts.mean, x.double().mean(0))
    torch.testing.assert_close(parts.covariance, torch.cov(x.double().T))
    torch.testing.assert_close(whole.covariance, parts.covariance)


def test_merging_does_not_depend_on_order_and_survives_a_large_mean() -> None:
    x = normal(300, 4) + 1e4
    a, b, c = (FeatureStatistics.of(p.double()) for p in x.split(100))
    one, other = a.merge(b).merge(c), c.merge(a).merge(b)
    torch.testing.assert_close(one.covariance, other.covariance, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(one.covariance, torch.cov((x.double() - x.double().mean(0)).T), rtol=1e-9, atol=1e-9)


def test_one_item_has_no_spread() -> None:
    one = FeatureStatistics.of(torch.ones(1, 3))
    assert one.count == 1 and float(one.covariance.abs().max()) == 0
    with pytest.raises(InvalidInput, match="at least two items"):
        fid(one, one)


def test_saved_statistics_come_back(tmp_path: Path) -> None:
    s = FeatureStatistics.of(normal(50, 5), network="a" * 64)
    s.save(tmp_path, "real")
    back = FeatureStatistics.load(tmp_path, "real")
    assert (back.count, back.network) == (50, "a" * 64)
    assert torch.equal(back.mean, s.mean) and torch.equal(back.covariance, s.covariance)
    (tmp_path / "real.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="truncated or was altered"):
        FeatureStatistics.load(tmp_path, "real")


def test_features_of_two_networks_are_not_compared() -> None:
    a, b = FeatureStatistics.of(normal(20, 3), "a" * 64), FeatureStatistics.of(normal(20, 3), "b" * 64)
    with pytest.raises(FingerprintMismatch, match="two feature networks"):
        fid(a, b)
    with pytest.raises(FingerprintMismatch):
        a.merge(b)
    assert fid(a, FeatureStatistics.of(normal(20, 3))) < 1e-12  # of unknown origin


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (torch.ones(3), r"\[items, dimensions\]"),
        (torch.ones(3, 2, dtype=torch.int64), "floating-point"),
        (torch.ones(0, 2), "at least 1"),
        (torch.tensor([[1.0, math.nan], [0.0, 1.0]]), "1 of 2 items"),
        ([], "without a single batch"),
    ],
)
def test_features_that_are_none_are_refused(wrong: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        FeatureStatistics.of(wrong)


def test_statistics_are_checked() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    with pytest.raises(InvalidInput, match=r"covariance \[D, D\]"):
        FeatureStatistics(3, torch.zeros(3, dtype=torch.float64), eye)
    with pytest.raises(InvalidInput, match="float64"):
        FeatureStatistics(3, torch.zeros(2), eye)
    with pytest.raises(InvalidInput, match="count 0"):
        FeatureStatistics(0, torch.zeros(2, dtype=torch.float64), eye)
    with pytest.raises(InvalidInput, match="2 and 3 dimensions"):
        fid(gaussian(torch.zeros(2), torch.eye(2)), gaussian(torch.zeros(3), torch.eye(3)))


# ------------------------------------------------------------------------------------------------ Fréchet distance


def test_fid_of_gaussians_that_commute() -> None:
    rotation = torch.linalg.qr(normal(6, 6).double()).Q
    a, b = torch.tensor([1.0, 2, 3, 4, 5, 0]).double(), torch.tensor([4.0, 2, 1, 0, 9, 1]).double()
    shift = torch.arange(6).double()
    found = fid(gaussian(shift, rotation @ a.diag() @ rotation.T), gaussian(torch.zeros(6), rotation @ b.diag() @ rotation.T))
    assert found == pytest.approx(float(shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()), rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_fid_of_gaussians_that_do_not_commute(seed: int) -> None:
    """In two dimensions the trace of a root has a closed form: tr M^(1/2) = (tr M + 2 det(M)^(1/2))^(1/2)."""
    a, b = spread(2, seed), spread(2, seed + 100)
    product = a @ b
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = float(a.trace() + b.trace() - 2 * root)
    assert fid(gaussian(torch.zeros(2), a), gaussian(torch.zeros(2), b)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_fid_of_samples_approaches_that_of_their_gaussians() -> None:
    a, b = spread(8, 1), spread(8, 2)
    exact = fid(gaussian(torch.full((8,), 0.3), a), gaussian(torch.zeros(8), b))
    x = normal(20_000, 8, seed=3).double() @ torch.linalg.cholesky(a).T + 0.3
    y = normal(20_000, 8, seed=4).double() @ torch.linalg.cholesky(b).T
    assert fid(FeatureStatistics.of(x), FeatureStatistics.of(y)) == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize("items", [3, 40, 500])
def test_fid_is_a_distance_also_where_covariances_are_singular(items: int) -> None:
    a = FeatureStatistics.of(normal(items, 40, seed=1) * 100 + 1000)
    b = FeatureStatistics.of(normal(items, 40, seed=2) * 100 + 1000)
    scale = float(a.covariance.trace())
    assert fid(a, a) < 1e-12 * scale
    assert fid(a, b) == pytest.approx(fid(b, a), rel=1e-9)
    assert fid(a, b) > 1e-3 * scale


def test_fid_falls_with_the_number_of_images_as_one_over_it() -> None:
    """Same distribution on both sides, so all of it is bias."""
    x = normal(16_000, 16)
    floors = [fid_floor(x, n, draws=8, seed=n) for n in (250, 500, 1000, 2000)]
    products = [f.mean * f.count for f in floors]
    assert max(products) / min(products) < 1.15
    assert floors[0].at(2000, 2000) == pytest.approx(floors[3].mean, rel=0.1)
    uneven = fid_floor(x, 500, 8000, draws=8)
    assert floors[1].at(500, 8000) == pytest.approx(uneven.mean, rel=0.1)
    assert (uneven.count, uneven.reference, len(uneven.values)) == (500, 8000, 8) and uneven.spread > 0


def test_a_floor_needs_disjoint_images() -> None:
    with pytest.raises(InvalidInput, match=r"FidFloor\.at"):
        fid_floor(normal(100, 3), 51)
    with pytest.raises(InvalidInput, match="draws >= 1"):
        fid_floor(normal(100, 3), 10, draws=0)
    with pytest.raises(InvalidInput, match=">= 2"):
        FidFloor((1.0,), 10, 10).at(1, 10)
    assert fid_floor(normal(100, 3), 50, draws=1).spread == 0


# ------------------------------------------------------------------------------------------------ chance


def test_the_bootstrap_interval_holds_the_true_difference() -> None:
    """Two generators at known distances from N(0, 1): the difference of their true Fréchet distances is 4 (0.25 - 0.16)."""
    real = gaussian(torch.zeros(4), torch.eye(4), 10**6)
    held = 0
    for trial in range(60):
        a, b = normal(400, 4, seed=2 * trial) + 0.5, normal(400, 4, seed=2 * trial + 1) + 0.4
        e = fid_difference(a, b, real, 0.95, paired=False, draws=60, groups=50, seed=trial)
        held += e.low <= 4 * (0.25 - 0.16) <= e.high
    assert held >= 51  # of 60; fewer has a probability below 0.003 where the interval covers 95 %


def test_equal_generators_are_rarely_called_different() -> None:
    real = gaussian(torch.zeros(4), torch.eye(4), 10**6)
    different = sum(
        outside_spread(
            fid_difference(normal(300, 4, seed=3 * t) * 1.3, normal(300, 4, seed=3 * t + 1) * 1.3, real, paired=False, draws=60, groups=60)
        )
        for t in range(40)
    )
    assert different <= 6  # 2 expected


def test_the_interval_takes_the_bias_of_few_images_off() -> None:
    """Both are as good as can be; the fewer images have the larger distance for being few."""
    real = gaussian(torch.zeros(8), torch.eye(8), 10**6)
    many, few = normal(4000, 8), normal(80, 8, seed=1)
    e = fid_difference(few, many, real, paired=False, draws=100)
    assert e.value == pytest.approx(fid(FeatureStatistics.of(few), real) - fid(FeatureStatistics.of(many), real), abs=1e-9)
    assert e.value > 0.1 and not outside_spread(e)


def test_pairing_sees_a_difference_that_is_lost_without_it() -> None:
    real = FeatureStatistics.of(normal(5000, 6, seed=9))
    noise = normal(1000, 6)
    first, second = noise + 0.30, noise + 0.31
    together = fid_difference(first, second, real, draws=60)
    apart = fid_difference(first, second, real, paired=False, draws=60)
    exact = fid(FeatureStatistics.of(first), real) - fid(FeatureStatistics.of(second), real)
    assert (together.value, apart.value) == pytest.approx((exact, exact), abs=1e-9)
    assert together.high < 0 and outside_spread(together) and not outside_spread(apart)
    assert together.high - together.low < 0.2 * (apart.high - apart.low)
    back = fid_difference(second, first, real, draws=60)
    assert (back.value, back.low, back.high) == pytest.approx((-together.value, -together.high, -together.low))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"second": normal(49, 3)}, "paired=False"),
        ({"second": normal(50, 4)}, "one feature network"),
        ({"level": 1.0}, "inside"),
        ({"draws": 5}, "draws >= 20"),
        ({"first": normal(5, 3)}, "at least 10"),
        ({"reference": gaussian(torch.zeros(2), torch.eye(2))}, "reference 2"),
    ],
)
def test_differences_check_what_they_get(change: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {
        "first": normal(50, 3),
        "second": normal(50, 3, seed=1),
        "reference": gaussian(torch.zeros(3), torch.eye(3)),
    }
    with pytest.raises(InvalidInput, match=words):
        fid_difference(**(given | change))


@pytest.mark.parametrize(
    ("freedom", "level", "t"),
    [(1, 0.95, 12.7062047), (2, 0.95, 4.30265273), (4, 0.99, 4.60409487), (10, 0.9, 1.81246112), (1e6, 0.95, 1.95996635)],
)
def test_t_quantiles_are_those_of_tables(freedom: float, level: float, t: float) -> None:
    assert t_quantile(freedom, level) == pytest.approx(t, rel=1e-6)


def test_seed_differences() -> None:
    e = seed_difference([3.0, 4.0, 5.0], [1.0, 2.5, 2.5])
    half = 4.30265273 * torch.tensor([2.0, 1.5, 2.5]).std().item() / math.sqrt(3)
    assert (e.value, e.low, e.high) == pytest.approx((2.0, 2 - half, 2 + half), rel=1e-6)
    assert outside_spread(e)
    welch = seed_difference([1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0], paired=False)  # equal spread: 6 degrees of freedom
    half = 2.44691185 * math.sqrt(2 * (5 / 3) / 4)
    assert (welch.value, welch.high) == pytest.approx((-1.0, -1 + half), rel=1e-6)
    assert not outside_spread(welch)
    same = seed_difference([2.0, 2.0], [2.0, 2.0], paired=False)
    assert (same.low, same.high) == (0.0, 0.0) and not outside_spread(same)
    with pytest.raises(InvalidInput, match="At least two"):
        seed_difference([1.0], [2.0])
    with pytest.raises(InvalidInput, match="paired=False"):
        seed_difference([1.0, 2.0], [2.0, 3.0, 4.0])


@pytest.mark.parametrize("paired", [True, False])
def test_seed_intervals_cover(paired: bool) -> None:
    held = 0
    for trial in range(300):
        a, b = (normal(3, seed=trial) + 1).tolist(), (3 * normal(3, seed=trial + 10_000)).tolist()
        e = seed_difference(a, b, 0.9, paired=paired)
        held += e.low <= 1 <= e.high
    assert 0.85 <= held / 300 <= 0.97  # Welch's is somewhat wide with three of each


def test_outside_needs_zero_outside() -> None:
    assert outside_spread(Estimate(1, 0.1, 2)) and outside_spread(Estimate(-1, -2, -0.1))
    assert not outside_spread(Estimate(1, 0.0, 2)) and not outside_spread(Estimate(1, -1, 3))


# ------------------------------------------------------------------------------------------------ kernel distance


def test_kid_is_the_unbiased_estimator() -> None:
    x, y = normal(9, 3), normal(9, 3, seed=1) + 0.5
    total = 0.0
    for i in range(9):
        for j in range(9):
            if i != j:
                total += ((float(x[i] @ x[j]) / 3 + 1) ** 3 + (float(y[i] @ y[j]) / 3 + 1) ** 3) / 72
            total -= 2 * (float(x[i] @ y[j]) / 3 + 1) ** 3 / 81
    found = kid(x, y)
    assert found.mean == pytest.approx(total, rel=1e-4) and (found.subsets, found.size, found.spread) == (1, 9, 0.0)
    assert kid(x[torch.randperm(9)], y).mean == pytest.approx(found.mean, rel=1e-9)


def test_kid_of_gaussians_in_one_dimension() -> None:
    """The kernel compares the first three moments: 3 (m1 - m1')^2 + 3 (m2 - m2')^2 + (m3 - m3')^2."""
    x, y = normal(20_000, 1), normal(20_000, 1, seed=1) + 0.5
    found = kid(x, y, subsets=200, size=500)
    error = found.spread / math.sqrt(found.subsets)
    assert abs(found.mean - (3 * 0.5**2 + 3 * 0.25**2 + 1.625**2)) < 4 * error + 0.05
    assert (found.subsets, found.size) == (200, 500)


def test_kid_has_no_bias_in_small_subsets() -> None:
    x, y = normal(4000, 8), normal(4000, 8, seed=1)
    for size in (20, 200):
        found = kid(x, y, subsets=300, size=size)
        assert abs(found.mean) < 4 * found.spread / math.sqrt(300) + 0.002


def test_kid_checks_what_it_gets() -> None:
    with pytest.raises(InvalidInput, match="3 and 4 dimensions"):
        kid(normal(9, 3), normal(9, 4))
    with pytest.raises(InvalidInput, match="size >= 2"):
        kid(normal(9, 3), normal(9, 3), size=1)
    with pytest.raises(InvalidInput, match="at least 2"):
        kid(normal(1, 3), normal(9, 3))


# ------------------------------------------------------------------------------------------------ neighbourhoods


def brute(real: Tensor, generated: Tensor, k: int) -> tuple[float, float, float, float]:
    def radii(x: Tensor) -> list[float]:
        return [sorted(float((a - b).norm()) for j, b in enumerate(x) if j != i)[k - 1] for i, a in enumerate(x)]

    real, generated = real.double(), generated.double()
    r, g = radii(real), radii(generated)
    distance = [[float((a - b).norm()) for b in real] for a in generated]
    inside = [[distance[i][j] <= r[j] for j in range(len(real))] for i in range(len(generated))]
    precision = sum(map(any, inside)) / len(generated)
    recall = sum(any(distance[i][j] <= g[i] for i in range(len(generated))) for j in range(len(real))) / len(real)
    density = sum(map(sum, inside)) / (k * len(generated))
    coverage = sum(any(row[j] for row in inside) for j in range(len(real))) / len(real)
    return precision, recall, density, coverage


@pytest.mark.parametrize(("k", "chunk"), [(1, 1024), (3, 7), (5, 1)])
def test_neighbourhoods_by_hand(k: int, chunk: int) -> None:
    real, generated = normal(40, 3), normal(30, 3, seed=1) * 1.3 + 0.4
    pr, dc = precision_recall(real, generated, k, chunk=chunk), density_coverage(real, generated, k, chunk=chunk)
    assert (pr.precision, pr.recall, dc.density, dc.coverage) == pytest.approx(brute(real, generated, k))


def test_chunks_and_order_change_nothing() -> None:
    real, generated = normal(700, 16), normal(500, 16, seed=1) * 0.9
    pr, dc = precision_recall(real, generated), density_coverage(real, generated)
    order, other = torch.randperm(700), torch.randperm(500)
    for chunk in (64, 333, 10_000):
        assert precision_recall(real[order], generated[other], chunk=chunk) == pr
        assert density_coverage(real[order], generated[other], chunk=chunk) == dc
    assert fid(FeatureStatistics.of(real[order]), FeatureStatistics.of(generated[other])) == pytest.approx(
        fid(FeatureStatistics.of(real), FeatureStatistics.of(generated)), rel=1e-9
    )


def test_a_generator_as_good_as_the_data() -> None:
    real, generated = normal(2000, 8), normal(2000, 8, seed=1)
    pr, dc = precision_recall(real, generated), density_coverage(real, generated)
    assert abs(pr.precision - pr.recall) < 0.05 and pr.precision > 0.7
    assert dc.density == pytest.approx(1, abs=0.05) and dc.coverage == pytest.approx(1 - 2**-5, abs=0.02)


def test_a_collapsed_generator_is_precise_and_forgets_most() -> None:
    real = normal(1000, 8)
    generated = real[:1] + 0.01 * normal(1000, 8, seed=1)
    pr, dc = precision_recall(real, generated), density_coverage(real, generated)
    assert pr.precision == 1 and pr.recall < 0.01
    assert dc.coverage < 0.05


def test_an_outlier_raises_recall_and_not_coverage() -> None:
    """What density and coverage are for: generated points far out have huge balls, which hold everything."""
    real = normal(500, 4)
    generated = torch.cat([real[:1] + 0.01 * normal(494, 4, seed=1), 30 * torch.eye(4), -30 * torch.eye(4)[:2]])
    assert precision_recall(real, generated).recall > 0.9
    assert density_coverage(real, generated).coverage < 0.1


def test_elsewhere_is_neither_precise_nor_complete() -> None:
    pr, dc = precision_recall(normal(200, 4), normal(200, 4) + 50), density_coverage(normal(200, 4), normal(200, 4) + 50)
    assert (pr.precision, pr.recall, dc.density, dc.coverage) == (0, 0, 0, 0)


def test_copies_are_inside_whatever_is_rounded() -> None:
    """Balls of radius zero around repeated images must hold further copies of them."""
    image = normal(1, 64) * 10 + 1e3
    real = torch.cat([image.expand(10, -1), normal(50, 64)])
    pr = precision_recall(real, image.expand(20, -1).contiguous())
    assert pr.precision == 1 and pr.recall == pytest.approx(10 / 60)
    assert density_coverage(real, image.expand(20, -1).contiguous()).coverage == pytest.approx(10 / 60)
    same = precision_recall(real, real.clone())
    assert (same.precision, same.recall) == (1, 1)
    for seed in range(5):  # every image twice: all balls have radius zero, and a product's rounding depends on its shape
        once = normal(64, 3, seed=seed).double() * 10
        pairs, shuffled = torch.cat([once, once.flip(0)]), once[torch.randperm(64)]
        assert precision_recall(pairs, shuffled, 1, chunk=7).precision == 1


def test_the_edge_of_a_ball_is_inside() -> None:
    line = torch.arange(4.0)[:, None]
    outside = torch.tensor([[-1.0], [4.0], [-1.001], [4.001]])
    assert precision_recall(line, outside, 1).precision == 0.5
    assert density_coverage(line, outside, 1).coverage == 0.5


def test_neighbourhoods_check_what_they_get() -> None:
    with pytest.raises(InvalidInput, match="real needs at least 4"):
        precision_recall(normal(3, 2), normal(9, 2))
    with pytest.raises(InvalidInput, match="generated needs at least 6"):
        density_coverage(normal(9, 2), normal(5, 2))
    with pytest.raises(InvalidInput, match="2 and 3 dimensions"):
        precision_recall(normal(9, 2), normal(9, 3))
    with pytest.raises(InvalidInput, match="chunk must be >= 1"):
        precision_recall(normal(9, 2), normal(9, 2), chunk=0)


# ------------------------------------------------------------------------------------------------ image by image


def test_psnr_and_relative_distance() -> None:
    reference = torch.full((3, 3, 4, 4), 0.5)
    images = reference + torch.tensor([0.0, 0.1, -0.2])[:, None, None, None]
    found = psnr(images, reference, 2.0)
    assert found[0] == math.inf
    assert found[1:].tolist() == pytest.approx([20 * math.log10(20), 20 * math.log10(10)], rel=1e-6)
    assert relative_l2(images, reference).tolist() == pytest.approx([0, 0.2, 0.4], rel=1e-6)
    assert psnr(images * 127.5, reference * 127.5, 255.0)[1] == pytest.approx(float(found[1]), rel=1e-6)
    assert relative_l2(torch.tensor([[0.0], [1.0]]), torch.zeros(2, 1)).tolist() == [0, math.inf]


def test_fidelity_needs_pairs() -> None:
    with pytest.raises(InvalidInput, match="image by image"):
        psnr(torch.zeros(2, 3), torch.zeros(3, 3), 2.0)
    with pytest.raises(InvalidInput, match="data_range"):
        psnr(torch.zeros(2, 3), torch.zeros(2, 3), 0.0)
    with pytest.raises(InvalidInput, match="non-empty"):
        relative_l2(torch.zeros(0, 3), torch.zeros(0, 3))


# ------------------------------------------------------------------------------------------------ the step alone


def test_a_schedule_is_explained_and_a_preference_of_samples_is_not() -> None:
    steps, samples = torch.arange(10.0), torch.arange(6.0)
    assert explained_by_step(steps.expand(6, 10)) == pytest.approx(1)
    assert explained_by_step(samples[:, None].expand(6, 10)) == pytest.approx(0)
    both = steps[None] + samples[:, None]
    a, b = steps.var(correction=0), samples.var(correction=0)
    assert explained_by_step(both) == pytest.approx(float(a / (a + b)))
    assert variance_within_step(both).tolist() == pytest.approx([float(b)] * 10)
    assert explained_by_step(torch.full((6, 10), 0.3)) == 1.0
    assert explained_by_step(torch.zeros(6, 10)) == 1.0


def test_depth_drawn_blindly_is_hardly_explained() -> None:
    found = [explained_by_step(normal(50, 40, seed=s)) for s in range(40)]
    assert sum(found) / 40 == pytest.approx(39 / (50 * 40 - 1), rel=0.1)


def test_depths_are_checked() -> None:
    for wrong in (torch.zeros(3), torch.zeros(0, 3), torch.tensor([[math.nan, 1.0]])):
        with pytest.raises(InvalidInput, match="depth"):
            explained_by_step(wrong)
