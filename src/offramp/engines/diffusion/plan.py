"""What a diffusion method was calibrated to: a `DenoisingPlan`, which `offramp.compile` makes a pipeline of, saved as JSON."""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from offramp.core.bundle import load_bundle, reading, save_bundle
from offramp.core.certificate import Certificate, Estimate
from offramp.core.errors import FingerprintMismatch, OfframpWarning
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.core.warn import warn
from offramp.engines.diffusion.model import PARTS, DiffusionModel
from offramp.engines.diffusion.sampler import asked_of, differing, kept_levels, same_levels, sampler_settings
from offramp.measure.image_report import ImageResult
from offramp.policies.denoising import NoiseLevel, NoiseSchedule, Point
from offramp.policies.skips import ALWAYS, FewerSteps
from offramp.reduce.regions import PARTS as REGION_PARTS
from offramp.reduce.regions import Regions


@dataclass(frozen=True)
class MeasuredSetting:
    """One setting that was run on the way to a plan for a `Quality`.

    Attributes:
        setting: what it was, in words.
        cost: mean over the images, a share of the full model's.
        fid: of its images; infinite where one of them was not finite.
    """

    setting: str
    cost: float
    fid: float


@dataclass(frozen=True)
class DenoisingPlan:
    """What a denoiser is to skip, and what that was measured to cost.

    Attributes:
        system: the method's name.
        points: decision points.
        cost: mean over held-out samples, a share of the full model's FLOPs with all steps.
        certificate: what was asked for and what was realised.
        made_with: ``model`` (fingerprint with heads), ``sampler`` (class) and ``sampler_settings``, ``noise_levels`` (some of the
            log-SNRs that the denoiser is called at), ``steps``, ``guidance``, ``dtype``.
        share: of the steps that are asked for, in (0, 1].
        regions: which tokens are computed, of a method that computes some of them; it has no points.
        tried: of a plan for a `Quality`, what was run, dearest first; the full model is the first.
    """

    system: str
    points: tuple[Point, ...]
    cost: Estimate
    certificate: Certificate
    made_with: Mapping[str, Any]
    share: float = 1.0
    regions: Regions | None = None
    tried: tuple[MeasuredSetting, ...] = ()

    def steps(self, steps: int) -> int:
        """Steps of the sampler where ``steps`` are asked for."""
        return FewerSteps(self.share).steps(steps)

    def __str__(self) -> str:
        said = ("model", "sampler", "steps", "guidance", "dtype")
        made = ", ".join(f"{k} {v if k != 'model' else str(v)[:12]}" for k, v in self.made_with.items() if k in said)
        skips = f"{len(self.points)} points" if self.regions is None else f"{self.regions.ratio:.4g} of the tokens"
        lines = [f"DenoisingPlan: {self.system}, {skips}, mean cost {self.cost} of the full model", f"  {made}"]
        lines += [f"  cost {t.cost:6.4f}   FID {t.fid:<10.5g} {t.setting}" for t in self.tried]
        return "\n".join([*lines, str(self.certificate)])

    def results(self) -> tuple[ImageResult, ...]:
        """What was run on the way to a plan for a `Quality`, for a page or a figure: the full model first, then from dear to cheap.

        Settings with an image that was not finite are left out, since they have no FID. Of a plan for another target nothing is known.
        """
        return tuple(
            ImageResult("full model" if k == 0 else self.system, "" if k == 0 else t.setting, (t.fid,), t.cost)
            for k, t in enumerate(self.tried)
            if math.isfinite(t.fid)
        )

    def check(self, net: DiffusionModel) -> None:
        """Refuse a denoiser that the plan was not made for, and warn of a sampler of another kind or with other settings.

        Raises:
            FingerprintMismatch: the plan is of another method; the denoiser has other weights, heads or another dtype; or it is called at
                other noise levels than those that the plan goes by.

        Warns:
            OfframpWarning: the sampler differs from the one that cost and quality were measured with.
        """
        net.check_plan(self)
        if (found := net.fingerprint()) != self.made_with["model"]:
            raise FingerprintMismatch(
                f"The plan was made for a denoiser with fingerprint {str(self.made_with['model'])[:12]}... ({self.made_with['dtype']}); "
                f"this {type(net.net.model).__name__} has {found[:12]}... ({net.net.dtype}). Calibrate again."
            )
        if not same_levels(self.made_with.get("noise_levels", ()), kept_levels(net.net.noise)):
            self._other_levels(net)
        self._other_sampler(net)

    @property
    def by_noise_level(self) -> bool:
        """Whether a point is decided by the noise level, so that the plan says nothing where the denoiser's levels are others."""
        return any(isinstance(p.signal, NoiseSchedule) or (isinstance(p.signal, NoiseLevel) and p.threshold != ALWAYS) for p in self.points)

    def _other_levels(self, net: DiffusionModel) -> None:
        made, found = (f"{x[0]:.4g} to {x[-1]:.4g}" for x in (self.made_with["noise_levels"], kept_levels(net.net.noise)))
        words = (
            f"The plan was made where the denoiser's time steps stand for other noise levels: log-SNRs from {made}, here {found} (other "
            "betas, or another noise scale)"
        )
        if self.by_noise_level:
            raise FingerprintMismatch(f"{words}. The plan goes by noise level, so it does not hold here: calibrate again.")
        warn(f"{words}: its cost and drift were measured for the former.", OfframpWarning)

    def _other_sampler(self, net: DiffusionModel) -> None:
        if net.scheduler is None:
            return
        name, made = type(net.scheduler).__name__, str(self.made_with["sampler"])
        other = differing(self.made_with.get("sampler_settings", {}), sampler_settings(net.scheduler))
        if name == made and not other:
            return
        which = f"{made} and runs with {name}" if name != made else f"another {made}"
        stays = "It goes by noise level and stays valid, but its" if self.by_noise_level else "Its"
        warn(
            f"The plan was made with {which}{': ' if other else ''}{'; '.join(other)}. {stays} cost and drift were measured for the "
            "former; calibrate again to know them here.",
            OfframpWarning,
        )

    def check_call(self, steps: int | None, guidance: float | None) -> None:
        """Warn of a call that the plan's figures were not measured for.

        Steps matter to what is remembered from step to step, to plans of tokens, and where a share of them is taken, which is rounded; not
        to schedules of depths. Guidance matters to what was promised about images.

        Args:
            steps: that are asked for; ``None`` if that is not known.
            guidance: its scale, likewise.

        Warns:
            OfframpWarning: one of them differs from the calibration's where the plan depends on it.
        """
        was, scale = int(self.made_with["steps"]), float(self.made_with["guidance"])
        found: list[str] = []
        if steps is not None and steps != was:
            share, there = self.steps(steps) / steps, self.steps(was) / was
            if abs(share - there) > 0.05:
                found.append(f"it takes {self.steps(steps)} of {steps} steps, a share of {share:.2g}, and was measured at {there:.2g}")
            elif self.regions is not None or any(p.remembers for p in self.points):
                found.append(f"it was measured with {was} steps and this call takes {steps}: what is reused is as old as a step is wide")
        if guidance is not None and guidance != scale and set(self.certificate.requested) - {"mean_cost"}:
            found.append(f"it was measured at guidance {scale:g} and this call has {guidance:g}")
        if found:
            warn(
                f"The plan of {self.system} has no figures for this call: {'; '.join(found)}. Calibrate with calls like this one to "
                "know its cost and drift.",
                OfframpWarning,
            )

    def watch(self, view: Any) -> Any:
        """A pipeline that carries the plan out, so that it compares every call with the calibration (see `check_call`).

        A denoiser alone is given back as it is: it is not told how many steps there will be.
        """
        kind = type(view)
        signature = inspect.signature(kind.__call__)
        if not hasattr(view, "scheduler") or isinstance(view, nn.Module):
            return view

        @functools.wraps(kind.__call__)
        def call(this: Any, *args: Any, **kwargs: Any) -> Any:
            self.check_call(*asked_of(signature, signature.bind(this, *args, **kwargs).arguments))
            return kind.__call__(this, *args, **kwargs)

        view.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__, "__doc__": kind.__doc__})
        return view

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``denoising_plan.json`` into ``folder``, atomically."""
        content = {
            "system": self.system,
            "points": part_to_dict(self.points),
            "cost": [self.cost.value, self.cost.low, self.cost.high, self.cost.level],
            "certificate": self.certificate.to_dict(),
            "made_with": dict(self.made_with),
            "share": self.share,
            "regions": part_to_dict(self.regions),
            "tried": [[t.setting, t.cost, str(t.fid)] for t in self.tried],  # JSON has no infinity
        }
        save_bundle(folder, "denoising_plan", "denoising_plan", content)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> DenoisingPlan:
        """Read what `save` wrote.

        Raises:
            ArtifactError: the file is missing, truncated, altered or foreign.
        """
        content, _ = load_bundle(folder, "denoising_plan", "denoising_plan")
        with reading(f"The plan in {folder}"):
            return cls(
                str(content["system"]),
                part_from_dict(content["points"], PARTS),
                Estimate(*content["cost"]),
                Certificate.from_dict(content["certificate"]),
                content["made_with"],
                float(content["share"]),
                part_from_dict(content.get("regions"), REGION_PARTS),  # plans from before it was kept have none
                tuple(MeasuredSetting(str(setting), float(cost), float(fid)) for setting, cost, fid in content.get("tried", ())),
            )


__all__ = ["DenoisingPlan", "MeasuredSetting"]
