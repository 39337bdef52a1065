"""The adaptive model as one module without Python control flow on data: what is exported.

Shape legend: ``B`` rows given, ``R`` rows still in the batch, ``C`` width of an answer, ``K`` exits, the model's own output last.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from offramp.backbones.cut import CutState
from offramp.core.certificate import Plan
from offramp.core.errors import InvalidInput
from offramp.core.modes import evaluating
from offramp.core.types import Readout
from offramp.network import MultiExit

THRESHOLDS = "thresholds"
"""Name of the thresholds, in the module and in the file: float32 ``[K - 1]``, exits switched off included."""

_RESHAPES = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default)


class AdaptiveModule(nn.Module):
    """A network and a plan as one module without Python control flow on data, to be exported or scripted into a server.

    ``forward`` takes what the model takes and returns ``output`` ``[B, C]`` and ``exit`` int64 ``[B]``, the index of the
    exit each row left at. Call it in evaluation mode. Weights are shared with the network.

    Attributes:
        thresholds: buffer ``[K - 1]`` float32.
        active: indices of the exits that may be left at (threshold below ``inf``); the others are not in the graph unless a
            stateful rule or a later head reads them.
        scored: indices of the exits whose score is computed, those that a stateful rule must see included.
        read: indices of the exits whose head runs, those whose answer a later head reads included.

    Raises:
        InvalidInput: the plan has other exits than the network, or an exit's answer has another shape than the model's.
        FingerprintMismatch: the plan was made for another model.
    """

    thresholds: Tensor

    def __init__(self, net: MultiExit, plan: Plan) -> None:
        super().__init__()
        if plan.exits != net.names:
            raise InvalidInput(f"The plan has the exits {plan.exits}, the network has {net.names}. Calibrate a trace of this network.")
        plan.check(net.fingerprint())
        self.cut = net.cut()
        self.segments = nn.ModuleList(_sized(segment.module) for segment in self.cut.segments)
        self.heads = net.heads
        self.rule = plan.rule
        self.select = net.select
        early = plan.thresholds[:-1]
        self.register_buffer(THRESHOLDS, torch.tensor(early, dtype=torch.float32, device=net.device), persistent=False)
        self.active = tuple(k for k, t in enumerate(early) if t < math.inf)
        # A rule that remembers scores every exit up to the last that may be left at; a head that reads earlier answers needs all of them.
        self.scored = frozenset(range(max(self.active, default=-1) + 1) if plan.rule.stateful else self.active)
        cascade = (k for k in self.scored if getattr(net.heads[k], "needs_previous", False))
        self.read = self.scored | frozenset(range(max(cascade, default=-1) + 1))
        self._shape = _answer_shape(net)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.decide(self.thresholds, *args, **kwargs)

    def decide(self, thresholds: Tensor, /, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """``forward`` with other thresholds, float32 ``[K - 1]``; those of exits that are not active are not read."""
        state = self.cut.begin(*args, **kwargs)
        live = dict(state.values)
        device = next(iter(live.values())).device
        memory = self.rule.begin(state.rows, device)
        previous: tuple[Tensor, ...] = ()
        output = exits = rows = None  # rows: place of each current row in the batch given, None while nobody has left
        for k, segment in enumerate(self.cut.segments):
            made = self.segments[k](*(live[n] for n in segment.inputs))
            live = {n: v for n, v in {**live, **dict(zip(segment.outputs, made, strict=True))}.items() if n in segment.live}
            if segment.hidden is None:
                logits = self.select(self.cut.end(CutState(live, state.rows, len(self.cut.segments))))
                return _write(output, exits, rows, self.shaped(logits), k)
            if k not in self.read:
                continue
            hidden = live[segment.hidden]
            logits = self.heads[k](hidden, previous)
            previous = (*previous, logits)
            if k not in self.scored:
                continue
            score, memory = self.rule.score(k, Readout(logits, hidden), memory)
            if k not in self.active:
                continue
            output, exits = _write(output, exits, rows, self.shaped(logits), k)
            if rows is None:
                rows = torch.arange(logits.shape[0], device=device)
            stay = (~(score >= thresholds[k])).nonzero()[:, 0]  # a score that is not a number stays
            _promise_rows(stay)
            rows = rows.index_select(0, stay)
            live = {n: _take(v, self.cut.batch_dims.get(n, ()), stay) for n, v in live.items()}
            previous = tuple(p.index_select(0, stay) for p in previous)
            memory = {n: v.index_select(0, stay) for n, v in memory.items()}
        raise InvalidInput("The cut has no last segment.")

    def shaped(self, logits: Tensor) -> Tensor:
        """An exit's answer in the shape of the model's."""
        return logits if tuple(logits.shape[1:]) == self._shape else logits.reshape(logits.shape[0], *self._shape)


def _write(output: Tensor | None, exits: Tensor | None, rows: Tensor | None, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Answers ``[B, C]`` and exits ``[B]`` after everybody still here has answered at exit ``k``; later exits overwrite."""
    here = torch.full((logits.shape[0],), k, dtype=torch.int64, device=logits.device)
    if output is None or exits is None or rows is None:
        return logits, here
    return output.index_copy(0, rows, logits.to(output.dtype)), exits.index_copy(0, rows, here)


def _take(value: Tensor, dims: Sequence[int], stay: Tensor) -> Tensor:
    for dim in dims:
        value = value.index_select(dim, stay)
    return value


def _promise_rows(stay: Tensor) -> None:
    """While tracing, let the exporter take the path of two or more rows.

    It cannot branch on a size that data decides, and asks about 0 and 1 (an empty batch norm, a broadcast). The segments were cut
    under the same promise and are plain operator graphs that hold for any size; the assertion itself is removed from the result.
    """
    if torch.compiler.is_exporting():
        torch._check(stay.shape[0] >= 2)


def _answer_shape(net: MultiExit) -> tuple[int, ...]:
    """Shape of the model's answer without the batch; every exit must give as many numbers."""
    example = net.example.to(net.device, net.dtype)
    with evaluating(net), torch.no_grad():
        *early, final = net(*example.args, **example.kwargs)
    shape = tuple(final.shape[1:])
    for name, logits in zip(net.at, early, strict=True):
        if final.ndim > 2 or logits.shape[0] != final.shape[0] or logits.numel() != final.numel():
            raise InvalidInput(
                f"The exit at {name!r} answers {tuple(logits.shape)}, the model {tuple(final.shape)}; exporting needs one vector per "
                "row, of the same width at every exit."
            )
    return shape


def _sized(module: fx.GraphModule) -> fx.GraphModule:
    """The same segment with every ``-1`` in a reshape written out, because the size it stands for is ambiguous on no rows."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copy = graph.node_copy(node, lambda n: copies[n])
        copies[node] = copy
        if node.target in _RESHAPES and -1 in node.args[1]:
            with graph.inserting_before(copy):
                copy.args = (copy.args[0], _written_out(graph, node, copies))
    graph.lint()
    return fx.GraphModule(module, graph)


def _written_out(graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> list[Any]:
    source: Any = node.args[0]
    shape: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    place = shape.index(-1)
    before, after = source.meta.get("val"), node.meta.get("val")
    given = [copies[s] if isinstance(s, fx.Node) else s for s in shape]
    if after is None or before is None:
        return given
    size = after.shape[place]
    if isinstance(size, int):
        given[place] = size
        return given
    expression = size.node.expr
    for dim, candidate in enumerate(before.shape):
        if isinstance(candidate, torch.SymInt) and candidate.node.expr == expression:
            given[place] = graph.call_function(torch.ops.aten.sym_size.int, (copies[source], dim))
            return given
    # A fold of the batch with fixed sizes (rows times windows): the quotient of the two is fixed.
    for dim, candidate in enumerate(before.shape):
        if not isinstance(candidate, torch.SymInt):
            continue
        ratio = expression / candidate.node.expr
        if ratio.is_Integer or (1 / ratio).is_Integer:
            whole = graph.call_function(torch.ops.aten.sym_size.int, (copies[source], dim))
            times, factor = (operator.mul, int(ratio)) if ratio.is_Integer else (operator.floordiv, int(1 / ratio))
            given[place] = graph.call_function(times, (whole, factor))
            return given
    return given


__all__ = ["THRESHOLDS", "AdaptiveModule"]
