"""One threshold for rules that must be run to know what they do: caches and per-sample exits of a denoiser.

In a sampler a decision changes what all later steps see, so nothing can be replayed: a setting is run, on some samples, and measured.
`threshold_for_cost` finds the threshold whose measured mean cost meets a budget. `threshold_for_quality` takes settings that were all run
on the same samples and returns the cheapest whose drift from the full model is certified to stay within a limit.

Shapes: ``N`` samples, ``M`` settings.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from offramp.budget.bounds import Sample, default_bound
from offramp.budget.replay import F64, mean_estimate, share_estimate
from offramp.budget.risk_control import CRC, LTT, Procedure
from offramp.core.bundle import load_bundle, reading, save_bundle
from offramp.core.certificate import Certificate, Estimate
from offramp.core.errors import BudgetInfeasible, FingerprintMismatch, InvalidInput, NoEffectWarning
from offramp.core.warn import warn

Run = Callable[[float], ArrayLike | Tensor]
"""From a threshold to the cost of each sample ``[N]`` at it, as a share of the full model's; the same samples and noise every time."""

# --------------------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Tried:
    """One setting that was run.

    Attributes:
        threshold: the setting.
        cost: mean over samples, a share of the full model's cost.
        drift: of the final images from the full model's, if it was measured: their mean, or the share of them above a tolerance.
        certified: whether it may be used under the limit that was asked for; for a budget, whether it was met.
    """

    threshold: float
    cost: Estimate
    drift: Estimate | None
    certified: bool


@dataclass(frozen=True)
class ThresholdPlan:
    """A threshold for a rule inside a sampler, what was tried on the way, and what is promised.

    Attributes:
        threshold: to set.
        cost: measured mean, a share of the full model's cost.
        tried: every setting that was run, by rising threshold.
        certificate: what was asked, what was realised, and whether a guarantee backs it (``certificate.guaranteed``).
        fingerprint: of the model and the sampler it was measured with.
    """

    threshold: float
    cost: Estimate
    tried: tuple[Tried, ...]
    certificate: Certificate
    fingerprint: str = ""

    def __str__(self) -> str:
        rows = "\n".join(
            f"  {'>' if t.threshold == self.threshold else ' '} {t.threshold:>10.4g}   cost {t.cost}"
            f"{'' if t.drift is None else f'   drift {t.drift}'}{'   ok' if t.certified else ''}"
            for t in self.tried
        )
        return f"ThresholdPlan: threshold {self.threshold:.6g}, mean cost {self.cost} of the full model\n{rows}\n{self.certificate}"

    def check(self, fingerprint: str) -> None:
        """Refuse a model or sampler that the plan was not made for.

        Raises:
            FingerprintMismatch: the plan names another.
        """
        if self.fingerprint and fingerprint and self.fingerprint != fingerprint:
            raise FingerprintMismatch(
                f"The threshold was measured with {self.fingerprint!r}, this is {fingerprint!r}. A threshold says nothing about another "
                "model, sampler or number of steps: measure again."
            )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``threshold.json`` into ``folder``, atomically."""
        content = {
            "threshold": str(self.threshold),  # JSON has no infinity
            "cost": _pack(self.cost),
            "tried": [[str(t.threshold), _pack(t.cost), None if t.drift is None else _pack(t.drift), t.certified] for t in self.tried],
            "certificate": self.certificate.to_dict(),
            "fingerprint": self.fingerprint,
        }
        save_bundle(folder, "threshold", "step_threshold", content)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ThresholdPlan:
        """Read what `save` wrote.

        Raises:
            ArtifactError: the file is missing, truncated, altered or foreign.
        """
        content, _ = load_bundle(folder, "threshold", "step_threshold")
        with reading(f"The threshold in {folder}"):
            tried = tuple(
                Tried(float(at), Estimate(*cost), None if drift is None else Estimate(*drift), bool(ok))
                for at, cost, drift, ok in content["tried"]
            )
            certificate = Certificate.from_dict(content["certificate"])
            return cls(float(content["threshold"]), Estimate(*content["cost"]), tried, certificate, str(content["fingerprint"]))


def _pack(e: Estimate) -> list[float]:
    return [e.value, e.low, e.high, e.level]


def _matrix(values: ArrayLike | Tensor) -> F64:
    return values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, np.float64)


# --------------------------------------------------------------------------------------------------------------------- for a cost


def threshold_for_cost(
    run: Run, target: float, low: float, high: float, *, tolerance: float = 0.01, runs: int = 12, fingerprint: str = ""
) -> ThresholdPlan:
    """The threshold whose measured mean cost comes nearest to a target from below, by bisection over real runs.

    Cost may rise or fall with the threshold; which of the two is seen at the ends. In between it need only be monotone up to noise: of all
    settings that were run, the dearest within the target is returned, wherever bisection ended. Cost as a function of one threshold has
    jumps (a step that all samples reuse at once), so the tolerance cannot always be reached.

    Args:
        run: measures a setting.
        target: mean cost as a share of the full model's, above 0.
        low: one end of the thresholds to search, finite.
        high: the other, above ``low``.
        tolerance: stop when the mean cost is within this share of the target below it, >= 0.
        runs: most settings to run, at least 2.
        fingerprint: of the model and the sampler.

    Warns:
        NoEffectWarning: the dearer end is within the target already.

    Raises:
        InvalidInput: an argument is out of range, or a run gave no costs, costs that are not finite or another number of samples.
        BudgetInfeasible: no setting that was run is within the target; carries the least mean cost seen.
    """
    if not (math.isfinite(target) and target > 0 and math.isfinite(low) and math.isfinite(high) and low < high):
        raise InvalidInput(f"threshold_for_cost needs a target above 0 and finite low < high, got {target}, {low} and {high}.")
    if runs < 2 or not tolerance >= 0:
        raise InvalidInput(f"runs must be at least 2 and tolerance at least 0, got {runs} and {tolerance}.")
    seen: dict[float, F64] = {}

    def mean(threshold: float) -> float:
        cost = _matrix(run(threshold))
        if cost.ndim != 1 or cost.size == 0 or not np.isfinite(cost).all() or any(c.size != cost.size for c in seen.values()):
            raise InvalidInput(
                f"A run must give one finite cost for each of the same samples; threshold {threshold:g} gave shape {cost.shape}."
            )
        seen[threshold] = cost
        return float(cost.mean())

    limit = target * (1 + 1e-9)
    at_low, at_high = mean(low), mean(high)
    dear, cheap = (low, high) if at_low >= at_high else (high, low)
    if max(at_low, at_high) <= limit:
        warn(
            f"Even threshold {dear:g} costs {max(at_low, at_high):.4g}, within the target {target:g}: widen the range to spend the rest.",
            NoEffectWarning,
        )
    elif min(at_low, at_high) <= limit:
        best = min(at_low, at_high)
        while len(seen) < runs and best < target * (1 - tolerance):
            middle = (dear + cheap) / 2
            if middle in (dear, cheap):
                break
            cost = mean(middle)
            if cost <= limit:
                cheap, best = middle, max(best, cost)
            else:
                dear = middle
    means = {t: float(c.mean()) for t, c in seen.items()}
    within = [t for t in means if means[t] <= limit]
    if not within:
        least = min(means, key=lambda t: means[t])
        raise BudgetInfeasible(
            f"No threshold from {low:g} to {high:g} brings the mean cost to {target:g}; the least seen is {means[least]:.4g} at {least:g}. "
            "Raise the target, widen the range, or allow longer reuse.",
            requested=target,
            best=means[least],
            unit="share of the full model's cost",
        )
    # Of equal costs the setting nearest to the dear end changes least.
    toward = 1 if at_low >= at_high else -1
    chosen = max(within, key=lambda t: (means[t], -toward * t))
    cost_estimate = mean_estimate(seen[chosen])
    certificate = Certificate(
        f"Mean cost was measured to be at most {target:g} of the full model's.",
        f"bisection over {len(seen)} runs",
        {"mean_cost": target},
        {"mean_cost": cost_estimate},
        False,
        int(seen[chosen].size),
        fingerprint,
    )
    tried = tuple(Tried(t, mean_estimate(seen[t]), None, means[t] <= limit) for t in sorted(seen))
    return ThresholdPlan(chosen, cost_estimate, tried, certificate, fingerprint)


# ------------------------------------------------------------------------------------------------------------------- for a quality


@dataclass(frozen=True)
class DriftLimit:
    """How far final images may be from the full model's, from the same noise.

    Fidelity to the full model is not quality as such: an image may differ and be as good. It is what can be certified without a judge.

    Attributes:
        limit: inside (0, 1): on the mean of ``min(drift, cap) / cap``, or, with ``above``, on the share of samples that drift further.
        above: count samples whose drift exceeds this, >= 0, in the unit of the drift; the test is then exact. ``None``: the mean.
        cap: drift that counts as total, above 0; unused with ``above``.
        delta: allowed probability that the promise fails, in (0, 1).
        in_expectation: bound the expected value over calibration samples (CRC) instead; ``delta`` is then unused.
    """

    limit: float
    above: float | None = None
    cap: float = 1.0
    delta: float = 0.1
    in_expectation: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.limit < 1 and 0 < self.delta < 1):
            raise InvalidInput(f"DriftLimit.limit and delta must lie inside (0, 1), got {self.limit} and {self.delta}.")
        if not (math.isfinite(self.cap) and self.cap > 0) or (self.above is not None and not self.above >= 0):
            raise InvalidInput(f"DriftLimit.cap must be finite and above 0, and above at least 0; got {self.cap} and {self.above}.")

    def losses(self, drift: F64) -> F64:
        """Losses in [0, 1] of drifts; a drift that is not finite is total."""
        bad = ~np.isfinite(drift)
        out: F64 = np.where(bad, 1.0, drift > self.above if self.above is not None else np.minimum(drift, self.cap) / self.cap)
        return out


def run_settings(run: Callable[[float], tuple[ArrayLike | Tensor, ArrayLike | Tensor]], thresholds: Sequence[float]) -> tuple[F64, F64]:
    """Run every setting on the same samples: the tables for `threshold_for_quality`.

    Args:
        run: from a threshold to drift ``[N]`` and cost ``[N]`` of the same samples.
        thresholds: M settings.

    Returns:
        drift ``[N, M]`` and cost ``[N, M]``.

    Raises:
        InvalidInput: no settings, or runs differ in their number of samples.
    """
    results = [tuple(_matrix(v) for v in run(t)) for t in thresholds]
    shapes = {v.shape for pair in results for v in pair}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise InvalidInput(
            f"Every run must give drift [N] and cost [N] of the same samples, one setting or more; got shapes {sorted(shapes)}."
        )
    return np.stack([d for d, _ in results], axis=1), np.stack([c for _, c in results], axis=1)


def threshold_for_quality(
    thresholds: Sequence[float],
    drift: ArrayLike | Tensor,
    cost: ArrayLike | Tensor,
    limit: DriftLimit,
    *,
    method: Procedure | None = None,
    exact_first: bool = False,
    seed: int = 0,
    fingerprint: str = "",
) -> ThresholdPlan:
    """The cheapest of some thresholds whose drift is certified to stay within a limit.

    Learn then Test (Angelopoulos et al. 2021) over a fixed grid, or conformal risk control for a limit in expectation. The items are
    samples: each comes from its own noise (and prompt), so they are independent however much steps of one sample are not.

    Args:
        thresholds: M settings from strict to permissive, strictly rising or strictly falling, chosen without looking at these samples.
        drift: ``[N, M]`` >= 0, distance of each final image from the full model's at each setting. NaN and inf count as total.
        cost: ``[N, M]`` as a share of the full model's.
        limit: what is asked.
        method: `LTT` by default; `CRC` for a limit in expectation.
        exact_first: the first setting gives the full model's images by construction (a cache at threshold 0), and is certified untested.
        seed: of the order in which samples are read.
        fingerprint: of the model and the sampler.

    Warns:
        NoEffectWarning: only the setting that is exact by construction is left.

    Raises:
        InvalidInput: shapes differ, thresholds are not in order, numbers are out of range, or the method does not control such a limit.
        BudgetInfeasible: no setting is certified; carries the least upper bound on drift (or, in expectation, the least CRC value).
    """
    t, far, price = np.asarray(thresholds, np.float64), _matrix(drift), _matrix(cost)
    order = np.sign(np.diff(t))
    if t.ndim != 1 or t.size == 0 or np.isnan(t).any() or not (np.all(order == 1) or np.all(order == -1)):
        raise InvalidInput(f"thresholds must be strictly rising or falling numbers, strictest first; got {t.tolist()}.")
    if far.shape != price.shape or far.ndim != 2 or far.shape[1] != t.size or far.shape[0] == 0:
        raise InvalidInput(f"drift and cost must be [samples, {t.size} settings] alike, got {far.shape} and {price.shape}.")
    if (far < 0).any() or not np.isfinite(price).all():
        raise InvalidInput("drift must not be negative and cost must be finite.")
    procedure = method or (CRC() if limit.in_expectation else LTT())
    if procedure.guaranteed and isinstance(procedure, CRC) != limit.in_expectation:
        raise InvalidInput(f"A limit in expectation is controlled by CRC and only by it, got {procedure!r} for {limit!r}.")
    if procedure.family is not None:
        raise InvalidInput("Thresholds are given here, so a family of settings in the method would be ignored; leave it out.")
    if exact_first and far[:, 0].any():
        raise InvalidInput(
            f"exact_first: threshold {t[0]:g} drifts by up to {far[:, 0].max():g}, so it is not exact. Leave exact_first out."
        )

    losses = limit.losses(far)
    shuffled = losses[np.random.default_rng(seed).permutation(losses.shape[0])]
    sample = Sample.of(np.maximum.accumulate(shuffled, axis=1) if procedure.monotone else shuffled)
    # Which test is used must follow from the question, not from what the samples happen to be.
    sample = replace(sample, binary=limit.above is not None)
    certified = np.zeros(t.size, bool)
    free = int(exact_first)
    certified[:free] = True
    if t.size > free:
        certified[free:] = procedure.certify(sample.at(slice(free, None)), limit.limit, limit.delta)
    estimates = [_drift_estimate(losses[:, m], limit) for m in range(t.size)]
    costs = [mean_estimate(price[:, m]) for m in range(t.size)]
    if not certified.any():
        raise _uncertified(sample, limit, procedure, t)
    at = min(np.flatnonzero(certified), key=lambda m: (costs[m].value, m))
    if exact_first and at == 0:
        warn(
            f"No setting but the exact one is certified to keep drift at {limit.limit:g} and costs less, with {far.shape[0]} samples. Give "
            "more samples, gentler settings or a higher limit.",
            NoEffectWarning,
        )
    return ThresholdPlan(
        float(t[at]),
        costs[at],
        tuple(sorted((Tried(float(t[m]), costs[m], estimates[m], bool(certified[m])) for m in range(t.size)), key=lambda r: r.threshold)),
        _promise(limit, procedure, sample, {"drift": estimates[at], "mean_cost": costs[at]}, fingerprint),
        fingerprint,
    )


def _drift_estimate(losses: F64, limit: DriftLimit) -> Estimate:
    return mean_estimate(losses) if limit.above is None else share_estimate(float(losses.sum()), losses.size)


def _uncertified(sample: Sample, limit: DriftLimit, procedure: Procedure, thresholds: NDArray[np.float64]) -> BudgetInfeasible:
    n = sample.items
    if limit.in_expectation or not procedure.guaranteed:
        reach, what = (n * sample.mean + 1) / (n + 1), "its conformal value"
    else:
        bound = getattr(procedure, "bound", None) or default_bound(sample)
        reach, what = bound.upper(sample, limit.delta), f"its upper bound at delta {limit.delta:g}"
    m = int(np.argmin(reach))
    return BudgetInfeasible(
        f"With {n} samples no setting is certified to keep drift at {limit.limit:g}. The nearest is threshold {thresholds[m]:g}: "
        f"mean {sample.mean[m]:.4g}, {what} {reach[m]:.4g}. Give more samples, stricter settings first, or a higher limit.",
        requested=limit.limit,
        best=float(reach[m]),
        unit="share of samples that drift" if limit.above is not None else "mean drift over the cap",
    )


def _promise(limit: DriftLimit, procedure: Procedure, sample: Sample, realised: Mapping[str, Estimate], fingerprint: str) -> Certificate:
    what = (
        f"Mean drift of final images from the full model's, capped at and counted in units of {limit.cap:g},"
        if limit.above is None
        else f"The share of final images that drift further than {limit.above:g} from the full model's"
    )
    delta: float | None = None
    if not procedure.guaranteed:
        statement = f"{what} was measured to be at most {limit.limit:g}."
    elif limit.in_expectation:
        statement = f"{what} is at most {limit.limit:g} in expectation over calibration samples."
    else:
        delta = limit.delta
        statement = f"{what} is at most {limit.limit:g} with probability at least {1 - delta:g} over calibration samples."
    requested: dict[str, Any] = {"drift": limit.limit} | ({} if delta is None else {"delta": delta})
    return Certificate(
        statement,
        procedure.describe(sample),
        requested,
        realised,
        procedure.guaranteed,
        sample.items,
        fingerprint,
        delta,
        "calibration samples (noise, prompts, guidance) are exchangeable with those that will be served, with the same model and sampler",
    )
