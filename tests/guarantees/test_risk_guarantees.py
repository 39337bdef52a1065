"""Monte Carlo: every guarantee holds at its stated level, on flat and steep risk curves, with few and many items; naive picking does not.

The true risk of each setting is known in closed form (bounds, procedures) or measured on a large population (`calibrate`). A share of
violations may exceed delta by binomial noise over the draws only: three standard deviations.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from budget_synthetic import RULE, synthetic

from offramp.budget import (
    CRC,
    LTT,
    RCPS,
    WSR,
    Bentkus,
    Bound,
    ClopperPearson,
    DesignedPath,
    Hoeffding,
    HoeffdingBentkus,
    PointEstimate,
    Procedure,
    Risk,
    Sample,
    SharedThreshold,
    calibrate,
    drop_loss,
    leave_at,
)
from offramp.core.trace import Trace

DELTA, DRAWS, M = 0.1, 300, 25
LIMIT = DELTA + 3 * (DELTA * (1 - DELTA) / DRAWS) ** 0.5

CURVES = {"flat": np.linspace(0.07, 0.13, M), "steep": np.linspace(0.0, 0.6, M) ** 1.5, "just above": np.full(M, 0.1001)}
"""True mean loss of each setting; the limit is 0.1."""

BOUNDS = [Hoeffding(), Bentkus(), HoeffdingBentkus(), ClopperPearson(), WSR()]


def draw(curve: np.ndarray, n: int, g: np.random.Generator, kind: str) -> Sample:
    """Losses ``[n, M]`` with the given means, strongly dependent between settings as they are in reality."""
    u = g.random((n, 1))
    if kind == "binary":
        return Sample.of((u < curve).astype(float))
    if kind == "graded":  # in [0, 1], many values
        return Sample.of(np.clip(curve * 2 * u, 0, 1))
    # A signed gap: mostly 0, +1 with probability curve + 0.05 and -1 with probability 0.05.
    return Sample.of((u < curve + 0.05).astype(float) - (u > 0.95), low=-1, high=1)


def kinds(bound: Bound | None) -> list[str]:
    return ["binary"] if isinstance(bound, ClopperPearson) else ["binary", "graded", "signed"]


@pytest.mark.parametrize("n", [50, 1000])
@pytest.mark.parametrize(
    ("bound", "kind"), [(b, k) for b in BOUNDS for k in kinds(b)], ids=lambda v: v if isinstance(v, str) else type(v).__name__
)
def test_upper_bounds_and_p_values_hold(bound: Bound, kind: str, n: int) -> None:
    # One setting per column, all independent draws of the same mean: DRAWS experiments at once.
    g = np.random.default_rng(n)
    for mean in (0.02, 0.1, 0.4):
        u = g.random((n, DRAWS))
        if kind == "binary":
            sample = Sample.of((u < mean).astype(float))
        elif kind == "graded":
            sample = Sample.of(2 * mean * u)
        else:
            sample = Sample.of((u < mean + 0.05).astype(float) - (u > 0.95), low=-1, high=1)
        assert np.mean(bound.p_value(sample, mean, level=DELTA) <= DELTA) <= LIMIT
        if mean == 0.1:
            assert np.mean(bound.upper(sample, DELTA) < mean) <= LIMIT


@pytest.mark.parametrize("n", [100, 2000])
@pytest.mark.parametrize("curve", list(CURVES))
@pytest.mark.parametrize("kind", ["binary", "graded", "signed"])
@pytest.mark.parametrize("procedure", [LTT(), LTT(HoeffdingBentkus()), LTT(starts=4), RCPS(), RCPS(HoeffdingBentkus())], ids=repr)
def test_certified_settings_keep_the_limit(procedure: Procedure, kind: str, curve: str, n: int) -> None:
    g = np.random.default_rng(hash_of(kind, curve, n))
    truth = np.clip(CURVES[curve], 0, 1)
    violated = []
    for _ in range(DRAWS):
        certified = procedure.certify(draw(CURVES[curve], n, g, kind), 0.1, DELTA)
        violated.append(bool(certified.any() and truth[certified].max() > 0.1 + 1e-12))
    assert np.mean(violated) <= LIMIT


def hash_of(*parts: object) -> int:
    """A seed that does not change between runs."""
    return sum(ord(c) * 31**i for i, c in enumerate(repr(parts))) % 2**32


def test_procedures_have_power() -> None:
    # A guarantee that never certifies anything would pass every test above.
    g = np.random.default_rng(0)
    truth = CURVES["steep"]
    for procedure in (LTT(), LTT(HoeffdingBentkus()), RCPS(), RCPS(HoeffdingBentkus())):
        reached = [truth[procedure.certify(draw(truth, 2000, g, "binary"), 0.1, DELTA)].max(initial=0) for _ in range(50)]
        assert 0.07 < np.mean(reached) <= 0.1


@pytest.mark.parametrize("n", [50, 1000])
@pytest.mark.parametrize("curve", ["flat", "steep"])
def test_crc_controls_the_expected_risk(curve: str, n: int) -> None:
    g = np.random.default_rng(n)
    truth = CURVES[curve]
    risks = []
    for _ in range(600):
        certified = CRC().certify(draw(truth, n, g, "binary"), 0.1, DELTA)
        risks.append(truth[certified].max(initial=0.0))
    # Never leaving is taken to have no loss, as it has for drop and disagreement.
    assert np.mean(risks) <= 0.1 + 3 * np.std(risks) / 600**0.5
    if curve == "steep" and n == 1000:
        assert np.mean(risks) > 0.09


@pytest.mark.parametrize("n", [300, 1000, 5000])
def test_naive_picking_fails_about_half_of_the_time(n: int) -> None:
    g = np.random.default_rng(n)
    truth = np.linspace(0.0, 0.3, 120)
    violated = []
    for _ in range(200):
        certified = PointEstimate().certify(draw(truth, n, g, "binary"), 0.1, DELTA)
        violated.append(truth[certified].max(initial=0) > 0.1)
    assert 0.35 <= np.mean(violated) <= 0.65


@pytest.fixture(scope="module")
def population() -> Trace:
    return synthetic(100_000, exits=4, seed=77)


def drops(procedure: Procedure, whole: Trace, draws: int = 120) -> np.ndarray:
    """True drop of the plans calibrated on 1000 random items each."""
    scores, loss = whole.scores(RULE), drop_loss(whole).values
    g = torch.Generator().manual_seed(5)
    out = []
    for _ in range(draws):
        rows = torch.randint(0, whole.items, (1000,), generator=g)
        plan = calibrate(whole.subset(rows), RULE, Risk(max_drop=0.05, delta=DELTA), method=procedure)
        leave = leave_at(scores, plan.thresholds)
        out.append(float(loss.gather(1, leave[:, None]).mean()))
    return np.array(out)


PROCEDURES: list[Procedure] = [
    LTT(family=DesignedPath(size=40)),
    LTT(family=SharedThreshold(size=60)),
    LTT(HoeffdingBentkus(), family=DesignedPath(size=40)),
    RCPS(family=SharedThreshold(size=60)),
]


# With the bound that ignores the variance a thousand items certify nothing, and the plan never leaves: no violation, and a warning.
@pytest.mark.filterwarnings("ignore::offramp.core.errors.NoEffectWarning")
@pytest.mark.parametrize("procedure", PROCEDURES, ids=["LTT designed", "LTT grid", "LTT HoeffdingBentkus", "RCPS grid"])
def test_calibrate_keeps_its_promise_on_fresh_items(procedure: Procedure, population: Trace) -> None:
    violated = drops(procedure, population) > 0.05
    assert violated.mean() <= DELTA + 3 * (DELTA * (1 - DELTA) / 120) ** 0.5


def test_naive_calibrate_breaks_its_promise(population: Trace) -> None:
    assert (drops(PointEstimate(SharedThreshold()), population) > 0.05).mean() >= 0.3
