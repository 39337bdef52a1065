"""The cheapest setting of a diffusion method whose images are about as good as the full model's, by FID: what carries out `Quality`.

A decision in a sampler changes what all later steps see, and a FID is of a set of images and not of one: nothing here can be replayed or
predicted. Every setting that is looked at makes all its images, from the full model's noise and conditions, so that what is common to both
sets cancels in the difference of their FIDs. Settings are one family, from what changes nothing to the loosest, and are searched by
bisection.

Shapes: ``N`` images, ``D`` dimensions of their features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from offramp.budget import Quality
from offramp.budget.replay import mean_estimate
from offramp.core.certificate import Certificate, Estimate
from offramp.core.errors import InvalidInput, NoEffectWarning, OfframpWarning
from offramp.core.modes import evaluating
from offramp.core.warn import warn
from offramp.engines.diffusion.choose import Choice, Chooser
from offramp.engines.diffusion.plan import DenoisingPlan, MeasuredSetting
from offramp.engines.diffusion.samples import Samples
from offramp.measure.image_quality import FeatureStatistics, fid, fid_difference

TOLERANCE = 0.01
"""Bisection ends where the cheapest setting within the limit costs at most this share of the full model more than one beyond it."""

_ROOM = 1e8  # numbers that the bootstrap's sums over groups may hold
_WORK = 2e11  # cube of dimensions times resamples


@dataclass(frozen=True)
class _Made:
    """Images of one setting, by their features.

    Attributes:
        choice: the setting.
        features: ``[N, D]`` float32 on the CPU.
        cost: ``[N]`` float64, shares of the full model's.
        reference: of real images.
    """

    choice: Choice
    features: Tensor
    cost: Tensor
    reference: FeatureStatistics

    @cached_property
    def finite(self) -> bool:
        """Whether all features are."""
        return bool(self.features.isfinite().all())

    @cached_property
    def fid(self) -> float:
        """Infinite where a feature is not finite: such a setting is never within a limit."""
        return fid(FeatureStatistics.of(self.features), self.reference) if self.finite else float("inf")

    @property
    def mean_cost(self) -> float:
        return float(self.cost.mean())


class FidSearch:
    """Runs settings and compares their FIDs.

    Args:
        samples: images to choose by and images that are held out, ``target.samples`` of each at least.
        chooser: of the settings, from samples of its own.
        target: what is asked for.
        runs: most settings to run beside the full model, at least 1.
        seed: of the bootstrap.
        progress: show a progress bar.

    Raises:
        InvalidInput: the features do not fit, or the full model's images are not finite.
    """

    def __init__(self, samples: Samples, chooser: Chooser, target: Quality, *, runs: int, seed: int, progress: bool) -> None:
        self.samples, self.chooser, self.target, self.runs, self.seed = samples, chooser, target, runs, seed
        given = target.reference
        if isinstance(given, Tensor):
            self.reference = FeatureStatistics.of(given)
        else:
            self.reference = FeatureStatistics(given.count, given.mean.cpu().double(), given.covariance.cpu().double())
        self.made: list[_Made] = []
        self._bar = Progress(disable=not progress, transient=True)

    def plan(self, made_with: Mapping[str, Any]) -> DenoisingPlan:
        """Search, measure what was found on images that were held out, and say how sure that is.

        Warns:
            NoEffectWarning: nothing cheaper than the full model was within the limit.
            OfframpWarning: an increase as small as was asked for cannot be told from chance with that many images.
        """
        with ExitStack() as stack:
            stack.enter_context(self._bar)
            if isinstance(self.target.features, nn.Module):
                stack.enter_context(evaluating(self.target.features))
            full = self._run(self.chooser.exact, False)
            self.made = [full]
            self._search(full)
            best, again = self._held_out(full)
        beyond = [m for m in self.made if not self._within(m) and m.finite]
        nearest = min(beyond, key=lambda m: m.fid, default=best)  # what the chance is shown by where nothing is skipped
        chance = self._difference(nearest if again is None else best, full)
        increase = Estimate(0.0, 0.0, 0.0, self.target.level) if again is None else replace(chance, value=best.fid - full.fid)
        realised = {"fid_increase": increase, "mean_cost": mean_estimate((best if again is None else again[0]).cost.numpy())}
        if again is not None:
            realised["fid_increase_held_out"] = replace(self._difference(*again), value=again[0].fid - again[1].fid)
        half = (chance.high - chance.low) / 2
        self._warn(best, nearest, full, half)
        tried = sorted((MeasuredSetting(m.choice.how, m.mean_cost, m.fid) for m in self.made), key=lambda t: -t.cost)
        return DenoisingPlan(
            self.chooser.net.system.card.name,
            best.choice.points,
            realised["mean_cost"],
            self._certificate(best, full, again, half, realised, str(made_with["model"])),
            made_with,
            best.choice.share,
            best.choice.regions,
            tuple(tried),
        )

    def _certificate(
        self, best: _Made, full: _Made, again: tuple[_Made, _Made] | None, half: float, realised: Mapping[str, Estimate], fingerprint: str
    ) -> Certificate:
        limit, count = self.target.max_fid_increase, self.target.samples
        other = "" if again is None else f"; on {count:,} others, held out, {again[0].fid:.5g} against {again[1].fid:.5g}"
        return Certificate(
            f"An estimate: FID {best.fid:.5g} against the full model's {full.fid:.5g}, from {count:,} images each of the same noise and "
            f"conditions{other}. An increase of at most {limit:g} was asked for; differences of less than about {half:.2g} may be chance "
            "with this many images.",
            f"bisection, settings run beside the full model: {len(self.made) - 1}; {best.choice.how}",
            {"fid_increase": limit},
            realised,
            False,
            count,
            fingerprint,
            assumptions=(
                f"A FID of N images is too large by an amount that falls as 1/N and grows with the {self.target.dimensions} dimensions; "
                "what of it is common to both sets cancels in their difference, and what is not does not. FIDs compare only "
                "with FIDs of as many images in the same features and reference. Settings were compared on the same images, so that the "
                "one chosen looks a little better there than it is; held-out images do not have that bias. Intervals are bootstrap "
                "intervals over images, with the reference and the weights taken as given."
            ),
        )

    def _search(self, full: _Made) -> None:
        """Bisection between the full model and the loosest setting. FID need only rise with the looseness up to noise."""
        at = self._family()
        strict, loose, good, bad = 0.0, 1.0, full, at(1.0)
        if self._within(bad):
            return
        while len(self.made) <= self.runs and loose - strict > 1e-4 and good.mean_cost - bad.mean_cost > TOLERANCE:
            middle = (strict + loose) / 2
            found = at(middle)
            if self._within(found):
                strict, good = middle, found
            else:
                loose, bad = middle, found

    def _held_out(self, full: _Made) -> tuple[_Made, tuple[_Made, _Made] | None]:
        """Of all that were run the cheapest within the limit, wherever bisection ended, with its held-out images and the full model's.

        A setting that breaks images there is passed over. The full model has no need of them.
        """
        for made in sorted((m for m in self.made if self._within(m)), key=lambda m: m.mean_cost):
            if made is full:
                break
            held = self._run(made.choice, True)
            if held.finite:
                return made, (held, self._run(self.chooser.exact, True))
        return full, None

    def _family(self) -> Callable[[float], _Made]:
        """From a looseness in (0, 1] to the images of that setting; settings that do the same are run once."""
        choose, steps = self.chooser.family(), self.samples.asked

        def at(looseness: float) -> _Made:
            choice = choose(looseness)
            for made in self.made:
                if made.choice.same(choice, steps):
                    return made
            self.made.append(self._run(choice, False))
            return self.made[-1]

        return at

    def _within(self, made: _Made) -> bool:
        return made.fid - self.made[0].fid <= self.target.max_fid_increase

    # ---- running

    def _run(self, choice: Choice, held_out: bool) -> _Made:
        """Make images with a setting and keep their features."""
        wanted = self.target.samples
        denoiser = choice.denoiser(self.chooser.net)
        task = self._bar.add_task(f"{choice.how}{', held out' if held_out else ''}"[:60], total=wanted)
        features: list[Tensor] = []
        costs: list[Tensor] = []
        done = 0
        for images, cost, _ in self.samples.each(lambda: denoiser, held_out, choice.share):
            kept = min(len(images), wanted - done)
            features.append(self._features(images[:kept]))
            costs.append(cost[:kept])
            done += kept
            self._bar.advance(task, kept)
            if done == wanted:
                break
        made = _Made(choice, torch.cat(features), torch.cat(costs).double(), self.reference)
        if not made.finite and choice == self.chooser.exact:
            raise InvalidInput(
                f"Features of the full model's images are NaN or infinite in {int((~made.features.isfinite().all(1)).sum())} of {wanted} "
                "images: nothing can be compared with them. Look at these images, or run model and features in float32."
            )
        return made

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        """``[B, D]`` float32 on the CPU."""
        function = self.target.features
        if isinstance(function, nn.Module):
            held = next(iter([*function.parameters(), *function.buffers()]), images)
            images = images.to(held.device)
        found = function(images)
        rows, width = len(images), self.target.dimensions
        if not isinstance(found, Tensor) or found.shape != (rows, width) or not found.is_floating_point():
            given = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise InvalidInput(
                f"Quality.features gave {given} for images {tuple(images.shape)}; expected floating-point features [{rows}, {width}], "
                "as wide as the reference. Pool over space, flatten the rest, and use the network that the reference was made with."
            )
        return found.float().cpu()

    # ---- chance

    def _difference(self, made: _Made, full: _Made) -> Estimate:
        """FID minus the full model's, both resampled together. In many dimensions with fewer groups and resamples, for memory and time."""
        width = self.target.dimensions
        groups = int(min(200, max(10, _ROOM / width**2)))
        draws = int(min(200, max(20, _WORK / width**3)))
        return fid_difference(
            made.features, full.features, self.reference, self.target.level, draws=draws, groups=groups, seed=self.seed
        )  # fmt: skip

    def _warn(self, best: _Made, nearest: _Made, full: _Made, half: float) -> None:
        limit, count = self.target.max_fid_increase, self.target.samples
        name = self.chooser.net.system.card.name
        if best is full:
            closest = (
                ""
                if nearest is full
                else f" The nearest was {nearest.choice.how}, at {nearest.mean_cost:.4g} of the cost and a FID higher by "
                f"{nearest.fid - full.fid:.4g}."
            )
            warn(
                f"No setting of {name} that was run costs less than the full model, raises the FID by at most {limit:g} and leaves every "
                f"image finite, so the plan skips nothing.{closest} Raise max_fid_increase, give more runs=, or take another method.",
                NoEffectWarning,
            )
        if half > limit:
            warn(
                f"With {count:,} images a FID increase of {limit:g} cannot be told from chance: its {self.target.level:.0%} interval "
                f"reaches about {half:.2g} to either side. Give more samples (it narrows as one over their root) or a higher limit.",
                OfframpWarning,
            )


__all__ = ["TOLERANCE", "FidSearch"]
