"""The cut: any exportable PyTorch model as resumable segments, without an adapter.

The model is exported with its batch dimension dynamic and its flat graph is split after the last node of each
requested module. What crosses a split is the state: tensors whose batch dimension is known by its symbol, so that
choosing rows is an ``index_select`` on exactly those dimensions, masks, conditioning and skip connections included.
Integers computed from shapes never cross: each segment reads them again from the tensors it is given, so they are right
after rows have left. Parameters and buffers stay shared with the user's model.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils._pytree import SUPPORTED_NODES, TreeSpec, tree_flatten, tree_map, tree_unflatten

from offramp.backbones.taps import Taps, first_tensor, resolve
from offramp.core.errors import InvalidInput, NotCuttable
from offramp.core.flops import counter
from offramp.core.types import BackboneSpec, SegmentSpec

_GUARDS = ("_assert", "sym_constrain", "_check")


@dataclass(frozen=True)
class CutState:
    """A cut model stopped between two segments.

    Attributes:
        values: live tensors by graph name; after the last segment, the flat outputs by position.
        rows: items in the state.
        at: segments that have run.
        hidden: the tensor an exit reads here; ``None`` before the first and after the last segment.
    """

    values: Mapping[str, Any]
    rows: int
    at: int
    hidden: Tensor | None = None


@dataclass(frozen=True)
class Segment:
    """One piece: a graph module from tensors to a tuple of tensors.

    Attributes:
        name: module path after which it ends; ``"output"`` for the last.
        module: takes ``inputs`` in order, returns the new live tensors ``outputs`` in order (the flat outputs, for the last).
        inputs: names of live tensors it reads.
        outputs: names of live tensors it makes.
        live: names of everything that crosses its end, passed-through tensors included.
        hidden: name of the tensor an exit reads at its end.
    """

    name: str
    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    live: tuple[str, ...]
    hidden: str | None


class Cut:
    """A model as resumable segments (a `Backbone`). Made by `cut`.

    Attributes:
        segments: in execution order.
        spec: names, FLOPs and bytes of each.
        batch_dims: for each live tensor the dimensions that hold the batch (usually ``(0,)``, ``()`` if it has none).
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        spec: BackboneSpec,
        batch_dims: Mapping[str, tuple[int, ...]],
        placeholders: Sequence[tuple[str, Any]],
        in_spec: TreeSpec,
        out_spec: TreeSpec,
        output_constants: Mapping[int, Any],
    ) -> None:
        self.segments = tuple(segments)
        self.spec = spec
        self.batch_dims = dict(batch_dims)
        self._placeholders = tuple(placeholders)
        self._in_spec = in_spec
        self._out_spec = out_spec
        self._output_constants = dict(output_constants)

    def begin(self, *args: Any, **kwargs: Any) -> CutState:
        """Bind inputs, given as they are given to the model.

        Raises:
            InvalidInput: another structure, dtype, rank or constant than the example the model was cut with.
        """
        kwargs = {k: kwargs[k] for k in self._keyword_order() if k in kwargs} | kwargs
        leaves, spec = tree_flatten((args, kwargs))
        if spec != self._in_spec:
            raise InvalidInput(
                f"The inputs have another structure than the example: given {len(args)} positional and {sorted(kwargs)}, "
                f"expected {self._in_spec}. Pass what was passed as `example`."
            )
        values: dict[str, Tensor] = {}
        rows: int | None = None
        for leaf, (name, expected) in zip(leaves, self._placeholders, strict=True):
            if not isinstance(expected, Tensor):
                if leaf != expected and leaf is not expected:
                    raise InvalidInput(f"Input {name!r} is {leaf!r}; the model was cut with the constant {expected!r}. Cut it again.")
                continue
            if not isinstance(leaf, Tensor) or leaf.ndim != expected.ndim or leaf.dtype != expected.dtype:
                given = f"{leaf.dtype} of rank {leaf.ndim}" if isinstance(leaf, Tensor) else type(leaf).__name__
                raise InvalidInput(f"Input {name!r} is {given}; expected a tensor of {expected.dtype} and rank {expected.ndim}.")
            for dim, (size, want) in enumerate(zip(leaf.shape, expected.shape, strict=True)):
                if isinstance(want, int) and size != want:
                    raise InvalidInput(
                        f"Input {name!r} has size {size} in dimension {dim}; the model was cut with {want} there, which is fixed. "
                        "Resize the input, or cut again with an example of that size."
                    )
            for dim in self.batch_dims.get(name, ()):
                if rows is not None and leaf.shape[dim] != rows:
                    raise InvalidInput(f"Input {name!r} has {leaf.shape[dim]} rows where another input has {rows}.")
                rows = leaf.shape[dim]
            values[name] = leaf
        if rows is None:
            raise InvalidInput("No input carries the batch dimension.")
        return CutState(values, rows, 0)

    def _keyword_order(self) -> list[str]:
        children = self._in_spec.children() if hasattr(self._in_spec, "children") else self._in_spec.children_specs
        return list(children[1].context or [])

    def run(self, state: CutState, start: int, stop: int) -> CutState:
        """Run segments ``start`` to ``stop - 1``.

        Raises:
            InvalidInput: the state is not at ``start``, or the range is not inside the model.
        """
        if state.at != start or not start <= stop <= len(self.segments):
            raise InvalidInput(f"Cannot run segments [{start}, {stop}) of {len(self.segments)} on a state at segment {state.at}.")
        for index in range(start, stop):
            made = self.segments[index].module(*(state.values[n] for n in self.segments[index].inputs))
            state = self.advance(state, made)
        return state

    def advance(self, state: CutState, made: Sequence[Tensor]) -> CutState:
        """The state after its next segment has returned ``made``. For engines that call segments themselves."""
        segment = self.segments[state.at]
        values = {**state.values, **dict(zip(segment.outputs, made, strict=True))}
        kept = {n: values[n] for n in segment.live}
        return CutState(kept, state.rows, state.at + 1, kept[segment.hidden] if segment.hidden is not None else None)

    def end(self, state: CutState) -> Any:
        """The model's outputs, in the structure its forward returns (tuple, dict, dataclass)."""
        if state.at != len(self.segments):
            raise InvalidInput(f"The state is at segment {state.at} of {len(self.segments)}; run the rest first.")
        leaves = [state.values.get(f"out{i}", self._output_constants.get(i)) for i in range(self._out_spec.num_leaves)]
        return tree_unflatten(leaves, self._out_spec)

    def take(self, state: CutState, rows: Tensor) -> CutState:
        """The state of the given rows (int64 ``[R]`` on the state's device), in that order."""
        values = {}
        for name, value in state.values.items():
            for dim in self.batch_dims.get(name, ()):
                value = value.index_select(dim, rows)
            values[name] = value
        hidden = None
        if 0 < state.at < len(self.segments):
            hidden = values[self.segments[state.at - 1].hidden]
        return CutState(values, int(rows.numel()), state.at, hidden)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The whole model: begin, run everything, end."""
        return self.end(self.run(self.begin(*args, **kwargs), 0, len(self.segments)))


def cut(
    model: nn.Module,
    at: Sequence[str],
    example: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    batch_size: int | None = None,
    verify: bool = True,
) -> Cut:
    """Split ``model`` after each module in ``at``.

    Args:
        model: any PyTorch module that ``torch.export`` accepts. It is exported in evaluation mode and left as it was.
        at: module paths, each run exactly once per forward; any order.
        example: positional inputs. The batch is dimension 0 of the tensors whose size there equals ``batch_size``. Sequence
            length (dimension 1 of integer and boolean tensors of rank 2 or more) is dynamic too.
        example_kwargs: keyword inputs.
        batch_size: size of the batch in the example, if it is not dimension 0 of the first tensor.
        verify: run the example and compare states and outputs with the uncut model, also after permuting the rows between segments.

    Returns:
        The cut model, its parameters shared with ``model``.

    Raises:
        NotCuttable: a path is missing, never reached or runs more than once; the model cannot be exported; its batch
            dimension is specialised away; or the segments do not give the model's output.
        InvalidInput: no tensor in the example, or no path.
    """
    kwargs = dict(example_kwargs or {})
    if not at:
        raise InvalidInput("`at` is empty: name at least one module to cut after.")
    for path in at:
        resolve(model, path)
    args, kwargs, batch = _two_rows(example, kwargs, batch_size)
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            reference, states = _tapped(model, at, args, kwargs)
            graph_module = _export(model, args, kwargs, batch)
        made = _split(graph_module, at, states, batch, (args, kwargs))
        if verify:
            _verify(made, at, args, kwargs, reference, states, batch)
    finally:
        for module, flag in training.items():
            module.training = flag
    return made


def _two_rows(args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int | None) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """A batch of one would be specialised away by the exporter, so repeat it."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and t.ndim > 0]
    if not tensors:
        raise InvalidInput("The example holds no tensor with a batch dimension. Pass example=(inputs,) or example_kwargs={...}.")
    batch = batch_size if batch_size is not None else tensors[0].shape[0]
    if batch >= 2:
        return args, kwargs, batch
    repeat = lambda t: torch.cat([t, t]) if isinstance(t, Tensor) and t.ndim > 0 and t.shape[0] == batch else t  # noqa: E731
    args, kwargs = tree_map(repeat, (args, kwargs))
    return args, kwargs, 2


def _tapped(model: nn.Module, at: Sequence[str], args: Any, kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
    with Taps(model, at) as taps:
        output = model(*args, **kwargs)
        states = dict(zip(at, (s.clone() for s in taps.states), strict=True))
    _register_dataclasses(output)
    return output, states


def _register_dataclasses(output: Any) -> None:
    """Plain dataclasses must be known to pytree before export can return them."""
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        if type(output) not in SUPPORTED_NODES:
            torch.export.register_dataclass(type(output), serialized_type_name=f"{type(output).__module__}.{type(output).__qualname__}")
        for item in dataclasses.fields(output):
            _register_dataclasses(getattr(output, item.name))
    elif isinstance(output, tuple | list):
        for item in output:
            _register_dataclasses(item)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> fx.GraphModule:
    def dims(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        dynamic: dict[int, Any] = {}
        if leaf.ndim and leaf.shape[0] == batch:
            dynamic[0] = Dim.AUTO
        if leaf.ndim >= 2 and not leaf.is_floating_point() and not leaf.is_complex() and leaf.shape[1] > 1:
            dynamic[1] = Dim.AUTO
        return dynamic

    shapes = tree_map(dims, (args, kwargs))
    # Keyword inputs are matched by name and positional ones by the names of forward's parameters.
    try:
        exported = torch.export.export(model, args, kwargs, dynamic_shapes=_named_shapes(model, shapes), strict=False)
    except Exception as error:  # every exporter failure is the same to the caller: this model cannot be cut
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotCuttable(
            f"torch.export cannot export {type(model).__name__}: {reason} Cut a submodule that it can export, or remove "
            "data-dependent Python control flow from forward.",
            reason="export",
        ) from error
    return exported.module(check_guards=False)


def _named_shapes(model: nn.Module, shapes: tuple[Any, dict[str, Any]]) -> Any:
    positional, keyword = shapes
    if not keyword:
        return positional
    import inspect

    names = list(inspect.signature(model.forward).parameters.values())
    bound: dict[str, Any] = {}
    for index, shape in enumerate(positional):
        parameter = names[min(index, len(names) - 1)]
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            bound[parameter.name] = (*bound.get(parameter.name, ()), shape)
        else:
            bound[parameter.name] = shape
    known = {p.name for p in names if p.kind is not inspect.Parameter.VAR_KEYWORD}
    extra = next((p.name for p in names if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    for name, shape in keyword.items():
        if name in known or extra is None:
            bound[name] = shape
        else:
            bound.setdefault(extra, {})[name] = shape
    return bound


def _paths(node: fx.Node) -> list[str]:
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def _is_size(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat | int | float | bool) and node.op == "call_function"


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def _split(
    graph_module: fx.GraphModule, at: Sequence[str], states: Mapping[str, Tensor], batch: int, example: tuple[Any, Any]
) -> Cut:
    nodes = [n for n in graph_module.graph.nodes if not any(g in str(n.target) for g in _GUARDS)]
    order = {n: i for i, n in enumerate(nodes)}
    ends = {path: _last_node(nodes, order, path) for path in at}
    paths = sorted(at, key=lambda p: ends[p])
    bounds = [ends[p] for p in paths]

    symbol = _batch_symbol(nodes, example, batch)
    part: dict[fx.Node, int] = {}
    for node in nodes:
        if node.op == "placeholder":
            part[node] = -1
        elif node.target is operator.getitem:
            part[node] = part[node.args[0]]  # a tuple never crosses a split, its elements do
        else:
            part[node] = next((i for i, end in enumerate(bounds) if order[node] <= end), len(bounds))
    output = nodes[-1]
    segments_count = len(paths) + 1
    part[output] = segments_count - 1

    crossing = [n for n in nodes if n.op in ("placeholder", "call_function", "call_module") and not _is_size(n) and _is_tensor(n)]
    needed: dict[fx.Node, int] = {n: max((u for u in _uses(n, part, set(nodes))), default=-1) for n in crossing}
    hidden = {path: _hidden_node(nodes, order, path, states[path], part, set(nodes)) for path in paths}
    for path, node in hidden.items():
        needed[node] = max(needed[node], part[hidden[path]])

    batch_dims: dict[str, tuple[int, ...]] = {}
    live: list[list[fx.Node]] = []
    for k in range(segments_count - 1):
        here = [n for n in crossing if part[n] <= k and (needed[n] > k or n is hidden[paths[k]])]
        live.append(here)
    for node in {n for boundary in live for n in boundary} | {n for n in nodes if n.op == "placeholder" and _is_tensor(n)}:
        batch_dims[node.name] = _batch_dims(node, symbol)

    outputs = list(output.args[0]) if isinstance(output.args[0], tuple | list) else [output.args[0]]
    constants = {i: o for i, o in enumerate(outputs) if not isinstance(o, fx.Node)}
    segments = []
    for k in range(segments_count):
        last = k == segments_count - 1
        makes = [o for o in outputs if isinstance(o, fx.Node)] if last else [n for n in live[k] if part[n] == k]
        available = live[k - 1] if k else [n for n in nodes if n.op == "placeholder" and _is_tensor(n)]
        body = [n for n in nodes if part.get(n) == k and n.op == "call_function" or (part.get(n) == k and n.op == "call_module")]
        module, inputs = _extract(graph_module, body, makes, available)
        names = tuple(f"out{i}" for i, o in enumerate(outputs) if isinstance(o, fx.Node)) if last else tuple(n.name for n in makes)
        crossing_names = names if last else tuple(n.name for n in live[k])
        segments.append(
            Segment("output" if last else paths[k], module, inputs, names, crossing_names, None if last else hidden[paths[k]].name)
        )
    if constants:
        out_dims = {f"out{i}": () for i in constants}
        batch_dims.update(out_dims)
    for i, node in enumerate(outputs):
        if isinstance(node, fx.Node) and _is_tensor(node):
            batch_dims[f"out{i}"] = _batch_dims(node, symbol)

    info = graph_module.graph._codegen.pytree_info  # the exporter keeps input and output structure here
    placeholders = [(n.name, n.meta.get("val")) for n in nodes if n.op == "placeholder"]
    leaves = tree_flatten(example)[0]
    fixed = [(name, value if isinstance(value, Tensor) else leaf) for (name, value), leaf in zip(placeholders, leaves, strict=True)]
    spec = _spec(segments, {n.name: n for n in nodes}, hidden, paths, fixed, example, symbol, batch)
    return Cut(segments, spec, batch_dims, fixed, info.in_spec, info.out_spec, constants)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _uses(node: fx.Node, part: Mapping[fx.Node, int], known: set[fx.Node]) -> list[int]:
    """Segments that read a node, through sizes too: a size is recomputed where it is used."""
    found = []
    for user in node.users:
        if user not in known:
            continue
        if _is_size(user):
            found += _uses(user, part, known)
        else:
            found.append(part[user])
    return found


def _last_node(nodes: Sequence[fx.Node], order: Mapping[fx.Node, int], path: str) -> int:
    inside = [n for n in nodes if n.op != "placeholder" and path in _paths(n)]
    if any(f"{path}@" in p for n in nodes for p in _paths(n)):
        calls = len({p for n in nodes for p in _paths(n) if p == path or p.startswith(f"{path}@")})
        raise NotCuttable(
            f"The module at {path!r} runs {calls} times in one forward (shared or looped), so the place is ambiguous. "
            "Cut after a module that runs once.",
            reason="repeated",
            path=path,
        )
    if not inside:
        raise NotCuttable(
            f"The module at {path!r} leaves no operation in the exported graph (it is skipped, or is an identity). "
            "Cut after the module before or after it.",
            reason="unreached",
            path=path,
        )
    return max(order[n] for n in inside)


def _batch_symbol(nodes: Sequence[fx.Node], example: tuple[Any, Any], batch: int) -> Any:
    leaves = tree_flatten(example)[0]
    placeholders = [n for n in nodes if n.op == "placeholder"]
    fixed = []
    for node, leaf in zip(placeholders, leaves, strict=True):
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch and _is_tensor(node):
            size = node.meta["val"].shape[0]
            if isinstance(size, torch.SymInt):
                return _expr(size)
            fixed.append(node.name)
    raise NotCuttable(
        f"The exporter fixed the batch dimension of {', '.join(fixed) or 'every input'} at {batch}: forward does something that holds "
        "for that batch size only (a Python `if` on the size, a reshape with a literal, a stored buffer). Make it use x.shape[0].",
        reason="batch",
    )


def _batch_dims(node: fx.Node, symbol: Any) -> tuple[int, ...]:
    dims = []
    for dim, size in enumerate(node.meta["val"].shape):
        expression = _expr(size)
        if isinstance(expression, int):
            continue
        if expression == symbol:
            dims.append(dim)
        elif symbol in expression.free_symbols:
            raise NotCuttable(
                f"The tensor {node.name!r} crosses the cut with dimension {dim} = {expression}, in which the batch is folded together "
                "with something else, so its rows cannot be told apart. Cut after an enclosing module that unfolds it.",
                reason="live",
                path=(_paths(node) or [None])[-1],
            )
    return tuple(dims)


def _hidden_node(
    nodes: Sequence[fx.Node], order: Mapping[fx.Node, int], path: str, state: Tensor, part: Mapping[fx.Node, int], known: set[fx.Node]
) -> fx.Node:
    """The node that is the module's output: of the right shape, made inside, read outside; the last of those."""
    inside = [n for n in nodes if n.op == "call_function" and path in _paths(n) and _is_tensor(n)]
    fits = [n for n in inside if len(n.meta["val"].shape) == state.ndim and n.meta["val"].dtype == state.dtype]
    read_outside = [n for n in fits if any(u in known and path not in _paths(u) for u in n.users)]
    exact = [n for n in read_outside or fits if all(not isinstance(s, int) or s == t for s, t in zip(n.meta["val"].shape, state.shape, strict=True))]
    if not exact:
        raise NotCuttable(f"No value in the exported graph matches the output of {path!r}.", reason="output", path=path)
    return exact[-1]


def _extract(
    graph_module: fx.GraphModule, body: Sequence[fx.Node], makes: Sequence[fx.Node], available: Sequence[fx.Node]
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Copy ``body`` into a graph of its own, reading ``available`` live tensors and giving ``makes``."""
    graph = fx.Graph()
    inside = set(body)
    offered = {n: i for i, n in enumerate(available)}
    read: set[fx.Node] = set()
    sizes: set[fx.Node] = set()

    def visit(node: fx.Node) -> None:
        if node in inside and not _is_size(node):
            return
        if node in offered:
            read.add(node)
        elif _is_size(node) and node not in sizes:
            sizes.add(node)
            for source in node.all_input_nodes:
                visit(source)

    for node in body:
        for source in node.all_input_nodes:
            visit(source)
    for node in makes:
        visit(node)
    inputs = sorted(read, key=lambda n: offered[n])
    mapped: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        mapped[node] = graph.placeholder(node.name)
        mapped[node].meta = dict(node.meta)

    def emit(node: fx.Node) -> fx.Node:
        if node not in mapped:
            if node.op not in ("get_attr", "call_function", "call_module"):
                raise NotCuttable(f"The value {node.name!r} is needed after the cut but does not cross it.", reason="live")
            for source in node.all_input_nodes:
                emit(source)
            mapped[node] = graph.node_copy(node, lambda n: mapped[n])
        return mapped[node]

    for node in body:
        if not _is_size(node):
            emit(node)
    graph.output(tuple(emit(n) for n in makes))
    graph.lint()
    return fx.GraphModule(graph_module, graph), tuple(n.name for n in inputs)


def _spec(
    segments: Sequence[Segment],
    nodes: Mapping[str, fx.Node],
    hidden: Mapping[str, fx.Node],
    paths: Sequence[str],
    placeholders: Sequence[tuple[str, Any]],
    example: tuple[Any, Any],
    symbol: Any,
    batch: int,
) -> BackboneSpec:
    values = {name: leaf for (name, kind), leaf in zip(placeholders, tree_flatten(example)[0], strict=True) if isinstance(kind, Tensor)}
    done: list[SegmentSpec] = []
    with torch.no_grad():
        for segment in segments:
            with counter() as counted:
                made = segment.module(*(values[n] for n in segment.inputs))
            values = {n: v for n, v in {**values, **dict(zip(segment.outputs, made, strict=True))}.items() if n in segment.live}
            last = segment.hidden is None
            tensors = {t.data_ptr(): t for t in (*segment.module.parameters(), *segment.module.buffers())}.values()
            done.append(
                SegmentSpec(
                    segment.name,
                    counted.get_total_flops() // batch,
                    sum(t.numel() * t.element_size() for t in tensors),
                    0 if last else sum(values[n].numel() * values[n].element_size() for n in segment.live if symbol in _symbols(nodes[n])) // batch,
                    None if last else tuple(s if isinstance(s, int) else -1 for s in _shape_without_batch(hidden[segment.name], symbol)),
                )
            )
    dynamic = any(_expr(s) != symbol and not isinstance(s, int) for _, v in placeholders if isinstance(v, Tensor) for s in v.shape)
    return BackboneSpec(tuple(done), dynamic)


def _symbols(node: fx.Node) -> set[Any]:
    return {s for size in node.meta["val"].shape if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols}


def _shape_without_batch(node: fx.Node, symbol: Any) -> list[Any]:
    shape = node.meta["val"].shape
    if not len(shape) or _expr(shape[0]) != symbol:
        raise NotCuttable(
            f"The output of the module is shaped {tuple(shape)}; an exit reads a tensor whose first dimension is the batch.",
            reason="output",
            path=(_paths(node) or [None])[-1],
        )
    return list(shape[1:])


def _verify(
    made: Cut, at: Sequence[str], args: Any, kwargs: Any, reference: Any, states: Mapping[str, Tensor], batch: int
) -> None:
    """Segments must give the model's own states and output, and rows must be independent of their place."""
    with torch.no_grad():
        state = made.begin(*args, **kwargs)
        permuted = state
        device = next(iter(state.values.values())).device
        back = torch.arange(batch - 1, -1, -1, device=device)
        for k, segment in enumerate(made.segments):
            state = made.run(state, k, k + 1)
            permuted = made.run(made.take(permuted, back), k, k + 1)
            if segment.hidden is not None and state.hidden is not None and not torch.equal(state.hidden, states[segment.name]):
                raise NotCuttable(
                    f"The state after {segment.name!r} differs from the module's output in an ordinary forward "
                    f"(largest difference {_gap(state.hidden, states[segment.name]):.3g}).",
                    reason="mismatch",
                    path=segment.name,
                )
        output = made.end(state)
        if len(made.segments) % 2:
            permuted = made.take(permuted, back)
        again = made.end(permuted)
    for name, left, right in zip(("cut", "cut with rows permuted"), (output, again), (reference, reference), strict=True):
        for got, want in zip(tree_flatten(left)[0], tree_flatten(right)[0], strict=True):
            same = torch.equal(got, want) if name == "cut" else torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(_scale(want)))
            if isinstance(want, Tensor) and not same and not (got.isnan() == want.isnan()).all():
                raise NotCuttable(f"The {name} gives another output than the model (NaN).", reason="mismatch")
            if isinstance(want, Tensor) and not same:
                raise NotCuttable(
                    f"The {name} gives another output than the model (largest difference {_gap(got, want):.3g}). A model that is random "
                    "or mixes rows in evaluation mode cannot be cut.",
                    reason="mismatch",
                )


def _scale(t: Tensor) -> Tensor:
    return t.float().abs().max().clamp_min(1.0) if t.numel() else torch.tensor(1.0)


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max()) if a.shape == b.shape else float("inf")


__all__ = ["Cut", "CutState", "Segment", "cut", "first_tensor"]
