"""Which settings the diffusion benchmark measures: those of every system and control for each cost, and compositions of them.

Everything is chosen on calibration noise and held-out images; the noise that is evaluated with is other noise. Compositions are first
chosen by tables (what each exit, and each reuse of an older result, changes in one step), then run on calibration noise: the one whose
final images are nearest to those of the same model with many more steps is the one that is called chosen.

Shapes: ``S`` steps of a sampler, ``G`` most steps that a result is reused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusion_ways import Model, Way, evaluations, model_of, steps_for
from torch import Tensor
from train_diffusion import image_name

from offramp import systems
from offramp.budget import CachePlan, NoiseBins, best_cache_plan, best_schedule, threshold_for_cost
from offramp.budget.knapsack import best_choice
from offramp.core.errors import BudgetInfeasible, InvalidInput
from offramp.engines.diffusion.losses import Follower, depth_losses
from offramp.measure.image_quality import relative_l2
from offramp.policies.denoising import Every, Guard, Point, ResidualChange, depth_schedule
from offramp.policies.fills import CachedOutput, CachedResidual, Extrapolated, Fill
from offramp.policies.skips import AfterFirst, ConstantDepth, Deep, Region, Reuse
from offramp.reduce.regions import AtLevels, Regions
from offramp.train import Noising, RectifiedFlow, noisy_loader

MAX_GAP = 6
"""Most steps in a row that compositions reuse a result for."""

REUSES = (2, 3, 4, 5)
"""Intervals that a noise level may reuse at, where depth and reuse are chosen together."""


@dataclass(frozen=True)
class Calibration:
    """Noise and classes to choose by; the first ``few`` of them for what runs the model several times a step."""

    noise: Tensor
    labels: Tensor
    few: int

    @classmethod
    def of(cls, model: Model, count: int, few: int, seed: int) -> Calibration:
        return cls(*model.noise(count, seed), min(few, count))


# ---- pure choices --------------------------------------------------------------------------------------------------------


def check_costs(costs: Sequence[float]) -> tuple[float, ...]:
    """Costs in (0, 1), dearest first."""
    if not costs or not all(0 < c < 1 for c in costs):
        raise InvalidInput(f"Costs are shares of the full model's inside (0, 1), got {list(costs)}.")
    return tuple(sorted(set(costs), reverse=True))


def even_steps(steps: int, cost: float, reuse: float) -> list[bool]:
    """Which steps reuse, with those that compute spread evenly, for a mean cost of a step; the first and the last compute.

    Args:
        steps: S, at least 2.
        cost: mean, as a share of a step that computes.
        reuse: cost of a step that reuses.

    Raises:
        BudgetInfeasible: two steps that compute are dearer.
    """
    count = math.floor((cost - reuse) / (1 - reuse) * steps + 1e-9)
    if count < 2:
        raise BudgetInfeasible(
            f"Two of {steps} steps that compute cost {(2 + (steps - 2) * reuse) / steps:.4g}, more than {cost:g}.",
            requested=cost, best=(2 + (steps - 2) * reuse) / steps, unit="mean cost of a step",
        )  # fmt: skip
    count = min(count, steps)
    plan = CachePlan(steps, tuple(k * (steps - 1) // (count - 1) for k in range(count)))
    return [g > 0 for g in plan.gaps]


def interval_losses(table: Tensor, bins: Sequence[int], count: int, interval: int, reuse: float) -> tuple[np.ndarray[Any, Any], ...]:
    """What it costs and loses, in each bin of the noise level, to compute at every n-th step of the bin and reuse between.

    Args:
        table: ``[S, G + 1]`` loss of reusing, at each step, what is so many steps old.
        bins: S, the bin of each step; the first step of each bin computes.
        count: of bins.
        interval: n.
        reuse: cost of a step that reuses, as a share of one that computes.

    Returns:
        Sums over the bin's steps of cost and of loss, each ``[bins]``; infinite loss where an age is not in the table.
    """
    cost, loss = np.zeros(count), np.zeros(count)
    seen = [0] * count
    for step, where in enumerate(bins):
        age = seen[where] % interval
        seen[where] += 1
        cost[where] += reuse if age else 1.0
        loss[where] += float(table[step, age]) if age < table.shape[1] else math.inf
    return cost, loss


def reused_steps(bins: Sequence[int], chosen: Sequence[int | None]) -> list[bool]:
    """Which steps reuse, if each bin reuses at its interval or, for ``None``, not at all."""
    seen: dict[int, int] = {}
    out = []
    for where in bins:
        place = seen[where] = seen.get(where, -1) + 1
        interval = chosen[where]
        out.append(interval is not None and place % interval != 0)
    return out


SLACK = 1.02
"""A setting may execute so many times what it was to cost."""


def best_of(ways: Sequence[Way], chosen_only: Sequence[float] = ()) -> list[Way]:
    """Of each system's settings for one cost the one with the least drift on calibration noise; the best of all is marked as chosen.

    Args:
        ways: what was tried; what executed more than it was to cost does not count.
        chosen_only: costs of which nothing but the chosen one is kept.
    """
    best: dict[tuple[str, Any], Way] = {}
    for way in ways:
        if way.about["spent"] > SLACK * way.about["cost"]:
            continue
        key = (way.name, way.about["cost"])
        if key not in best or way.about["drift"] < best[key].about["drift"]:
            best[key] = way
    found = list(best.values())
    for cost in {w.about["cost"] for w in found}:
        first = min((w for w in found if w.about["cost"] == cost), key=lambda w: w.about["drift"])
        found[found.index(first)] = replace(first, about={**first.about, "chosen": True})
    return [w for w in found if w.about["cost"] not in chosen_only or w.about.get("chosen")]


# ---- the chooser ---------------------------------------------------------------------------------------------------------


class Plans:
    """Settings of all systems on one family of models.

    Args:
        family: by architecture; the first is the model itself.
        data: held-out images in [-1, 1] and their classes.
        calibration: noise to choose by.
        costs: shares of the full model's FLOPs.
        half: further ones for compositions, of which the chosen alone is kept: an equal share of time takes fewer FLOPs.
        fine: the reference of drift takes so many times the steps.
        batch: samples at a time.
        say: is told what was chosen.
    """

    def __init__(
        self, family: Mapping[str, Model], data: tuple[Tensor, Tensor], calibration: Calibration, costs: Sequence[float], fine: int = 4,
        batch: int = 256, say: Callable[[str], None] = print, half: Sequence[float] = (),
    ) -> None:  # fmt: skip
        self.family, self.data, self.calibration, self.costs = family, data, calibration, tuple(costs)
        self.half = tuple(c for c in half if c not in self.costs)
        self.fine, self.batch, self.say = fine, batch, say
        self.base = next(iter(family.values()))
        self.layout, self.steps = self.base.layout, self.base.steps
        self.full = Way("full model", "", self.base.name, self.steps)
        self.has_blocks = bool(self.layout.blocks)
        self._reuse: dict[Any, Tensor] = {}
        self._fine: dict[Any, Tensor] = {}
        self._depth: dict[str, Any] = {}

    # ---- measuring -----------------------------------------------------------------------------------------------------------

    def images(self, way: Way, count: int | None = None) -> tuple[Tensor, float]:
        """Final images on calibration noise, and executed FLOPs over those of the full model."""
        model = model_of(self.family, way)
        denoiser = model.denoiser(way)
        noise, labels = self.calibration.noise[:count], self.calibration.labels[:count]
        drawn = [model.draw(denoiser, way, n, c) for n, c in zip(noise.split(self.batch), labels.split(self.batch), strict=True)]
        rows = [len(d.images) for d in drawn]
        cost = sum(model.share(d, self.base) * n for d, n in zip(drawn, rows, strict=True)) / sum(rows)
        return torch.cat([d.images for d in drawn]), cost

    def drift(self, way: Way) -> tuple[float, float]:
        """Mean relative distance of final images from those of the same model with many more steps, and cost."""
        if way.model not in self._fine:
            self._fine[way.model] = self.images(Way("fine", "", way.model, self.steps * self.fine))[0]
        made, cost = self.images(way)
        return float(relative_l2(made, self._fine[way.model]).mean()), cost

    def reuse_table(self, way: Way, span: tuple[str, str], fill: Fill) -> Tensor:
        """``[S, G + 1]`` what reuse of each age changes in the prediction, along the trajectories of a plain way."""
        key = (way.model, way.sampler, way.steps, span, fill)
        if key not in self._reuse:
            model = model_of(self.family, way)
            follower = Follower(model.net, Point(*span, fill, Every(1)), min(MAX_GAP, way.steps - 1))
            few = self.calibration.few
            model.draw(follower, way, self.calibration.noise[:few], self.calibration.labels[:few])
            self._reuse[key] = torch.stack(follower.rows)
        return self._reuse[key]

    def depth_table(self, stage: str) -> dict[str, Any]:
        """Loss and drift of every exit at every noise level, on held-out images: of the training if it is there, else measured."""
        if stage not in self._depth:
            model = model_of(self.family, Way("", "", stage, 1))
            found = model.stages[stage].about.get("losses")
            if found is None or list(found["places"][:-1]) != list(self.layout.blocks[:-1]):
                found = self._measured(model, stage)
            self._depth[stage] = found
        return self._depth[stage]

    def _measured(self, model: Model, stage: str) -> dict[str, Any]:
        process = model.stages[stage].process
        process = replace(process, spread=None) if isinstance(process, RectifiedFlow) else process
        noising = Noising(process, image_name(model.module), label="class_labels", no_class=model.classes, drop=0.0)
        images, classes = self.data
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            batches = list(noisy_loader(images, noising, min(200, len(images)), classes=classes, shuffle=False)) * 2
        typed = [{n: v.to(model.net.dtype) if v.is_floating_point() and n != "timestep" else v for n, v in b.items()} for b in batches]
        edges = process.noise.log_snr(torch.arange(900, 0, -100, dtype=torch.float64)).tolist()
        found = depth_losses(model.net, typed, edges, at=self.layout.blocks[:-1])
        return {"edges": list(found.edges), "places": list(found.places), "loss": found.loss.tolist(), "drift": found.drift.tolist(),
                "flops": list(found.flops)}  # fmt: skip

    def reuse_share(self, span: tuple[str, str]) -> float:
        """Cost of a step that reuses a part, as a share of one that computes it."""
        cut = self.base.net.cut()
        start, stop = self.base.net.boundary(span[0], cut), self.base.net.boundary(span[1], cut)
        return 1 - sum(s.flops for s in cut.spec.segments[start:stop]) / self.base.flops

    # ---- controls ------------------------------------------------------------------------------------------------------------

    def controls(self) -> list[Way]:
        """Settings of what needs no method, at each cost and at some lower ones, so that equal times can be read off.

        What a control leaves open (DeepCache its branch, a static schedule what it is to lose least of) is chosen for it as compositions
        are: by drift on calibration noise.
        """
        more = sorted({*self.costs, 0.9, 0.4, 0.3}, reverse=True)
        out: list[Way] = []
        for sampler, name in (("own", "few-steps"), ("dpm++", "dpm++"), ("heun", "heun")):
            for cost in [1.0, *more] if sampler != "own" else more:
                steps = steps_for(sampler, cost, self.steps)
                count = evaluations(sampler, steps)
                way = Way(name, f"{count} evaluations", self.base.name, steps, sampler=sampler, control=True, about={"cost": cost})
                out += [way] if all(way.title != w.title for w in out) else []
        out += self._deepcache(more) + self._random()
        if self.has_blocks:
            stage = "uniform" if "uniform" in self.base.weights else self.base.name
            out += [w for cost in more if (w := self._static(stage, cost)) is not None]
            out += self._shallow(stage)
        if "shallow" in self.family:
            out.append(Way("smaller model", f"{self.family['shallow'].stages['shallow'].about['blocks']} blocks", "shallow", self.steps,
                           control=True))  # fmt: skip
        return out + self._trained_on()

    def _trained_on(self) -> list[Way]:
        """The whole model trained for as many steps as what leaves early, and fewer steps of it."""
        if "full" not in self.base.weights:
            return []
        fewer = {steps_for("own", c, self.steps): c for c in self.costs}
        settings = [(self.steps, "all blocks", {}), *((n, f"{n} evaluations", {"cost": c}) for n, c in fewer.items())]
        return [Way("trained on", setting, "full", n, control=True, about=about) for n, setting, about in settings]

    def least_drift(self, ways: Sequence[Way]) -> Way:
        """Of several settings the one whose final images differ least; one alone is not run."""
        return ways[0] if len(ways) == 1 else min(ways, key=lambda w: self.drift(w)[0])

    def _static(self, stage: str, cost: float) -> Way | None:
        """The schedule that loses least on held-out images, or the one that changes the prediction least."""
        found = [w for by in ("loss", "drift") if (w := self.schedule("static-schedule", stage, cost, by, control=True)) is not None]
        return self.least_drift(list({w.points: w for w in found}.values())) if found else None

    def _deepcache(self, costs: Sequence[float]) -> list[Way]:
        out = []
        for interval in (2, 3, 5):
            points = systems.build("deepcache", interval=interval).skips.points(self.layout)
            out.append(Way("deepcache", f"every {interval}", self.base.name, self.steps, points, control=True))
        for cost in costs:
            found = [w for b in range(self.branches()) if (w := self._evenly(b, cost)) is not None]
            out += [self.least_drift(found)] if found else []
        return out

    def _evenly(self, branch: int, cost: float) -> Way | None:
        """DeepCache's branch at evenly spread steps; ``None`` where so little cannot be spent."""
        reuse = systems.build("deepcache", branch=branch).skips
        try:
            reused = even_steps(self.steps, cost, self.reuse_share(reuse.region.span(self.layout)))
        except BudgetInfeasible:
            return None
        points = reuse.at_steps(self.base.levels(), reused).points(self.layout)
        about = {"cost": cost, "branch": branch}
        return Way("deepcache", f"evenly, cost {cost:g}", self.base.name, self.steps, points, control=True, about=about)

    def _random(self) -> list[Way]:
        share = 1 - self.reuse_share(AfterFirst(1).span(self.layout))
        out = []
        for cost in self.costs:
            rate = (1 - cost) / share * self.steps / max(1, self.steps - 2)
            if rate < 1:
                system = systems.build("random-skip", rate=rate)
                points = system.skips.points(self.layout, system.threshold)
                out.append(Way("random-skip", f"cost {cost:g}", self.base.name, self.steps, points, control=True, about={"cost": cost}))
        return out

    def _shallow(self, stage: str) -> list[Way]:
        out, blocks = [], len(self.layout.blocks)
        for depth in sorted({round(c * blocks) for c in self.costs} - {0, blocks}, reverse=True):
            points = ConstantDepth(depth / blocks).points(self.layout)
            out.append(Way("shallow", f"{depth} of {blocks} blocks", stage, self.steps, points, control=True))
        return out

    # ---- systems -------------------------------------------------------------------------------------------------------------

    def schedule(self, name: str, stage: str, cost: float, by: str = "loss", control: bool = False) -> Way | None:
        """The schedule of depths of least loss (or drift) on held-out images for a cost; ``None`` if even one block is dearer."""
        table = self.depth_table(stage)
        bins, levels = NoiseBins(tuple(table["edges"])), self.base.levels()
        price = [f / table["flops"][-1] for f in table["flops"]]
        try:
            found = best_schedule(bins, table[by], price, bins.counts(levels), cost)
        except BudgetInfeasible:
            return None
        return Way(name, f"cost {cost:g}", stage, self.steps, self._depth_points(bins, found.depths), control=control,
                   about={"cost": cost, "depths": [d + 1 for d in found.depths], "by": by})  # fmt: skip

    def _depth_points(self, bins: NoiseBins, depths: Sequence[int | None]) -> tuple[Point, ...]:
        blocks = self.layout.blocks
        exits = [None if d is None or d >= len(blocks) - 1 else blocks[d] for d in depths]
        return depth_schedule(bins.edges, exits, self.layout.last)

    def systems(self) -> list[Way]:
        """Settings of every system at each cost."""
        out: list[Way] = []
        weights = self.base.weights
        if "ee" in weights:
            out.append(Way("ee-diffusion", "published depths", "ee", self.steps, self.base.stages["ee"].plan()))
            out += [w for c in self.costs if (w := self.schedule("ee-diffusion", "ee", c)) is not None]
        if "latte" in weights:
            out.append(Way("latte-flow", f"{self.base.stages['latte'].about['groups']} groups", "latte", self.steps,
                           self.base.stages["latte"].plan()))  # fmt: skip
        for name, stage in (("first-block-cache", self.base.name), ("deediff", "deediff")):
            if stage in weights and (name != "deediff" or self.has_blocks):
                out += self._found(name, stage)
        if self.has_blocks:
            out += [w for c in self.costs if (w := self._ras(c)) is not None]
        return out

    def threshold(self, way: Callable[[float], Way], cost: float, low: float, high: float, what: str) -> Way | None:
        """The setting whose cost on calibration noise comes nearest from below; ``None`` if none is that cheap."""

        def run(value: float) -> Tensor:
            return torch.tensor([self.images(way(value), self.calibration.few)[1]])

        try:
            found = threshold_for_cost(run, cost, low, high, tolerance=0.02, runs=8)
        except BudgetInfeasible as error:
            self.say(f"{what}: {error}")
            return None
        return replace(way(found.threshold), about={"threshold": found.threshold, "cost": cost})

    def _found(self, name: str, stage: str) -> list[Way]:
        skips = systems.build(name).skips
        out = []
        for cost in self.costs:

            def way(value: float, cost: float = cost) -> Way:
                return Way(name, f"cost {cost:g}", stage, self.steps, skips.points(self.layout, value))

            made = self.threshold(way, cost, -1.0, 0.0, f"{name} at {cost:g}")
            out += [made] if made is not None else []
        return out

    def _ras(self, cost: float) -> Way | None:
        """Dense at a tenth of the steps first and where two fifths and three quarters of them are done, as published of 30 steps."""
        levels = self.base.levels()
        resets = AtLevels(tuple(levels[round(s * self.steps)] for s in (0.4, 0.73)))
        few = max(1, round(self.steps * 4 / 30))

        def way(ratio: float) -> Way:
            regions = Regions(ratio=ratio, first=few, resets=resets, multiple=1)
            return Way("ras", f"cost {cost:g}", self.base.name, self.steps, regions=regions)

        return self.threshold(way, cost, 0.02, 1.0, f"ras at {cost:g}")

    # ---- compositions --------------------------------------------------------------------------------------------------------

    def branches(self) -> int:
        """Of DeepCache that are tried, the shallowest first."""
        return min(3, len(self.layout.deep) if self.layout.deep else (len(self.layout.blocks) - 1) // 2)

    def regions(self) -> list[Region]:
        return [*(Deep(b) for b in range(self.branches())), *([AfterFirst(1)] if self.has_blocks else [])]

    def compositions(self, fits: Callable[[], bool] = lambda: True) -> list[Way]:
        """The best of each kind at each cost, by drift on calibration noise; ``fits`` says whether there is time to go on."""
        tried: list[Way] = []
        for cost in sorted((*self.costs, *self.half), key=lambda c: abs(c - 0.5)):  # what the bar asks for comes first
            waiting = [*self._caches(cost), *self._stepped(cost), *self._mixed(cost), *self._nested(cost)]
            for way in waiting:
                if not fits():
                    break
                tried.append(self._tried(way, cost))
            if fits() and (best := [w for w in tried if w.name == "ours: cache" and w.about["cost"] == cost]):
                tried += [self._tried(w, cost) for w in self._with_rule(cost, min(best, key=lambda w: w.about["drift"]))]
        return best_of(tried, self.half)

    def _tried(self, way: Way, cost: float) -> Way:
        drift, spent = self.drift(way)
        self.say(f"  {way.title} (cost {cost:g}): drift {drift:.4f}, cost on calibration noise {spent:.4f}")
        return replace(way, setting=f"cost {cost:g}", ours=True,
                       about={**way.about, "what": way.setting, "cost": cost, "drift": drift, "spent": spent})  # fmt: skip

    def _cached(self, plain: Way, region: Region, fill: Fill, budget: float) -> tuple[tuple[Point, ...], float] | None:
        """Points and predicted loss of the best steps to compute, on a plain way, for a share of its own cost."""
        span = region.span(self.layout)
        # What an extrapolation changes is not in a table of single results; the steps are those that are best for what it falls back to.
        known = CachedOutput() if isinstance(fill, CachedOutput) or self.layout.deep else CachedResidual()
        table = self.reuse_table(plain, span, known)
        try:
            plan = best_cache_plan(table, 1.0, self.reuse_share(span), budget)
        except BudgetInfeasible:
            return None
        levels = self.base.levels(plain)
        if any(not b > a for a, b in pairwise(levels)):
            return None
        points = Reuse(region, fill=fill).at_steps(levels, [g > 0 for g in plan.gaps]).points(self.layout)
        return points, plan.loss(table)

    def fills(self) -> list[Fill]:
        if self.layout.deep:
            return [CachedOutput(), Extrapolated(1)]
        return [CachedResidual(), CachedOutput(), Extrapolated(1, residual=True)]

    def _caches(self, cost: float) -> list[Way]:
        """The best steps to compute, for every part that may be reused and every fill."""
        out = []
        for region in self.regions():
            for fill in self.fills():
                if (found := self._cached(self.full, region, fill, cost)) is not None:
                    what = f"{region}, {type(fill).__name__}"
                    out.append(Way("ours: cache", what, self.base.name, self.steps, found[0], about={"predicted": found[1]}))
        return out

    def _stepped(self, cost: float) -> list[Way]:
        """Fewer steps, of this sampler or a better one, and the best cache plan within them."""
        out = []
        for sampler in ("own", "dpm++"):
            for steps in sorted({round(share * self.steps) for share in (0.9, 0.8, 0.7, 0.6)}, reverse=True):
                budget = cost * self.steps / max(1, steps)
                if not 0 < budget < 0.97 or steps < 4:
                    continue
                plain = Way("", "", self.base.name, steps, sampler=sampler)
                for region in self.regions()[:1]:
                    fill = self.fills()[0]
                    if (found := self._cached(plain, region, fill, budget)) is not None:
                        what = f"{steps} steps of {sampler}, {region}, {type(fill).__name__}"
                        out.append(
                            Way("ours: steps and cache", what, self.base.name, steps, found[0], sampler, about={"predicted": found[1]})
                        )
        return out

    def _stages(self) -> list[str]:
        return [n for n in ("uniform", self.base.name) if n in self.base.weights][:1]

    def _mixed(self, cost: float) -> list[Way]:
        """For every noise level a depth or an interval of reuse, whichever combination loses least for the cost: one knapsack."""
        if not self.has_blocks:
            return []
        out = []
        for stage in self._stages():
            table = self.depth_table(stage)
            bins = NoiseBins(tuple(table["edges"]))
            where = bins.bins_of(self.base.levels()).tolist()
            counts = np.array(bins.counts(self.base.levels()), dtype=float)
            used = counts > 0
            price = np.array(table["flops"]) / table["flops"][-1]
            for region in self.regions():
                span = region.span(self.layout)
                reuse = self.reuse_table(replace(self.full, model=stage), span, CachedResidual())
                columns = [interval_losses(reuse, where, bins.size, n, self.reuse_share(span)) for n in REUSES]
                spent = np.concatenate([counts[:, None] * price, np.stack([c for c, _ in columns], 1)], 1)[used]
                lost = np.concatenate([counts[:, None] * np.array(table["drift"]), np.stack([x for _, x in columns], 1)], 1)[used]
                found = best_choice(spent, lost, np.zeros(spent.shape[1], np.int64), cost * self.steps)
                if not found.cost.size:
                    continue
                options: list[int | None] = [None] * bins.size
                for place, option in zip(np.flatnonzero(used), found.options[0], strict=True):
                    options[place] = int(option)
                depths = [o if o is not None and o < len(price) else None for o in options]
                intervals = [REUSES[o - len(price)] if o is not None and o >= len(price) else None for o in options]
                points = self._depth_points(bins, depths)
                if any(reused := reused_steps(where, intervals)):
                    points += Reuse(region, fill=CachedResidual()).at_steps(self.base.levels(), reused).points(self.layout)
                what = f"{region}; " + " ".join(f"1/{i}" if i else str(len(price) if d is None else d + 1)
                                                for d, i in zip(depths, intervals, strict=True))  # fmt: skip
                out.append(
                    Way("ours: depths or reuse", what, stage, self.steps, points, about={"predicted": float(found.loss[0]) / self.steps})
                )
        return out

    def _nested(self, cost: float) -> list[Way]:
        """A schedule of depths, and within it steps that reuse the blocks which every depth runs."""
        if not self.has_blocks:
            return []
        best: Way | None = None
        for stage in self._stages():
            table = self.depth_table(stage)
            bins, levels = NoiseBins(tuple(table["edges"])), self.base.levels()
            price = [f / table["flops"][-1] for f in table["flops"]]
            for depth_cost in (0.95, 0.9, 0.85, 0.8, 0.7):
                if depth_cost <= cost:
                    continue
                depths = best_schedule(bins, table["drift"], price, bins.counts(levels), depth_cost).depths
                least = min(depths)
                if least < 2:  # one block is all that could be reused
                    continue
                span = (self.layout.blocks[0], self.layout.blocks[least])
                share = self.reuse_share(span)
                spent = sum(price[depths[b]] for b in bins.bins_of(levels)) / len(levels)
                reuse = self.reuse_table(replace(self.full, model=stage), span, CachedResidual())
                try:
                    plan = best_cache_plan(reuse, 1.0, share, 1 - (spent - cost))
                except BudgetInfeasible:
                    continue
                lost = sum(table["drift"][b][depths[b]] for b in bins.bins_of(levels)) / len(levels) + plan.loss(reuse)
                if best is None or lost < best.about["predicted"]:
                    changes = Reuse(Deep(0), fill=CachedResidual()).at_steps(levels, [g > 0 for g in plan.gaps])
                    point = Point(*span, CachedResidual(), changes.signal)
                    what = f"depths {' '.join(str(d + 1) for d in depths)}, blocks 2 to {least + 1} at {len(plan.computed)} steps"
                    points = (point, *self._depth_points(bins, depths))
                    best = Way("ours: cache in depths", what, stage, self.steps, points, about={"predicted": lost})
        return [best] if best is not None else []

    def _with_rule(self, cost: float, cache: Way) -> list[Way]:
        """A cheaper part of the saving by the best cache plan, the rest where an image's own state has hardly changed."""
        region = self.regions()[0]
        fill = self.fills()[0]
        rule = Reuse(region, ResidualChange(), fill, Guard(2, 1, True))
        for share in (0.5, 0.25):  # of the saving that is left to the rule, which may not reuse often enough for more
            found = self._cached(self.full, region, fill, cost + share * (1 - cost))
            if found is None:
                continue

            def way(value: float, planned: tuple[Point, ...] = found[0]) -> Way:
                points = planned + rule.points(self.layout, value)
                return Way("ours: cache and rule", f"{region}, {type(fill).__name__}", self.base.name, self.steps, points)

            made = self.threshold(way, cost, -1.0, 0.0, f"cache and rule at {cost:g}")
            if made is not None:
                return [made]
        return []
