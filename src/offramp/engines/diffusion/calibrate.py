"""Calibrating a diffusion method: from a budget or a limit to a plan, measured on samples that were not used to choose it.

`MeanCost` asks for a cost, `DriftLimit` for images that stay near the full model's, with a certificate, and `Quality` for images that are
about as good as them by FID, as an estimate. What there is to choose is in `offramp.engines.diffusion.choose`. A plan is then run on
held-out samples, and what was realised stands beside what was asked for.

Shapes: ``N`` samples, ``S`` steps of a sampler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from offramp.budget import DriftLimit, MeanCost, Quality, run_settings, threshold_for_quality
from offramp.budget.replay import mean_estimate
from offramp.core.certificate import Certificate
from offramp.core.errors import InvalidInput
from offramp.engines.diffusion.choose import BUDGETS, Chooser
from offramp.engines.diffusion.fid_search import FidSearch
from offramp.engines.diffusion.model import DiffusionModel
from offramp.engines.diffusion.plan import DenoisingPlan
from offramp.engines.diffusion.sampler import kept_levels, sampler_settings
from offramp.engines.diffusion.samples import FromCalls, FromNoise, Samples
from offramp.engines.diffusion.trained import trained_alone
from offramp.measure.image_quality import relative_l2
from offramp.policies.skips import LayerGroups


def calibrate_denoiser(
    net: DiffusionModel,
    target: MeanCost | DriftLimit | Quality,
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
    progress: bool = True,
) -> DenoisingPlan:
    """Choose what a diffusion method skips, for a mean cost or a limit, and measure it on held-out samples.

    Of a method whose denoiser was trained under a plan (`offramp.fit` of ``shallow`` or ``ee-diffusion``), that plan is kept: its cost is
    measured, and where it is too much the error says what was trained.

    Samples come from ``calls`` of the pipeline, or from ``noise`` with a scheduler and the denoiser's other inputs.

    Args:
        net: from `offramp.attach`.
        target: `MeanCost`, as a share of the full model's FLOPs with all steps; `DriftLimit` on the relative distance of final images from
            the full model's at equal noise, certified on the held-out samples; or `Quality` on how much higher their FID may be.
        noise: ``[N, ...]`` standard normal; by default ``samples`` of them, where the denoiser needs no other inputs. A `Quality` needs
            twice its own ``samples``: the first half to choose by, the second held out.
        steps: of the sampler; by default 50, or what the calls say.
        inputs: the denoiser's other inputs by name, ``[N, ...]`` each.
        unconditional: the same of the second guidance branch.
        guidance: see `offramp.engines.diffusion.pipeline.sample`.
        calls: keyword arguments of the pipeline, one mapping for each call; noise is drawn from ``seed``. For a `Quality` they are gone
            through again and again, with other noise, until there are images enough.
        data: batches of noisy images with what is to be predicted under ``labels`` (`offramp.train.noisy_loader`): schedules of depths are
            then chosen by loss; without it by the distance from the full model's predictions along its own trajectories.
        samples: N where no noise is given; of a `Quality`, N of those that settings are made from before they are compared.
        batch_size: samples at a time.
        held_out: share of the noise that is not used to choose, inside (0, 1). Calls are repeated with other noise instead, and a
            `Quality` holds out as many as it chooses by.
        bins: intervals of the noise level, for a schedule of depths.
        monotone: depth never falls from noisy to clean.
        max_gap: most steps in a row that reuse, for a plan of cached steps.
        thresholds: settings to try for a `DriftLimit`, strictest first: thresholds of rules that measure, costs of others.
        runs: most settings to run in search of a threshold, or for a `Quality`, at least 2.
        seed: of the noise, and of what the sampler draws on the way: every setting that is run sees the same.
        progress: show a progress bar for a `Quality`, which runs every setting on all its images.

    Raises:
        InvalidInput: an argument is lacking or out of range, or the method has nothing to calibrate.
        BudgetInfeasible: no setting meets the target, or none of those that were trained; carries the best that can be reached. A
            `Quality` is always met by the full model.

    Warns:
        NoEffectWarning: the plan skips nothing.
        OfframpWarning: an increase in FID as small as was asked for cannot be told from chance with that many images; or a method's exits
            are not trained.
    """
    if not isinstance(target, MeanCost | DriftLimit | Quality):
        raise InvalidInput(f"A diffusion method is calibrated for MeanCost(...), a DriftLimit(...) or a Quality(...), got {target!r}.")
    if (isinstance(net.skips, LayerGroups) or trained_alone(net) is not None) and not isinstance(target, MeanCost):
        what = "its groups" if isinstance(net.skips, LayerGroups) else "its depths"
        raise InvalidInput(
            f"{net.system.card.name} runs a model that was trained for {what}, whose blocks all together are no model to stay near to. "
            "Calibrate it for MeanCost(...), and compare its images with those of a model trained for all blocks: "
            "offramp.measure.image_quality.fid_difference."
        )
    if runs < 2:
        raise InvalidInput(f"runs must be at least 2, the loosest setting and one between it and the full model; got {runs}.")
    if calls is not None:
        if net.pipe is None or noise is not None:
            raise InvalidInput(
                "calls are of a pipeline, and come with noise of their own; a denoiser alone takes noise=... and inputs=...."
            )
        few: Samples = FromCalls(net, calls, steps, seed)
        given: Samples = FromCalls(net, calls, steps, seed, endless=True) if isinstance(target, Quality) else few
    else:
        options = {"inputs": inputs, "unconditional": unconditional}
        wanted = 2 * target.samples if isinstance(target, Quality) else samples
        noise = _noise(net, noise, steps or 50, options, wanted, batch_size, held_out, seed)
        chosen, held = _divided(len(noise), target, held_out)
        from_rows = partial(
            FromNoise, net.scheduler, noise, steps or 50, batch_size, held_out=held, options=options, guidance=guidance, seed=seed
        )
        given = from_rows(chosen)
        few = from_rows(chosen[:samples]) if isinstance(target, Quality) else given
    made_with: dict[str, Any] = {
        "model": net.fingerprint(),
        "sampler": type(net.scheduler).__name__,
        "sampler_settings": sampler_settings(net.scheduler),
        "noise_levels": kept_levels(net.net.noise),
        "steps": given.asked,
        "guidance": given.guidance,
        "dtype": str(net.net.dtype),
    }
    chooser = Chooser(net, few, data, bins, monotone, max_gap, runs, made_with["model"])
    if isinstance(target, Quality):
        return FidSearch(given, chooser, target, runs=runs, seed=seed, progress=progress).plan(made_with)
    if isinstance(target, DriftLimit):
        return _for_drift(net, given, chooser, target, thresholds, made_with, seed)
    return _for_cost(net, given, chooser, target, made_with)


def _noise(
    net: DiffusionModel, noise: Tensor | None, steps: int, options: Mapping[str, Any], samples: int, batch_size: int, held_out: float,
    seed: int,
) -> Tensor:  # fmt: skip
    """The noise that samples begin with, if everything else is there too."""
    if net.scheduler is None:
        raise InvalidInput("Calibration samples, and for that it needs a scheduler: attach with scheduler=....")
    if not 0 < held_out < 1 or batch_size < 1 or steps < 2:
        raise InvalidInput(f"held_out must lie inside (0, 1), batch_size be at least 1 and steps 2; got {held_out}, {batch_size}, {steps}.")
    call = net.net.example_call()
    others = sorted(set(call.kwargs) - {net.net.sample_name, net.net.timestep_name} - set(options["inputs"] or {}))
    if others:
        how = "or calls=[{...}] of the pipeline" if net.pipe is not None else "a row for each sample"
        raise InvalidInput(f"The denoiser also takes {', '.join(others)}: give inputs={{...}}, {how}.")
    if noise is None:
        shape = tuple(call.kwargs[net.net.sample_name].shape[1:])
        noise = torch.randn(samples, *shape, generator=torch.Generator().manual_seed(seed)).to(net.net.device, net.net.dtype)
    for what, given in options.items():
        for name, value in (given or {}).items():
            like = call.kwargs.get(name)
            if not isinstance(value, Tensor) or not isinstance(like, Tensor) or like.shape[:1] != (call.rows,):
                continue  # not by row
            if value.shape[:1] != noise.shape[:1]:
                raise InvalidInput(f"{what}[{name!r}] is {tuple(value.shape)} for {len(noise)} samples of noise; give it a row for each.")
    return noise


def _divided(rows: int, target: MeanCost | DriftLimit | Quality, held_out: float) -> tuple[range, range]:
    """Rows of the noise to choose by and rows that are held out."""
    if isinstance(target, Quality):
        half = target.samples
        if rows < 2 * half:
            raise InvalidInput(
                f"Quality(samples={half}) needs {2 * half} rows of noise and inputs, {half} to choose by and {half} held out; got {rows}. "
                "Give more noise, or fewer samples."
            )
        return range(half), range(half, 2 * half)
    kept = rows - round(held_out * rows)
    if not 0 < kept < rows:
        raise InvalidInput(f"{rows} samples cannot be divided with a share of {held_out:g} held out; give more noise.")
    return range(kept), range(kept, rows)


def _for_cost(net: DiffusionModel, given: Samples, chooser: Chooser, target: MeanCost, made_with: Mapping[str, Any]) -> DenoisingPlan:
    chosen = chooser.choose(target.fraction)
    spent = given.run(lambda: chosen.denoiser(net), True, chosen.share).cost
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
    return DenoisingPlan(net.system.card.name, chosen.points, cost, certificate, made_with, chosen.share, chosen.regions)


def _for_drift(
    net: DiffusionModel,
    given: Samples,
    chooser: Chooser,
    target: DriftLimit,
    thresholds: Sequence[float] | None,
    made_with: Mapping[str, Any],
    seed: int,
) -> DenoisingPlan:
    settings = dict(chooser.settings(thresholds))
    if not settings:
        raise InvalidInput(f"{net.system.card.name} has no setting at the costs {thresholds or BUDGETS}; name others: thresholds=[...].")
    full = given.run(lambda: chooser.exact.denoiser(net), True).images

    def run(value: float) -> tuple[Tensor, Tensor]:
        ran = given.run(lambda: settings[value].denoiser(net), True, settings[value].share)
        return relative_l2(ran.images, full), ran.cost

    drift, cost = run_settings(run, list(settings))
    found = threshold_for_quality(list(settings), drift, cost, target, seed=seed, fingerprint=made_with["model"])
    chosen = settings[found.threshold]
    certificate = replace(found.certificate, method=f"{found.certificate.method}; {chosen.how}")
    return DenoisingPlan(net.system.card.name, chosen.points, found.cost, certificate, made_with, chosen.share, chosen.regions)


__all__ = ["DenoisingPlan", "calibrate_denoiser"]
