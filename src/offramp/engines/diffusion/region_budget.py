"""The share of tokens that a cost allows: what region-adaptive sampling is calibrated by.

Its cost is known before anything is sampled: every step that is not dense computes as many tokens for every image, and FLOPs rise linearly
with tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from offramp.core.errors import BudgetInfeasible, InvalidInput
from offramp.engines.diffusion.regions import RegionDenoiser
from offramp.reduce.regions import Regions


def region_cost(denoiser: RegionDenoiser, regions: Regions, log_snr: Sequence[float]) -> float:
    """Executed FLOPs of a trajectory over those of the plain model.

    Args:
        denoiser: whose example's shape the images have.
        regions: which tokens at which steps.
        log_snr: noise level of every step of the sampler, in order.

    Raises:
        InvalidInput: there are no steps.
    """
    if not log_snr:
        raise InvalidInput("A cost needs the noise levels of a sampler's steps; got none.")
    tokens, share = denoiser.token_cost()
    total, before = 0.0, -math.inf
    for step, level in enumerate(log_snr):
        dense = step == 0 or regions.must(step, before, level, step == len(log_snr) - 1)
        total += 1 - (0 if dense else (tokens - regions.count(tokens, level)) * share)
        before = level
    return total / len(log_snr)


def regions_for_cost(denoiser: RegionDenoiser, regions: Regions, log_snr: Sequence[float], cost: float) -> Regions:
    """The largest ratio whose cost is at most a given one; dense steps and all else stay as they are.

    Args:
        denoiser: whose example's shape the images have.
        regions: all but the ratio.
        log_snr: noise level of every step of the sampler, in order.
        cost: as a share of the plain model's FLOPs, above 0.

    Raises:
        BudgetInfeasible: the dense steps alone, or the fewest tokens, cost more.
        InvalidInput: there are no steps.
    """
    tokens, _ = denoiser.token_cost()
    tried = [replace(regions, ratio=k / tokens) for k in range(1, tokens + 1)]
    costs = [region_cost(denoiser, r, log_snr) for r in tried]
    within = [r for r, c in zip(tried, costs, strict=True) if c <= cost * (1 + 1e-9)]
    if not within:
        raise BudgetInfeasible(
            f"With the fewest of {tokens} tokens at every step that is not dense, {len(log_snr)} steps still cost {min(costs):.4g} of the "
            f"plain model, more than {cost:g}. Make fewer steps dense (first, resets) or `multiple` smaller.",
            requested=cost,
            best=min(costs),
            unit="share of the full model's cost",
        )
    return within[-1]
