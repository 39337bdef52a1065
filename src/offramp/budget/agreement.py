"""When a language model may leave at an exit: thresholds on how sure the exit is, from how often it then says what the full model says.

Three answers, from loose to strict. `tolerant_thresholds` asks that the calibration tokens that leave agree often enough; it promises
nothing for others. `BetaMixture` models the confidence of tokens that agree and of those that do not, and follows the text while it is
written. `certify_agreement` tests thresholds so that disagreement stays below a limit with high probability; its items are texts, since
the tokens of one text are anything but independent.

Shapes: ``N`` tokens, ``K`` exits, ``T`` texts, ``M`` thresholds from strict to permissive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.budget.bounds import Sample
from offramp.budget.replay import F64, mean_estimate
from offramp.budget.risk_control import CRC, LTT, DesignedPath, Procedure, SharedThreshold
from offramp.budget.targets import Risk
from offramp.core.certificate import Certificate, Estimate
from offramp.core.errors import InvalidInput, NoEffectWarning
from offramp.core.warn import warn

# ------------------------------------------------------------------------------------------------------------------- by tolerance


def tolerant_thresholds(scores: Tensor, agreed: Tensor, tolerance: float) -> tuple[float, ...]:
    """For each exit the loosest threshold such that the calibration tokens that reach it agree with the full model often enough.

    Self-supervised early exits (Valade 2024): one tolerance gives every exit its threshold. The share is that of the calibration tokens;
    as the loosest threshold that looks good is taken, on other tokens it is often exceeded. `certify_agreement` promises.

    Args:
        scores: ``[N, K]`` or ``[N]``, higher = surer: probability, gap of the two likeliest, minus the entropy.
        agreed: bool, alike.
        tolerance: most of the tokens that leave may disagree, as a share in [0, 1).

    Returns:
        K thresholds; a token leaves at a score of at least this. ``inf`` where no threshold is good enough.

    Raises:
        InvalidInput: shapes differ, there are no tokens, scores are not numbers, or the tolerance is out of range.
    """
    s, a = _pairs(scores, agreed)
    if not 0 <= tolerance < 1:
        raise InvalidInput(f"tolerance must be in [0, 1), got {tolerance}.")
    s, a = s.reshape(s.shape[0], -1), a.reshape(a.shape[0], -1)
    out = []
    for k in range(s.shape[1]):
        order = np.argsort(-s[:, k], kind="stable")
        ordered, wrong = s[order, k], np.cumsum(~a[order, k])
        whole = np.append(ordered[1:] != ordered[:-1], True)  # equal scores leave together
        good = np.flatnonzero(whole & (wrong <= tolerance * np.arange(1, wrong.size + 1) + 1e-9))
        out.append(float(ordered[good[-1]]) if good.size else math.inf)
    return tuple(out)


def _pairs(scores: Tensor, agreed: Tensor) -> tuple[F64, NDArray[np.bool_]]:
    if scores.shape != agreed.shape or scores.ndim not in (1, 2) or scores.shape[0] == 0 or agreed.dtype != torch.bool:
        raise InvalidInput(
            f"scores and agreed (bool) must be [tokens] or [tokens, exits] alike, at least one token; got {tuple(scores.shape)} and "
            f"{tuple(agreed.shape)} of {agreed.dtype}."
        )
    s = scores.detach().to("cpu", torch.float64).numpy()
    if np.isnan(s).any():
        raise InvalidInput("A score is not a number.")
    return s, agreed.detach().cpu().numpy()


# --------------------------------------------------------------------------------------------------------------- Beta mixture, online


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared differences from it (Welford's form), so that two can be put together."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def with_values(self, values: F64) -> Moments:
        """These and some more."""
        if not values.size:
            return self
        mean = float(values.mean())
        count = self.count + values.size
        gap = mean - self.mean
        squares = self.squares + float(np.square(values - mean).sum()) + gap * gap * self.count * values.size / count
        return Moments(count, self.mean + gap * values.size / count, squares)

    def beta(self) -> tuple[float, float]:
        """Parameters of the Beta distribution with this mean and variance, kept away from the degenerate."""
        mean = min(max(self.mean, 1e-3), 1 - 1e-3)
        variance = min(max(self.squares / max(self.count, 1.0), 1e-6), mean * (1 - mean) * (1 - 1e-3))
        total = mean * (1 - mean) / variance - 1
        return mean * total, (1 - mean) * total


@dataclass(frozen=True)
class BetaMixture:
    """FREE's threshold (Bae et al. 2023): one Beta distribution over the confidence of tokens that agree, one over that of the others.

    Both are fitted by their moments to pairs that every pass through the blocks behind the exit gives for free. The threshold is the
    smallest on a grid at which agreement is likely enough, ``f_agree / (f_agree + f_disagree) > zeta``; the two densities weigh alike, as
    published, however rare disagreement is.

    Attributes:
        zeta: in (0, 1).
        low: end of the grid, in [0, 1).
        high: end of the grid, in (low, 1].
        points: of the grid, at least 2.
        agree: moments of confidence where the exit was right.
        disagree: where it was not.
    """

    zeta: float = 0.4
    low: float = 0.3
    high: float = 0.9
    points: int = 10
    agree: Moments = field(default_factory=Moments)
    disagree: Moments = field(default_factory=Moments)

    def __post_init__(self) -> None:
        if not (0 < self.zeta < 1 and 0 <= self.low < self.high <= 1 and self.points >= 2):
            raise InvalidInput(
                f"zeta must be in (0, 1), 0 <= low < high <= 1 and points >= 2; got {self.zeta}, {self.low}, {self.high} and {self.points}."
            )

    def seen(self, confidence: Tensor, agreed: Tensor) -> BetaMixture:
        """After more pairs: ``[N]`` in [0, 1] and bool ``[N]``.

        Raises:
            InvalidInput: shapes differ or a confidence is out of range.
        """
        if confidence.numel() == 0 and confidence.shape == agreed.shape:
            return self
        c, a = _pairs(confidence.reshape(-1), agreed.reshape(-1))
        if c.min() < 0 or c.max() > 1:
            raise InvalidInput(f"confidence must lie in [0, 1], got values from {c.min()} to {c.max()}.")
        return replace(self, agree=self.agree.with_values(c[a]), disagree=self.disagree.with_values(c[~a]))

    @property
    def grid(self) -> tuple[float, ...]:
        """Thresholds to choose from, ascending."""
        return tuple(np.linspace(self.low, self.high, self.points).tolist())

    def likely(self, confidence: float) -> float:
        """``f_agree / (f_agree + f_disagree)`` at a confidence in [0, 1]."""
        gap = _log_beta(self.disagree.beta(), confidence) - _log_beta(self.agree.beta(), confidence)
        return 1 / (1 + math.exp(min(gap, 700.0)))

    def threshold(self) -> float:
        """The smallest grid point that is likely enough, ``inf`` if none is; the last one while either kind was seen less than twice."""
        if min(self.agree.count, self.disagree.count) < 2:
            return self.grid[-1]
        return next((c for c in self.grid if self.likely(c) > self.zeta), math.inf)


def _log_beta(parameters: tuple[float, float], x: float) -> float:
    a, b = parameters
    x = min(max(x, 1e-6), 1 - 1e-6)
    return math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + (a - 1) * math.log(x) + (b - 1) * math.log1p(-x)


# ------------------------------------------------------------------------------------------------------------------- with a promise


@dataclass(frozen=True)
class AcceptPlan:
    """A threshold for leaving at an exit, and what it was promised to keep.

    Attributes:
        threshold: a token leaves at a score of at least this; ``inf`` = none does.
        left: share of tokens that left, of a text.
        certificate: the promise.
    """

    threshold: float
    left: Estimate
    certificate: Certificate

    def __str__(self) -> str:
        return f"AcceptPlan: threshold {self.threshold:.4g}, share of tokens that leave {self.left}\n{self.certificate}"

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        e = self.left
        return {
            "threshold": str(self.threshold),  # JSON has no infinity
            "left": [e.value, e.low, e.high, e.level],
            "certificate": self.certificate.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AcceptPlan:
        """Inverse of `to_dict`."""
        return cls(float(data["threshold"]), Estimate(*data["left"]), Certificate.from_dict(data["certificate"]))


def certify_agreement(
    scores: Tensor,
    agreed: Tensor,
    text: Tensor,
    risk: Risk,
    *,
    method: Procedure | None = None,
    grid: SharedThreshold | None = None,
    seed: int = 0,
    fingerprint: str = "",
) -> AcceptPlan:
    """The lowest threshold whose disagreement with the full model is certified to stay within a limit.

    The guarantee of CALM (Schuster et al. 2022: Learn then Test over thresholds) for the measure that needs no labels: the share of a
    text's tokens that leave with another token than the full model would choose there. Tokens are compared given the text before them.
    Once tokens leave, that text changes: what is certified here holds for texts that are written as the calibration texts were. Let an
    accepting run write them, or give `certify_table` what running each threshold gave.

    Args:
        scores: ``[N]``, higher = surer.
        agreed: bool ``[N]``.
        text: int64 ``[N]``, which text each token is of.
        risk: ``Risk(max_disagreement=...)``.
        method: `LTT` by default; `CRC` for a limit in expectation.
        grid: thresholds; over [0, 1] by default, for probabilities and their gaps.
        seed: of the order in which texts are read.
        fingerprint: of the model and its heads.

    Raises:
        InvalidInput: shapes differ, or the risk is not a disagreement.
    """
    s, a = _pairs(scores, agreed)
    if s.ndim != 1 or text.shape != scores.shape or text.is_floating_point():
        raise InvalidInput(
            f"scores, agreed and text (int64) must be [tokens] alike, got {tuple(scores.shape)} and {tuple(text.shape)} of {text.dtype}."
        )
    family = grid if grid is not None else SharedThreshold(low=0.0, high=1.0)
    thresholds = family.settings(None, 2)[:, 0]
    _, index = np.unique(text.detach().cpu().numpy(), return_inverse=True)
    index = index.reshape(-1)
    count = np.bincount(index).astype(np.float64)
    # A token leaves from its first threshold on: counted there, then added up along the settings.
    first = np.searchsorted(-thresholds, -s, side="left")
    wrong, gone = np.zeros((count.size, thresholds.size + 1)), np.zeros((count.size, thresholds.size + 1))
    np.add.at(gone, (index, first), 1.0)
    np.add.at(wrong, (index, first), (~a).astype(np.float64))
    losses, left = (np.cumsum(v, axis=1)[:, :-1] / count[:, None] for v in (wrong, gone))
    plan = certify_table(thresholds, losses, left, risk, method=method, seed=seed, fingerprint=fingerprint)
    promise = replace(
        plan.certificate,
        assumptions="calibration texts are exchangeable with the texts that will be served, and the tokens before each token are written "
        "as theirs were",
    )
    return replace(plan, certificate=promise)


def certify_table(
    thresholds: F64,
    losses: F64,
    left: F64,
    risk: Risk,
    *,
    method: Procedure | None = None,
    seed: int = 0,
    fingerprint: str = "",
) -> AcceptPlan:
    """The same from what each threshold gave on each text: measured by running it, so that the text written with it is the text judged.

    Args:
        thresholds: ``[M]`` from strict to permissive, chosen without looking at these texts; ``inf`` first is certified without a test.
        losses: ``[T, M]`` share of a text's tokens that left and disagree, in [0, 1].
        left: ``[T, M]`` share of its tokens that left.
        risk: ``Risk(max_disagreement=...)``.
        method: `LTT` by default; `CRC` for a limit in expectation.
        seed: of the order in which texts are read.
        fingerprint: of the model and its heads.

    Raises:
        InvalidInput: shapes differ, the risk is not a disagreement, thresholds do not fall, or the method does not control such a risk.
    """
    if risk.max_disagreement is None:
        raise InvalidInput(
            f"Accepted tokens are judged by disagreement with the full model: give Risk(max_disagreement=...), not {risk.name}."
        )
    procedure = method or (CRC() if risk.in_expectation else LTT())
    if isinstance(procedure, CRC) != risk.in_expectation and procedure.guaranteed:
        raise InvalidInput(f"Risk(in_expectation=True) is controlled by CRC and only by it, got {procedure!r} for {risk!r}.")
    if isinstance(procedure.family, DesignedPath):
        raise InvalidInput("Thresholds are given here, so a family of settings in the method would be ignored; leave it out.")
    t = np.asarray(thresholds, np.float64)
    falling = t.ndim == 1 and t.size >= 2 and bool(np.all(np.diff(t) < 0))
    if not falling or losses.shape != left.shape or losses.ndim != 2 or losses.shape[1] != t.size:
        raise InvalidInput(
            f"thresholds must be [M] falling, losses and left [texts, M] alike; got {t.shape}, {losses.shape} and {left.shape}. "
            "Give two thresholds or more, strictest first."
        )
    order = np.random.default_rng(seed).permutation(losses.shape[0])
    table = Sample.of(np.maximum.accumulate(losses, axis=1)[order] if procedure.monotone else losses[order])
    sample = replace(table, binary=False)  # shares of a text: that these happen to be 0 or 1 must not choose the test
    certified = np.zeros(t.size, bool)
    free = int(math.isinf(t[0]))  # where no token leaves, none disagrees
    certified[:free] = True
    certified[free:] = procedure.certify(sample.at(slice(free, None)), risk.limit, risk.delta)
    at = int(np.flatnonzero(certified)[-1]) if certified.any() else None
    threshold = math.inf if at is None else float(t[at])
    nothing = Estimate(0.0, 0.0, 0.0)
    gone, lost = (nothing, nothing) if at is None else (mean_estimate(left[:, at]), mean_estimate(losses[:, at]))
    if math.isinf(threshold):
        warn(
            f"No threshold is certified to keep disagreement at {risk.limit:g} with {losses.shape[0]} texts, so no token leaves. Give more "
            "texts or a higher limit.",
            NoEffectWarning,
        )
    what = "Mean share of a text's tokens that leave with another token than the full model's"
    how, delta = "in expectation over calibration texts", None
    if not procedure.guaranteed:
        statement = f"{what} was measured to be at most {risk.limit:g}."
    else:
        if not risk.in_expectation:
            how, delta = f"with probability at least {1 - risk.delta:g} over calibration texts", risk.delta
        statement = f"{what} is at most {risk.limit:g} {how}."
    requested = {risk.name: risk.limit} | ({"delta": delta} if delta is not None else {})
    certificate = Certificate(
        statement,
        procedure.describe(sample),
        requested,
        {risk.name: lost, "left_early": gone},
        procedure.guaranteed,
        losses.shape[0],
        fingerprint,
        delta,
        "calibration texts are exchangeable with the texts that will be served",
    )
    return AcceptPlan(threshold, gone, certificate)
