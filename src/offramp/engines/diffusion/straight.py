"""A step of a denoiser whose decisions are known beforehand and the same for every row: one function, without a look at any tensor.

Schedules, intervals and depths by noise level take this way where all rows of a call stand at one step. What the step does is a `Path`;
there are few different ones, so each can be compiled and captured whole, memories included.

Shapes: ``B`` rows of a call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from offramp.backbones import Cut, CutState
from offramp.core.noise import noise_share
from offramp.diffusion import BoundPoint
from offramp.engines.diffusion.report import StepRecord
from offramp.engines.diffusion.trajectory import Branch, Memory
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
        opened |= {p.index: p for p in live if p.start == at and p.point.remembers}
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
    """

    cut: Cut
    points: tuple[BoundPoint, ...]
    path: Path
    rows: int

    def __call__(
        self,
        values: Tensors,
        remembered: Mapping[int, Sequence[Tensors]],
        weights: Mapping[int, Tensor],
        level: Tensor | None,
        run: Callable[[Cut, CutState, int, int], CutState] = Cut.run,
    ) -> tuple[dict[str, Tensor], dict[int, Tensors]]:
        """The outputs by name, and what each point of ``path.stored`` keeps.

        Args:
            values: the inputs by name.
            remembered: for each point that fires what it remembers, newest first.
            weights: ``[B, keeps]`` of those steps, for points that weigh them.
            level: log-SNR ``[B]`` float32, for output layers.
            run: runs segments as `Cut.run` does.
        """
        state = CutState(values, self.rows, 0)
        starts: dict[int, dict[str, Tensor]] = {}
        kept: dict[int, Tensors] = {}
        for part in self.path.parts:
            if isinstance(part, int):
                state = self._skip(self.points[part], state, remembered, weights, level)
            else:
                for p in self.points:
                    if p.start == state.at and p.index in self.path.stored:
                        starts[p.index] = _start(p, state)
                state = run(self.cut, state, *part)
            for p in self.points:
                if p.stop == state.at and p.index in self.path.stored and p.index not in kept and p.point.fill.keeps:
                    kept[p.index] = p.point.fill.remember(starts[p.index], {n: state.values[n] for n in p.made})
        return dict(state.values), kept

    def _skip(
        self,
        p: BoundPoint,
        state: CutState,
        remembered: Mapping[int, Sequence[Tensors]],
        weights: Mapping[int, Tensor],
        level: Tensor | None,
    ) -> CutState:
        if p.point.fill.reads_head:
            made = p.point.fill.fill({p.made[0]: p.head.output(state.hidden, level)}, (), None)  # type: ignore[union-attr,operator]
        else:
            made = p.point.fill.fill(_start(p, state), remembered.get(p.index, ()), weights.get(p.index))
        return self.cut.skip(state, p.stop, made)


def _start(p: BoundPoint, state: CutState) -> dict[str, Tensor]:
    return {n: state.values[b] for n, b in p.pairs.items()} if p.point.fill.paired else {}


def is_straight(points: Sequence[BoundPoint], branch: Branch, moment: Moment, final: Sequence[bool]) -> bool:
    """Whether every decision of a call is known beforehand and the same for all rows."""
    live = [p.point.signal for p in points if p.point.threshold != math.inf]
    if any(not isinstance(s, Scheduled) or isinstance(s, Chance) for s in live):
        return False

    def same(column: Sequence[Any]) -> bool:
        return column.count(column[0]) == len(column)

    columns = (moment.log_snr, branch.step, final, *(c for m in branch.memories for c in (m.noise, m.age)))
    return all(same(c) for c in columns)


def straight_path(points: Sequence[BoundPoint], last: int, branch: Branch, moment: Moment, final: bool, why: str) -> Path:
    """The path of a call for which `is_straight` holds: what the first row does."""
    one = Moment(moment.log_snr[:1], moment.step[:1], moment.branch, moment.keys[:1])

    def ask(p: BoundPoint) -> str:
        if reason := must_compute(p, branch, branch.memories[p.index], 0, final, why):
            return reason
        score = p.point.signal.known(one, p.index)[0]  # type: ignore[union-attr]
        if not math.isfinite(score):
            return "not finite"
        return "skipped" if score >= p.point.threshold else "score"

    return find_path(points, last, ask)


def must_compute(p: BoundPoint, branch: Branch, memory: Memory, row: int, final: bool, why: str) -> str:
    """Why a row must compute whatever its score; empty if its score decides.

    Args:
        p: the point.
        branch: of the call.
        memory: of the point in it.
        row: which.
        final: whether the row is at its last step.
        why: why the branch has nothing to remember, if it has not.
    """
    limits = p.point.limits
    if p.point.remembers and not memory.noise[row]:
        return why or ("first" if branch.step[row] == 0 else "missing")
    if branch.step[row] < limits.first:
        return "first"
    if limits.last and final:
        return "last"
    if limits.max_reuse is not None and memory.age[row] >= limits.max_reuse:
        return "cap"
    return ""


def weigh(p: BoundPoint, memory: Memory, log_snr: float) -> list[float]:
    """Weights of what a point remembers, the same for every row: ``keeps`` numbers, those of steps that are not there 0."""
    return p.point.fill.coefficients(noise_share(log_snr), memory.noise[0])


def note(record: StepRecord, work: Work) -> None:
    """What a path executes, for every row."""
    flops = sum(s.flops for start, stop in work.path.spans for s in work.cut.spec.segments[start:stop])
    fired = list(work.path.fired)
    flops += sum(work.points[i].fill_flops for i in fired)
    record.depth = [sum(stop - start for start, stop in work.path.spans)] * work.rows
    record.flops = [flops] * work.rows
    record.fired = [fired] * work.rows
    for key in work.path.reasons:
        record.reasons[key] += work.rows
