"""Calibrating a diffusion method: from a budget or a limit on drift to a plan, measured on samples that were not used to choose it.

What is chosen depends on what the method skips. Depths by noise level are chosen exactly from the loss of every exit at every level, cached
steps exactly from what reuse of each age changes, and rules that measure are run at several thresholds, since there a decision changes what
all later steps see. A plan is then run on held-out samples, and the cost that was realised stands beside the one that was asked for.

Shapes: ``N`` samples, ``S`` steps of a sampler.
"""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.backbones.taps import first_tensor
from offramp.budget import (
    DriftLimit,
    MeanCost,
    NoiseBins,
    best_cache_plan,
    best_schedule,
    run_settings,
    threshold_for_cost,
    threshold_for_quality,
)
from offramp.budget.replay import mean_estimate
from offramp.core.bundle import load_bundle, save_bundle
from offramp.core.certificate import Certificate, Estimate
from offramp.core.errors import ArtifactError, BudgetInfeasible, FingerprintMismatch, InvalidInput, OfframpWarning
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.engines.diffusion.denoise import Denoiser
from offramp.engines.diffusion.losses import Follower, depth_losses
from offramp.engines.diffusion.model import PARTS, DiffusionModel
from offramp.engines.diffusion.pipeline import sample
from offramp.engines.diffusion.report import Report
from offramp.measure.image_quality import relative_l2
from offramp.policies.denoising import Chance, Point, depth_schedule
from offramp.policies.skips import ConstantDepth, DepthSchedule, FewerSteps, LearnedExits, Reuse

BUDGETS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Costs that are tried for a limit on drift, where a method's plan is chosen for a cost."""

_NEVER = 1e9  # a threshold that no score reaches, at which scores are still measured

# ---- the plan ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DenoisingPlan:
    """What a denoiser is to skip, and what that was measured to cost.

    Attributes:
        system: the method's name.
        points: decision points.
        cost: mean over held-out samples, a share of the full model's FLOPs with all steps.
        certificate: what was asked for and what was realised.
        made_with: ``model`` (fingerprint with heads), ``sampler`` (class), ``steps``, ``guidance``, ``dtype``.
        share: of the steps that are asked for, in (0, 1].
    """

    system: str
    points: tuple[Point, ...]
    cost: Estimate
    certificate: Certificate
    made_with: Mapping[str, Any]
    share: float = 1.0

    def steps(self, steps: int) -> int:
        """Steps of the sampler where ``steps`` are asked for."""
        return FewerSteps(self.share).steps(steps)

    def __str__(self) -> str:
        made = ", ".join(f"{k} {v if k != 'model' else str(v)[:12]}" for k, v in self.made_with.items())
        what = f"DenoisingPlan: {self.system}, {len(self.points)} points, mean cost {self.cost} of the full model"
        return f"{what}\n  {made}\n{self.certificate}"

    def check(self, net: DiffusionModel) -> None:
        """Refuse a denoiser that the plan was not made for, and warn of another sampler.

        Raises:
            FingerprintMismatch: the denoiser has other weights, heads or another dtype.
        """
        if (found := net.fingerprint()) != self.made_with["model"]:
            raise FingerprintMismatch(
                f"The plan was made for a denoiser with fingerprint {str(self.made_with['model'])[:12]}... ({self.made_with['dtype']}); "
                f"this {type(net.net.model).__name__} has {found[:12]}... ({net.net.dtype}). Calibrate again."
            )
        sampler = type(net.scheduler).__name__
        if net.scheduler is not None and sampler != self.made_with["sampler"]:
            warnings.warn(
                f"The plan was made with {self.made_with['sampler']} and runs with {sampler}: it goes by noise level and stays valid, but "
                "its cost and drift were measured for the other.",
                OfframpWarning,
                stacklevel=3,
            )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``denoising_plan.json`` into ``folder``, atomically."""
        content = {
            "system": self.system,
            "points": part_to_dict(self.points),
            "cost": [self.cost.value, self.cost.low, self.cost.high, self.cost.level],
            "certificate": self.certificate.to_dict(),
            "made_with": dict(self.made_with),
            "share": self.share,
        }
        save_bundle(folder, "denoising_plan", "denoising_plan", content)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> DenoisingPlan:
        """Read what `save` wrote.

        Raises:
            ArtifactError: the file is missing, truncated, altered or foreign.
        """
        content, _ = load_bundle(folder, "denoising_plan", "denoising_plan")
        try:
            points = part_from_dict(content["points"], PARTS)
            certificate = Certificate.from_dict(content["certificate"])
            return cls(
                str(content["system"]), points, Estimate(*content["cost"]), certificate, content["made_with"], float(content["share"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"The plan in {folder} lacks or garbles a field: {error}.") from error


# ---- samples -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """Images ``[N, ...]`` and cost ``[N]`` as a share of the full model's with all steps, and a report of each batch."""

    images: Tensor
    cost: Tensor
    reports: tuple[Report, ...]


class Samples(ABC):
    """Samples to calibrate with: the same noise and conditioning at every run.

    Attributes:
        guidance: for the record.
        asked: steps of the full sampler.
    """

    guidance: float = 1.0
    asked: int = 0

    @abstractmethod
    def batches(self, held_out: bool) -> Iterable[Callable[[Denoiser, float], Tensor]]:
        """For each batch of samples a function that runs it, with a share of the steps, and gives its images."""

    def run(self, make: Callable[[], Denoiser], held_out: bool, share: float = 1.0) -> Ran:
        """Run all batches, each with a denoiser of its own."""
        images, costs, reports = [], [], []
        taken = FewerSteps(share).steps(self.asked) / self.asked
        for batch in self.batches(held_out):
            denoiser = make()
            got = batch(denoiser, share)
            images.append(got.float().cpu())
            # Guidance branches follow one another, in one call or in several.
            costs.append(denoiser.report.row_cost.reshape(-1, len(got)).mean(0) * taken)
            reports.append(denoiser.report)
        return Ran(torch.cat(images), torch.cat(costs), tuple(reports))


class FromNoise(Samples):
    """Samples of a denoiser and a scheduler; a share of them is held out."""

    def __init__(
        self, scheduler: Any, noise: Tensor, steps: int, batch_size: int, held_out: float, options: Mapping[str, Any], guidance: float
    ) -> None:
        kept = len(noise) - round(held_out * len(noise))
        if not 0 < kept < len(noise):
            raise InvalidInput(f"{len(noise)} samples cannot be divided with a share of {held_out:g} held out; give more noise.")
        self.scheduler, self.noise, self.asked, self.size = scheduler, noise, steps, batch_size
        self.rows = {False: range(kept), True: range(kept, len(noise))}
        self.options, self.guidance = options, guidance

    def batches(self, held_out: bool) -> Iterable[Callable[[Denoiser, float], Tensor]]:
        rows = self.rows[held_out]
        for start in range(rows.start, rows.stop, self.size):
            yield self._runs(slice(start, min(start + self.size, rows.stop)))

    def _runs(self, rows: slice) -> Callable[[Denoiser, float], Tensor]:
        def run(denoiser: Denoiser, share: float) -> Tensor:
            given: dict[str, Any] = {
                name: {k: v[rows] if isinstance(v, Tensor) and v.ndim and len(v) == len(self.noise) else v for k, v in part.items()}
                for name, part in self.options.items()
                if part is not None
            }
            steps = FewerSteps(share).steps(self.asked)
            return sample(denoiser, copy.deepcopy(self.scheduler), self.noise[rows], steps=steps, guidance=self.guidance, **given)

        return run


class FromCalls(Samples):
    """Calls of a pipeline; those that are held out are the same calls with other noise."""

    def __init__(self, net: DiffusionModel, calls: Sequence[Mapping[str, Any]], steps: int | None, seed: int) -> None:
        names = inspect.signature(type(net.pipe).__call__).parameters
        if not calls or "generator" not in names or "num_inference_steps" not in names:
            raise InvalidInput(
                f"calls must hold one call or more of a {type(net.pipe).__name__} that takes generator and num_inference_steps."
            )
        more = {"output_type": "np"} if "output_type" in names else {}
        asked = {int(steps or c.get("num_inference_steps", names["num_inference_steps"].default)) for c in calls}
        if len(asked) != 1:
            raise InvalidInput(f"All calls must take one number of steps, got {sorted(asked)}.")
        self.asked = asked.pop()
        scales = [float(c.get("guidance_scale", getattr(names.get("guidance_scale"), "default", 1.0))) for c in calls]
        self.net, self.seed, self.guidance = net, seed, scales[0]
        self.calls = [{**more, **c, "num_inference_steps": self.asked} for c in calls]

    def batches(self, held_out: bool) -> Iterable[Callable[[Denoiser, float], Tensor]]:
        for k, call in enumerate(self.calls):
            yield self._runs(call, self.seed + k + (len(self.calls) if held_out else 0))

    def _runs(self, call: Mapping[str, Any], seed: int) -> Callable[[Denoiser, float], Tensor]:
        def run(denoiser: Denoiser, share: float) -> Tensor:
            view = self.net.around(denoiser, FewerSteps(share).steps)
            got = view(**call, generator=torch.Generator().manual_seed(seed)).images
            return got if isinstance(got, Tensor) else torch.as_tensor(np.stack([np.asarray(image) for image in got]))

        return run


class _Recorder(Denoiser):
    """The full model, which notes its inputs and answers as batches with labels."""

    def __init__(self, net: Any) -> None:
        super().__init__(net)
        self.seen: list[dict[str, Any]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        given = self.net.call(*args, **kwargs).kwargs
        self.seen.append({**{k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items()}, "labels": first_tensor(output)})
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


# ---- choosing ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    """Points and a share of the steps, and in words how they were chosen."""

    points: tuple[Point, ...]
    how: str
    share: float = 1.0


class _Chooser:
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
    def by_threshold(self) -> bool:
        """Whether one number is to be found by running."""
        skips = self.net.skips
        return isinstance(skips, LearnedExits) or (isinstance(skips, Reuse) and (skips.measures or isinstance(skips.signal, Chance)))

    def choose(self, cost: float) -> _Choice:
        """The best for a mean cost.

        Raises:
            InvalidInput: the method's cost is settled by its arguments.
            BudgetInfeasible: the method cannot reach it.
        """
        skips = self.net.skips
        if self.by_threshold:
            return self._threshold(cost)
        if isinstance(skips, Reuse):
            return self._cache(skips, cost)
        if isinstance(skips, DepthSchedule):
            return self._schedule(cost)
        if isinstance(skips, ConstantDepth):
            return self._depth(cost)
        if isinstance(skips, FewerSteps):
            if cost * self.samples.asked < 1:
                raise BudgetInfeasible(
                    f"{cost:g} of {self.samples.asked} steps is less than one step.",
                    requested=cost,
                    best=1 / self.samples.asked,
                    unit="share of the full model's cost",
                )
            return _Choice((), "fewer steps", min(cost, 1.0))
        raise InvalidInput(
            f"The cost of {self.net.system.card.name} is settled by the arguments it is built with; nothing is left to calibrate."
        )

    def _levels(self) -> list[float]:
        ran = self.samples.run(lambda: self.net.run(()), False).reports[0]
        return [float(x) for x in ran.log_snr[0]]

    def _shares(self) -> list[float]:
        """Cost of leaving after each block, and of all of them, as a share of the full model's."""
        segments = self.net.net.cut().spec.segments
        flops, order = [s.flops for s in segments], [s.name for s in segments]
        tail = sum(flops[order.index(self.net.layout.last) + 1 :])
        ends = [order.index(b) + 1 for b in self.net.layout.blocks]
        return [(sum(flops[:e]) + tail) / sum(flops) for e in ends]

    def _schedule(self, cost: float) -> _Choice:
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
        return _Choice(depth_schedule(bins.edges, exits, self.net.layout.last), f"knapsack over {bins.size} noise levels, by {what}")

    def _depth(self, cost: float) -> _Choice:
        shares = self._shares()
        within = [k for k, s in enumerate(shares[:-1], 1) if s <= cost * (1 + 1e-9)]
        if not within:
            raise BudgetInfeasible(
                f"Even one block costs {shares[0]:.4g} of the model, more than {cost:g}.",
                requested=cost,
                best=shares[0],
                unit="share of the full model's cost",
            )
        depth = within[-1]
        return _Choice(ConstantDepth(depth / len(shares)).points(self.net.layout), f"{depth} of {len(shares)} blocks")

    def _cache(self, skips: Reuse, cost: float) -> _Choice:
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
        return _Choice(points, f"best {len(plan.computed)} of {plan.steps} steps to compute")

    def range(self) -> tuple[float, float, Tensor]:
        """Thresholds between which a rule goes from skipping all it may to nothing, and the scores that were seen."""
        skips = self.net.skips
        if isinstance(skips, Reuse) and isinstance(skips.signal, Chance):
            return 0.0, 1.0, torch.linspace(0, 1, 101)
        points = skips.points(self.net.layout, _NEVER) if skips is not None else ()
        ran = self.samples.run(lambda: self.net.run(points, observe=True), False)
        seen = torch.cat([v.flatten() for r in ran.reports for v in r.scores.values()])
        seen = seen[seen.isfinite()].double()
        if not seen.numel():
            raise InvalidInput(f"{self.net.system.card.name} measured no score in {self.samples.asked} steps; give more steps.")
        # A result that is reused for long is compared with over many steps, so that changes grow; an uncertainty is at most 1.
        low = -1.0 if isinstance(skips, LearnedExits) else 4 * float(seen.min())
        return low, 0.0, seen

    def _threshold(self, cost: float) -> _Choice:
        if self._table is None:
            self._table = self.range()
        low, high, _ = self._table
        found = threshold_for_cost(
            lambda t: self.samples.run(lambda: self.net.run(self.at(t)), False).cost, cost, low, high, runs=self.runs,
            fingerprint=self.fingerprint,
        )  # fmt: skip
        return _Choice(self.at(found.threshold), f"threshold {found.threshold:.6g}, {found.certificate.method}")

    def at(self, threshold: float) -> tuple[Point, ...]:
        """The points at a threshold."""
        skips = self.net.skips
        return skips.points(self.net.layout, threshold) if skips is not None else ()

    def settings(self, thresholds: Sequence[float] | None) -> list[tuple[float, _Choice]]:
        """Settings for a limit on drift, strictest first."""
        if self.by_threshold:
            if thresholds is None:
                seen = self.range()[2]
                thresholds = sorted({float(seen.quantile(q)) for q in (0.98, 0.9, 0.8, 0.65, 0.5, 0.35, 0.2, 0.05)}, reverse=True)
            return [(t, _Choice(self.at(t), f"threshold {t:.6g}")) for t in thresholds]
        found = []
        for budget in thresholds or BUDGETS:
            try:
                found.append((budget, self.choose(budget)))
            except BudgetInfeasible:
                break
        return found


def calibrate_denoiser(
    net: DiffusionModel,
    target: MeanCost | DriftLimit,
    *,
    noise: Tensor | None = None,
    steps: int | None = None,
    inputs: Mapping[str, Any] | None = None,
    unconditional: Mapping[str, Any] | None = None,
    guidance: float = 1.0,
    calls: Sequence[Mapping[str, Any]] | None = None,
    data: Any = None,
    samples: int = 32,
    batch_size: int = 16,
    held_out: float = 0.5,
    bins: int = 10,
    monotone: bool = False,
    max_gap: int = 8,
    thresholds: Sequence[float] | None = None,
    runs: int = 12,
    seed: int = 0,
) -> DenoisingPlan:
    """Choose what a diffusion method skips, for a mean cost or a limit on drift, and measure it on held-out samples.

    Samples come from ``calls`` of the pipeline, or from ``noise`` with a scheduler and the denoiser's other inputs.

    Args:
        net: from `offramp.attach`.
        target: `MeanCost`, as a share of the full model's FLOPs with all steps; or `DriftLimit` on the relative distance of final images
            from the full model's at equal noise, certified on the held-out samples.
        noise: ``[N, ...]`` standard normal; by default ``samples`` of them, where the denoiser needs no other inputs.
        steps: of the sampler; by default 50, or what the calls say.
        inputs: the denoiser's other inputs by name, ``[N, ...]`` each.
        unconditional: the same of the second guidance branch.
        guidance: see `offramp.engines.diffusion.pipeline.sample`.
        calls: keyword arguments of the pipeline, one mapping for each call; noise is drawn from ``seed``.
        data: batches of noisy images with what is to be predicted under ``labels`` (`offramp.train.noisy_loader`): schedules of depths are
            then chosen by loss; without it by the distance from the full model's predictions along its own trajectories.
        samples: N where no noise is given.
        batch_size: samples at a time.
        held_out: share of the noise that is not used to choose, inside (0, 1). Calls are repeated with other noise instead.
        bins: intervals of the noise level, for a schedule of depths.
        monotone: depth never falls from noisy to clean.
        max_gap: most steps in a row that reuse, for a plan of cached steps.
        thresholds: settings to try for a `DriftLimit`, strictest first: thresholds of rules that measure, costs of others.
        runs: most settings to run in search of a threshold.
        seed: of the noise.

    Raises:
        InvalidInput: an argument is lacking or out of range, or the method has nothing to calibrate.
        BudgetInfeasible: no setting meets the target; carries the best that can be reached.
    """
    if not isinstance(target, MeanCost | DriftLimit):
        raise InvalidInput(f"A diffusion method is calibrated for MeanCost(...) or a DriftLimit(...), got {target!r}.")
    if net.system.reduction is not None:
        raise InvalidInput(
            f"The cost of {net.system.card.name} is settled by the arguments it is built with; nothing is left to calibrate."
        )
    given: Samples
    if calls is not None:
        if net.pipe is None or noise is not None:
            raise InvalidInput(
                "calls are of a pipeline, and come with noise of their own; a denoiser alone takes noise=... and inputs=...."
            )
        given = FromCalls(net, calls, steps, seed)
    else:
        given = _from_noise(net, noise, steps or 50, inputs, unconditional, guidance, samples, batch_size, held_out, seed)
    made_with: dict[str, Any] = {
        "model": net.fingerprint(),
        "sampler": type(net.scheduler).__name__,
        "steps": given.asked,
        "guidance": given.guidance,
        "dtype": str(net.net.dtype),
    }
    chooser = _Chooser(net, given, data, bins, monotone, max_gap, runs, made_with["model"])
    if isinstance(target, DriftLimit):
        return _for_drift(net, given, chooser, target, thresholds, made_with, seed)
    chosen = chooser.choose(target.fraction)
    spent = given.run(lambda: net.run(chosen.points), True, chosen.share).cost
    cost = mean_estimate(spent.numpy())
    certificate = Certificate(
        f"Chosen for a mean cost of at most {target.fraction:g} of the full model's; measured on samples that were not used to choose.",
        chosen.how,
        {"mean_cost": target.fraction},
        {"mean_cost": cost},
        False,
        len(spent),
        made_with["model"],
    )
    return DenoisingPlan(net.system.card.name, chosen.points, cost, certificate, made_with, chosen.share)


def _from_noise(
    net: DiffusionModel, noise: Tensor | None, steps: int, inputs: Any, unconditional: Any, guidance: float, samples: int, batch_size: int,
    held_out: float, seed: int,
) -> Samples:  # fmt: skip
    if net.scheduler is None:
        raise InvalidInput("Calibration samples, and for that it needs a scheduler: attach with scheduler=....")
    if not 0 < held_out < 1 or batch_size < 1 or steps < 2:
        raise InvalidInput(f"held_out must lie inside (0, 1), batch_size be at least 1 and steps 2; got {held_out}, {batch_size}, {steps}.")
    example = net.net.example_call().kwargs
    others = sorted(set(example) - {net.net.sample_name, net.net.timestep_name} - set(inputs or {}))
    if others:
        how = "or calls=[{...}] of the pipeline" if net.pipe is not None else "a row for each sample"
        raise InvalidInput(f"The denoiser also takes {', '.join(others)}: give inputs={{...}}, {how}.")
    if noise is None:
        shape = tuple(example[net.net.sample_name].shape[1:])
        noise = torch.randn(samples, *shape, generator=torch.Generator().manual_seed(seed)).to(net.net.device, net.net.dtype)
    return FromNoise(net.scheduler, noise, steps, batch_size, held_out, {"inputs": inputs, "unconditional": unconditional}, guidance)


def _for_drift(
    net: DiffusionModel,
    given: Samples,
    chooser: _Chooser,
    target: DriftLimit,
    thresholds: Sequence[float] | None,
    made_with: Mapping[str, Any],
    seed: int,
) -> DenoisingPlan:
    settings = dict(chooser.settings(thresholds))
    if not settings:
        raise InvalidInput(f"{net.system.card.name} has no setting at the costs {thresholds or BUDGETS}; name others: thresholds=[...].")
    full = given.run(lambda: net.run(()), True).images

    def run(value: float) -> tuple[Tensor, Tensor]:
        ran = given.run(lambda: net.run(settings[value].points), True, settings[value].share)
        return relative_l2(ran.images, full), ran.cost

    drift, cost = run_settings(run, list(settings))
    found = threshold_for_quality(list(settings), drift, cost, target, seed=seed, fingerprint=made_with["model"])
    chosen = settings[found.threshold]
    certificate = replace(found.certificate, method=f"{found.certificate.method}; {chosen.how}")
    return DenoisingPlan(net.system.card.name, chosen.points, found.cost, certificate, made_with, chosen.share)


__all__ = ["DenoisingPlan", "FromCalls", "FromNoise", "Ran", "Samples", "calibrate_denoiser"]
