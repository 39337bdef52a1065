"""What a diffusion method may be set to: for a cost, and as a family from what changes nothing to the loosest.

What is chosen depends on what the method skips. Depths by noise level are chosen exactly from the loss of every exit at every level, cached
steps exactly from what reuse of each age changes, a share of the tokens from what one token less saves; rules that measure are run at
several thresholds, since there a decision changes what all later steps see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from offramp.budget import NoiseBins, best_cache_plan, best_schedule, threshold_for_cost
from offramp.core.errors import BudgetInfeasible, InvalidInput, OfframpWarning
from offramp.core.warn import warn
from offramp.engines.diffusion.denoise import Denoiser
from offramp.engines.diffusion.losses import Follower, depth_losses
from offramp.engines.diffusion.model import DiffusionModel
from offramp.engines.diffusion.region_budget import regions_for_cost
from offramp.engines.diffusion.regions import RegionDenoiser
from offramp.engines.diffusion.samples import Samples
from offramp.engines.diffusion.trained import depths_in_words, trained_alone
from offramp.policies.denoising import Chance, Point, depth_schedule
from offramp.policies.skips import ConstantDepth, DepthSchedule, FewerSteps, LayerGroups, LearnedExits, Reuse
from offramp.reduce.regions import Regions

BUDGETS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Costs that are tried for a limit on drift, where a method's plan is chosen for a cost."""

UNIT = "share of the full model's cost"

_NEVER = 1e9  # a threshold that no score reaches, at which scores are still measured
_SEEN = 0.75  # share of a family of thresholds that lies among the scores that were seen


@dataclass(frozen=True)
class Choice:
    """What a denoiser is to skip, and in words how it was chosen.

    Attributes:
        points: decision points.
        how: in words.
        share: of the steps.
        regions: which tokens are computed, of a method that computes some of them.
    """

    points: tuple[Point, ...]
    how: str
    share: float = 1.0
    regions: Regions | None = None

    def denoiser(self, net: DiffusionModel, observe: bool = False) -> Denoiser:
        """What carries it out."""
        return net.run(self.points, regions=self.regions, observe=observe)

    def same(self, other: Choice, steps: int) -> bool:
        """Whether both do the same in a sampler of so many steps."""
        taken = [FewerSteps(c.share).steps(steps) for c in (self, other)]
        return self.points == other.points and self.regions == other.regions and taken[0] == taken[1]


class _Recorder(Denoiser):
    """The full model, which notes its inputs and answers as batches with labels."""

    def __init__(self, net: Any) -> None:
        super().__init__(net)
        self.seen: list[dict[str, Any]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        given = self.net.call(*args, **kwargs).kwargs
        self.seen.append(
            {**{k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items()}, "labels": self.net.prediction(output)}
        )
        return output


class _Following(Denoiser):
    """The full model, which notes for each guidance branch what older results would have given."""

    def __init__(self, net: Any, point: Point, max_gap: int) -> None:
        super().__init__(net)
        self.point, self.max_gap = point, max_gap
        self.followers: dict[int, Follower] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        branch = self.trajectory.branch
        if branch not in self.followers:
            self.followers[branch] = Follower(self.net, self.point, self.max_gap)
        with torch.inference_mode(False), torch.no_grad():
            self.followers[branch](**self.net.call(*args, **kwargs).kwargs)
        return output


class Chooser:
    """Choices for costs; what they are made from is measured once.

    Args:
        net: the method on a denoiser.
        samples: to measure with.
        data: batches with labels, for the loss of exits; else their drift from the full model along its own trajectories.
        bins: intervals of the noise level.
        monotone: depth never falls from noisy to clean.
        max_gap: most steps that a result is reused.
        runs: most settings of a threshold to run.
        fingerprint: of the model.
    """

    def __init__(
        self, net: DiffusionModel, samples: Samples, data: Any, bins: int, monotone: bool, max_gap: int, runs: int, fingerprint: str
    ) -> None:
        self.net, self.samples, self.data = net, samples, data
        self.bins, self.monotone, self.max_gap, self.runs, self.fingerprint = bins, monotone, max_gap, runs, fingerprint
        self._table: Any = None

    @property
    def exact(self) -> Choice:
        """The full model."""
        regions: Regions | None = self.net.system.reduction
        return Choice((), "the full model", regions=None if regions is None else replace(regions, ratio=1.0, change=0.0))

    @property
    def by_threshold(self) -> bool:
        """Whether one number is to be found by running."""
        skips = self.net.skips
        return isinstance(skips, LearnedExits) or (isinstance(skips, Reuse) and (skips.measures or isinstance(skips.signal, Chance)))

    # ---- for a cost

    def choose(self, cost: float) -> Choice:
        """The best for a mean cost.

        Raises:
            InvalidInput: the method's cost is settled by its arguments.
            BudgetInfeasible: the method cannot reach it.
        """
        skips = self.net.skips
        if self.net.system.reduction is not None:
            return self._tokens(self.net.system.reduction, cost)
        if self.by_threshold:
            return self._threshold(cost)
        if trained_alone(self.net) is not None and not isinstance(skips, LayerGroups):
            return self._as_trained(cost)
        if isinstance(skips, Reuse):
            return self._cache(skips, cost)
        if isinstance(skips, DepthSchedule):
            return self._schedule(cost)
        if isinstance(skips, ConstantDepth):
            return self._depth(cost)
        if isinstance(skips, LayerGroups):
            return self._groups(skips, cost)
        if isinstance(skips, FewerSteps):
            if cost * self.samples.asked < 1:
                raise BudgetInfeasible(
                    f"{cost:g} of {self.samples.asked} steps is less than one step.",
                    requested=cost,
                    best=1 / self.samples.asked,
                    unit=UNIT,
                )
            share = min(cost, 1.0)
            return Choice((), f"{FewerSteps(share).steps(self.samples.asked)} of {self.samples.asked} steps", share)
        raise InvalidInput(
            f"The cost of {self.net.system.card.name} is settled by the arguments it is built with; nothing is left to calibrate."
        )

    def _levels(self) -> list[float]:
        """Noise level of every step, by the first batch."""
        _, _, report = next(iter(self.samples.each(lambda: self.exact.denoiser(self.net), False)))
        return [float(x) for x in report.log_snr[0]]

    def _shares(self) -> list[float]:
        """Cost of leaving after each block, and of all of them, as a share of the full model's."""
        segments = self.net.net.cut().spec.segments
        flops, order = [s.flops for s in segments], [s.name for s in segments]
        tail = sum(flops[order.index(self.net.layout.last) + 1 :])
        ends = [order.index(b) + 1 for b in self.net.layout.blocks]
        return [(sum(flops[:e]) + tail) / sum(flops) for e in ends]

    def _tokens(self, regions: Regions, cost: float) -> Choice:
        if self._table is None:
            self._table = self._levels()
        found = regions_for_cost(RegionDenoiser(self.net.net, regions), regions, self._table, cost)
        return Choice((), f"{found.ratio:.4g} of the tokens at steps that are not dense", regions=found)

    def _schedule(self, cost: float) -> Choice:
        blocks = self.net.layout.blocks
        if self._table is None:
            levels = self._levels()
            bins = NoiseBins.equal_shares(levels, min(self.bins, len(set(levels))))
            batches = self.data
            if batches is None:
                recorders: list[_Recorder] = []

                def record() -> Denoiser:
                    recorders.append(_Recorder(self.net.net))
                    return recorders[-1]

                self.samples.run(record, False)
                batches = [b for r in recorders for b in r.seen]
            losses = depth_losses(self.net.net, batches, bins.edges, at=blocks[:-1], to=self.net.layout.last)
            self._table = bins, losses, bins.counts(levels)
        bins, losses, counts = self._table
        price = [f / losses.flops[-1] for f in losses.flops]
        found = best_schedule(bins, losses.loss, price, counts, cost, monotone=self.monotone)
        exits = [None if d == len(blocks) - 1 else blocks[d] for d in found.depths]
        what = "loss on data" if self.data is not None else "drift along the full model's trajectories"
        return Choice(depth_schedule(bins.edges, exits, self.net.layout.last), f"knapsack over {bins.size} noise levels, by {what}")

    def _depth(self, cost: float) -> Choice:
        shares = self._shares()
        within = [k for k, s in enumerate(shares[:-1], 1) if s <= cost * (1 + 1e-9)]
        if not within:
            raise BudgetInfeasible(
                f"Even one block costs {shares[0]:.4g} of the model, more than {cost:g}.", requested=cost, best=shares[0], unit=UNIT
            )
        depth = within[-1]
        return Choice(ConstantDepth(depth / len(shares)).points(self.net.layout), f"{depth} of {len(shares)} blocks")

    def _groups(self, skips: LayerGroups, cost: float) -> Choice:
        """The groups that the model was trained with: others would need another training, so they are named and not chosen."""
        points, layout = skips.points(self.net.layout), self.net.layout
        name, blocks = self.net.system.card.name, len(layout.blocks)
        segments = self.net.net.cut().spec.segments
        order, flops = [s.name for s in segments], [s.flops for s in segments]
        inside = sum(flops[order.index(str(layout.inlet)) + 1 : order.index(layout.last) + 1]) / sum(flops)
        spent = {k: 1 - inside * (1 - 1 / k) for k in range(2, blocks + 1) if blocks % k == 0}
        fitting = next((k for k, s in spent.items() if s <= cost * (1 + 1e-9)), None)
        own = f"{name} with groups={skips.groups} runs one group of {blocks // skips.groups} blocks at every step and costs"
        if fitting is None or fitting > skips.groups:
            other = (
                f"Even groups={blocks}, of one block each, costs {spent[blocks]:.4g}: raise the cost to that"
                if fitting is None
                else f"groups={fitting} costs {spent[fitting]:.4g}: build it with that and train it so (a model trained for other groups "
                "gives noise)"
            )
            raise BudgetInfeasible(
                f"{own} {spent[skips.groups]:.4g} of the full model, more than {cost:g}. {other}.",
                requested=cost,
                best=spent[skips.groups],
                unit=UNIT,
            )
        if fitting < skips.groups:
            warn(
                f"{own} {spent[skips.groups]:.4g} of the full model; groups={fitting} would cost {spent[fitting]:.4g}, still within "
                f"{cost:g}. Build and train it with that to spend the rest.",
                OfframpWarning,
            )
        return Choice(points, f"one of {skips.groups} groups of blocks at every step, by noise level, as it was built")

    def _as_trained(self, cost: float) -> Choice:
        """The plan that the denoiser was trained under: of other depths, or at other noise levels, it has learned nothing."""
        points, name = trained_alone(self.net) or (), self.net.system.card.name
        what = depths_in_words(points, self.net.layout.blocks)
        if self._table is None:
            self._table = float(self.samples.run(lambda: self.net.run(points), False).cost.mean())
        if self._table > cost * (1 + 1e-9):
            raise BudgetInfeasible(
                f"This denoiser was trained by {name} for {what}, which costs {self._table:.4g} of the full model, more than {cost:g}; "
                "other depths were not trained and would give noise. Raise the cost to that, or build the method with fewer blocks and "
                "train it so.",
                requested=cost,
                best=self._table,
                unit=UNIT,
            )
        return Choice(points, f"{what}, as it was trained")

    def _cache(self, skips: Reuse, cost: float) -> Choice:
        point = skips.points(self.net.layout)[0]
        if self._table is None:
            made: list[_Following] = []

            def follow() -> Denoiser:
                made.append(_Following(self.net.net, point, min(self.max_gap, max(1, self.samples.asked - 1))))
                return made[-1]

            self.samples.run(follow, False)
            followers = [f for m in made for f in m.followers.values()]
            self._table = torch.stack([torch.stack(f.rows) for f in followers]).mean(0), followers[0].levels
        table, levels = self._table
        cut = self.net.net.cut()
        flops = [float(s.flops) for s in cut.spec.segments]
        start, stop = self.net.net.boundary(point.at, cut), self.net.net.boundary(point.to, cut)
        plan = best_cache_plan(table, 1.0, 1 - sum(flops[start:stop]) / sum(flops), cost)
        points = skips.at_steps(levels, [g > 0 for g in plan.gaps]).points(self.net.layout)
        return Choice(points, f"best {len(plan.computed)} of {plan.steps} steps to compute")

    # ---- by threshold

    def range(self) -> tuple[float, float, Tensor]:
        """Thresholds between which a rule goes from skipping all it may to nothing, and the scores that were seen."""
        skips = self.net.skips
        if isinstance(skips, Reuse) and isinstance(skips.signal, Chance):
            return 0.0, 1.0, torch.linspace(0, 1, 101, dtype=torch.float64)
        points = skips.points(self.net.layout, _NEVER) if skips is not None else ()
        ran = self.samples.run(lambda: self.net.run(points, observe=True), False)
        seen = torch.cat([v.flatten() for r in ran.reports for v in r.scores.values()])
        seen = seen[seen.isfinite()].double()
        if not seen.numel():
            raise InvalidInput(f"{self.net.system.card.name} measured no score in {self.samples.asked} steps; give more steps.")
        if isinstance(skips, LearnedExits) and float(seen.max() - seen.min()) < 1e-6:
            warn(
                f"All exits of {self.net.system.card.name} say the same uncertainty, {-float(seen[0]):.4g}, of every image at every step, "
                "as new heads do: they are not trained. Call offramp.fit(fast, data) first.",
                OfframpWarning,
            )
        # A result that is reused for long is compared with over many steps, so that changes grow; an uncertainty is at most 1.
        low = -1.0 if isinstance(skips, LearnedExits) else 4 * float(seen.min())
        return low, 0.0, seen

    def _threshold(self, cost: float) -> Choice:
        if self._table is None:
            self._table = self.range()
        low, high, _ = self._table
        found = threshold_for_cost(
            lambda t: self.samples.run(lambda: self.net.run(self.at(t)), False).cost, cost, low, high, runs=self.runs,
            fingerprint=self.fingerprint,
        )  # fmt: skip
        return Choice(self.at(found.threshold), f"threshold {found.threshold:.6g}, {found.certificate.method}")

    def at(self, threshold: float) -> tuple[Point, ...]:
        """The points at a threshold."""
        skips = self.net.skips
        return skips.points(self.net.layout, threshold) if skips is not None else ()

    # ---- several

    def settings(self, thresholds: Sequence[float] | None) -> list[tuple[float, Choice]]:
        """Settings for a limit on drift, strictest first."""
        if self.by_threshold:
            if thresholds is None:
                seen = self.range()[2]
                thresholds = sorted({float(seen.quantile(q)) for q in (0.98, 0.9, 0.8, 0.65, 0.5, 0.35, 0.2, 0.05)}, reverse=True)
            return [(t, Choice(self.at(t), f"threshold {t:.6g}")) for t in thresholds]
        found = []
        for budget in thresholds or BUDGETS:
            try:
                found.append((budget, self.choose(budget)))
            except BudgetInfeasible:
                break
        return found

    def family(self) -> Callable[[float], Choice]:
        """The method's settings on one scale: cost falls, or stays, from 0, just short of the full model, to 1, the loosest.

        Thresholds go through the scores that were seen by their ranks, so that equal parts of the scale skip about equally much more, and
        in the last part beyond them. Other methods' settings are those that are best for costs in equal distances.
        """
        if self.by_threshold:
            low, _, seen = self.range()
            least = float(seen.min())

            def at(looseness: float) -> Choice:
                beyond = (looseness - _SEEN) / (1 - _SEEN)
                t = least + beyond * (low - least) if beyond > 0 else float(seen.quantile(1 - looseness / _SEEN))
                return Choice(self.at(t), f"threshold {t:.6g}")

            return at
        least = self._least()

        def costing(looseness: float) -> Choice:
            cost = max(1 - looseness * (1 - least), least)
            choice = self.choose(cost)
            return replace(choice, how=f"{choice.how}, for a cost of {cost:.4g}")

        return costing

    def _least(self) -> float:
        """The least cost that `choose` meets."""
        try:
            self.choose(1e-9)
        except BudgetInfeasible as error:
            return error.best * (1 + 1e-9)
        return 1e-9


__all__ = ["BUDGETS", "UNIT", "Choice", "Chooser"]
