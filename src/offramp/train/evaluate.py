"""Evaluation during training: every exit, over all processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offramp.core.batches import Batch
from offramp.core.errors import InvalidInput
from offramp.core.modes import evaluating
from offramp.train.losses import ItemLoss, NonFiniteLoss, per_item

if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], loss: ItemLoss, names: Sequence[str], accelerator: Accelerator, step: int
) -> dict[str, Any]:
    """Mean loss, and accuracy for class labels, of every exit.

    Args:
        model: a wrapped `offramp.train.trainee.Trainee`.
        batches: of a prepared loader.
        loss: of one answer.
        names: of the exits.
        accelerator: that prepared both.
        step: optimizer steps taken, for an error.

    Raises:
        InvalidInput: there are no labels, or no batches.
        NonFiniteLoss: the loss of an exit is not finite.
    """
    sums: Tensor | None = None
    count, classes = 0, True
    with evaluating(model):
        for raw in batches:
            batch = raw.to(accelerator.device)
            if batch.labels is None:
                raise InvalidInput("The evaluation loader yields no labels. Yield (inputs, labels), or leave eval_loader out.")
            logits, _ = model(batch.args, batch.kwargs)
            classes = classes and not batch.labels.is_floating_point() and logits[-1].ndim == 2
            losses = torch.stack([per_item(loss, z, batch.labels) for z in logits], 1)
            right = torch.stack([z.argmax(-1) == batch.labels for z in logits], 1) if classes else torch.zeros_like(losses)
            both = torch.cat([losses.double(), right.double()], 1)
            both = accelerator.gather_for_metrics(both) if accelerator.num_processes > 1 else both
            count += both.shape[0]
            sums = both.sum(0) if sums is None else sums + both.sum(0)
    if sums is None:
        raise InvalidInput("The evaluation loader yields no batch.")
    means, right_share = (sums / count).split(len(names))
    by_exit = dict(zip(names, means.tolist(), strict=True))
    if bad := tuple(n for n, v in by_exit.items() if not math.isfinite(v)):
        raise NonFiniteLoss(f"The evaluation loss of {', '.join(bad)} is not finite after step {step}.", step=step, exits=bad)
    record: dict[str, Any] = {"loss": sum(by_exit.values()) / len(names), "losses": by_exit, "rows": count}
    if classes:
        record["accuracy"] = dict(zip(names, right_share.tolist(), strict=True))
    return record
