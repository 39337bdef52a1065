"""Memory at fixed addresses for captured graphs: what a batch of one input signature needs, before every stage and at the end.

Shapes: ``rows`` rows of the largest batch, ``C`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.engines.capture import Graph, Mailbox, Recorder
from offramp.engines.classify.stages import Rows, Stage


def buckets(rows: int, reach: float) -> tuple[int, ...]:
    """Sizes to capture a stage at, ascending, the last being ``rows``.

    Each size is compiled for itself, so only those are made that a batch of ``rows`` rows is likely to need when each row reaches
    the stage with probability ``reach``: the mean of the binomial, and one to three standard deviations around it.
    """
    step = 8 if rows >= 64 else 2 if rows >= 16 else 1
    mean, deviation = rows * reach, math.sqrt(rows * reach * (1 - reach))
    wanted = {math.ceil((mean + z * deviation) / step) * step for z in (-2.0, -1.0, 0.0, 1.0, 2.0, 3.0)}
    return (*sorted(w for w in wanted if 0 < w < rows), rows)


class Bench:
    """Memory and graphs of one input signature: buffers for ``rows`` rows before every stage, answers, graphs by (stage, bucket).

    Args:
        recorder: makes the graphs.
        stages: what runs between decisions.
        reach: expected share of rows that enters each stage.
        example: rows before the first stage, at least two unless the batch is one.
        rows: most rows that a stage runs on.
        slots: answers that are kept.
    """

    def __init__(self, recorder: Recorder, stages: list[Stage], reach: list[float], example: Rows, rows: int, slots: int) -> None:
        self.recorder, self.stages, self.rows, self.slots = recorder, stages, rows, slots
        device = recorder.device
        self.graphs: dict[Any, Graph] = {}
        self.cost: dict[Any, float] = {}
        self.inputs: list[Rows] = []
        with torch.inference_mode():
            values = example
            for stage in stages:
                self.inputs.append(tuple(_room(t, dims, rows + 1) for t, dims in zip(values, stage.before.dims, strict=True)))
                values, logits, _ = stage(*values)
        self.output = logits.new_zeros(slots + 1, *logits.shape[1:])  # the last row takes what nobody asked for
        self.done = torch.full((slots + 1,), stages[-1].exit, dtype=torch.int64, device=device)
        self.index = [torch.arange(rows + 1, device=device) for _ in stages]
        self.count = torch.zeros(len(stages), dtype=torch.int64, device=device)
        self.mail = Mailbox(len(stages), device)
        self.entered = -1  # rows that count[0] says
        self.alone: dict[int, Tensor] = {}  # where the graph of an only stage leaves its answers, by size
        self.begun = 0  # rows whose initial rule state is in place
        self.windows: dict[int, Rows] = {}  # the first rows of the first buffers, by count
        self.quota: dict[int, tuple[Tensor, Tensor]] = {}  # where the graph of a batch size leaves its answers
        self.sizes: list[tuple[int, ...]] = [buckets(rows, share) for share in reach]

    def bucket(self, stage: int, left: int) -> int:
        """The captured size that holds ``left`` rows and was fastest when timed.

        A size is added, at the price of compiling it on the way, where the smallest captured one is more than twice too large.
        """
        fitting = [b for b in self.sizes[stage] if b >= left]
        if fitting[0] > 2 * left:
            new = 1 << (left - 1).bit_length()
            self.sizes[stage] = (new, *self.sizes[stage]) if new < self.sizes[stage][0] else tuple(sorted({new, *self.sizes[stage]}))
            return new
        timed = [b for b in fitting if (stage, b) in self.cost]
        return min(timed, key=lambda b: self.cost[(stage, b)]) if timed else fitting[0]

    def view(self, stage: int, size: int) -> Rows:
        dims_of = self.stages[stage].before.dims
        return tuple(t.narrow(dims[0], 0, size) if dims else t for t, dims in zip(self.inputs[stage], dims_of, strict=True))

    def load(self, rows: Rows, count: int) -> None:
        """Copy rows into the first buffers. The rule's initial state is the same for every batch and is copied once."""
        window = self.windows.get(count)
        if window is None:
            window = self.windows[count] = self.view(0, count)
        if self.begun >= count:
            window = window[: len(self.stages[0].before.live)]
        self.begun = max(self.begun, count)
        for buffer, value in zip(window, rows, strict=False):
            buffer.copy_(value, non_blocking=True)

    def store(self, stage: int, position: Tensor, rows: Rows) -> None:
        """Scatter rows to their positions in a stage's buffer; part of a graph."""
        for buffer, value, dims in zip(self.inputs[stage], rows, self.stages[stage].before.dims, strict=True):
            buffer.index_copy_(dims[0], position, value) if dims else buffer.copy_(value)

    def graph(self, key: Any, make: Callable[[], object]) -> Graph:
        """The graph of this key, captured on first use."""
        found = self.graphs.get(key)
        if found is None:
            found = self.graphs[key] = self.recorder.graph(make)
        return found


def _room(tensor: Tensor, dims: tuple[int, ...], rows: int) -> Tensor:
    if not dims:
        return tensor.clone()
    if len(dims) > 1:
        raise InvalidInput("A tensor that holds the batch in two dimensions crosses the cut; run this model with graphs=False.")
    shape = list(tensor.shape)
    shape[dims[0]] = rows
    return tensor.new_zeros(shape)
