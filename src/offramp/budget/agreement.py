"""When a language model may leave at an exit: thresholds on how sure the exit is, from how often it then says what the full model says.

Three answers, from loose to strict. `tolerant_thresholds` asks that the calibration tokens that leave agree often enough; it promises
nothing for others. `BetaMixture` models the confidence of tokens that agree and of those that do not, and follows the text while it is
written. `certify_agreement` tests thresholds so that disagreement stays below a limit with high probability; its items are texts, since
the tokens of one text are anything but independent.

Shapes: ``N`` tokens, ``K`` exits, ``T`` texts, ``M`` thresholds from strict to permissive.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.budget.bounds import Sample
from offramp.budget.replay import F64, mean_estimate
from offramp.budget.risk_control import CRC, LTT, DesignedPath, Procedure, SharedThreshold
from offramp.budget.targets import Risk
from offramp.core.bundle import load_bundle, reading, save_bundle
from offramp.core.certificate import Certificate, Estimate
from offramp.core.errors import FingerprintMismatch, InvalidInput, NoEffectWarning
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.core.protocols import Rule
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


@runtime_checkable
class Leaving(Protocol):
    """A way of decoding in which tokens leave, as data with these fields: `offramp.policies.Accept`."""

    @property
    def threshold(self) -> Any:
        """What a score is held against."""
        ...

    @property
    def rule(self) -> Rule:
        """What gives the score."""
        ...

    @property
    def fill(self) -> Any:
        """What becomes of the blocks behind the exit."""
        ...

    @property
    def exits(self) -> tuple[int, ...] | None:
        """Which exits are used; ``None`` = all."""
        ...


@dataclass(frozen=True)
class AcceptPlan:
    """How tokens leave early, and what that was promised to keep. `offramp.compile` makes a generator of it.

    Attributes:
        way: the calibrated one: the rule, fill and exit that were judged, with the threshold that was chosen; ``inf`` = no token leaves.
        left: share of tokens that left, of a text.
        certificate: the promise, with the fingerprint of the model and its exits.
    """

    way: Leaving
    left: Estimate
    certificate: Certificate

    @property
    def threshold(self) -> float:
        """A token leaves at a score of at least this; of a threshold that decays, its first value."""
        held = self.way.threshold
        return float(getattr(held, "tau", held))

    def __str__(self) -> str:
        way = f"{type(self.way.rule).__name__}, {self.way.fill}" + ("" if self.way.exits is None else f", exits {self.way.exits}")
        return f"AcceptPlan: {way}, threshold {self.threshold:.4g}, share of tokens that leave {self.left}\n{self.certificate}"

    def check(self, fingerprint: str) -> None:
        """Refuse a model that the plan was not made for.

        Raises:
            FingerprintMismatch: the model or its exits have other weights, another place or another dtype.
        """
        if fingerprint != (own := self.certificate.fingerprint):
            raise FingerprintMismatch(
                f"The plan was calibrated for the language model and exits with fingerprint {own[:12]!r}, these have {fingerprint[:12]!r}: "
                "other weights, exits or another dtype. Its certificate says nothing about them: load the exits it was calibrated with, or "
                "certify again with the model as it will serve."
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON data.

        Raises:
            InvalidInput: the way holds something that is no part, or a rule with learned weights, which `save` keeps beside the data.
        """
        if self._weights():
            raise InvalidInput(f"{type(self.way.rule).__name__} has learned weights, which are no JSON data; use save(folder).")
        return self._content()

    def _weights(self) -> Mapping[str, Tensor]:
        state = getattr(self.way.rule, "state_dict", None)  # a rule that is a module
        return state() if state is not None else {}

    def _content(self) -> dict[str, Any]:
        e = self.left
        held = self.way.threshold
        return {
            "way": part_to_dict(replace(self.way, threshold=0.0)),  # type: ignore[type-var] # a frozen dataclass
            "threshold": str(held) if isinstance(held, int | float) else part_to_dict(held),  # JSON has no infinity
            "left": [e.value, e.low, e.high, e.level],
            "certificate": self.certificate.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], parts: Mapping[str, type]) -> AcceptPlan:
        """Inverse of `to_dict`.

        Args:
            data: what it gave.
            parts: ways, rules and fills that may be named, by name: ``offramp.policies.PARTS | offramp.policies.WAYS``.

        Raises:
            ArtifactError: a field is missing or garbled, or a part is unknown.
        """
        with reading("The plan for leaving"):
            held = data["threshold"]
            threshold = float(held) if isinstance(held, str) else part_from_dict(held, parts)
            way = replace(part_from_dict(data["way"], parts), threshold=threshold)
            return cls(way, Estimate(*data["left"]), Certificate.from_dict(data["certificate"]))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``accept_plan.json`` (and ``accept_plan.safetensors`` for a learned rule) into ``folder``, atomically."""
        save_bundle(folder, "accept_plan", "accept_plan", self._content(), self._weights())

    @classmethod
    def load(cls, folder: str | os.PathLike[str], parts: Mapping[str, type]) -> AcceptPlan:
        """Read what `save` wrote; ``parts`` as for `from_dict`.

        Raises:
            ArtifactError: a file is missing, truncated, altered or foreign, or names an unknown part.
        """
        content, weights = load_bundle(folder, "accept_plan", "accept_plan")
        plan = cls.from_dict(content, parts)
        rule: Any = plan.way.rule
        if weights or plan._weights():
            with reading(f"The plan in {folder}", RuntimeError, AttributeError):  # weights of a rule that do not fit, or has none
                rule.load_state_dict(weights)
        return plan


def certify_agreement(
    scores: Tensor,
    agreed: Tensor,
    text: Tensor,
    risk: Risk,
    *,
    way: Leaving,
    fingerprint: str,
    method: Procedure | None = None,
    grid: SharedThreshold | None = None,
    seed: int = 0,
) -> AcceptPlan:
    """The lowest threshold whose disagreement with the full model is certified to stay within a limit.

    The guarantee of CALM (Schuster et al. 2022: Learn then Test over thresholds) for the measure that needs no labels: the share of a
    text's tokens that leave with another token than the full model would choose there. Tokens are compared given the text before them.
    Once tokens leave, that text changes: what is certified here holds for texts that are written as the calibration texts were. Let an
    accepting run write them, or give `certify_table` what running each threshold gave.

    Args:
        scores: ``[N]``, higher = surer: what the rule of ``way`` said, of one exit.
        agreed: bool ``[N]``.
        text: int64 ``[N]``, which text each token is of.
        risk: ``Risk(max_disagreement=...)``.
        way: the `Accept` that the scores are of, with its exit, such as ``Accept(inf, Margin(), exits=(0,))``; the certified threshold
            takes the place of its own.
        fingerprint: of the model and its exits: `offramp.engines.text.planner.fingerprint_of`.
        method: `LTT` by default; `CRC` for a limit in expectation.
        grid: thresholds; over [0, 1] by default, for probabilities and their gaps.
        seed: of the order in which texts are read.

    Raises:
        InvalidInput: shapes differ, the risk is not a disagreement, the way does not name one exit or has no single threshold, or the
            fingerprint is empty.
    """
    if not isinstance(getattr(way, "threshold", None), int | float) or way.exits is None or len(way.exits) != 1:
        raise InvalidInput(
            "Tokens are judged by the scores of one exit at one threshold: give way=Accept(inf, rule, exits=(k,)), with the rule and the "
            f"exit that the scores are of, k = 0 for the only one; got {way!r}. Where several exits are used or a threshold decays, run "
            "each of some thresholds and give certify_table what they gave."
        )
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
    plan = certify_table(thresholds, losses, left, risk, way=way, fingerprint=fingerprint, method=method, seed=seed)
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
    way: Leaving,
    fingerprint: str,
    method: Procedure | None = None,
    seed: int = 0,
) -> AcceptPlan:
    """The same from what each threshold gave on each text: measured by running it, so that the text written with it is the text judged.

    Args:
        thresholds: ``[M]`` from strict to permissive, chosen without looking at these texts; ``inf`` first is certified without a test.
        losses: ``[T, M]`` share of a text's tokens that left and disagree, in [0, 1].
        left: ``[T, M]`` share of its tokens that left.
        risk: ``Risk(max_disagreement=...)``.
        way: the `Accept` that was run, at any of the thresholds, which all of its exits share; of a `Decaying` one they are the ``tau``.
        fingerprint: of the model and its exits: `offramp.engines.text.planner.fingerprint_of`.
        method: `LTT` by default; `CRC` for a limit in expectation.
        seed: of the order in which texts are read.

    Raises:
        InvalidInput: shapes differ, the risk is not a disagreement, thresholds do not fall, the method does not control such a risk, the
            way's threshold adapts or is one for each exit, or the fingerprint is empty.
    """
    _check_way(way, fingerprint)
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
    return AcceptPlan(_at(way, threshold), gone, certificate)


def _check_way(way: Leaving, fingerprint: str) -> None:
    held = way.threshold if isinstance(way, Leaving) else None
    if not (isinstance(held, int | float) or hasattr(held, "tau")):
        raise InvalidInput(f"way must be Accept(...) as it was run, with one threshold or one that decays; got {way!r}.")
    if not isinstance(fingerprint, str) or not fingerprint:
        raise InvalidInput(
            "fingerprint must say which model and exits this promise is about, so that no other is served by it; give "
            f"offramp.engines.text.planner.fingerprint_of(lm), got {fingerprint!r}."
        )


def _at(way: Any, threshold: float) -> Leaving:
    """The same way at another threshold; one that decays still does, from there."""
    decays = hasattr(way.threshold, "tau") and math.isfinite(threshold)
    moved: Leaving = replace(way, threshold=replace(way.threshold, tau=threshold) if decays else threshold)
    return moved
