"""What a diffusion method skips, when, and what stands for it: data from which the decision points of a plan are made.

A published method speaks of "the deep part", "after the first block" or "a tenth of the time steps". Which module paths and noise levels
these are depends on the denoiser: `Layout` says where it has places, and a `Skips` makes the points (`offramp.policies.denoising.Point`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from offramp.core.errors import InvalidInput
from offramp.policies.denoising import (
    OUTPUT,
    Guard,
    Measured,
    NoiseLevel,
    NoiseSchedule,
    Place,
    Point,
    ResidualChange,
    Signal,
    StateChange,
    Uncertainty,
    depth_schedule,
)
from offramp.policies.fills import CachedOutput, CachedResidual, Fill, HeadOutput, Identity

ALWAYS = -1e9
"""A threshold that every score reaches; finite, so that it can be saved."""


@dataclass(frozen=True)
class Layout:
    """Where a denoiser has places.

    Attributes:
        model: its class, for messages.
        blocks: places after its repeated blocks, in order; empty for a U-Net, whose blocks do not continue one state.
        inlet: the place before the first block whose state is like the blocks', if there is one.
        deep: of a U-Net, for each branch from the shallowest on, the places between which it is deeper.
        edges: from a number of bins to the ascending log-SNRs that part the training time steps into equally many.
    """

    model: str
    blocks: tuple[str, ...]
    inlet: str | None
    deep: tuple[tuple[str, str], ...]
    edges: Callable[[int], tuple[float, ...]]

    def need_blocks(self, what: str, least: int = 2) -> tuple[str, ...]:
        """The blocks.

        Raises:
            InvalidInput: there are fewer than ``least``.
        """
        if len(self.blocks) < least:
            why = "is a U-Net: its blocks do not continue one state" if self.deep else f"has {len(self.blocks)} such blocks"
            raise InvalidInput(
                f"{what} needs a denoiser of {least} repeated blocks at least, and {self.model} {why}. Use a cache, such as deepcache."
            )
        return self.blocks

    @property
    def last(self) -> str:
        """The place before the final layers."""
        return self.blocks[-1] if self.blocks else self.deep[0][1]


# ---- regions -------------------------------------------------------------------------------------------------------------


class Region(ABC):
    """A part of a denoiser that may be skipped."""

    @abstractmethod
    def span(self, layout: Layout) -> tuple[str, str]:
        """Places between which it lies.

        Raises:
            InvalidInput: the denoiser has no such part.
        """


@dataclass(frozen=True)
class Deep(Region):
    """What is deeper than a branch: of a U-Net all between a down block and the up block that mirrors it; of a transformer all blocks but
    the first and last ``branch + 1``.

    Attributes:
        branch: at least 0, the shallowest, which skips most.
    """

    branch: int = 0

    def span(self, layout: Layout) -> tuple[str, str]:
        branches = len(layout.deep) if layout.deep else (len(layout.blocks) - 1) // 2
        if not 0 <= self.branch < branches:
            raise InvalidInput(f"branch must be from 0 to {branches - 1} for this {layout.model}, got {self.branch}.")
        if layout.deep:
            return layout.deep[self.branch]
        return layout.blocks[self.branch], layout.blocks[-2 - self.branch]


@dataclass(frozen=True)
class AfterFirst(Region):
    """Everything after the first blocks; of a U-Net what is deeper than its first down blocks.

    Attributes:
        blocks: that always run, at least 1.
    """

    blocks: int = 1

    def span(self, layout: Layout) -> tuple[str, str]:
        if layout.deep:
            return Deep(self.blocks - 1).span(layout)
        if not 1 <= self.blocks < len(layout.blocks):
            raise InvalidInput(f"blocks must be from 1 to {len(layout.blocks) - 1} for this {layout.model}, got {self.blocks}.")
        return layout.blocks[self.blocks - 1], layout.blocks[-1]


REGIONS: dict[str, type] = {c.__name__: c for c in (Deep, AfterFirst)}


# ---- what is skipped -----------------------------------------------------------------------------------------------------


class Skips(ABC):
    """What a method skips.

    Attributes:
        as_run: a model is trained for it by computing what the plan leaves; otherwise every exit learns.
    """

    as_run: bool = False

    @abstractmethod
    def points(self, layout: Layout, threshold: float | None = None) -> tuple[Point, ...]:
        """The decision points on a denoiser.

        Args:
            layout: its places.
            threshold: of rules that measure, in the place of the method's own.

        Raises:
            InvalidInput: the denoiser has no such places, or something has to be calibrated first.
        """

    def places(self, layout: Layout) -> tuple[str, ...]:
        """Module paths after which the denoiser is to be cut."""
        named = (place for p in self.points(layout) for place in (p.at, p.to, getattr(p.signal, "since", None)))
        return tuple(dict.fromkeys(place for place in named if isinstance(place, str) and place != OUTPUT))

    def steps(self, steps: int) -> int:
        """Steps of the sampler where ``steps`` are asked for."""
        return steps


@dataclass(frozen=True)
class DepthSchedule(Skips):
    """How many blocks run, by the part of training time that the noise level falls in; then the final layers.

    Attributes:
        depths: blocks of ``of`` in each of equal parts of the time steps, nearly clean first, as published; ``()`` has to be calibrated.
        of: blocks of the model that they are for. In a model of others every entry keeps its share, halves up, one at least.
    """

    depths: tuple[int, ...] = ()
    of: int = 28
    as_run = True

    def __post_init__(self) -> None:
        if self.of < 1 or any(not 1 <= d <= self.of for d in self.depths):
            raise InvalidInput(f"depths must be from 1 to the {self.of} blocks that they are for, got {self.depths}.")

    def points(self, layout: Layout, threshold: float | None = None) -> tuple[Point, ...]:
        blocks = layout.need_blocks("A schedule of depths")
        if not self.depths:
            raise InvalidInput("The schedule has no depths yet: choose them with calibrate(...), for a cost.")
        counts = [max(1, (2 * d * len(blocks) + self.of) // (2 * self.of)) for d in reversed(self.depths)]
        exits = [None if n >= len(blocks) else blocks[n - 1] for n in counts]
        return depth_schedule(layout.edges(len(counts)), exits, layout.last)

    def places(self, layout: Layout) -> tuple[str, ...]:
        return layout.need_blocks("A schedule of depths")


@dataclass(frozen=True)
class ConstantDepth(Skips):
    """The first blocks and the final layers, at every step.

    Attributes:
        share: of the blocks, inside (0, 1); rounded, halves up, one at least.
    """

    share: float = 0.5
    as_run = True

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InvalidInput(f"share must lie inside (0, 1), got {self.share}.")

    def points(self, layout: Layout, threshold: float | None = None) -> tuple[Point, ...]:
        blocks = layout.need_blocks("A constant depth")
        count = min(max(1, int(self.share * len(blocks) + 0.5)), len(blocks) - 1)
        return (Point(blocks[count - 1], layout.last, Identity(), NoiseLevel(), ALWAYS),)

    def places(self, layout: Layout) -> tuple[str, ...]:
        return layout.need_blocks("A constant depth")


@dataclass(frozen=True)
class LearnedExits(Skips):
    """After every block but the last a learned head says how wrong its own output layer is; where that is little, it is the output."""

    def points(self, layout: Layout, threshold: float | None = None) -> tuple[Point, ...]:
        least = 0.0 if threshold is None else threshold
        return tuple(Point(b, OUTPUT, HeadOutput(), Uncertainty(), least) for b in layout.need_blocks("A learned exit")[:-1])

    def places(self, layout: Layout) -> tuple[str, ...]:
        return layout.need_blocks("A learned exit")


@dataclass(frozen=True)
class LayerGroups(Skips):
    """Groups of consecutive blocks, each for the noise levels of one bin; no other block runs there.

    Attributes:
        groups: at least 2; divides the number of blocks. The first serves the noisiest of equal parts of the time steps.
    """

    groups: int = 4
    as_run = True

    def points(self, layout: Layout, threshold: float | None = None) -> tuple[Point, ...]:
        blocks = layout.need_blocks("A group of layers")
        if layout.inlet is None:
            raise InvalidInput(f"{layout.model} has no place before its blocks with a state like theirs, where a group could begin.")
        return layer_groups(layout.inlet, blocks, self.groups, layout.edges(self.groups))


def layer_groups(before: Place, blocks: Sequence[Place], groups: int, edges: Sequence[float]) -> tuple[Point, ...]:
    """A plan in which each group of consecutive blocks serves the noise levels of one bin, and no other block runs there.

    Blocks are passed over with the state as it is. The first group serves the noisiest bin, where a trajectory begins (LaTtE-Flow, 2025,
    arXiv 2506.06952). The paper's attention to what earlier blocks attended to, gated by the timestep, is left out: no released code says
    its exact form.

    Args:
        before: the place before the first block, where its state is first whole: the patch embedding, say.
        blocks: the places after all blocks, in order; the model is cut there.
        groups: number of groups; divides the number of blocks.
        edges: ascending log-SNRs between the bins, one fewer than groups.

    Raises:
        InvalidInput: the numbers do not fit.
    """
    if groups < 2 or len(blocks) % groups or len(edges) != groups - 1:
        raise InvalidInput(
            f"{groups} groups, at least 2, must divide {len(blocks)} blocks and have {groups - 1} edges between their levels; "
            f"got {len(edges)}."
        )
    size, last = len(blocks) // groups, blocks[-1]
    points = []
    for group in range(groups):
        only = NoiseSchedule(tuple(edges), tuple(g == group for g in range(groups)))
        if group:
            points.append(Point(before, blocks[group * size - 1], Identity(), only))
        if group < groups - 1:
            points.append(Point(blocks[(group + 1) * size - 1], last, Identity(), only))
    return tuple(points)


@dataclass(frozen=True)
class Reuse(Skips):
    """A part is not computed at some steps; what was computed before stands for it.

    Attributes:
        region: which part.
        signal: when. `ResidualChange` compares what the blocks before the region added; where no place before them has a state alike (a
            U-Net), the state at the region's start is compared.
        fill: what stands for it. ``None``: what a U-Net's deep part made, and in a transformer, whose state goes straight through, what the
            part added, for else all that ran before it would be lost.
        guard: limits; by default those of `Point`.
    """

    region: Region = field(default_factory=Deep)
    signal: Signal = field(default_factory=StateChange)
    fill: Fill | None = None
    guard: Guard | None = None

    def points(self, layout: Layout, threshold: float | None = None) -> tuple[Point, ...]:
        start, stop = self.region.span(layout)
        signal = self.signal
        if isinstance(signal, ResidualChange):
            signal = StateChange() if layout.deep or layout.inlet is None else replace(signal, since=layout.inlet)
        fill = self.fill or (CachedOutput() if layout.deep else CachedResidual())
        return (Point(start, stop, fill, signal, 0.5 if threshold is None else threshold, self.guard),)

    @property
    def measures(self) -> bool:
        """Whether decisions depend on what is seen on the way."""
        return isinstance(self.signal, Measured)

    def at_steps(self, levels: Sequence[float], reused: Sequence[bool]) -> Reuse:
        """The same with a schedule: the steps of a sampler at which the part is reused.

        Args:
            levels: log-SNR of every step, strictly rising.
            reused: whether each reuses.
        """
        if len(levels) != len(reused) or any(not b > a for a, b in pairwise(levels)):
            raise InvalidInput(f"A cache plan needs one strictly rising log-SNR for each of {len(reused)} steps, got {list(levels)}.")
        changes = [k for k in range(1, len(reused)) if reused[k] != reused[k - 1]]
        edges = tuple((levels[k - 1] + levels[k]) / 2 for k in changes)
        return replace(self, signal=NoiseSchedule(edges, (reused[0], *(reused[k] for k in changes))))


@dataclass(frozen=True)
class FewerSteps(Skips):
    """Nothing is skipped; the sampler takes fewer steps.

    Attributes:
        share: of the steps that are asked for, in (0, 1]; rounded down, one at least.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InvalidInput(f"share must lie in (0, 1], got {self.share}.")

    def points(self, layout: Layout, threshold: float | None = None) -> tuple[Point, ...]:
        return ()

    def places(self, layout: Layout) -> tuple[str, ...]:
        return (layout.last,)

    def steps(self, steps: int) -> int:
        return max(1, int(self.share * steps + 1e-9))


SKIPS: dict[str, type] = {c.__name__: c for c in (DepthSchedule, ConstantDepth, LearnedExits, LayerGroups, Reuse, FewerSteps)}
"""Everything that a method may skip by name: what a saved file may name."""

__all__ = [
    "ALWAYS", "REGIONS", "SKIPS", "AfterFirst", "ConstantDepth", "Deep", "DepthSchedule", "FewerSteps", "LayerGroups", "Layout",
    "LearnedExits", "Region", "Reuse", "Skips", "layer_groups",
]  # fmt: skip
