"""How good the answers of a trace are: per exit, under a plan, and where thinking longer hurts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.core.certificate import Plan
from offramp.core.errors import InvalidInput
from offramp.core.trace import Trace


def _logits(trace: Trace, need: str) -> Tensor:
    if trace.logits is None:
        raise InvalidInput(f"{need} needs logits, which this trace does not hold. Record it again and keep them.")
    return trace.logits


def _labels(trace: Trace, need: str) -> Tensor:
    if trace.labels is None:
        raise InvalidInput(f"{need} needs labels, which this trace does not hold. Record it on labelled items.")
    return trace.labels.long()


# ------------------------------------------------------------------------------------------------ right or wrong, per exit


@dataclass(frozen=True)
class ItemQuality:
    """Quality of each exit's answer to each item.

    Attributes:
        values: ``[N, K]`` float32 in [0, 1], higher is better.
        name: ``"accuracy"``, ``"quality"`` (one minus the recorded loss) or ``"agreement with the full model"``.
        binary: whether every value is 0 or 1.
    """

    values: Tensor
    name: str
    binary: bool


def item_quality(trace: Trace) -> ItemQuality:
    """The best notion of quality that the trace allows.

    Class predictions with labels give accuracy; otherwise recorded losses give ``1 - loss``; without either, class
    predictions give agreement with the model's own output, which needs no labels.

    Raises:
        InvalidInput: regression predictions without losses.
    """
    classes = not trace.predictions.is_floating_point()
    if classes and trace.labels is not None:
        return ItemQuality((trace.predictions == trace.labels.long()[:, None]).float(), "accuracy", True)
    if trace.losses is not None:
        values = 1 - trace.losses.float()
        return ItemQuality(values, "quality", bool(((values == 0) | (values == 1)).all()))
    if classes:
        return ItemQuality((trace.predictions == trace.predictions[:, -1:]).float(), "agreement with the full model", True)
    raise InvalidInput("Quality of regression answers needs recorded losses, and this trace has none. Record it with labels and a loss.")


def correct(trace: Trace) -> Tensor:
    """``[N, K]`` bool: whether each exit's answer is the label.

    Raises:
        InvalidInput: no labels, or predictions that are not classes.
    """
    if trace.predictions.is_floating_point():
        raise InvalidInput("Right or wrong is defined for class predictions; this trace holds float predictions.")
    return trace.predictions == _labels(trace, "Right or wrong")[:, None]


def exit_accuracy(trace: Trace) -> Tensor:
    """``[K]`` float64 accuracy of each exit over all items."""
    return correct(trace).double().mean(0)


def disagreement(trace: Trace) -> Tensor:
    """``[K]`` float64 share of items whose answer at exit k differs from the model's own; 0 at the last. Needs no labels."""
    return (trace.predictions != trace.predictions[:, -1:]).double().mean(0)


# ------------------------------------------------------------------------------------------------ proper scores, per exit


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log likelihood in nats of ``logits`` ``[..., C]`` over items ``[N, ...]``.

    Args:
        logits: ``[N, C]`` or ``[N, K, C]``.
        labels: ``[N]`` int64.

    Returns:
        A scalar, or ``[K]``, float64.
    """
    log_p = torch.log_softmax(logits.double(), dim=-1)
    index = labels.long().view(-1, *([1] * (logits.ndim - 1))).expand(*logits.shape[:-1], 1)
    return -log_p.gather(-1, index).squeeze(-1).mean(0)


def brier(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean squared distance of the softmax from the one-hot label, summed over classes, in [0, 2] (Brier 1950).

    Args:
        logits: ``[N, C]`` or ``[N, K, C]``.
        labels: ``[N]`` int64.

    Returns:
        A scalar, or ``[K]``, float64.
    """
    p = torch.softmax(logits.double(), dim=-1)
    index = labels.long().view(-1, *([1] * (logits.ndim - 1))).expand(*logits.shape[:-1], 1)
    truth = torch.zeros_like(p).scatter_(-1, index, 1.0)
    return ((p - truth) ** 2).sum(-1).mean(0)


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram.

    Attributes:
        confidence: ``[bins]`` mean confidence of the items in each bin; 0 where a bin is empty.
        accuracy: ``[bins]`` share of them that is right; 0 where a bin is empty.
        count: ``[bins]`` int64 items.
        edges: ``[bins + 1]`` ascending.
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor
    edges: Tensor

    @property
    def ece(self) -> float:
        """Expected calibration error: mean absolute gap of accuracy and confidence, weighted by items (Guo et al. 2017, eq. 3)."""
        gap = (self.accuracy - self.confidence).abs()
        return float((gap * self.count).sum() / self.count.sum())

    @property
    def max_error(self) -> float:
        """Largest gap of any bin that holds items (Guo et al. 2017, eq. 5)."""
        return float((self.accuracy - self.confidence).abs()[self.count > 0].max())


def reliability(confidence: Tensor, right: Tensor, bins: int = 15, *, equal_mass: bool = False) -> Reliability:
    """Bin items by confidence.

    Args:
        confidence: ``[N]`` in [0, 1], at least one item.
        right: ``[N]`` bool, or quality in [0, 1].
        bins: >= 1.
        equal_mass: bins hold equally many items (quantile bins, to within one) instead of being equally wide. Items with
            equal confidence may then fall on both sides of an edge.

    Raises:
        InvalidInput: shapes differ, no items, no bins, or a confidence outside [0, 1].
    """
    if confidence.ndim != 1 or confidence.shape != right.shape or confidence.numel() == 0:
        raise InvalidInput(f"confidence and right must be equally long vectors, got {tuple(confidence.shape)} and {tuple(right.shape)}.")
    p, r = confidence.detach().cpu().double(), right.detach().cpu().double()
    if bins < 1 or float(p.min()) < 0 or float(p.max()) > 1 + 1e-6 or bool(p.isnan().any()):
        raise InvalidInput(f"bins must be >= 1 and confidence in [0, 1], got {bins} bins and [{float(p.min())}, {float(p.max())}].")
    if equal_mass:
        order = p.argsort(stable=True)
        index = torch.empty(p.numel(), dtype=torch.int64)
        index[order] = torch.arange(p.numel()) * bins // p.numel()
        starts = (torch.arange(1, bins) * p.numel() + bins - 1) // bins  # first rank of each bin but the first
        ordered = p[order]
        inner = ordered[starts.clamp(max=p.numel() - 1)]
        edges = torch.cat([ordered[:1], inner, ordered[-1:]])
    else:
        edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
        index = torch.bucketize(p, edges[1:-1], right=False)  # (low, high], as is usual; 0 goes to the first bin
    count = torch.bincount(index, minlength=bins)
    share = count.clamp(min=1).double()
    return Reliability(
        torch.bincount(index, weights=p, minlength=bins) / share, torch.bincount(index, weights=r, minlength=bins) / share, count, edges
    )


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 15, *, equal_mass: bool = False) -> float:
    """Expected calibration error in [0, 1]; see `reliability` for the arguments."""
    return reliability(confidence, right, bins, equal_mass=equal_mass).ece


def exit_reliability(trace: Trace, bins: int = 15, *, equal_mass: bool = False) -> tuple[Reliability, ...]:
    """One reliability diagram of the top-1 probability per exit, K in all."""
    logits, right = _logits(trace, "Reliability"), correct(trace)
    out = []
    for k in range(len(trace.exits)):
        top = torch.softmax(logits[:, k].float(), dim=-1).amax(-1)
        out.append(reliability(top, right[:, k], bins, equal_mass=equal_mass))
    return tuple(out)


@dataclass(frozen=True)
class ExitQuality:
    """Quality of every exit over all items; each field ``[K]`` float64.

    Attributes:
        accuracy: share right.
        disagreement: share that differs from the model's own output.
        ece: expected calibration error, 15 equally wide bins.
        ece_equal_mass: the same with 15 quantile bins (as JEI-DNN reports it).
        nll: nats.
        brier: in [0, 2].
    """

    accuracy: Tensor
    disagreement: Tensor
    ece: Tensor
    ece_equal_mass: Tensor
    nll: Tensor
    brier: Tensor


def exit_quality(trace: Trace, bins: int = 15) -> ExitQuality:
    """Everything that labels and logits say about each exit on its own."""
    logits, labels = _logits(trace, "Exit quality"), _labels(trace, "Exit quality")
    wide, mass = exit_reliability(trace, bins), exit_reliability(trace, bins, equal_mass=True)
    per_exit = range(len(trace.exits))
    return ExitQuality(
        exit_accuracy(trace),
        disagreement(trace),
        torch.tensor([r.ece for r in wide], dtype=torch.float64),
        torch.tensor([r.ece for r in mass], dtype=torch.float64),
        torch.stack([nll(logits[:, k], labels) for k in per_exit]),
        torch.stack([brier(logits[:, k], labels) for k in per_exit]),
    )


# ------------------------------------------------------------------------------------------------ thinking too long


@dataclass(frozen=True)
class Overthinking:
    """What going on costs and gains (Kaya, Hong and Dumitras 2019, sections 3 and 4).

    Attributes:
        destructive: share of items that some early exit gets right and the last gets wrong.
        wasteful: share of items that some early exit and the last both get right: the rest of the network was not needed.
        oracle: share of items that some exit gets right; the accuracy of leaving each item at its first right exit.
        oracle_cost: mean cost of doing so (items that no exit gets right leave at the first), over the base model's cost.
        lost_after: ``[K - 1]`` share right at exit k and wrong at the last.
        gained_after: ``[K - 1]`` share wrong at exit k and right at the last.
        first_right: ``[N]`` int64 first exit that is right, K if none is.
    """

    destructive: float
    wasteful: float
    oracle: float
    oracle_cost: float
    lost_after: Tensor
    gained_after: Tensor
    first_right: Tensor


def overthinking(trace: Trace) -> Overthinking:
    """Where earlier answers were right already."""
    right = correct(trace)
    exits = right.shape[1]
    early, last = right[:, :-1].any(1), right[:, -1]
    any_right = right.any(1)
    first = torch.where(any_right, right.int().argmax(1), exits)
    leave_at = torch.where(any_right, first, 0)
    return Overthinking(
        float((early & ~last).double().mean()),
        float((early & last).double().mean()),
        float(any_right.double().mean()),
        float(trace.cost.double()[leave_at].mean() / trace.base_cost),
        (right[:, :-1] & ~last[:, None]).double().mean(0),
        (~right[:, :-1] & last[:, None]).double().mean(0),
        first,
    )


@dataclass(frozen=True)
class Monotonicity:
    """Whether more compute means better answers.

    Attributes:
        marginal: ``[K - 1]`` accuracy of exit k + 1 minus that of exit k; a negative entry is a step back.
        worst_drop: ``[N]`` float64 largest fall of an item's true-class probability from any exit to any later one.
        tolerances: the falls that were asked about.
        violations: ``[len(tolerances)]`` share of items whose worst drop exceeds each.
    """

    marginal: Tensor
    worst_drop: Tensor
    tolerances: tuple[float, ...]
    violations: Tensor

    @property
    def conditional(self) -> float:
        """Share of items whose true-class probability never falls."""
        return float((self.worst_drop <= 0).double().mean())


def monotonicity(trace: Trace, tolerances: Sequence[float] = (0.01, 0.05, 0.1, 0.2, 0.5)) -> Monotonicity:
    """Marginal monotonicity, and conditional monotonicity as in Jazbec et al. 2023 (section 3), per item.

    Args:
        trace: with logits and labels.
        tolerances: falls of probability, in [0, 1].
    """
    logits, labels = _logits(trace, "Conditional monotonicity"), _labels(trace, "Conditional monotonicity")
    p = torch.softmax(logits.double(), dim=-1).gather(-1, labels.view(-1, 1, 1).expand(-1, logits.shape[1], 1)).squeeze(-1)
    drop = (p.cummax(dim=1).values - p).amax(1)
    limits = tuple(float(t) for t in tolerances)
    violations = torch.tensor([float((drop > t).double().mean()) for t in limits], dtype=torch.float64)
    return Monotonicity(exit_accuracy(trace).diff(), drop, limits, violations)


# ------------------------------------------------------------------------------------------------ under a plan


def first_exit(scores: Tensor, thresholds: Sequence[float]) -> Tensor:
    """``[N]`` int64 index of the first exit with ``score >= threshold``; the last exit takes what is left.

    Args:
        scores: ``[N, K]``; the last column is not compared.
        thresholds: K numbers.
    """
    if scores.ndim != 2 or scores.shape[1] != len(thresholds):
        raise InvalidInput(f"scores must be [items, {len(thresholds)}], got {tuple(scores.shape)}.")
    limits = torch.tensor(list(thresholds), dtype=torch.float64, device=scores.device).to(scores.dtype)
    leaves = scores >= limits
    leaves[:, -1] = True
    return leaves.int().argmax(1)


@dataclass(frozen=True)
class Outcome:
    """What a plan does to each item of a trace.

    Attributes:
        exits: ``[N]`` int64 exit taken, 0-based.
        scores: ``[N, K]`` float32 as the rule gives them.
        predictions: ``[N]`` answers given.
        quality: ``[N]`` float32 in [0, 1]; its name is ``quality_name``.
        full_quality: ``[N]`` of the model's own output.
        cost: ``[N]`` float64 over the base model's FLOPs, heads passed on the way included.
        shares: ``[K]`` float64 share of items leaving at each exit.
    """

    exits: Tensor
    scores: Tensor
    predictions: Tensor
    quality: Tensor
    full_quality: Tensor
    quality_name: str
    binary: bool
    cost: Tensor
    shares: Tensor

    @property
    def mean_cost(self) -> float:
        return float(self.cost.mean())

    @property
    def mean_quality(self) -> float:
        return float(self.quality.double().mean())


def outcome(trace: Trace, plan: Plan) -> Outcome:
    """Replay a plan on a trace.

    Raises:
        InvalidInput: the plan names other exits than the trace.
        NotReplayable: leaving early would change later steps, or the rule's scores are not in the trace.
    """
    if plan.exits != trace.exits:
        raise InvalidInput(f"The plan's exits {list(plan.exits)} are not the trace's {list(trace.exits)}.")
    if trace.items == 0:
        raise InvalidInput("The trace holds no items.")
    scores = trace.scores(plan.rule).detach().cpu()
    exits = first_exit(scores, plan.thresholds)
    quality = item_quality(trace)
    row = exits[:, None]
    return Outcome(
        exits,
        scores,
        trace.predictions.gather(1, row).squeeze(1),
        quality.values.gather(1, row).squeeze(1),
        quality.values[:, -1],
        quality.name,
        quality.binary,
        trace.running_cost(plan.thresholds, plan.rule).double()[exits] / trace.base_cost,
        torch.bincount(exits, minlength=len(trace.exits)).double() / trace.items,
    )


def adaptive_calibration_error(trace: Trace, result: Outcome, bins: int = 15, *, equal_mass: bool = True) -> float:
    """Expected calibration error of the answers actually given, each with the top-1 probability of its exit (JEI-DNN, section 5)."""
    logits, right = _logits(trace, "Calibration error"), correct(trace)
    rows = torch.arange(trace.items)
    top = torch.softmax(logits[rows, result.exits].float(), dim=-1).amax(-1)
    return calibration_error(top, right[rows, result.exits], bins, equal_mass=equal_mass)


# ------------------------------------------------------------------------------------------------ what explains the depth


def r_squared(depth: Tensor, covariate: Tensor) -> float:
    """Share of the variance of exit depth that a straight line in a covariate explains, in [0, 1].

    A rule whose depth the time step, the position or the input length explains almost fully could be a schedule.

    Args:
        depth: ``[N]`` exit taken (or blocks run).
        covariate: ``[N]`` or ``[N, D]`` numbers; an intercept is added.

    Returns:
        0 when all depths are equal: there is nothing to explain.
    """
    y = depth.detach().cpu().double()
    x = covariate.detach().cpu().double().reshape(covariate.shape[0], -1)
    if y.ndim != 1 or y.numel() == 0 or x.shape[0] != y.numel():
        raise InvalidInput(f"depth [items] and covariate [items] or [items, D] needed, got {tuple(depth.shape)}, {tuple(covariate.shape)}.")
    y = y - y.mean()
    total = float((y**2).sum())
    if total == 0:
        return 0.0
    design = x - x.mean(0)
    scale = design.norm(dim=0)
    design = design[:, scale > 0] / scale[scale > 0]
    if design.shape[1] == 0:
        return 0.0
    fitted = design @ torch.linalg.lstsq(design, y[:, None], driver="gelsd").solution[:, 0]
    return min(1.0, max(0.0, 1 - float(((y - fitted) ** 2).sum()) / total))


def r_squared_groups(depth: Tensor, group: Tensor) -> float:
    """Share of the variance of exit depth between groups (correlation ratio), in [0, 1]: any function of a discrete covariate.

    Args:
        depth: ``[N]``.
        group: ``[N]`` integers, e.g. time step, position, class or task.
    """
    y = depth.detach().cpu().double()
    if group.is_floating_point() or group.shape != y.shape or y.ndim != 1 or y.numel() == 0:
        raise InvalidInput(
            f"depth [items] and integer groups [items] needed, got {tuple(depth.shape)}, {group.dtype} {tuple(group.shape)}."
        )
    _, index, count = group.detach().cpu().unique(return_inverse=True, return_counts=True)
    y = y - y.mean()
    total = float((y**2).sum())
    means = torch.bincount(index, weights=y) / count
    return 0.0 if total == 0 else min(1.0, float((means**2 * count).sum()) / total)
