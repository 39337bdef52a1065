"""Several diffusion methods at once on one denoiser."""

from __future__ import annotations

from typing import Any

from offramp.core.errors import InvalidInput
from offramp.diffusion import attach_denoiser
from offramp.engines.diffusion.denoise import Denoiser
from offramp.engines.diffusion.model import DiffusionModel
from offramp.engines.diffusion.pipeline import attach_pipeline


def composed(*methods: DiffusionModel) -> Any:
    """Several methods at once on the pipeline or denoiser that each was attached to: a schedule and a cache, say.

    At each place the points are asked in the order of the methods, and the first that fires is carried out. Of each method there are the
    points of its plan, or else the published ones.

    Args:
        methods: at least two, on one pipeline or denoiser; none that computes fewer tokens or takes fewer steps.

    Returns:
        As `DiffusionModel.view`.

    Raises:
        InvalidInput: the methods are on different denoisers, or one is no set of points.
    """
    first = methods[0] if methods else None
    if first is None or len(methods) < 2 or any(m.net.model is not first.net.model or m.pipe is not first.pipe for m in methods):
        raise InvalidInput("composed takes two methods or more that were attached to one pipeline or denoiser.")
    for m in methods:
        if m.system.reduction is not None or (m.taken is not None and m.taken(1000) != 1000):
            raise InvalidInput(f"{m.system.card.name} is no set of points, so it cannot be one of several methods on a denoiser.")
        if m.net.noise != first.net.noise:
            raise InvalidInput(f"{m.system.card.name} was attached with other noise levels than {first.system.card.name}.")
    heads = {p.replace("/", "."): h for m in methods for p, h in m.net.heads.items()}
    if len(heads) != sum(len(m.net.heads) for m in methods):
        raise InvalidInput("Two of the methods have a learned head at the same place, and a denoiser has one at each.")
    at = list(dict.fromkeys(p for m in methods for p in m.net.at))
    net = attach_denoiser(
        first.net.model, at, noise=first.net.noise, example=first.net.example, heads=heads, timestep=first.net.timestep_name
    )
    points = tuple(p for m in methods for p in (m.points if m.plan is None else m.plan.points))
    return Denoiser(net, points) if first.pipe is None else attach_pipeline(first.pipe, points, net=net)


__all__ = ["composed"]
