"""One optimizer step: forwards, the recipe's loss, the gradient's mean over all items of all processes, and checks before it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offramp.core.batches import Batch
from offramp.core.errors import InvalidInput
from offramp.train.losses import NonFiniteLoss
from offramp.train.order import Place, seed_all
from offramp.train.recipe import Objective, Seen
from offramp.train.setup import Settings
from offramp.train.sharding import whole
from offramp.train.trainee import Trainee, forget_unused

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Work:
    """What one phase trains, and with what.

    Attributes:
        own: the caller's network and the phase's recipe.
        trainee: what is trained: ``own``, or where training is sharded a copy of it.
        model: ``trainee`` as accelerate wrapped it.
        optimizer: as accelerate wrapped it.
        scheduler: or ``None``.
        steps: of the phase, or ``None`` where the loader has no length.
        cost: ``[K]`` cost of leaving at each exit as a share of the whole; empty if the recipe does not read it.
    """

    own: Trainee
    trainee: Trainee
    model: nn.Module
    optimizer: Any
    scheduler: Any
    steps: int | None
    cost: tuple[float, ...]


def take_step(window: Sequence[Batch], work: Work, place: Place, accelerator: Accelerator, settings: Settings) -> dict[str, Any]:
    """One optimizer step on the mean over all items of ``window``, those of the other processes included.

    Args:
        window: the micro-batches of this process.
        work: what is trained.
        place: where training is.
        accelerator: that prepared ``work``.
        settings: of the run.

    Returns:
        The step's record for the metrics.

    Raises:
        NonFiniteLoss: a loss or the gradient is not finite; no step was taken. Raised in every process alike.
        InvalidInput: the loss does not depend on what is trained.
    """
    optimizer, recipe, exits = work.optimizer, work.trainee.recipe, work.own.net.names
    processes = accelerator.num_processes
    rows = torch.tensor([float(b.rows) for b in window], device=accelerator.device)
    everywhere = float(_sum(rows.sum(), accelerator))
    done = 0.0 if not work.steps else min(1.0, place.phase_step / work.steps)
    optimizer.zero_grad(set_to_none=True)
    sums: Tensor | None = None
    names: list[str] = []
    used = [False] * len(exits)
    for position, raw in enumerate(window):
        batch = raw.to(accelerator.device)
        seed_all(settings.seed, place.phase, place.epoch, place.batch + position, "forward", accelerator.process_index)
        with nullcontext() if position + 1 == len(window) else accelerator.no_sync(work.model):
            logits, extra = work.model(batch.args, batch.kwargs)
            target = recipe.objective(Seen(logits, batch.labels, settings.loss, place.phase_step, done, work.cost, extra))
            if not target.total.requires_grad:
                raise InvalidInput(
                    f"The loss of {type(recipe).__name__} does not depend on anything it may train. Give the early exits a weight > 0."
                )
            # DDP averages the processes' gradients: this factor makes them the mean over all items of the step.
            objective = target.total * (batch.rows * processes / everywhere)
            if processes > 1:
                # DDP waits for a gradient of every parameter, also of heads that take no part in this step.
                objective = objective + sum(z.sum() * 0.0 for z, part in zip(logits, target.losses, strict=True) if part is None)
            accelerator.backward(objective)
        used = [u or part is not None for u, part in zip(used, target.losses, strict=True)]
        names = ["loss", *exits, *target.terms]
        values = _values(target) * batch.rows
        sums = values if sums is None else sums + values
    forget_unused(work.trainee.net, used)
    assert sums is not None  # a window is never empty
    means = (_sum(sums, accelerator) / everywhere).tolist()
    _check_finite(dict(zip(names, means, strict=True)), exits, used, work, place)
    norm = None
    if settings.max_grad_norm is not None:
        norm = _clip(work.model, settings.max_grad_norm, accelerator)
        if not math.isfinite(norm) and accelerator.scaler is None:
            optimizer.zero_grad(set_to_none=True)
            raise NonFiniteLoss(f"The gradient's norm is {norm} at step {place.step}. Lower the learning rate.", step=place.step, exits=())
    rates = [float(g["lr"]) for g in optimizer.param_groups]
    optimizer.step()
    if work.scheduler is not None and not accelerator.optimizer_step_was_skipped:
        work.scheduler.step()
    record: dict[str, Any] = {
        "event": "step",
        "step": place.step + 1,
        "phase": place.phase,
        "epoch": place.epoch,
        "rows": int(everywhere),
        "loss": means[0],
        "losses": {n: m for n, m, u in zip(exits, means[1:], used, strict=False) if u},
        "terms": dict(zip(names[1 + len(exits) :], means[1 + len(exits) :], strict=True)),
        "lr": rates,
    }
    if norm is not None:
        record["grad_norm"] = norm if math.isfinite(norm) else None
    return record


def _sum(value: Tensor, accelerator: Accelerator) -> Tensor:
    if accelerator.num_processes == 1:
        return value
    reduced: Tensor = accelerator.reduce(value, reduction="sum")
    return reduced


def _clip(model: nn.Module, limit: float, accelerator: Accelerator) -> float:
    """Clip the gradient and return its norm before."""
    # Not accelerate's: it looks for the model by comparing parameters, and sharded ones compare element by element.
    accelerator.unscale_gradients()
    trained = [p for p in model.parameters() if p.requires_grad]  # what an earlier phase trained may still have its last gradient
    return float(whole(nn.utils.clip_grad_norm_(trained, limit)))


def _check_finite(means: Mapping[str, float], exits: Sequence[str], used: Sequence[bool], work: Work, place: Place) -> None:
    bad = tuple(n for n, u in zip(exits, used, strict=True) if u and not math.isfinite(means[n]))
    if not bad and all(math.isfinite(v) for v in means.values()):
        return
    work.optimizer.zero_grad(set_to_none=True)
    who = f"of exit {', '.join(bad)}" if bad else f"term {', '.join(n for n, v in means.items() if not math.isfinite(v))}"
    raise NonFiniteLoss(
        f"The loss {who} is not finite at step {place.step} (phase {place.phase}, epoch {place.epoch}, batch {place.batch}). "
        "No step was taken with it. Look for NaN in the inputs, lower the learning rate, clip with max_grad_norm, "
        "or use bf16 instead of fp16.",
        step=place.step,
        exits=bad,
    )


def _values(target: Objective) -> Tensor:
    """Total, losses of the exits (0 where unused) and terms, as one tensor: one host read a step."""
    zero = target.total.detach() * 0
    parts = [target.total, *(zero if part is None else part for part in target.losses), *target.terms.values()]
    return torch.stack([p.detach().float().reshape(()) for p in parts])
