"""A step of a denoiser whose decisions are known beforehand and the same for every row: one function, without a look at any tensor.

Schedules, intervals and depths by noise level take this way where all rows of a call stand at one step. What the step does is a `Path`;
there are few different ones, so each can be compiled and captured whole, memories included.

Shapes: ``B`` rows of a call.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from offramp.backbones import Cut, CutState
from offramp.core.noise import noise_share
from offramp.diffusion import BoundPoint
from offramp.engines.diffusion.report import StepRecord
from offramp.engines.diffusion.rows import Fuse, as_it_is, continued, filled
from offramp.engines.diffusion.trajectory import Branch, Host, Memory
from offramp.policies.denoising import Chance, Moment, Scheduled
from offramp.policies.fills import Tensors


@dataclass(frozen=True)
class Path:
    """What one step does, the same for every row.

    Attributes:
        parts: segments that run, as ``(start, stop)``, and points that fire, by number, in order.
        stored: points that remember the step.
        reasons: for each point that was asked, why it computed, or ``"skipped"``.
    """

    parts: tuple[tuple[int, int] | int, ...]
    stored: tuple[int, ...]
    reasons: tuple[tuple[int, str], ...]

    @property
    def fired(self) -> tuple[int, ...]:
        return tuple(p for p in self.parts if isinstance(p, int))

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        return tuple(p for p in self.parts if not isinstance(p, int))


def find_path(points: Sequence[BoundPoint], last: int, ask: Callable[[BoundPoint], str]) -> Path:
    """Walk over the boundaries without running anything.

    Args:
        points: the plan.
        last: boundary of the outputs.
        ask: ``"skipped"`` if a point fires, else why not.
    """
    stops = sorted({0, last, *(b for p in points for b in (p.start, p.stop))})
    live = [p for p in points if p.point.threshold != math.inf]
    parts: list[tuple[int, int] | int] = []
    stored: list[int] = []
    reasons: list[tuple[int, str]] = []
    opened: dict[int, BoundPoint] = {}
    at = 0
    while True:
        for p in live:
            if p.stop == at and opened.pop(p.index, None) is not None:
                stored.append(p.index)
        if at == last:
            return Path(tuple(parts), tuple(stored), tuple(reasons))
        fired = None
        for p in live:
            if p.start == at and fired is None:
                reasons.append((p.index, ask(p)))
                fired = p if reasons[-1][1] == "skipped" else None
        if fired is not None:  # what is under way across this place is not computed any more
            opened = {i: p for i, p in opened.items() if not p.start <= fired.start < p.stop}
            parts.append(fired.index)
            at = fired.stop
            continue
        opened |= {p.index: p for p in live if p.start == at and p.point.follows}
        following = stops[stops.index(at) + 1]
        parts.append((at, following))
        at = following


@dataclass(frozen=True)
class Work:
    """A path on one cut, as a function of tensors.

    Attributes:
        cut: the model.
        points: the plan on it.
        path: what is done.
        rows: B.
        executed: segments that a row runs, its FLOPs, and rows that run each segment.
    """

    cut: Cut
    points: tuple[BoundPoint, ...]
    path: Path
    rows: int

    @cached_property
    def executed(self) -> tuple[int, int, Counter[int]]:
        ran = [k for start, stop in self.path.spans for k in range(start, stop)]
        flops = sum(self.cut.spec.segments[k].flops for k in ran) + sum(self.points[i].fill_flops for i in self.path.fired)
        return len(ran), flops, Counter(dict.fromkeys(ran, self.rows))

    def __call__(
        self,
        values: Tensors,
        remembered: Mapping[int, Sequence[Tensors]],
        weights: Mapping[int, Tensor],
        level: Tensor | None,
        run: Callable[[Cut, CutState, int, int], CutState] = Cut.run,
        fuse: Fuse = as_it_is,
    ) -> tuple[dict[str, Tensor], dict[int, Tensors]]:
        """The outputs by name, and what each point of ``path.stored`` keeps.

        Args:
            values: the inputs by name.
            remembered: for each point that fires what it remembers, newest first.
            weights: ``[B, keeps]`` of those steps, for points that weigh them.
            level: log-SNR ``[B]`` float32, for output layers.
            run: runs segments as `Cut.run` does.
            fuse: given what fills and remembers.
        """
        state = CutState(values, self.rows, 0)
        starts: dict[int, dict[str, Tensor]] = {}
        kept: dict[int, Tensors] = {}
        for part in self.path.parts:
            if isinstance(part, int):
                p = self.points[part]
                made = filled(self.cut, p, state.values, remembered.get(part, ()), weights.get(part), level, fuse)
                state = self.cut.skip(state, p.stop, made)
            else:
                for p in self.points:
                    if p.start == state.at and p.index in self.path.stored:
                        starts[p.index] = continued(p, state.values)
                state = run(self.cut, state, *part)
            for p in self.points:
                if p.stop == state.at and p.index in self.path.stored and p.index not in kept and p.point.fill.keeps:
                    kept[p.index] = fuse(p.point.fill.remember)(starts[p.index], {n: state.values[n] for n in p.made})
        return dict(state.values), kept


def is_straight(points: Sequence[BoundPoint], branch: Branch, moment: Moment, final: Host) -> bool:
    """Whether every decision of a call is known beforehand and the same for all rows."""
    live = [p.point.signal for p in points if p.point.threshold != math.inf]
    if any(not isinstance(s, Scheduled) or isinstance(s, Chance) for s in live):
        return False

    columns: list[Any] = [moment.log_snr, branch.step, final, *(m.age for m in branch.memories)]
    return all(_same(c) for c in columns) and all(_same(level) for m in branch.memories for level in m.noise)


def _same(column: Sequence[Any] | Host) -> bool:
    if isinstance(column, np.ndarray):
        held = column.tobytes()
        return held == held[: column.itemsize] * len(column)
    return column.count(column[0]) == len(column)


def straight_path(points: Sequence[BoundPoint], last: int, branch: Branch, moment: Moment, final: Host, why: str) -> Path:
    """The path of a call for which `is_straight` holds: what the first row does."""
    one = Moment(moment.log_snr[:1], moment.step[:1], moment.branch, moment.keys[:1])
    row = np.zeros(1, dtype=np.int64)

    def ask(p: BoundPoint) -> str:
        for reason in must_compute(p, branch, branch.memories[p.index], row, final, why)[1]:
            return reason
        score = p.point.signal.known(one, p.index)[0]  # type: ignore[union-attr]
        if not math.isfinite(score):
            return "not finite"
        return "skipped" if score >= p.point.threshold else "score"

    return find_path(points, last, ask)


def must_compute(p: BoundPoint, branch: Branch, memory: Memory, rows: Host, final: Host, why: str) -> tuple[Host, dict[str, int]]:
    """Which rows must compute whatever their score.

    Args:
        p: the point.
        branch: of the call.
        memory: of the point in it.
        rows: which are asked (int64 ``[R]``).
        final: bool ``[B]``, whether a row is at its last step.
        why: why the branch has nothing to remember, if it has not.

    Returns:
        The rows whose score decides, and how many others there are, by reason.
    """
    limits, step = p.point.limits, branch.step[rows]
    free = np.ones(len(rows), dtype=bool)
    found: dict[str, int] = {}

    def compute(which: Host, reason: str) -> None:
        which = which & free
        if count := int(np.count_nonzero(which)):
            found[reason] = found.get(reason, 0) + count
            free[which] = False

    if p.point.remembers:
        unknown = ~memory.known[rows]
        if unknown.any():
            compute(unknown if why else unknown & (step == 0), why or "first")
            compute(unknown, "missing")
    if limits.first:
        compute(step < limits.first, "first")
    if limits.last:
        compute(final[rows], "last")
    if limits.max_reuse is not None:
        compute(memory.age[rows] >= limits.max_reuse, "cap")
    return (rows[free] if found else rows), found


def weigh(p: BoundPoint, memory: Memory, log_snr: float) -> list[float]:
    """Weights of what a point remembers, the same for every row: ``keeps`` numbers, those of steps that are not there 0."""
    return p.point.fill.coefficients(noise_share(log_snr), memory.levels(0))


def note(record: StepRecord, work: Work) -> None:
    """What a path executes, for every row."""
    depth, flops, record.ran = work.executed
    record.spend(slice(None), depth, flops)
    if work.path.fired:
        record.fire(slice(None), work.path.fired[0])
    for key in work.path.reasons:
        record.reasons[key] += work.rows
