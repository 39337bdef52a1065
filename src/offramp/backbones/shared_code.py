"""Compiled code that equal segments of a cut share: of one model, of one view after the other, and of other models of the same shape.

A transformer cut after every block is the same graph many times over other weights. Compiled one by one, each is traced, differentiated and
lowered for itself, and again for every view of the model. Here a segment's weights become inputs of its graph; graphs that are then equal
are one function, compiled once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen

from offramp.core.errors import InvalidInput

_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


class SharedCode:
    """Functions that `torch.compile` made, by what they compute. Give one to every ``DenoisingView.compile`` that is to share them.

    Args:
        same_gradients: differentiate weights that are held like those beside them that learn, and drop their gradients. One code then
            serves recipes that hold different weights, at the price of these gradients. A segment without anything to learn stays without.
        options: of ``torch.compile``.

    Attributes:
        options: as given.
    """

    def __init__(self, *, same_gradients: bool = False, **options: Any) -> None:
        self.same_gradients = same_gradients
        self.options: Mapping[str, Any] = MappingProxyType(options)
        self._made: dict[Any, Callable[..., Any]] = {}

    def __len__(self) -> int:
        """Different functions so far."""
        return len(self._made)

    def bind(self, module: fx.GraphModule) -> Callable[..., Any]:
        """The module as a compiled function of its inputs. Weights are read at every call, so they may be replaced in the module.

        Args:
            module: flat, as the segments of a cut are. One that calls modules or holds subgraphs is compiled for itself.
        """
        lifted = _lifted(module)
        if lifted is None:
            alone: Callable[..., Any] = torch.compile(module, **self.options)
            return alone
        graph, paths = lifted
        owners = [_owner(module, path) for path in paths]
        kinds = tuple(_kind(getattr(o, n)) for o, n in owners)
        if (graph.code, kinds) not in self._made:
            self._made[graph.code, kinds] = torch.compile(graph, **self.options)
        return _Bound(self._made[graph.code, kinds], owners, self.same_gradients)


class _Bound:
    """A shared function with the weights of one segment."""

    def __init__(self, code: Callable[..., Any], owners: Sequence[tuple[nn.Module, str]], same_gradients: bool) -> None:
        self.code, self.owners, self.same_gradients = code, tuple(owners), same_gradients

    def __call__(self, *inputs: Any) -> Any:
        weights = [getattr(owner, name) for owner, name in self.owners]
        if self.same_gradients and torch.is_grad_enabled() and any(w.requires_grad for w in weights):
            # Fresh at every call, so that the gradient goes with it.
            weights = [nn.Parameter(w.detach()) if isinstance(w, nn.Parameter) and not w.requires_grad and _real(w) else w for w in weights]
        return self.code(*weights, *map(_dense, inputs))


def _real(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _dense(value: Any) -> Any:
    """With the strides that other segments' states have: other strides are other code. A memory format of images is kept."""
    if not isinstance(value, Tensor) or value.is_contiguous():
        return value
    if value.ndim in _LAYOUTS and value.is_contiguous(memory_format=_LAYOUTS[value.ndim]):
        return value
    return value.contiguous()


def _kind(value: Any) -> tuple[Any, ...]:
    return type(value), tuple(value.shape), value.dtype, value.device


def _owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return module.get_submodule(parent), name


def _lifted(module: fx.GraphModule) -> tuple[fx.GraphModule, list[str]] | None:
    """The graph with its weights as first inputs and names that tell nothing, and the weights' paths; ``None`` if it is not flat."""
    if type(module.graph._codegen) is not CodeGen:
        return None
    nodes = list(module.graph.nodes)
    paths: list[str] = list(dict.fromkeys(str(n.target) for n in nodes if n.op == "get_attr"))
    if any(n.op in ("call_module", "call_method") for n in nodes):
        return None
    if not all(isinstance(getattr(*_owner(module, p), None), Tensor) for p in paths):
        return None
    graph = fx.Graph()
    weights = {path: graph.placeholder(f"w{k}") for k, path in enumerate(paths)}
    inputs = [n for n in nodes if n.op == "placeholder"]
    copies: dict[fx.Node, fx.Node] = {n: graph.placeholder(f"x{k}") for k, n in enumerate(inputs)}
    for node in nodes:
        if node.op == "get_attr":
            copies[node] = weights[str(node.target)]
        elif node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], copies.__getitem__))
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), copies.__getitem__)
            copies[node] = graph.create_node("call_function", node.target, args, kwargs, name=f"v{len(copies)}")
        elif node.op != "placeholder":
            raise InvalidInput(f"A segment's graph holds a node {node.name!r} of the kind {node.op!r}, which no exported graph has.")
    return fx.GraphModule({}, graph), paths


__all__ = ["SharedCode"]
