"""What leaving early and reusing cost a denoiser in quality, by noise level: the tables that schedules and cache plans are chosen from.

``depth_losses`` runs every exit on held-out noisy images; its table is for `offramp.budget.best_schedule`. ``reuse_losses`` follows the
full model's trajectories and asks at every step what an older result would have given; its table is for `offramp.budget.best_cache_plan`.
Both take each step by itself: what an error does to later steps is not in them.

Shapes: ``B`` bins, ``O`` options, ``R`` rows, ``S`` steps of a sampler, ``G`` most steps that a result is reused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backbones import Cut, CutState
from offramp.core.batches import unpack_batch
from offramp.core.errors import InvalidInput
from offramp.core.modes import evaluating
from offramp.diffusion import BoundPoint, Call, DenoisingNet
from offramp.engines.diffusion.pipeline import sample
from offramp.policies.denoising import FREE, OUTPUT, NoiseLevel, Place, Point
from offramp.policies.fills import Fill, Identity


@dataclass(frozen=True)
class DepthLosses:
    """Loss of every exit at every noise level.

    Attributes:
        edges: ascending log-SNRs between the bins.
        places: O options: where an exit leaves, and ``"output"`` last.
        loss: ``[B, O]`` mean squared error of the prediction (float64).
        drift: ``[B, O]`` mean squared difference from the full model's prediction; 0 for the last option.
        uncertainty: ``[B, O - 1]`` mean uncertainty that the exit's head tells; NaN where it has none.
        flops: O, per row and step; the heads' output layers included.
        count: ``[B]`` rows measured.
    """

    edges: tuple[float, ...]
    places: tuple[str, ...]
    loss: Tensor
    drift: Tensor
    uncertainty: Tensor
    flops: tuple[float, ...]
    count: Tensor


@torch.no_grad()
def depth_losses(
    net: DenoisingNet,
    batches: Iterable[Any],
    edges: Sequence[float],
    *,
    at: Sequence[str] | None = None,
    to: Place = -1,
    fill: Fill | None = None,
) -> DepthLosses:
    """Run every exit on noisy images whose prediction is known.

    Args:
        net: the denoiser; runs in evaluation mode.
        batches: inputs by name, and under ``labels`` what is to be predicted, as ``offramp.train.noisy_loader`` gives them. Levels that
            are drawn evenly over the sampler's steps fill all bins.
        edges: ascending log-SNRs between the bins.
        at: places of the exits, in order; by default all before ``to``.
        to: where they go on.
        fill: `Identity` by default, which is an exit through the model's final layers; ``HeadOutput()`` for learned output layers, with
            ``to=OUTPUT``.

    Raises:
        InvalidInput: a bin got no rows, a batch has no labels, or a place or the fill does not fit.
    """
    if list(edges) != sorted(set(edges)):
        raise InvalidInput(f"edges must be ascending log-SNRs, got {tuple(edges)}.")
    made = net.cut()
    stop = net.boundary(to, made)
    places = list(net.at[: min(stop, len(net.at)) - (to != OUTPUT)]) if at is None else list(at)
    used = fill or Identity()
    if used.keeps:
        raise InvalidInput(f"{type(used).__name__} fills in what an earlier step computed; use reuse_losses for it.")
    points = tuple(Point(p, to, used, NoiseLevel(), guard=FREE) for p in places)
    bins, options = len(edges) + 1, len(places) + 1
    sums = torch.zeros(3, bins, options, dtype=torch.float64)
    count = torch.zeros(bins, dtype=torch.float64)
    bounds = torch.tensor(list(edges), dtype=torch.float64)
    bound: dict[Any, tuple[BoundPoint, ...]] = {}
    with evaluating(net):
        for raw in batches:
            batch = unpack_batch(raw).to(net.device)
            if batch.labels is None:
                raise InvalidInput("The batches have no labels: give what is to be predicted under 'labels', as noisy_loader does.")
            call = net.call(*batch.args, **batch.kwargs)
            if call.key not in bound:
                bound[call.key] = net.bind(points, call)
            level = net.noise.log_snr(call.kwargs[net.timestep_name])
            where = torch.bucketize(level.cpu(), bounds, right=True)
            answers, told = _every_exit(net, bound[call.key], call, level.float())
            losses = torch.stack([_per_row(a, batch.labels) for a in answers], 1)
            drift = torch.stack([_per_row(a, answers[-1]) for a in answers], 1)
            for table, values in zip(sums, (losses, drift, told), strict=True):
                table.index_add_(0, where, values.double().cpu())
            count.index_add_(0, where, torch.ones(len(where), dtype=torch.float64))
    if empty := (count == 0).nonzero().flatten().tolist():
        raise InvalidInput(f"No rows in bins {empty} of {bins}: give more batches, levels that reach there, or fewer bins.")
    loss, drift, told = sums / count[:, None]
    first = net.bind(points)
    flops = [s.flops for s in made.spec.segments]
    spent = [float(sum(flops[: p.start]) + sum(flops[p.stop :]) + p.fill_flops) for p in first]
    return DepthLosses(tuple(edges), (*places, OUTPUT), loss, drift, told[:, :-1], (*spent, float(sum(flops))), count)


def _per_row(answer: Tensor, target: Tensor) -> Tensor:
    """Mean squared error ``[R]``; channels that predict something else than the target come after it."""
    return (answer[:, : target.shape[1]].float() - target.float()).square().flatten(1).mean(1)


def _every_exit(net: DenoisingNet, points: Sequence[BoundPoint], call: Call, level: Tensor) -> tuple[list[Tensor], Tensor]:
    """Predictions of every exit and of the model, and uncertainties ``[R, O]``, NaN where there is none."""
    made = net.cut(call)
    state, answers, told = made.begin(**call.kwargs), [], []
    for boundary in range(len(made.segments)):
        for point in (p for p in points if p.start == boundary):
            answers.append(_prediction(net, made, _filled(made, state, point, level)))
            head = point.head
            ask = getattr(head, "uncertainty", None)
            told.append(ask(state.hidden, level).float() if callable(ask) else torch.full_like(level, torch.nan))
        state = made.run(state, state.at, state.at + 1)
    answers.append(_prediction(net, made, state))
    return answers, torch.stack([*told, torch.full_like(level, torch.nan)], 1)


def _filled(made: Cut, state: CutState, point: BoundPoint, level: Tensor) -> CutState:
    if point.point.fill.reads_head:
        return made.skip(state, point.stop, {point.made[0]: point.head.output(state.hidden, level)})  # type: ignore[union-attr,operator]
    start = {n: state.values[b] for n, b in point.pairs.items()}
    return made.skip(state, point.stop, point.point.fill.fill(start, (), None))


def _prediction(net: DenoisingNet, made: Cut, state: CutState) -> Tensor:
    """Run the rest and pick the prediction out of the model's output."""
    while state.at < len(made.segments):
        state = made.run(state, state.at, state.at + 1)
    return net.prediction(made.end(state))


# ---- reuse ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReuseLosses:
    """What the reuse of an older result changes at every step of a sampler.

    Attributes:
        loss: ``[S, G + 1]`` mean squared difference from the full model's prediction (float64), for results 0, 1, ..., G steps old; 0 for
            age 0, ``inf`` before there is one so old.
        flops_full: of a step that computes, per row.
        flops_reuse: of a step that reuses.
        log_snr: noise level of every step.
    """

    loss: Tensor
    flops_full: float
    flops_reuse: float
    log_snr: tuple[float, ...]


def reuse_losses(
    net: DenoisingNet,
    point: Point,
    scheduler: Any,
    noise: Tensor,
    *,
    steps: int,
    max_gap: int,
    inputs: Mapping[str, Any] | None = None,
    unconditional: Mapping[str, Any] | None = None,
    guidance: float = 1.0,
) -> ReuseLosses:
    """Follow the full model along trajectories and fill, at every step, what older steps made.

    Args:
        net: the denoiser; runs in evaluation mode.
        point: what is skipped, and the fill; its signal is not asked. The fill remembers one step: `CachedOutput` or `CachedResidual`.
        scheduler: of diffusers' shape.
        noise: ``[R, ...]`` standard normal, where trajectories begin.
        steps: of the scheduler.
        max_gap: G, at least 1.
        inputs: further inputs of the denoiser by name.
        unconditional: of the second guidance branch; its rows count as others do.
        guidance: as in `offramp.engines.diffusion.pipeline.sample`.

    Raises:
        InvalidInput: an argument is out of range, or the fill does not remember exactly one step.
    """
    if max_gap < 1:
        raise InvalidInput(f"max_gap must be at least 1, got {max_gap}.")
    if point.fill.keeps != 1:
        raise InvalidInput(
            f"reuse_losses is for fills that remember one step, CachedOutput() or CachedResidual(); {type(point.fill).__name__} "
            f"remembers {point.fill.keeps}."
        )
    follower = Follower(net, point, max_gap)
    names = (net.sample_name, net.timestep_name)
    with evaluating(net):
        sample(
            follower, scheduler, noise, steps=steps, inputs=inputs, unconditional=unconditional, guidance=guidance, names=names,
            select=net.prediction,
        )  # fmt: skip
    flops = [s.flops for s in net.cut().spec.segments]
    bound = net.bind([point])[0]
    reuse = sum(flops[: bound.start]) + sum(flops[bound.stop :])
    return ReuseLosses(torch.stack(follower.rows), float(sum(flops)), float(reuse), tuple(follower.levels))


class Follower(nn.Module):
    """Called by the sampler as the model: gives the full answer and notes what older results would have given."""

    def __init__(self, net: DenoisingNet, point: Point, max_gap: int) -> None:
        super().__init__()
        self._net, self.point, self.max_gap = (net,), point, max_gap
        self.rows: list[Tensor] = []
        self.levels: list[float] = []
        self._older: deque[Mapping[str, Tensor]] = deque(maxlen=max_gap)
        self._bound: BoundPoint | None = None

    def forward(self, **kwargs: Any) -> Any:
        net = self._net[0]
        call = net.call(**kwargs)
        made = net.cut(call)
        if self._bound is None:
            self._bound = net.bind([self.point], call)[0]
        point, fill = self._bound, self.point.fill
        state = made.begin(**call.kwargs)
        while state.at < point.start:
            state = made.run(state, state.at, state.at + 1)
        begun, start = state, {n: state.values[b] for n, b in point.pairs.items()} if fill.paired else {}
        while state.at < point.stop:
            state = made.run(state, state.at, state.at + 1)
        kept = dict(fill.remember(start, {n: state.values[n] for n in point.made}))
        full = _prediction(net, made, state)
        row = torch.full((self.max_gap + 1,), torch.inf, dtype=torch.float64)
        row[0] = 0.0
        for age, older in enumerate(self._older, 1):
            filled = made.skip(begun, point.stop, fill.fill(start, [older], None))
            row[age] = _per_row(_prediction(net, made, filled), full).double().mean().cpu()
        self._older.appendleft(kept)
        self.rows.append(row)
        self.levels.append(float(net.noise.log_snr(call.kwargs[net.timestep_name][:1].cpu())))
        return full


__all__ = ["DepthLosses", "Follower", "ReuseLosses", "depth_losses", "reuse_losses"]
