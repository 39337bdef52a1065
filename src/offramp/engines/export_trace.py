"""Tracing the adaptive model with `torch.export`: its inputs as a list, the dimensions that may vary, what the exporter is promised."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten

from offramp.core.certificate import Plan
from offramp.core.errors import ExportError
from offramp.core.modes import evaluating
from offramp.engines.export_module import AdaptiveModule
from offramp.network import MultiExit

_ASSERTIONS = ("_assert_scalar", "sym_constrain_range", "_assert_tensor_metadata")


class Inputs:
    """What a network is called with, as a flat list of tensors: a file has neither structure nor constants.

    Attributes:
        example: the network's, on its device.
        tensors: those in the example, in order.
        names: one for each: forward's parameter, and the way inside it where the input is nested.
        rows: in the example.
    """

    def __init__(self, net: MultiExit) -> None:
        self.example = net.example.to(net.device, net.dtype)
        leaves, self._spec = tree_flatten(tuple(self.example))
        self._constants = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        self.tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        self.names = _names(net, self.example)
        self.rows = int(next(t.shape[0] for t in self.tensors if t.ndim))

    def call(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of forward with other tensors in the places of the example's."""
        given = iter(tensors)
        leaves = [self._constants[i] if i in self._constants else next(given) for i in range(self._spec.num_leaves)]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return args, kwargs

    def has_batch(self, leaf: Tensor) -> bool:
        """Whether the first dimension of one of ``tensors`` is the batch."""
        return leaf.ndim > 0 and leaf.shape[0] == self.rows

    def dynamic(self, leaf: Tensor) -> dict[int, Any]:
        """Which dimensions of one of ``tensors`` may vary, as `torch.export` takes it."""
        batch = {0: Dim.AUTO} if self.has_batch(leaf) else {}
        return {**batch, 1: Dim.AUTO} if has_length(leaf) else batch


def has_length(leaf: Tensor) -> bool:
    """As in the cut: dimension 1 of integer and boolean inputs may vary."""
    return leaf.ndim >= 2 and not leaf.is_floating_point() and not leaf.is_complex() and leaf.shape[1] > 1


def _names(net: MultiExit, example: Any) -> tuple[str, ...]:
    parameters = list(inspect.signature(net.model.forward).parameters.values())
    names = []
    for way, leaf in tree_flatten_with_path(tuple(example))[0]:
        if not isinstance(leaf, Tensor):
            continue
        steps: list[Any] = [getattr(step, "idx", getattr(step, "key", getattr(step, "name", ""))) for step in way]
        side, first, *rest = steps
        if side == 1:
            name = str(first)
        else:
            parameter = parameters[min(first, len(parameters) - 1)] if parameters else None
            variadic = parameter is None or parameter.kind is inspect.Parameter.VAR_POSITIONAL
            name = f"input_{first}" if parameter is None else f"{parameter.name}_{first}" if variadic else parameter.name
        names.append("_".join([name, *map(str, rest)]))
    return tuple(names)


class _Flat(nn.Module):
    """`AdaptiveModule` on thresholds and a flat list of tensors."""

    def __init__(self, module: AdaptiveModule, inputs: Inputs) -> None:
        super().__init__()
        self.module = module
        self._call = inputs.call

    def forward(self, thresholds: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        args, kwargs = self._call(tensors)
        return self.module.decide(thresholds, *args, **kwargs)


def trace_flat(module: AdaptiveModule, inputs: Inputs) -> ExportedProgram:
    """The adaptive model as a program of thresholds and ``inputs.tensors``.

    Raises:
        ExportError: ``torch.export`` cannot trace it.
    """
    flat = _Flat(module, inputs)
    with evaluating(flat):
        return _trace(flat, (module.thresholds, *inputs.tensors), {}, ({}, tuple(map(inputs.dynamic, inputs.tensors))))


def export_program(net: MultiExit, plan: Plan) -> ExportedProgram:
    """The adaptive model as a ``torch.export`` program that takes what the model takes and returns ``(output, exit)``.

    The batch is dynamic, and so is the length where the model allows it. Save it with ``torch.export.save`` if wanted; offramp
    neither writes nor reads that format, whose loader may unpickle.

    Raises:
        ExportError: ``torch.export`` cannot trace the composed model.
        InvalidInput: the plan has other exits than the network.
        FingerprintMismatch: the plan was made for another model.
    """
    module, inputs = AdaptiveModule(net, plan), Inputs(net)
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    for leaf in inputs.tensors:
        shapes[leaf] = inputs.dynamic(leaf)
    args, kwargs = inputs.example
    module.forward = _named_forward(module, len(args), kwargs)  # type: ignore[method-assign]
    with evaluating(module):
        program = _trace(module, args, kwargs, shapes)
    _drop_promises(program)
    return program


def _named_forward(module: AdaptiveModule, positional: int, keywords: Iterable[str]) -> Callable[..., Any]:
    """``forward`` with a parameter for each input, because the exporter takes no shapes for ``**kwargs``."""

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return module.decide(module.thresholds, *args, **kwargs)

    parameters = [inspect.Parameter(f"input_{i}", inspect.Parameter.POSITIONAL_OR_KEYWORD) for i in range(positional)]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in keywords]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return forward


def _trace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # every exporter failure is the same to the caller
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(
            f"torch.export cannot trace the adaptive model: {reason} Heads and rules must not branch in Python on values or on the "
            "number of rows."
        ) from error


def _drop_promises(program: ExportedProgram) -> None:
    """Remove the assertions that tracing left (two or more rows stay; see `offramp.engines.export_module`), and what only they read."""
    graph = program.graph_module.graph
    for node in reversed(list(graph.nodes)):
        if any(a in str(node.target) for a in _ASSERTIONS):
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


__all__ = ["Inputs", "export_program", "has_length", "trace_flat"]
