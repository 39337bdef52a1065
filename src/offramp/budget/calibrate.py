"""`calibrate`: from a trace, a rule and a target to a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.budget.bounds import default_bound
from offramp.budget.mean_cost import CostMethod, GeometricShares, OptimalStopping, Problem
from offramp.budget.replay import (
    F32,
    F64,
    Loss,
    Realised,
    columns,
    disagreement_loss,
    drop_loss,
    error_loss,
    evaluate_columns,
    share_estimate,
    share_thresholds,
)
from offramp.budget.risk_control import CRC, LTT, Evidence, Procedure, default_family, gather_evidence
from offramp.budget.targets import All, ExitShares, Latency, MeanCost, PeakCost, Risk, Target, Utility
from offramp.core.certificate import Certificate, Estimate, Plan
from offramp.core.errors import BudgetInfeasible, InvalidInput, NoEffectWarning
from offramp.core.parts import part_key
from offramp.core.protocols import Rule
from offramp.core.trace import Trace
from offramp.core.warn import warn

FLOPS = "fraction of the full model's FLOPs"


@dataclass(frozen=True)
class _Limit:
    """One cost constraint: the mean of ``cost[exit]`` is at most ``target``."""

    name: str
    cost: F64
    target: float
    requested: float
    unit: str


def exit_latency_ms(trace: Trace, batch_size: int = 1) -> F64:
    """Milliseconds until an answer is out at each exit ``[K]``, for a batch of ``batch_size`` (rounded up to the next timed size).

    Segments and heads on the way plus one synchronisation per early exit passed; time saved by compaction is not counted.

    Raises:
        InvalidInput: the trace has no latency table, or none of its batch sizes is large enough.
    """
    table = trace.latency
    if table is None:
        raise InvalidInput(
            "A latency target needs measured times, and this trace has no latency table. Record it with latency measurement on."
        )
    at = next((i for i, size in enumerate(table.batch_sizes) if size >= batch_size), None)
    if at is None:
        raise InvalidInput(f"Batch size {batch_size} was not timed: the latency table has {table.batch_sizes}.")
    if table.segment_ms.shape[0] != len(trace.exits) or table.head_ms.shape[0] != len(trace.exits):
        raise InvalidInput(f"The latency table has {table.segment_ms.shape[0]} segments, but the trace has {len(trace.exits)} exits.")
    each = (table.segment_ms[:, at] + table.head_ms[:, at]).to(torch.float64).cpu().numpy()
    each = each + np.append(np.full(len(each) - 1, table.sync_ms), 0.0)
    out: F64 = np.cumsum(each)
    return out


_WORDS = {"mean_cost": "Mean cost", "mean_ms": "Mean time", "p95_ms": "95th percentile of the time"}
_UNITS = {"mean_cost": " of the full model's FLOPs", "mean_ms": " ms", "p95_ms": " ms"}


def _limit(trace: Trace, target: MeanCost | Latency) -> _Limit:
    if isinstance(target, MeanCost):
        return _Limit("mean_cost", _relative_cost(trace), target.fraction, target.fraction, FLOPS)
    ms = exit_latency_ms(trace, target.batch_size)
    if target.mean_ms is not None:
        return _Limit("mean_ms", ms, target.limit, target.limit, "ms")
    if target.limit < ms[0]:
        raise BudgetInfeasible(
            f"A 95th percentile of {target.limit:.4g} ms cannot be met: leaving at the first exit takes {ms[0]:.4g} ms.",
            requested=target.limit,
            best=float(ms[0]),
            unit="ms",
        )
    # "At least 95 % of the items within the limit" is a mean cost too: that of a cost which is 1 beyond the limit.
    return _Limit("p95_ms", (ms > target.limit).astype(np.float64), 0.05, target.limit, "share of slow items")


def _relative_cost(trace: Trace) -> F64:
    if not trace.base_cost > 0:
        raise InvalidInput(f"The trace's base_cost must be positive, got {trace.base_cost}.")
    out: F64 = trace.cost.detach().to("cpu", torch.float64).numpy() / trace.base_cost
    return out


def _cap(trace: Trace, caps: list[PeakCost]) -> int:
    """Index of the deepest exit that every cap allows."""
    cost = _relative_cost(trace)
    last = len(cost) - 1
    for cap in caps:
        # A cap of 1 means "the full model is allowed": the heads it passes are the library's own addition.
        allowed = np.flatnonzero((cost <= cap.fraction * (1 + 1e-9)) | ((np.arange(len(cost)) == len(cost) - 1) & (cap.fraction >= 1)))
        if not allowed.size:
            raise BudgetInfeasible(
                f"A peak cost of {cap.fraction:.4g} ({FLOPS}) cannot be met: the first exit costs {cost[0]:.4g}.",
                requested=cap.fraction,
                best=float(cost[0]),
                unit=FLOPS,
            )
        last = min(last, int(allowed[-1]))
    return last


def _risk_loss(trace: Trace, risk: Risk) -> Loss:
    if risk.max_error is not None:
        return error_loss(trace)
    if risk.max_drop is not None:
        return drop_loss(trace, signed=risk.signed)
    return disagreement_loss(trace)


def _expand(thresholds: F64, exits: int) -> F64:
    """Thresholds of the first exits as thresholds of all: nobody passes the last allowed one."""
    return np.concatenate([thresholds, np.full(exits - thresholds.size, -np.inf)])


def calibrate(trace: Trace, rule: Rule, target: Target, *, method: CostMethod | Procedure | None = None, level: float = 0.95) -> Plan:
    """Choose the thresholds with which a rule meets a target.

    Args:
        trace: recorded exits of the calibration items.
        rule: gives the scores.
        target: `MeanCost`, `Risk`, `Latency`, `PeakCost`, `Utility`, `ExitShares`, or several in `All`.
        method: how; by default `OptimalStopping` for costs where the trace has losses and `GeometricShares` where not, `LTT` for a
            `Risk` with ``delta`` and `CRC` for one in expectation.
        level: coverage of the intervals of the realised values, in (0, 1).

    Returns:
        A plan with thresholds, expected shares and mean cost, and a certificate with requested and realised values.

    Raises:
        NotReplayable: leaving early changes later steps, so a recorded trace cannot stand for a run.
        BudgetInfeasible: no setting meets the target; carries the best achievable value.
        InvalidInput: no items, scores that are not finite, losses or latencies that the target needs but the trace lacks, or a method
            that does not fit the target.

    Warns:
        NoEffectWarning: the plan never leaves early.
    """
    if not 0 < level < 1:
        raise InvalidInput(f"level must lie inside (0, 1), got {level}.")
    _check_kinds(trace, rule, target)
    scores = trace.scores(rule)
    if scores.shape != trace.predictions.shape:
        raise InvalidInput(f"scores must be {tuple(trace.predictions.shape)}, got {tuple(scores.shape)}.")
    closed = torch.isneginf(scores[:, :-1]).all(dim=0)
    if closed.any():
        return _without(trace, rule, scores, closed, target, method, level)
    cols = columns(scores, trace.exits)
    parts = target.targets if isinstance(target, All) else (target,)
    caps = [t for t in parts if isinstance(t, PeakCost)]
    deepest = _cap(trace, caps)
    limits = [_limit(trace, t) for t in parts if isinstance(t, (MeanCost, Latency))]
    risks = [t for t in parts if isinstance(t, Risk)]
    wants = Procedure if risks else CostMethod
    if method is not None and not isinstance(method, wants):
        kind = "a risk procedure such as LTT()" if risks else "a mean-cost method such as OptimalStopping()"
        raise InvalidInput(f"{target!r} needs {kind}, got {method!r}.")
    capped = np.ascontiguousarray(cols[:deepest])
    work = _Work(trace, rule, cols, capped, deepest, level, {"peak_cost": min(c.fraction for c in caps)} if caps else {})
    if risks:
        plan = _by_risk(work, risks[0], parts, limits, method if isinstance(method, Procedure) else None)
    else:
        plan = _by_cost(work, parts, limits, method if isinstance(method, CostMethod) else None)
    if plan.shares[-1] == 1 and len(trace.exits) > 1:
        warn(
            "The plan never leaves early on the calibration items, so it changes nothing. Relax the target or train better exits.",
            NoEffectWarning,
        )
    return plan


def _check_kinds(trace: object, rule: object, target: object) -> None:
    """Refuse arguments in the wrong order, classes in place of objects, and bare numbers, which have no one meaning as a target."""
    if not isinstance(trace, Trace):
        raise InvalidInput(f"calibrate(trace, rule, target) takes a Trace first, as record() gives it; got {trace!r:.200}.")
    if isinstance(rule, type) or not hasattr(rule, "needs_hidden"):  # a rule whose scores were recorded need not score again
        raise InvalidInput(f"The second argument is a rule, as in Confidence(); got {rule!r:.200}.")
    if isinstance(target, type) or not isinstance(target, (MeanCost, Risk, Latency, PeakCost, Utility, ExitShares, All)):
        raise InvalidInput(f"The third argument is a target, as in MeanCost(0.5) or Risk(max_drop=0.01, delta=0.05); got {target!r:.200}.")


def _without(
    trace: Trace, rule: Rule, scores: Tensor, closed: Tensor, target: Target, method: CostMethod | Procedure | None, level: float
) -> Plan:
    """Calibrate without the exits at which a rule lets nobody leave (every score is ``-inf``), and put them back, switched off.

    Some rules have no score at an exit: there is nothing to compare with before the first one, or `after` forbids it.
    """
    keep = torch.cat([~closed, torch.tensor([True])])
    table = trace.latency
    if table is not None:
        # What runs up to a closed exit, its head included, is on the way to the next one.
        owner = (keep.to(torch.int64).cumsum(0) - keep.to(torch.int64)).to(table.segment_ms.device)
        merged = torch.zeros(int(keep.sum()), table.segment_ms.shape[1], dtype=table.segment_ms.dtype)
        passing = torch.where(keep[:, None], table.segment_ms, table.segment_ms + table.head_ms)
        table = replace(table, segment_ms=merged.index_add(0, owner, passing), head_ms=table.head_ms[keep])
    part = replace(
        trace,
        exits=tuple(n for n, kept in zip(trace.exits, keep.tolist(), strict=True) if kept),
        predictions=trace.predictions[:, keep],
        cost=trace.running_cost(torch.where(keep, 0.0, math.inf), rule)[keep],
        head_cost=None if trace.head_cost is None else trace.head_cost[keep],
        losses=None if trace.losses is None else trace.losses[:, keep],
        logits=None,
        recorded={part_key(rule): scores[:, keep]},
        latency=table,
    )
    plan = calibrate(part, rule, target, method=method, level=level)
    open_thresholds, open_shares = iter(plan.thresholds), iter(plan.shares)
    thresholds = tuple(next(open_thresholds) if kept else math.inf for kept in keep.tolist())
    shares = tuple(next(open_shares) if kept else 0.0 for kept in keep.tolist())
    return replace(plan, exits=trace.exits, thresholds=thresholds, shares=shares)


@dataclass(frozen=True)
class _Work:
    trace: Trace
    rule: Rule
    cols: F32
    capped: F32
    deepest: int
    level: float
    extra: Mapping[str, float]

    def full(self, thresholds: F64) -> F64:
        return _expand(thresholds, len(self.trace.exits)) if thresholds.size < len(self.trace.exits) else thresholds

    def plan(
        self,
        thresholds: F64,
        realised: Realised,
        *,
        statement: str,
        method: str,
        requested: Mapping[str, float],
        more: Mapping[str, Estimate],
        guaranteed: bool = False,
        delta: float | None = None,
        assumptions: str = "",
        notes: Mapping[str, Any] | None = None,
    ) -> Plan:
        found = realised.estimates()
        if self.extra:
            last = max(k for k, s in enumerate(realised.shares) if s > 0)
            peak = float(_relative_cost(self.trace)[last])
            found["peak_cost"] = Estimate(peak, peak, peak, self.level)
        text = {"assumptions": assumptions} if assumptions else {}
        certificate = Certificate(
            statement,
            method,
            {**requested, **self.extra},
            {**found, **more},
            guaranteed,
            int(realised.exits.numel()),
            self.trace.fingerprint,
            delta,
            **text,
        )
        return Plan(
            self.rule,
            self.trace.exits,
            tuple(float(t) for t in thresholds),
            realised.shares,
            realised.mean_cost.value,
            certificate,
            self.trace.fingerprint,
            dict(notes or {}),
        )


def _limit_estimates(trace: Trace, realised: Realised, level: float, parts: tuple[Target, ...]) -> dict[str, Estimate]:
    """Realised latencies; the mean cost in FLOPs is always reported."""
    out: dict[str, Estimate] = {}
    shares, n = np.asarray(realised.shares), int(realised.exits.numel())
    for part in parts:
        if isinstance(part, Latency) and part.mean_ms is not None:
            ms = exit_latency_ms(trace, part.batch_size)
            mean = float(shares @ ms)
            spread = max(float(shares @ ms**2) - mean**2, 0.0) ** 0.5 / max(n - 1, 1) ** 0.5
            half = NormalDist().inv_cdf(0.5 + level / 2) * spread
            out["mean_ms"] = Estimate(mean, mean - half, mean + half, level)
    for part in parts:
        if isinstance(part, Latency) and part.p95_ms is not None:
            ms = exit_latency_ms(trace, part.batch_size)
            below = np.cumsum(shares)
            # An order statistic lies between those at the ends of the interval of the share below it.
            band = share_estimate(0.95 * n, n, level)
            low, at, high = (float(ms[min(int(np.searchsorted(below, p - 1e-12)), len(ms) - 1)]) for p in (band.low, 0.95, band.high))
            out["p95_ms"] = Estimate(at, low, high, level)
    return out


def _by_cost(work: _Work, parts: tuple[Target, ...], limits: list[_Limit], method: CostMethod | None) -> Plan:
    trace, d = work.trace, work.deepest
    losses = None if trace.losses is None else error_loss(trace).values[:, : d + 1]
    chosen = method or (OptimalStopping() if losses is not None else GeometricShares())
    name = type(chosen).__name__
    requested: dict[str, float] = {}
    whole = next((p for p in parts if isinstance(p, (Utility, ExitShares))), None)
    assumptions = "the served items resemble the calibration items; realised values were measured on the items that chose the thresholds"
    if isinstance(whole, Utility):
        if losses is None:
            raise InvalidInput("Utility weighs loss against cost, and this trace has no losses. Record it with labels.")
        if not isinstance(chosen, OptimalStopping):
            raise InvalidInput(f"Utility is maximised by OptimalStopping, got {chosen!r}.")
        cost = _relative_cost(trace)[: d + 1]
        thresholds = chosen.at_price(Problem(work.capped, cost, float(cost[-1]), losses), whole.beta)
        requested["beta"] = whole.beta
        statement = f"The mean of quality - {whole.beta:g} x cost is as large as thresholds make it."
    elif isinstance(whole, ExitShares):
        if len(whole.shares) != len(trace.exits):
            raise InvalidInput(f"ExitShares needs {len(trace.exits)} shares, one per exit, got {len(whole.shares)}.")
        if method is not None:
            raise InvalidInput(f"ExitShares fixes the thresholds by itself; leave out method={method!r}.")
        left_by = np.rint(np.cumsum(whole.shares)[:-1] * trace.items).astype(np.int64)
        thresholds = share_thresholds(work.cols, np.minimum(left_by, trace.items))
        requested |= {f"share {exit_name}": s for exit_name, s in zip(trace.exits, whole.shares, strict=True)}
        name, statement = "quantiles", "The requested share of items leaves at each exit."
    elif not limits:  # a cap alone
        thresholds = np.append(np.full(d, np.inf), -np.inf)
        name, statement = "fixed exit", f"No item goes deeper than exit {trace.exits[d]!r}."
    else:
        requested |= {limit.name: limit.requested for limit in limits}
        thresholds = _meet_all(work, limits, losses, chosen)
        statement = "; ".join(f"{_WORDS[limit.name]} at most {limit.requested:.4g}{_UNITS[limit.name]}" for limit in limits) + "."
    thresholds = work.full(thresholds)
    realised = evaluate_columns(trace, work.cols, thresholds, work.level, rule=work.rule)
    more = _limit_estimates(trace, realised, work.level, parts)
    if isinstance(whole, ExitShares):
        more |= {
            f"share {e}": share_estimate(round(s * trace.items), trace.items, work.level)
            for e, s in zip(trace.exits, realised.shares, strict=True)
        }
    return work.plan(thresholds, realised, statement=statement, method=name, requested=requested, more=more, assumptions=assumptions)


def _meet_all(work: _Work, limits: list[_Limit], losses: torch.Tensor | None, method: CostMethod) -> F64:
    """Thresholds within every limit: each limit's own solution if it keeps the others, else what is within all of them together."""
    d = work.deepest
    problems = [Problem(work.capped, limit.cost[: d + 1], limit.target, losses, limit.unit) for limit in limits]
    found = [method.fit(p) for p in problems]
    if len(found) == 1:
        return found[0]
    # Lower thresholds only ever leave earlier, so the smallest of each exit is within all limits.
    found.append(np.minimum.reduce(found))
    fine = [t for t in found if all(p.mean_cost(t) <= p.target * (1 + 1e-9) for p in problems)]
    if losses is not None:
        return min(fine, key=problems[0].mean_loss)
    return max(fine, key=problems[0].mean_cost)


def _by_risk(work: _Work, risk: Risk, parts: tuple[Target, ...], limits: list[_Limit], method: Procedure | None) -> Plan:
    trace, d = work.trace, work.deepest
    procedure = method or (CRC() if risk.in_expectation else LTT())
    if risk.in_expectation and procedure.guaranteed and not isinstance(procedure, CRC):
        raise InvalidInput(f"Risk(in_expectation=True) is controlled by CRC, got {procedure!r}.")
    if not risk.in_expectation and isinstance(procedure, CRC):
        raise InvalidInput("CRC controls the risk in expectation, not with probability 1 - delta. Ask for Risk(..., in_expectation=True).")
    loss = _risk_loss(trace, risk)
    capped_loss = replace(loss, values=loss.values[:, : d + 1])
    family = procedure.family or default_family(work.rule, trace.items)
    cost = _relative_cost(trace)[: d + 1]
    evidence = gather_evidence(work.capped, cost, capped_loss, work.rule, family, monotone=procedure.monotone)
    sample, curve = evidence.sample, evidence.curve
    # Never leaving gives the full model's own answers: no drop and no disagreement, without any statistics.
    trivial = risk.max_error is None and d == len(trace.exits) - 1
    certified = np.zeros(sample.mean.size, bool)
    if trivial:
        certified[0] = True
        certified[1:] = procedure.certify(sample.at(slice(1, None)), risk.limit, risk.delta)
    else:
        certified = procedure.certify(sample, risk.limit, risk.delta)
    if not certified.any():
        best = _best_bound(evidence, risk, procedure)
        raise BudgetInfeasible(
            f"No setting is certified to keep {risk.name} at {risk.limit:.4g} with {sample.items:,} items; the best that can be promised "
            f"is {best:.4g}. Record more items, or ask for that.",
            requested=risk.limit,
            best=best,
            unit=f"mean {loss.unit}",
        )
    allowed = certified.copy()
    for limit in limits:
        mean = curve.shares @ limit.cost[: d + 1]
        within = mean <= limit.target * (1 + 1e-9)
        if not (allowed & within).any():
            reach = float(mean[certified].min())
            raise BudgetInfeasible(
                f"{limit.name} {limit.requested:.4g} and {risk.name} {risk.limit:.4g} cannot both be met: among the certified settings the "
                f"lowest is {reach:.4g} ({limit.unit}), and {limit.target:.4g} is needed.",
                requested=limit.target,
                best=reach,
                unit=limit.unit,
            )
        allowed &= within
    at = np.flatnonzero(allowed)
    if limits:  # within the budget, the least loss; the cheapest of equals
        key = np.lexsort((curve.cost[at], np.round(sample.mean[at], 12)))
        pick = int(at[key[0]])
    else:  # within the risk, the least cost
        pick = int(at[np.argmin(curve.cost[at])])
    thresholds = work.full(evidence.path[pick])
    realised = evaluate_columns(trace, work.cols, thresholds, work.level, evidence.rows, work.rule)
    more = _limit_estimates(trace, realised, work.level, parts)
    shown = realised.error if risk.max_error is not None else realised.drop if risk.max_drop is not None else realised.disagreement
    if shown is not None:
        more[risk.name] = shown
    requested = {risk.name: risk.limit} | {limit.name: limit.requested for limit in limits}
    what = {
        "max_drop": "Mean loss above the full model's",
        "max_error": "Mean loss",
        "max_disagreement": "Share of items answered otherwise than by the full model",
    }[risk.name]
    promise = f"{what} is at most {risk.limit:g}"
    if not procedure.guaranteed:
        statement, delta = f"{what} was measured to be at most {risk.limit:g}.", None
    elif risk.in_expectation:
        statement, delta = f"{promise} in expectation over calibration items.", None
    else:
        statement, delta = f"{promise} with probability at least {1 - risk.delta:g} over calibration items.", risk.delta
        requested["delta"] = risk.delta
    kind = type(family).__name__
    return work.plan(
        thresholds,
        realised,
        statement=statement,
        method=f"{procedure.describe(sample)}; {kind}",
        requested=requested,
        more=more,
        guaranteed=procedure.guaranteed,
        delta=delta,
        notes={"settings": int(certified.size), "certified": int(certified.sum()), "design_items": trace.items - sample.items},
    )


def _best_bound(evidence: Evidence, risk: Risk, procedure: Procedure) -> float:
    """The smallest limit that the most promising setting could be given."""
    sample = evidence.sample.at(int(np.argmin(evidence.sample.mean)))
    if isinstance(procedure, CRC):
        return float((sample.items * sample.natural(sample.mean)[0] + sample.high) / (sample.items + 1))
    if not procedure.guaranteed:
        return float(sample.natural(sample.mean)[0])
    bound = getattr(procedure, "bound", None) or default_bound(sample)
    return float(bound.upper(sample, risk.delta)[0])
