"""Replaying thresholds on recorded scores: who leaves where, at which cost, with which loss.

Shapes: ``N`` items, ``K`` exits with the model's own output last, ``M`` settings, ``G`` blocks of items. Inside this package
scores are held as contiguous columns ``[K-1, N]`` (exit first), since every loop walks over exits and reads all items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.core.certificate import Estimate
from offramp.core.errors import InvalidInput
from offramp.core.protocols import Rule
from offramp.core.trace import RiskTable, Trace

Floats: TypeAlias = NDArray[np.floating[Any]]
F32: TypeAlias = NDArray[np.float32]
F64: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.integer[Any]]
Bools: TypeAlias = NDArray[np.bool_]

CHUNK = 16_384
"""Items per pass. A chunk's columns stay in the processor's cache, and no array of all items is allocated on the way."""


# --------------------------------------------------------------------------------------------------------------- scores and leaving


def columns(scores: Tensor, names: Sequence[str] | None = None) -> F32:
    """Scores ``[N, K]`` as contiguous columns ``[K-1, N]`` without the last exit's, which is never compared.

    Raises:
        InvalidInput: not a matrix, no items, or scores that are not finite (with their number and the exit).
    """
    if scores.ndim != 2 or scores.shape[1] < 1:
        raise InvalidInput(f"scores must be [items, exits], got shape {tuple(scores.shape)}.")
    if scores.shape[0] == 0:
        raise InvalidInput("There are no items to calibrate on: the trace is empty. Record some items first.")
    raw: F32 = scores.detach().to("cpu", torch.float32).numpy()
    n, exits = raw.shape[0], raw.shape[1] - 1
    out = np.empty((exits, n), np.float32)
    good = np.zeros(exits, np.int64)
    for at in range(0, n, CHUNK):
        block = out[:, at : at + CHUNK]
        block[...] = raw[at : at + CHUNK, :-1].T
        good += np.count_nonzero(np.isfinite(block), axis=1)
    for k in range(exits):
        if good[k] < n:
            name = f"{k} ({names[k]!r})" if names is not None else str(k)
            raise InvalidInput(
                f"{n - good[k]} of {n} scores at exit {name} are not finite. A score must be a finite number: "
                "look for NaN or infinite logits of that head (a diverged training run, overflow in float16)."
            )
    return out


def leave_columns(cols: F32, thresholds: Floats) -> NDArray[np.int16]:
    """First exit whose score reaches its threshold, ``[N]``; comparisons in float32, as the engine makes them."""
    limits = thresholds.astype(np.float32)
    out = np.full(cols.shape[1], cols.shape[0], np.int16)
    for at in range(0, cols.shape[1], CHUNK):
        block = out[at : at + CHUNK]
        for k in range(cols.shape[0] - 1, -1, -1):
            np.copyto(block, np.int16(k), where=cols[k, at : at + CHUNK] >= limits[k])
    return out


def leave_at(scores: Tensor, thresholds: Sequence[float] | Tensor) -> Tensor:
    """Exit index (int64 ``[N]``) at which each item leaves: the first with ``score >= threshold``, else the last.

    Args:
        scores: ``[N, K]``; the last column is ignored.
        thresholds: K numbers; the last is ignored, ``inf`` switches an exit off.

    Example:
        >>> leave_at(torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.2, 0.1, 0.0]]), [0.5, 0.5, float("-inf")])
        tensor([0, 1, 2])
    """
    limits = torch.as_tensor(thresholds, dtype=torch.float32, device=scores.device)
    if scores.ndim != 2 or limits.shape != (scores.shape[1],):
        raise InvalidInput(f"leave_at needs scores [N, K] and K thresholds, got {tuple(scores.shape)} and {tuple(limits.shape)}.")
    ready = scores.to(torch.float32) >= limits
    ready[:, -1] = True
    return ready.to(torch.uint8).argmax(dim=1)


# ----------------------------------------------------------------------------------------------------------------------- losses


@dataclass(frozen=True)
class Loss:
    """A loss of every exit's answer.

    Attributes:
        values: ``[N, K]``.
        low: smallest possible value.
        high: largest possible value.
        binary: whether it only takes the values ``low`` and ``high``.
        unit: what the mean is called.
    """

    values: Tensor
    low: float
    high: float
    binary: bool
    unit: str


def error_loss(trace: Trace) -> Loss:
    """The recorded losses, in [0, 1].

    Raises:
        InvalidInput: the trace has no losses, or they leave [0, 1].
    """
    if trace.losses is None:
        raise InvalidInput("This trace has no losses. Record it with labels, or use a label-free target: Risk(max_disagreement=...).")
    values = trace.losses.detach().to("cpu", torch.float32)
    low, high = (float(v) for v in torch.aminmax(values)) if values.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= 1):
        raise InvalidInput(f"Losses must lie in [0, 1] for bounds to hold, got values from {low} to {high}. Scale or clip them.")
    # {0, 1} exactly when x (1 - x) vanishes; checked once since exact binomial bounds apply only then.
    flat = values.reshape(-1).numpy()
    binary = not any(np.any((b := flat[i : i + CHUNK]) * (1 - b)) for i in range(0, flat.size, CHUNK))
    return Loss(values, 0.0, 1.0, binary, "error")


def drop_loss(trace: Trace, *, signed: bool = True) -> Loss:
    """Loss above the last exit's, in [-1, 1]; without ``signed`` its positive part, in [0, 1]."""
    error = error_loss(trace)
    gap = error.values - error.values[:, -1:]
    return Loss(gap, -1.0, 1.0, False, "drop") if signed else Loss(gap.clamp_min_(0), 0.0, 1.0, error.binary, "positive drop")


def disagreement_loss(trace: Trace) -> Loss:
    """1 where an exit's class differs from the last exit's. Needs no labels.

    Raises:
        InvalidInput: predictions are not classes.
    """
    if trace.predictions.is_floating_point():
        raise InvalidInput(
            "Disagreement compares classes, but the predictions are real numbers. Use Risk(max_drop=...) with a bounded loss."
        )
    p = trace.predictions.detach().cpu()
    return Loss((p != p[:, -1:]).to(torch.float32), 0.0, 1.0, True, "disagreement")


# ------------------------------------------------------------------------------------------------------------------- evaluation


def mean_estimate(values: Floats, level: float = 0.95) -> Estimate:
    """Mean with a normal interval."""
    n = values.size
    mean = float(values.mean(dtype=np.float64))
    half = NormalDist().inv_cdf(0.5 + level / 2) * float(values.std(dtype=np.float64)) / max(n - 1, 1) ** 0.5
    return Estimate(mean, mean - half, mean + half, level)


def share_estimate(count: float, n: int, level: float = 0.95) -> Estimate:
    """Share ``count / n`` with Wilson's interval (Wilson 1927)."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p = count / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return Estimate(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), level)


def paired_estimate(gap: Floats, level: float = 0.95) -> Estimate:
    """Mean of a signed gap in [-1, 1]. Half an item is added to either side (Agresti and Min 2005), so no gap seen is not no gap."""
    n, mean = gap.size, float(gap.mean(dtype=np.float64))
    total, squares = float(gap.sum(dtype=np.float64)), float(np.square(gap, dtype=np.float64).sum()) + 1.0
    centre = total / (n + 2)
    half = NormalDist().inv_cdf(0.5 + level / 2) * max(squares / (n + 2) - centre**2, 0.0) ** 0.5 / (n + 2) ** 0.5
    return Estimate(mean, max(-1.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)), level)


@dataclass(frozen=True)
class Realised:
    """What thresholds do on a trace.

    Attributes:
        exits: ``[N]`` exit index of each item (int64).
        shares: K shares of items leaving at each exit.
        mean_cost: mean FLOPs over the FLOPs of the model without heads; see `offramp.core.trace.Trace.running_cost`.
        error: mean loss; ``None`` without losses.
        drop: mean loss above the full model's; ``None`` without losses.
        disagreement: share answered otherwise than by the full model; ``None`` for regression.
    """

    exits: Tensor
    shares: tuple[float, ...]
    mean_cost: Estimate
    error: Estimate | None
    drop: Estimate | None
    disagreement: Estimate | None

    @property
    def accuracy(self) -> float | None:
        """1 - mean loss."""
        return None if self.error is None else 1 - self.error.value

    def estimates(self) -> dict[str, Estimate]:
        """The values that are known, by name."""
        named = {"mean_cost": self.mean_cost, "error": self.error, "drop": self.drop, "disagreement": self.disagreement}
        early = share_estimate(round((1 - self.shares[-1]) * len(self.exits)), len(self.exits), self.mean_cost.level)
        return {k: v for k, v in named.items() if v is not None} | {"left_early": early}


def evaluate(trace: Trace, rule: Rule | Tensor, thresholds: Sequence[float] | Tensor, *, level: float = 0.95) -> Realised:
    """Replay thresholds on a trace.

    Args:
        trace: recorded exits.
        rule: gives the scores; or the scores ``[N, K]`` themselves.
        thresholds: K numbers.
        level: coverage of the intervals, in (0, 1).

    Raises:
        NotReplayable: the trace does not allow replay.
        InvalidInput: shapes do not fit, or the trace is empty.
    """
    scores = rule if isinstance(rule, Tensor) else trace.scores(rule)
    if scores.shape != trace.predictions.shape:
        raise InvalidInput(f"scores must be {tuple(trace.predictions.shape)}, got {tuple(scores.shape)}.")
    limits = np.asarray(torch.as_tensor(thresholds, dtype=torch.float64).cpu())
    if limits.shape != (len(trace.exits),):
        raise InvalidInput(f"{len(trace.exits)} thresholds are needed, one per exit, got {limits.shape}.")
    return evaluate_columns(trace, columns(scores, trace.exits), limits, level, rule=None if isinstance(rule, Tensor) else rule)


def _at_exit(values: Tensor, leave: Tensor, rows: slice | Tensor) -> Tensor:
    """``values[row, leave]`` for the chosen rows of ``[N, K]``."""
    if isinstance(rows, slice):
        return values.gather(1, leave[:, None])[:, 0]
    return values.reshape(-1)[rows * values.shape[1] + leave]


def evaluate_columns(
    trace: Trace, cols: F32, thresholds: Floats, level: float, rows: Ints | None = None, rule: Rule | None = None
) -> Realised:
    """`evaluate` on prepared columns, for some items if ``rows`` are given. Without the rule every head on the way is taken to run."""
    exits = len(trace.exits)
    chosen = slice(None) if rows is None else torch.from_numpy(rows)
    leave = torch.from_numpy(leave_columns(cols, thresholds)).to(torch.int64)[chosen]
    n = int(leave.numel())
    counts = torch.bincount(leave, minlength=exits).numpy()
    spent = trace.cost if rule is None else trace.running_cost(torch.from_numpy(np.asarray(thresholds, np.float64)), rule)
    cost = spent.detach().to("cpu", torch.float64).numpy() / trace.base_cost
    mean = float(counts @ cost) / n
    spread = max(float(counts @ cost**2) / n - mean**2, 0.0) ** 0.5
    half = NormalDist().inv_cdf(0.5 + level / 2) * spread / max(n - 1, 1) ** 0.5
    error = drop = disagreement = None
    if trace.losses is not None:
        losses = trace.losses.detach().cpu()
        here = _at_exit(losses, leave, chosen).to(torch.float64).numpy()
        wrong = float(here.sum())
        binary = not np.any(here * (1 - here))
        error = share_estimate(wrong, n, level) if binary else mean_estimate(here, level)
        drop = (
            Estimate(0.0, 0.0, 0.0, level)
            if counts[-1] == n
            else paired_estimate(here - losses[chosen, -1].to(torch.float64).numpy(), level)
        )
    if not trace.predictions.is_floating_point():
        p = trace.predictions.detach().cpu()
        different = int((_at_exit(p, leave, chosen) != p[chosen, -1]).sum())
        disagreement = Estimate(0.0, 0.0, 0.0, level) if counts[-1] == n else share_estimate(different, n, level)
    shares = tuple(float(c) / n for c in counts)
    return Realised(leave, shares, Estimate(mean, mean - half, mean + half, level), error, drop, disagreement)


def risk_table(trace: Trace, scores: Tensor, thresholds: Tensor, loss: Loss) -> RiskTable:
    """Loss and cost of every item under every setting, ``[N, M]`` each. For large ``N x M`` use `path_curve`, which keeps sums only.

    Args:
        trace: gives the costs.
        scores: ``[N, K]``.
        thresholds: ``[M, K]``.
        loss: e.g. `drop_loss(trace)`.
    """
    if thresholds.ndim != 2 or thresholds.shape[1] != len(trace.exits):
        raise InvalidInput(f"thresholds must be [settings, {len(trace.exits)}], got {tuple(thresholds.shape)}.")
    leave = torch.stack([leave_at(scores, row) for row in thresholds], dim=1)
    settings = thresholds.to(torch.float64).clone()
    settings[:, -1] = float("-inf")
    cost = trace.cost.to(torch.float64)[leave]
    return RiskTable(settings, loss.values.to(leave.device).gather(1, leave), cost, (loss.low, loss.high))


# -------------------------------------------------------------------------------------------------- one-parameter families of settings


@dataclass(frozen=True)
class PathCurve:
    """Means of all settings of a path.

    Attributes:
        cost: ``[M]`` mean cost, in the unit that was given.
        shares: ``[M, K]`` shares leaving at each exit.
        loss: ``[G, M]`` mean loss of each block of items; ``None`` without losses.
        items: N.
    """

    cost: F64
    shares: F64
    loss: F64 | None
    items: int
    block_sizes: F64

    @property
    def mean_loss(self) -> F64:
        """``[M]`` over all items."""
        if self.loss is None:
            raise InvalidInput("This curve was computed without losses.")
        mean: F64 = self.block_sizes @ self.loss / self.items
        return mean


class _Locator:
    """Index of the first setting at which scores of one exit leave (M: at none), for thresholds ``[M]`` that never rise.

    A binary search per score is the slowest step of a curve, so a score is first mapped to one of many equal bins. Rounding keeps the
    order, hence thresholds in lower bins are certainly passed and those in higher bins certainly not; only scores that share a bin
    with a threshold are searched.
    """

    BINS = 1 << 14

    def __init__(self, column: F32, limits: Floats) -> None:
        self.ascending = np.ascontiguousarray(limits[::-1].astype(np.float32))
        low, high = float(column.min()), float(column.max())
        self.low = np.float32(low)
        self.scale = np.float32(min((self.BINS - 1) / max(high - low, 1e-30), 1e30))
        with np.errstate(over="ignore", invalid="ignore"):
            places = np.clip((np.clip(self.ascending, low, high) - self.low) * self.scale, 0, self.BINS - 1).astype(np.int32)
        places = np.where(self.ascending < low, -1, np.where(self.ascending > high, self.BINS, places))
        inside = places[(places >= 0) & (places < self.BINS)]
        passed = np.searchsorted(places, np.arange(self.BINS), side="left")
        self.first = (limits.size - passed).astype(np.int32)
        self.mixed = np.zeros(self.BINS, bool)
        self.mixed[inside] = True

    def __call__(self, scores: F32) -> NDArray[np.int32]:
        place = np.clip((scores - self.low) * self.scale, 0, self.BINS - 1).astype(np.int32)
        out: NDArray[np.int32] = self.first[place]
        search = np.flatnonzero(self.mixed[place])
        if search.size:
            out[search] = self.ascending.size - np.searchsorted(self.ascending, scores[search], side="right")
        return out


def path_curve(
    cols: F32,
    path: Floats,
    cost: Floats,
    losses: Tensor | None = None,
    *,
    rows: Ints | None = None,
    blocks: Ints | None = None,
    monotone: bool = False,
) -> PathCurve:
    """Exact mean cost, shares and loss of M settings in O(N K), without an ``N x M`` array.

    The settings go from strict to permissive: no threshold rises from one to the next. An item has then left by exit k from some
    setting on, which is the smallest of those at which each exit up to k lets it go. Counting items by that setting and summing
    gives every mean at once.

    Args:
        cols: ``[K-1, N]``.
        path: ``[M, K]``, each column non-increasing.
        cost: ``[K]`` per item, any unit.
        losses: ``[N, K]`` float32.
        rows: items to use, ascending; all without.
        blocks: block index of each item used, all of ``0 .. G-1`` present; one block without.
        monotone: replace each loss by the largest that the item meets at this or any stricter setting (needed by CRC).
    """
    m, exits = path.shape[0], cols.shape[0]
    n = cols.shape[1] if rows is None else int(rows.size)
    if np.any(path[1:, :-1] > path[:-1, :-1]):
        raise InvalidInput("A path goes from strict to permissive: no threshold may rise from one setting to the next.")
    groups = 1 if blocks is None else int(blocks.max()) + 1
    locate = [_Locator(cols[k], path[:, k]) for k in range(exits)]
    left = np.zeros((exits, m + 1), np.int64)
    sums = np.zeros(groups * (m + 1))
    base = np.zeros(groups)
    table = None if losses is None else losses.detach().to("cpu", torch.float32).numpy()
    for at in range(0, n, CHUNK):
        here = slice(at, min(at + CHUNK, n)) if rows is None else rows[at : at + CHUNK]
        size = min(CHUNK, n - at)
        run = np.full(size, m, np.int32)
        firsts = np.empty((exits, size), np.int32)
        for k in range(exits):
            firsts[k] = np.minimum(run, locate[k](cols[k, here]), out=run)
            left[k] += np.bincount(run, minlength=m + 1)
        if table is None:
            continue
        values = np.ascontiguousarray(table[here].T)
        shift = None if blocks is None else blocks[at : at + CHUNK].astype(np.int64)
        if monotone:
            for k in range(exits - 1, -1, -1):
                # Exits that the item never leaves at, because an earlier one always goes first, do not count.
                used = firsts[k] < (firsts[k - 1] if k else m)
                values[k] = np.maximum(values[k + 1], np.where(used, values[k], -np.inf))
        change = values[1:] - values[:-1]
        exit_at, item = np.nonzero(change)
        slots = firsts[exit_at, item].astype(np.int64)
        if shift is None:
            sums += np.bincount(slots, weights=change[exit_at, item], minlength=m + 1)
            base[0] += values[0].sum(dtype=np.float64)
        else:
            np.add.at(sums, slots + shift[item] * (m + 1), change[exit_at, item].astype(np.float64))
            np.add.at(base, shift, values[0].astype(np.float64))
    sizes = np.asarray([n], np.float64) if blocks is None else np.bincount(blocks, minlength=groups).astype(np.float64)
    mean = None
    if table is not None:
        # An item that is still there at setting j has a first setting > j, hence the sum over all later slots.
        later = np.cumsum(sums.reshape(groups, m + 1)[:, ::-1], axis=1)[:, ::-1]
        mean = (later[:, 1:] + base[:, None]) / sizes[:, None]
    stay = 1 - np.cumsum(left, axis=1)[:, :m] / n
    shares = -np.diff(np.concatenate([np.ones((1, m)), stay, np.zeros((1, m))]), axis=0).T
    return PathCurve(float(cost[0]) + np.diff(np.asarray(cost, np.float64)) @ stay, shares, mean, n, sizes)


# ------------------------------------------------------------------------------------------------------------- placing thresholds


def between(low: float, high: float) -> float:
    """A float32 number in (low, high], as near the middle as there is: ``high`` passes it and ``low`` does not."""
    middle = np.float32((float(low) + float(high)) / 2)
    return float(middle) if low < middle <= high else float(np.float32(high))


def clamp(cols: F32, thresholds: Floats) -> F64:
    """Finite stand-ins for infinite thresholds: just above the largest score, and the smallest. Who leaves does not change."""
    if cols.shape[0] == 0:
        return np.zeros(0)
    top = np.nextafter(cols.max(axis=1), np.float32(np.inf)).astype(np.float64)
    clipped: F64 = np.clip(thresholds[: cols.shape[0]].astype(np.float64), cols.min(axis=1).astype(np.float64), top)
    return clipped


def _bracket(cols: F32, strict: F64, permissive: F64, cost: Floats, target: float) -> tuple[F64, F64]:
    """A short piece of the line with the target in it, so that few items need an exact position."""
    weight = np.linspace(0, 1, 129)[:, None]
    line = np.concatenate([(1 - weight) * strict + weight * permissive, np.full((129, 1), -np.inf)], axis=1)
    line = np.minimum.accumulate(line.astype(np.float32).astype(np.float64))
    within = path_curve(cols, line, cost).cost[1:] <= target
    at = int(np.argmax(within)) if within.any() else within.size - 1
    return line[at, :-1], line[at + 1, :-1]


def meet(cols: F32, strict: F64, permissive: F64, cost: Floats, target: float, *, shared: bool = False, near: bool = False) -> F64:
    """Thresholds on the straight line from ``strict`` to ``permissive`` whose mean cost is the largest one not above ``target``.

    Each (exit, item) has a position on the line from which on it leaves; mean cost is a step function of the position with one item
    moving at a step, so without ties the result is within ``(cost[-1] - cost[0]) / N`` of the target. A histogram finds the step's
    neighbourhood and a sort of that neighbourhood the step. Each threshold lies halfway between the two scores that it separates.

    Args:
        cols: ``[K-1, N]``.
        strict: finite thresholds ``[K-1]`` whose mean cost is at least ``target`` (else they are returned).
        permissive: finite thresholds ``[K-1]``, none above ``strict``.
        cost: ``[K]``, non-decreasing.
        target: mean cost, same unit.
        shared: one number separates all exits' scores (both ends are then constant over exits).
        near: the ends are close to each other already; saves a pass.

    Returns:
        ``[K]`` thresholds, the last ``-inf``.
    """
    exits, n = cols.shape
    if exits == 0:
        return np.asarray([-np.inf])
    if not near:
        strict, permissive = _bracket(cols, strict, permissive, cost, target)
    bins = 1 << 12
    span = strict - permissive
    upper, lower = strict.astype(np.float32), permissive.astype(np.float32)

    def position(k: int, scores: F32) -> F64:
        """Where on the line scores between the ends start to leave, in (0, 1]. Falls as the score rises."""
        out: F64 = np.clip((strict[k] - scores.astype(np.float64)) / max(span[k], 1e-300), np.finfo(np.float64).tiny, 1.0)
        return out

    # An item whose position falls from `old` to `new` at exit k saves cost[-1] - cost[k] from `new` on, in place of what an earlier
    # exit saved from `old` on. Position -1: leaves at either end. 2: at neither.
    saving = float(cost[-1]) - np.asarray(cost, np.float64)
    sure = 0.0
    events: list[tuple[F64, F64]] = [(np.empty(0), np.empty(0))]
    for at in range(0, n, CHUNK):
        block = cols[:, at : at + CHUNK]
        run = np.full(block.shape[1], 2.0)
        for k in range(exits):
            early = run > -1
            rows = np.flatnonzero((block[k] >= upper[k]) & early)
            old = run[rows]
            run[rows] = -1.0
            sure += saving[k] * rows.size
            lost = [old[old <= 1]]
            rows = np.flatnonzero((block[k] >= lower[k]) & (run > -1))
            new, old = position(k, block[k, rows]), run[rows]
            better = new < old
            rows, new, old = rows[better], new[better], old[better]
            run[rows] = new
            lost.append(old[old <= 1])
            gone = np.concatenate(lost)
            events.append((np.concatenate([new, gone]), np.concatenate([np.full(new.size, saving[k]), np.full(gone.size, -saving[k])])))
    places, gains = (np.concatenate(part) for part in zip(*events, strict=True))
    needed = (float(cost[-1]) - target) * n
    needed -= 1e-9 * max(abs(float(cost[-1])), abs(target)) * n
    alpha = 1.0
    if sure >= needed:
        alpha = 0.0
    elif places.size:
        slot = np.minimum((places * bins).astype(np.int64), bins)
        total = sure + np.cumsum(np.bincount(slot, weights=gains, minlength=bins + 1))
        if total[-1] >= needed:
            first = int(np.argmax(total >= needed))
            close = slot == first
            points, inverse = np.unique(places[close], return_inverse=True)
            reached = (total[first - 1] if first else sure) + np.cumsum(np.bincount(inverse, weights=gains[close]))
            alpha = float(points[int(np.argmax(reached >= needed))]) if reached[-1] >= needed else float(points[-1])
    natural = (strict - alpha * span).astype(np.float32)

    def settle(alphas: F64) -> tuple[F32, F32, float]:
        """Largest score that stays and smallest that leaves at each exit, and what leaving saves, with one position per exit."""
        lows, highs = np.full(exits, -np.inf, np.float32), np.full(exits, np.inf, np.float32)
        saved = 0.0
        for at in range(0, n, CHUNK):
            block = cols[:, at : at + CHUNK]
            alive = np.ones(block.shape[1], bool)
            for k in range(exits):
                leaves = block[k] >= upper[k]
                rows = np.flatnonzero((block[k] >= lower[k]) & ~leaves & alive)
                leaves[rows] = position(k, block[k, rows]) <= alphas[k]
                leaves &= alive
                alive &= ~leaves
                saved += saving[k] * np.count_nonzero(leaves)
                highs[k] = min(highs[k], np.where(leaves, block[k], np.float32(np.inf)).min())
                lows[k] = max(lows[k], np.where(alive, block[k], np.float32(-np.inf)).max())
        return lows, highs, saved

    alphas = np.full(exits, alpha)
    if not shared and np.count_nonzero(places == alpha) > 1:
        # Scores of several exits meet the line at one position: the first exits move alone, as few as reach the target.
        few, many = 0, exits
        while many - few > 1:
            middle = (few + many) // 2
            part = np.where(np.arange(exits) < middle, alpha, np.nextafter(alpha, -1))
            few, many = (few, middle) if settle(part)[2] >= needed else (middle, many)
        alphas = np.where(np.arange(exits) < many, alpha, np.nextafter(alpha, -1))
    lows, highs, _ = settle(alphas)
    out = np.full(exits + 1, -np.inf)
    for k in range(exits):
        low_k, high_k = (lows.max(), highs.min()) if shared else (lows[k], highs[k])
        if np.isfinite(low_k) and np.isfinite(high_k):
            out[k] = between(low_k, high_k)
        elif np.isfinite(low_k):  # nobody leaves here
            out[k] = max(float(natural[k]), float(np.nextafter(np.float32(low_k), np.float32(np.inf))))
        elif np.isfinite(high_k):  # everybody who comes leaves here
            out[k] = min(float(natural[k]), float(high_k))
        else:  # nobody comes
            out[k] = float(natural[k])
    return out


def share_thresholds(cols: F32, left_by: Ints, *, coin: np.random.Generator | None = None) -> F64:
    """Thresholds such that ``left_by[k]`` items have left by exit k, the highest scores first.

    Equal scores leave together. Without ``coin`` a group that straddles the cut leaves (shares only grow, as in MSDNet's released
    procedure); with it the group leaves with probability equal to the part of it above the cut, which is what infinitely small noise
    on the scores amounts to when rules compare the scores themselves. Later exits make up for what ties moved.

    Args:
        cols: ``[K-1, N]``.
        left_by: ``[K-1]`` cumulative counts, non-decreasing, at most N.
        coin: decides ties.

    Returns:
        ``[K]`` thresholds, the last ``-inf``; ``inf`` where nobody leaves, ``-inf`` where everybody does.
    """
    out = np.full(cols.shape[0] + 1, -np.inf)
    n = cols.shape[1]
    rows: NDArray[np.int64] | None = None
    for k, column in enumerate(cols):
        here = column if rows is None else column[rows]
        count = min(int(left_by[k]) - (n - here.size), here.size)
        if count <= 0:
            out[k] = np.inf
            continue
        if count == here.size:
            return out  # the rest stays at -inf: nobody comes there
        cut = here.size - count
        part = np.partition(here, (cut - 1, cut))
        low, high = float(part[cut - 1]), float(part[cut])
        if low == high:
            above = int(np.count_nonzero(here > high))
            group = int(np.count_nonzero(here == high))
            takes = coin is None or coin.random() < (count - above) / group
            if takes:
                rest = here[here < high]
                if not rest.size:
                    return out
                low = float(rest.max())
            else:
                if above == 0:
                    out[k] = np.inf
                    continue
                high = float(here[here > high].min())
        out[k] = between(low, high)
        stay = np.flatnonzero(here < np.float32(out[k]))
        rows = stay if rows is None else rows[stay]
    return out
