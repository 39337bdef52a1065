"""Throughput mode on the host: what an engine answers, and the queues between stages."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offramp.engines.classify.stages import Layout, Rows, Stage, join, part, signature, take


@dataclass(frozen=True)
class Answers:
    """What an engine returns for a batch.

    Attributes:
        output: ``[B, C]`` logits of the exit at which each row left.
        exit: ``[B]`` int64 index of that exit; K - 1 is the model's own output.
        exit_cost: ``[K]`` float64 FLOPs spent on a row that leaves at each exit.
    """

    output: Tensor
    exit: Tensor
    exit_cost: Tensor

    @property
    def cost(self) -> Tensor:
        """``[B]`` float64 FLOPs spent on each row; looked up when asked for, so that an answer does not wait for it."""
        return self.exit_cost[self.exit]


MakeAnswers = Callable[[Tensor | None, Tensor | None], Answers]
"""Makes answers from outputs and exits; from ``None, None`` those of a batch without rows."""


class Group(NamedTuple):
    """Rows that wait together. Most survivors stay in the memory of their bucket until they run again: one copy, into their place.

    Attributes:
        rows: what they carry, others that have left among them.
        ids: ``[n, 2]`` int64 on the host: number of the batch and place in it.
        chosen: ``[n]`` int64 which of the rows they are; ``None`` = all.
    """

    rows: Rows
    ids: Tensor
    chosen: Tensor | None = None

    def split(self, first: int, layout: Layout) -> tuple[Group, Group]:
        """The first rows, and the rest; nothing is copied."""
        count = len(self.ids)
        if self.chosen is not None:
            return Group(self.rows, self.ids[:first], self.chosen[:first]), Group(self.rows, self.ids[first:], self.chosen[first:])
        return Group(part(self.rows, layout, 0, first), self.ids[:first]), Group(part(self.rows, layout, first, count), self.ids[first:])


class Queues:
    """Queues of a throughput run on the host. Rows that differ in another size than the batch (text lengths) wait in separate queues."""

    def __init__(self, stages: Sequence[Stage], thresholds: Sequence[float], bucket: int, answer: MakeAnswers) -> None:
        self.stages, self.thresholds, self.bucket, self.answer = stages, thresholds, bucket, answer
        self.queues: list[dict[Any, list[Group]]] = [{} for _ in stages]
        self.results: dict[int, list[Any]] = {}  # number of batch -> [output, exits, rows still unfinished, rows]
        self.next_in = 0  # number of the next batch to admit
        self.next_out = 0  # number of the next batch to return
        self.front = 0  # number of the oldest batch that is not finished
        self.open_rows = 0  # rows of that batch and all later ones

    def admit(self, rows: Rows, layout: Layout, count: int) -> None:
        """Take a batch in."""
        number = self.next_in
        self.next_in += 1
        ids = torch.stack([torch.full((count,), number), torch.arange(count)], dim=1)  # on the host: batch, place in it
        self.results[number] = [None, torch.full((count,), -1, device=rows[0].device), count, count]
        self.open_rows += count
        if count:
            self.queues[0].setdefault(signature(rows, layout), []).append(Group(rows, ids))

    def _fill(self, stage: int) -> tuple[int, Any]:
        """Rows of the fullest queue of a stage, and its key."""
        filled = [(sum(len(g.ids) for g in groups), key) for key, groups in self.queues[stage].items()]
        return max(filled, key=operator.itemgetter(0), default=(0, None))

    def run_full(self) -> bool:
        """Run the deepest stage that has a full bucket."""
        for stage in reversed(range(len(self.queues))):
            count, key = self._fill(stage)
            if count >= self.bucket:
                self._run(stage, key)
                return True
        return False

    def behind(self) -> int:
        """Rows admitted after the oldest batch that is not finished."""
        while self.front < self.next_in and not self.results[self.front][2]:
            self.open_rows -= self.results[self.front][3]
            self.front += 1
        return self.open_rows - (self.results[self.front][3] if self.front < self.next_in else 0)

    def run_oldest(self) -> bool:
        """Run the stage where the oldest row waits, full or not."""
        fronts = [(int(groups[0].ids[0, 0]), -stage, key) for stage, queue in enumerate(self.queues) for key, groups in queue.items()]
        if not fronts:
            return False
        _, stage, key = min(fronts, key=operator.itemgetter(0, 1))
        self._run(-stage, key)
        return True

    def run_first(self) -> bool:
        """Run the shallowest stage that has rows, so that what it passes on fills the later buckets."""
        for stage in range(len(self.queues)):
            count, key = self._fill(stage)
            if count:
                self._run(stage, key)
                return True
        return False

    def _run(self, number: int, key: Any) -> None:
        stage = self.stages[number]
        waiting = self.queues[number].pop(key)
        picked: list[Group] = []
        total = 0
        while waiting and total < self.bucket:
            group = waiting.pop(0)
            room = self.bucket - total
            if len(group.ids) > room:
                group, rest = group.split(room, stage.before)
                waiting.insert(0, rest)
            picked.append(group)
            total += len(group.ids)
        if waiting:
            self.queues[number][key] = waiting
        ids = torch.cat([g.ids for g in picked])
        rows, logits, score = stage(*join([g.rows for g in picked], stage.before, [g.chosen for g in picked]))
        if stage.last:
            self._finish(logits, ids, stage.exit)
            return
        staying = (~(score >= self.thresholds[number])).cpu()  # a score that is not a number stays, as in replay
        leave = (~staying).nonzero().squeeze(1)
        if leave.numel():
            self._finish(logits[leave.to(logits.device)], ids[leave], stage.exit)
        keep = staying.nonzero().squeeze(1)
        if keep.numel():
            index = keep.to(logits.device) if leave.numel() else None
            if index is not None and 2 * len(index) < len(ids):  # few: copied now, so that they do not hold the memory of all
                rows, index = take(rows, stage.after, index), None
            self.queues[number + 1].setdefault(key, []).append(Group(rows, ids[keep], index))

    def _finish(self, logits: Tensor, ids: Tensor, exit_index: int) -> None:
        for number in ids[:, 0].unique().tolist():
            mine = (ids[:, 0] == number).nonzero().squeeze(1)
            result = self.results[number]
            if result[0] is None:
                result[0] = logits.new_empty(result[3], *logits.shape[1:])
            places = ids[mine, 1].to(logits.device)
            result[0][places] = logits[mine.to(logits.device)]
            result[1][places] = exit_index
            result[2] -= len(mine)

    def finished(self) -> Iterator[Answers]:
        """Answers of the batches that are done, in order, up to the first that is not."""
        self.behind()
        while self.next_out < self.front:
            output, exits, *_ = self.results.pop(self.next_out)
            self.next_out += 1
            yield self.answer(None, None) if output is None else self.answer(output, exits)
