"""Stages: what runs between two decisions, as plain functions of tensors.

A stage is one or more segments and, unless it is the last, a head and a score. Segments without a decision between them are one
stage, so that a compiler sees them whole. Everything a row carries (live tensors, earlier logits, the rule's state) is in one
tuple, so that choosing rows is one operation and nothing can be forgotten.

Shapes: ``B`` rows in the batch, ``C`` classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from offramp.backbones import Cut, CutState
from offramp.core.certificate import Plan
from offramp.core.errors import InvalidInput
from offramp.core.protocols import Rule
from offramp.core.types import Readout, RuleState
from offramp.network import MultiExit

Rows = tuple[Tensor, ...]
"""Everything that rows carry from one stage to the next: live tensors, then earlier logits, then the rule's state."""


@dataclass(frozen=True)
class Layout:
    """What the tensors of a `Rows` are.

    Attributes:
        live: names of the live tensors.
        batch_dims: for each of them the dimensions that hold the batch.
        previous: how many earlier exits' logits follow.
        rule: names of the rule's state tensors that follow.
    """

    live: tuple[str, ...]
    batch_dims: tuple[tuple[int, ...], ...]
    previous: int
    rule: tuple[str, ...]

    @property
    def dims(self) -> tuple[tuple[int, ...], ...]:
        """Batch dimensions of every tensor."""
        return (*self.batch_dims, *(((0,),) * (self.previous + len(self.rule))))


def take(rows: Rows, layout: Layout, index: Tensor) -> Rows:
    """The given rows (int64 ``[R]``) of everything, in that order."""
    picked = []
    for tensor, dims in zip(rows, layout.dims, strict=True):
        for dim in dims:
            tensor = tensor.index_select(dim, index)
        picked.append(tensor)
    return tuple(picked)


def part(rows: Rows, layout: Layout, start: int, stop: int) -> Rows:
    """Rows ``start`` to ``stop - 1`` of everything, as views."""
    picked = []
    for tensor, dims in zip(rows, layout.dims, strict=True):
        for dim in dims:
            tensor = tensor.narrow(dim, start, stop - start)
        picked.append(tensor)
    return tuple(picked)


def join(parts: Sequence[Rows], layout: Layout, index: Sequence[Tensor | None] | None = None) -> Rows:
    """Several groups of rows as one, in order. Tensors without a batch dimension are taken from the first group.

    Args:
        parts: groups of rows.
        layout: what they are.
        index: for each group which of its rows (int64) to take, or ``None`` for all; they are copied once, into their place.

    Raises:
        InvalidInput: a tensor holds the batch in two dimensions, as pairs of rows do: rows of two batches have none.
    """
    index = index if index is not None else [None] * len(parts)
    if len(parts) == 1:
        return parts[0] if index[0] is None else take(parts[0], layout, index[0])
    joined = []
    for tensors, dims in zip(zip(*parts, strict=True), layout.dims, strict=True):
        if len(dims) > 1:
            raise InvalidInput("A tensor that holds the batch in two dimensions crosses the cut; run this model in Latency mode.")
        if not dims:
            joined.append(tensors[0])
        elif all(i is None for i in index):
            joined.append(torch.cat(tensors, dim=dims[0]))
        else:
            joined.append(_placed(tensors, dims[0], index))
    return tuple(joined)


def _placed(tensors: Sequence[Tensor], dim: int, index: Sequence[Tensor | None]) -> Tensor:
    """Chosen rows of several tensors, one behind the other."""
    counts = [t.shape[dim] if i is None else i.numel() for t, i in zip(tensors, index, strict=True)]
    shape = list(tensors[0].shape)
    shape[dim] = sum(counts)
    out = tensors[0].new_empty(shape)
    start = 0
    for tensor, chosen, count in zip(tensors, index, counts, strict=True):
        place = out.narrow(dim, start, count)
        if chosen is None:
            place.copy_(tensor)
        elif dim == 0:
            torch.index_select(tensor, dim, chosen, out=place)
        else:
            place.copy_(tensor.index_select(dim, chosen))
        start += count
    return out


def signature(rows: Rows, layout: Layout) -> Any:
    """What rows must share to run in one batch: every size but the batch, and the values of inputs that have no batch."""
    return tuple(
        tuple(s for d, s in enumerate(t.shape) if d not in dims) if dims else (tuple(t.shape), tuple(t.flatten().tolist()))
        for t, dims in zip(rows, layout.dims, strict=True)
    )


class Stage(nn.Module):
    """Segments ``start`` to ``stop - 1``, then, unless last, the head and score of exit ``stop - 1``.

    ``forward(*rows) -> (rows, logits [B, C], score [B])``; the last stage returns ``((), logits, None)``.

    Attributes:
        exit: index of the exit that decides at the end; the last stage's is the model's own output.
        before: layout of the rows it takes.
        after: layout of the rows it returns.
    """

    def __init__(self, net: MultiExit, plan: Plan, start: int, stop: int, decide: bool, before: Layout) -> None:
        super().__init__()
        self.net = (net,)  # in a tuple: the network's parameters are not this module's
        self.cut: Cut = net.cut()
        self.rule = (plan.rule,)
        self.start, self.stop, self.exit = start, stop, stop - 1
        self.decide = decide
        self.last = stop == len(self.cut.segments)
        self.before = before
        self.after = before  # replaced by `lay_out` after a dry run
        self.dtype: torch.dtype | None = None  # of the model's own answer; set by `make_stages` after a dry run
        self._learning = False
        self._rule_names: tuple[str, ...] = ()
        self.keep_previous = any(getattr(h, "needs_previous", False) for h in net.heads)

    def forward(self, *rows: Tensor) -> tuple[Rows, Tensor, Tensor | None]:
        net, rule = self.net[0], self.rule[0]
        live_count, previous_count = len(self.before.live), self.before.previous
        values = dict(zip(self.before.live, rows[:live_count], strict=True))
        previous = tuple(rows[live_count : live_count + previous_count])
        state: RuleState = dict(zip(self.before.rule, rows[live_count + previous_count :], strict=True))
        logits: Tensor | None = None
        score: Tensor | None = None
        cut_state = CutState(values, 0, self.start)
        for k in range(self.start, self.stop):
            segment = self.cut.segments[k]
            made = segment.module(*(cut_state.values[n] for n in segment.inputs))
            cut_state = self.cut.advance(cut_state, made)
            if k == len(self.cut.segments) - 1:
                final = net.select(self.cut.end(cut_state))
                return (), final, None
            hidden = cut_state.hidden
            if self.last:  # no decision follows, so neither heads nor the rule are needed
                continue
            wanted = k == self.stop - 1 and self.decide
            if wanted or self.keep_previous or rule.stateful:
                logits = net.heads[k](hidden, previous)
                if self.keep_previous:
                    previous = (*previous, logits)
                if wanted or rule.stateful:
                    score, state = rule.score(k, Readout(logits, hidden), state)
        if self._learning:
            self._rule_names = tuple(sorted(state))
        after = (*cut_state.values.values(), *previous, *(state[n] for n in sorted(state)))
        if logits is None or score is None:
            raise InvalidInput(f"Stage {self.start}-{self.stop} ends without a decision; this is a defect in the plan of stages.")
        return after, logits.to(self.dtype) if self.dtype is not None else logits, score

    def lay_out(self, rows: Rows) -> Rows:
        """Run once on example rows to learn what follows; sets ``after``."""
        self._learning = True  # a rule may add to its running state at its first exit, so the names are learnt by running
        with torch.no_grad():
            following, logits, _ = self(*rows)
        self._learning = False
        self.dtype = logits.dtype
        if not self.last:
            live = self.cut.segments[self.stop - 1].live
            previous = self.before.previous + (self.stop - self.start if self.keep_previous else 0)
            self.after = Layout(live, tuple(self.cut.batch_dims.get(n, ()) for n in live), previous, self._rule_names)
        return following

    def head_inputs(self, following: Rows) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What the head at the end of this stage reads, out of the rows that the stage returns (not for the last stage)."""
        live = len(self.after.live)
        hidden = following[self.after.live.index(self.cut.segments[self.exit].hidden)]
        return hidden, following[live : live + self.before.previous + (self.stop - self.start - 1) * self.keep_previous]


def placed(rule: Rule, device: torch.device) -> Rule:
    """The rule on a device. A learned rule that lies elsewhere is copied there, so that the caller's stays where it is."""
    if not isinstance(rule, nn.Module) or all(t.device == device for t in (*rule.parameters(), *rule.buffers())):
        return rule
    return cast(Rule, copy.deepcopy(rule).to(device))


def begin(net: MultiExit, plan: Plan, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Rows, Layout, int]:
    """Rows before the first stage, what they are, and how many."""
    cut = net.cut()
    state = cut.begin(*args, **kwargs)
    running = plan.rule.begin(state.rows, net.device)
    names = tuple(sorted(running))
    layout = Layout(tuple(state.values), tuple(cut.batch_dims.get(n, ()) for n in state.values), 0, names)
    return (*state.values.values(), *(running[n] for n in names)), layout, state.rows


def make_stages(net: MultiExit, plan: Plan, decide: Sequence[bool]) -> list[Stage]:
    """Stages of a plan; ``decide[k]`` says whether exit k is checked (the model's own output not counted)."""
    ends = [k + 1 for k, yes in enumerate(decide) if yes] + [len(net.names)]
    example = net.example.to(net.device, net.dtype)
    stages: list[Stage] = []
    rows, layout, _ = begin(net, plan, example.args, example.kwargs)
    start = 0
    for stop in ends:
        stage = Stage(net, plan, start, stop, stop <= len(decide), layout)
        rows = stage.lay_out(rows)
        stages.append(stage)
        start, layout = stop, stage.after
    for stage in stages:  # answers of one type, the model's own: a model in bfloat16 may well answer in float32
        stage.dtype = stages[-1].dtype
    return stages


def exit_costs(net: MultiExit, plan: Plan, decide: Sequence[bool]) -> Tensor:
    """``[K]`` FLOPs per item to leave at each exit when only some heads run (float64)."""
    spec = net.cut().spec
    every = plan.rule.stateful or any(getattr(h, "needs_previous", False) for h in net.heads)
    heads = [e.head_flops if run or (every and any(decide[k:])) else 0 for k, (e, run) in enumerate(zip(net.exits, decide, strict=True))]
    segments = torch.tensor([s.flops for s in spec.segments], dtype=torch.float64)
    return segments.cumsum(0) + torch.tensor([*heads, 0], dtype=torch.float64).cumsum(0)


StageFunction = Callable[..., tuple[Rows, Tensor, Tensor | None]]
