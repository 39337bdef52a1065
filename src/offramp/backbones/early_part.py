"""What of a segment does not wait for the state: its conditioning on time, class or text, which can run beside the segments before it.

A block of a diffusion transformer embeds the timestep and the class again, with weights of its own, before it looks at the state: a chain
of small kernels that takes as long for few rows as for many, and during which most of the device has nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from offramp.backbones.graph import is_random, mutated

_VIEWS = {"chunk", "expand", "permute", "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "transpose", "unbind"}
_VIEWS |= {"unsqueeze", "view"}
"""Cheap wherever they are, so they stay where they are read."""

_PRODUCTS = {"addmm", "bmm", "conv2d", "convolution", "embedding", "linear", "matmul", "mm"}


@dataclass(frozen=True)
class EarlyPart:
    """A segment in two.

    Attributes:
        first: what can run early, ``first(*early inputs) -> tuple``.
        reads: which inputs of the segment these are.
        rest: the others, ``rest(*inputs, *first's results)``, with the segment's results.
    """

    first: fx.GraphModule
    reads: tuple[int, ...]
    rest: fx.GraphModule


def early_part(module: fx.GraphModule, early: Sequence[bool]) -> EarlyPart | None:
    """Split a flat segment of a cut; ``None`` if nothing of weight can run early, or what may cannot be told.

    Args:
        module: as the segments of a cut are; weights stay shared with it.
        early: for each input, whether it is there before the segment before this one has run.
    """
    nodes = list(module.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    if any(n.op in ("call_module", "call_method") or mutated(n) for n in nodes):
        return None
    there = {n for n, e in zip(inputs, early, strict=True) if e}
    free = there | {n for n in nodes if n.op == "get_attr"}
    depends = set(there)
    for node in nodes:
        if node.op == "call_function" and not is_random(node) and all(s in free for s in node.all_input_nodes):
            free.add(node)
            if any(s in depends for s in node.all_input_nodes):
                depends.add(node)
    # Down to the last product: what is done with it, number by number, costs nothing where it is read.
    worth, _ = _wanted([n for n in depends if _name(n) in _PRODUCTS], set())
    anchors = {n for n in worth & depends if n.op == "call_function" and isinstance(n.meta.get("val"), Tensor) and _name(n) not in _VIEWS}
    (output,) = (n for n in nodes if n.op == "output")
    rest, crossing = _wanted(output.all_input_nodes, anchors)
    first, _ = _wanted(crossing, set())
    if not crossing:
        return None
    passed = [n for n in nodes if n in crossing]
    used = [n for n in inputs if n in first]
    return EarlyPart(
        _graph(module, used, [n for n in nodes if n in first], passed, None),
        tuple(inputs.index(n) for n in used),
        _graph(module, [*inputs, *passed], [n for n in nodes if n in rest], None, output),
    )


def _wanted(ends: Iterable[fx.Node], given: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """What these nodes are made of, down to inputs, weights and given nodes; and which of the given nodes."""
    found: set[fx.Node] = set()
    met: set[fx.Node] = set()
    waiting = list(ends)
    while waiting:
        node = waiting.pop()
        if node in given:
            met.add(node)
        elif node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found, met


def _graph(
    module: fx.GraphModule, inputs: Sequence[fx.Node], body: Sequence[fx.Node], results: Sequence[fx.Node] | None, output: fx.Node | None
) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in body:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    made = fx.node.map_arg(output.args[0], copies.__getitem__) if output is not None else tuple(copies[n] for n in results or ())
    graph.output(made)
    graph.lint()
    return fx.GraphModule(module, graph)


def _name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet.__name__) if packet is not None else ""


__all__ = ["EarlyPart", "early_part"]
