"""Latency mode as a loop on the host, which runs on any device. Throughput mode on the host is
`offramp.engines.classify.queues`; quota mode needs no loop: it is `offramp.engines.classify.graphs.quota_pipeline`.

Predictions of all current rows are written by index and survivors alone are compacted: one gather and no reordering at the end.

Shapes: ``B`` rows of the batch, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.engines.classify.stages import Rows, Stage, take

Pays = Callable[[int, int, int], bool]
"""Whether gathering pays, from the number of the stage, the rows that ran in it and the rows that stay."""


def latency(stages: Sequence[Stage], thresholds: Sequence[float], rows: Rows, count: int, pays: Pays) -> tuple[Tensor, Tensor]:
    """Answers ``[B, C]`` and exits ``[B]`` of one batch of ``count`` rows; ``thresholds`` has one per stage, the last not used."""
    device = rows[0].device
    exits = torch.full((count,), stages[-1].exit, device=device)
    index = torch.arange(count, device=device)  # where each row of the state came from
    waiting: Tensor | None = None  # rows of the state that have not left; None = all
    output = rows[0].new_empty(0)  # made in the first stage, which knows what an answer looks like
    for number, stage in enumerate(stages):
        rows, logits, score = stage(*rows)
        if number == 0:
            output = logits if stage.last else logits.new_empty(count, *logits.shape[1:])
        if stage.last:
            if waiting is None and index.numel() == count:
                return logits, exits
            kept = torch.ones_like(index, dtype=torch.bool) if waiting is None else waiting
            output[index[kept]] = logits[kept]
            break
        if score is None:
            raise InvalidInput("Only the last stage may end without a score.")
        leaving = score >= thresholds[number]
        if waiting is not None:
            leaving &= waiting
        left = int(leaving.sum())
        if not left:
            continue
        gone = index[leaving]
        output[gone] = logits[leaving]
        exits[gone] = stage.exit
        waiting = ~leaving if waiting is None else waiting & ~leaving
        staying = int(waiting.sum()) if index.numel() != left else 0
        if not staying:
            break
        if pays(number, index.numel(), staying):
            keep = waiting.nonzero().squeeze(1)
            rows, index, waiting = take(rows, stage.after, keep), index[keep], None
    return output, exits
