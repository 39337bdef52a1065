"""What a diffusion method was calibrated to: a `DenoisingPlan`, which `offramp.compile` makes a pipeline of, saved as JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offramp.core.bundle import load_bundle, reading, save_bundle
from offramp.core.certificate import Certificate, Estimate
from offramp.core.errors import FingerprintMismatch, OfframpWarning
from offramp.core.parts import part_from_dict, part_to_dict
from offramp.core.warn import warn
from offramp.engines.diffusion.model import PARTS, DiffusionModel
from offramp.policies.denoising import Point
from offramp.policies.skips import FewerSteps
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
        made_with: ``model`` (fingerprint with heads), ``sampler`` (class), ``steps``, ``guidance``, ``dtype``.
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
        made = ", ".join(f"{k} {v if k != 'model' else str(v)[:12]}" for k, v in self.made_with.items())
        skips = f"{len(self.points)} points" if self.regions is None else f"{self.regions.ratio:.4g} of the tokens"
        lines = [f"DenoisingPlan: {self.system}, {skips}, mean cost {self.cost} of the full model", f"  {made}"]
        lines += [f"  cost {t.cost:6.4f}   FID {t.fid:<10.5g} {t.setting}" for t in self.tried]
        return "\n".join([*lines, str(self.certificate)])

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
            warn(
                f"The plan was made with {self.made_with['sampler']} and runs with {sampler}: it goes by noise level and stays valid, but "
                "its cost and drift were measured for the other.",
                OfframpWarning,
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
