"""Splitting a flat exported graph into segments: which values cross, which are computed again, which sizes are read anew."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from offramp.core.errors import NotCuttable

_GUARDS = ("_assert", "sym_constrain", "_check")
_SHAPE = "offramp_shape"


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


@dataclass(frozen=True)
class Split:
    """What `split` found.

    Attributes:
        segments: in execution order.
        batch_dims: for each live tensor, input and output the dimensions that hold the batch.
        shapes: for each live tensor its symbolic shape and dtype.
        symbol: the batch, as the exporter names it.
        constants: outputs that are not computed (``None``, numbers), by position.
    """

    segments: tuple[Segment, ...]
    batch_dims: dict[str, tuple[int, ...]]
    shapes: dict[str, tuple[tuple[Any, ...], torch.dtype]]
    symbol: Any
    constants: dict[int, Any]


def split(
    graph_module: fx.GraphModule,
    at: Sequence[str],
    states: Mapping[str, Tensor],
    leaves: Sequence[Any],
    batch: int,
    *,
    ahead: bool = False,
) -> Split:
    """Split an exported graph after each module in ``at``.

    Args:
        graph_module: flat graph of an exported model. Changed in place.
        at: module paths.
        states: what each module returned for the example, to find its node by value.
        leaves: flat example inputs, one per placeholder.
        batch: rows in the example.
        ahead: bring what does not depend on a place's state, and is read beyond the next place, before that place.

    Raises:
        NotCuttable: a module leaves no node, the batch is fixed or folded into another dimension, or a value is lost.
    """
    _rename_mutated(graph_module.graph)
    nodes = [n for n in graph_module.graph.nodes if not any(g in str(n.target) for g in _GUARDS)]
    order = {n: i for i, n in enumerate(nodes)}
    ends = {path: _last_node(nodes, order, path) for path in at}
    paths = sorted(at, key=lambda p: ends[p])
    bounds = [ends[p] for p in paths]
    symbol = _name_sizes(nodes, leaves, batch)
    hidden = _hidden_nodes(graph_module, order, ends, states, leaves)

    # Which segment makes a node: the first whose end is not before it. Sizes and what is made of sizes alone belong nowhere:
    # they are computed again wherever they are read, so that they are right after rows have left.
    again = _size_derived(nodes, symbol)
    part: dict[fx.Node, int] = {}
    for node in nodes:
        if node.op == "placeholder":
            part[node] = -1
        elif node.target is operator.getitem:
            part[node] = part[node.all_input_nodes[0]]  # a tuple never crosses a split, its elements do
        else:
            part[node] = next((i for i, end in enumerate(bounds) if order[node] <= end), len(bounds))
    for path, node in hidden.items():
        again.discard(node)
        if part[node] > paths.index(path):
            raise NotCuttable(f"No value in the exported graph matches the output of {path!r}.", reason="output", path=path)
    if ahead:
        _bring_ahead(nodes, part, [hidden[p] for p in paths], again)
    last = len(paths)
    output = nodes[-1]
    part[output] = last

    known = set(nodes)
    crossing = [n for n in nodes if n.op in ("placeholder", "call_function", "call_module") and _is_tensor(n) and n not in again]
    needed = {n: max(_uses(n, part, known, again), default=-1) for n in crossing}
    inputs = [n for n in nodes if n.op == "placeholder" and _is_tensor(n)]

    def live_at(k: int) -> list[fx.Node]:
        return [n for n in crossing if part[n] <= k and (needed[n] > k or n is hidden[paths[k]])]

    # A size is read from any tensor that crosses anyway; only where none has it, the tensor it was read from crosses too.
    for k in range(1, last + 1):
        body = [n for n in nodes if part[n] == k]
        offered = {s for n in live_at(k - 1) for s in _sizes(n)}
        for size in _sizes_read(body, again):
            source = size.all_input_nodes[0] if size.target is torch.ops.aten.sym_size.int else None
            if _is_fixed(size) or (source is not None and ((part[source] == k and source not in again) or size.meta[_SHAPE] in offered)):
                continue
            for tensor in _tensor_sources(size):
                if tensor in needed:
                    needed[tensor] = max(needed[tensor], k)

    live = [live_at(k) for k in range(last)]
    batch_dims = {n.name: _batch_dims(n, symbol) for n in {n for boundary in live for n in boundary} | set(inputs)}
    flat = list(output.args[0]) if isinstance(output.args[0], tuple | list) else [output.args[0]]
    constants = {i: o for i, o in enumerate(flat) if not isinstance(o, fx.Node)}
    segments = []
    for k in range(last + 1):
        body = [n for n in nodes if part[n] == k and n.op in ("call_function", "call_module") and n not in again]
        makes = [o for o in flat if isinstance(o, fx.Node)] if k == last else [n for n in live[k] if part[n] == k]
        module, reads = _extract(graph_module, body, makes, live[k - 1] if k else inputs, again)
        outputs = tuple(f"out{i}" for i, o in enumerate(flat) if isinstance(o, fx.Node)) if k == last else tuple(n.name for n in makes)
        crossed = outputs if k == last else tuple(n.name for n in live[k])
        segments.append(
            Segment("output" if k == last else paths[k], module, reads, outputs, crossed, None if k == last else hidden[paths[k]].name)
        )
    for i, node in enumerate(flat):
        batch_dims[f"out{i}"] = _batch_dims(node, symbol) if isinstance(node, fx.Node) and _is_tensor(node) else ()
    shapes = {n.name: (_sizes(n), n.meta["val"].dtype) for n in {n for boundary in live for n in boundary} | set(inputs)}
    for path, node in hidden.items():
        if not shapes[node.name][0] or shapes[node.name][0][0] != symbol:
            raise NotCuttable(
                f"The output of {path!r} is shaped {tuple(node.meta['val'].shape)}; an exit reads a tensor whose first dimension is the "
                "batch. Cut after an enclosing module.",
                reason="output",
                path=path,
            )
    return Split(tuple(segments), batch_dims, shapes, symbol, constants)


def _bring_ahead(nodes: Sequence[fx.Node], part: dict[fx.Node, int], states: Sequence[fx.Node], again: set[fx.Node]) -> None:
    """Move nodes that are independent of the state at a place from the segment after it into the one before, if later segments read them.

    What is random or shares memory with something that is written to stays where it is.
    """
    known = set(nodes)
    root = _roots(nodes)
    written = {root.get(t, t) for n in nodes for t in mutated(n)}

    def fixed(node: fx.Node) -> bool:
        return is_random(node) or root[node] in written or bool(mutated(node))

    for k in range(len(states), 0, -1):
        dependent = {states[k - 1]}
        for node in nodes:
            if any(s in dependent for s in node.all_input_nodes):
                dependent.add(node)
        for node in nodes:
            if part[node] != k or node.op != "call_function" or node in again or node in dependent or not _is_tensor(node):
                continue
            if max(_uses(node, part, known, again), default=-1) <= k:
                continue
            moved: list[fx.Node] = []
            stack = [node]
            while stack:
                source = stack.pop()
                if part.get(source) == k and source not in moved:
                    moved.append(source)
                    stack += source.all_input_nodes
            if not any(fixed(n) for n in moved):
                for source in moved:
                    part[source] = k - 1
                    for user in source.users:  # a tuple never crosses a split, its elements do
                        if user in known and user.target is operator.getitem:
                            part[user] = k - 1


def _name_sizes(nodes: Sequence[fx.Node], leaves: Sequence[Any], batch: int) -> Any:
    """Note the sizes of every node with one symbol for the batch, and return that symbol.

    Inputs that forward never compares (a mask and the tokens it belongs to) get a symbol each; all of them are the batch.

    Raises:
        NotCuttable: the exporter fixed the batch at a number.
    """
    symbols, fixed = [], []
    for node, leaf in zip((n for n in nodes if n.op == "placeholder"), leaves, strict=True):
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch and _is_tensor(node):
            size = node.meta["val"].shape[0]
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                symbols.append(size.node.expr)
            elif any(user.target != torch.ops.aten.sym_size.int for user in node.users):
                fixed.append(node.name)
    if fixed or not symbols:
        raise NotCuttable(
            f"The exporter fixed the batch dimension of {', '.join(fixed) or 'every input'}: forward does something that holds for one "
            "batch size only (a Python `if` on the size, a reshape with a literal, a stored buffer). Make it use x.shape[0].",
            reason="batch",
        )
    one = {s: symbols[0] for s in symbols}

    def named(size: Any) -> Any:
        if not isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
            return size
        expression = size.node.expr.xreplace(one)
        return int(expression) if getattr(expression, "is_Integer", False) else expression

    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            node.meta[_SHAPE] = tuple(named(s) for s in value.shape)
        elif _is_size(node):
            node.meta[_SHAPE] = named(value)
    return symbols[0]


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    """Shape of a tensor node: numbers and expressions."""
    found: tuple[Any, ...] = node.meta[_SHAPE]
    return found


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _is_size(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "call_function" and isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat | int | float | bool)


def _is_fixed(node: fx.Node) -> bool:
    """A size that the exporter found to be one number for all inputs."""
    return _is_size(node) and type(node.meta[_SHAPE]) is int


def _paths(node: fx.Node) -> list[str]:
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None) if node.op == "call_function" else None


def is_random(node: fx.Node) -> bool:
    """Whether an operator draws random numbers."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def mutated(node: fx.Node) -> list[fx.Node]:
    """Arguments that an operator writes to."""
    schema = _schema(node)
    if schema is None or not schema.is_mutable:
        return []
    found = []
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            found += (
                [value]
                if isinstance(value, fx.Node)
                else [v for v in value if isinstance(v, fx.Node)]
                if isinstance(value, tuple | list)
                else []
            )
    return found


def _rename_mutated(graph: fx.Graph) -> None:
    """After ``y = x.op_()`` the graph may still say ``x``; say ``y``, so that liveness by name is liveness by value."""
    for node in list(graph.nodes):
        for target in mutated(node):
            if isinstance(node.meta.get("val"), Tensor):
                target.replace_all_uses_with(node, delete_user_cb=partial(_later, node=node))


def _later(user: fx.Node, *, node: fx.Node) -> bool:
    return user is not node and bool(user > node)


def _roots(nodes: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The node whose memory each node may share, by the operators' own declarations."""
    root: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        root[node] = node
        schema = _schema(node)
        if schema is None:
            if node.target is operator.getitem:
                root[node] = root.get(node.all_input_nodes[0], node.all_input_nodes[0])
            continue
        if any(r.alias_info is not None for r in schema.returns):
            for index, argument in enumerate(schema.arguments):
                source = node.args[index] if index < len(node.args) else None
                if argument.alias_info is not None and isinstance(source, fx.Node):
                    root[node] = root.get(source, source)
                    break
    return root


def _size_derived(nodes: Sequence[fx.Node], symbol: Any) -> set[fx.Node]:
    """Sizes, and tensors made of the batch size and constants alone (``arange(B)``, ``token.expand(B, ...)``).

    Such a tensor is wrong to carry over a change of rows: ``arange(B)`` of the rows {2, 5} would be {2, 5} and not {0, 1}.
    Products and convolutions are left out: they are carried, not paid twice. So is what is written to or random.
    """
    root = _roots(nodes)
    written = {root.get(t, t) for n in nodes for t in mutated(n)}
    found: set[fx.Node] = set()
    constant: set[fx.Node] = set()
    for node in nodes:
        if _is_size(node):
            found.add(node)
            continue
        if node.op == "get_attr":
            constant.add(node)
            continue
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if root[node] in written or node.target.overloadpacket in flop_registry or is_random(node):
            continue
        sources = node.all_input_nodes
        if all(s in constant for s in sources):
            constant.add(node)
        elif all(s in constant or (s in found and not (_is_size(s) and _data_dependent(s))) for s in sources) and any(
            _on_batch(s, symbol) for s in sources if s in found
        ):
            found.add(node)
    # What the batch-made tensors are made of is made again with them; it is cheap, or it would not be here.
    stack = [s for n in found for s in n.all_input_nodes]
    while stack:
        node = stack.pop()
        if node in constant and node.op != "get_attr" and node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def _on_batch(node: fx.Node, symbol: Any) -> bool:
    if _is_tensor(node):
        return True  # a tensor is only in the set because it depends on the batch
    return symbol in getattr(node.meta[_SHAPE], "free_symbols", ())


def _data_dependent(size: fx.Node) -> bool:
    """Whether a number was read out of a tensor's values (``.item()``) and not out of its shape."""
    if size.target is torch.ops.aten.sym_size.int:
        return False
    return any(_data_dependent(s) if _is_size(s) else True for s in size.all_input_nodes)


def _uses(node: fx.Node, part: Mapping[fx.Node, int], known: set[fx.Node], again: set[fx.Node]) -> set[int]:
    """Segments that read the values of a node, through what is computed again too; reading a size is not a use."""
    found: set[int] = set()
    for user in node.users:
        if user not in known or user.target is torch.ops.aten.sym_size.int:
            continue
        found |= _uses(user, part, known, again) if user in again else {part[user]}
    return found


def _sizes_read(body: Sequence[fx.Node], again: set[fx.Node]) -> set[fx.Node]:
    """The sizes that nodes of a segment read at the bottom: those taken from tensors."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [s for n in body if n not in again for s in n.all_input_nodes if s in again]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if _is_size(node) and any(_is_tensor(s) and s not in again for s in node.all_input_nodes):
            found.add(node)
        stack += [s for s in node.all_input_nodes if s in again]
    return found


def _tensor_sources(size: fx.Node) -> list[fx.Node]:
    return [s for s in size.all_input_nodes if _is_tensor(s) and s.op != "get_attr"]


def _last_node(nodes: Sequence[fx.Node], order: Mapping[fx.Node, int], path: str) -> int:
    calls = {p for n in nodes for p in _paths(n) if p == path or p.startswith(f"{path}@")}
    if any("@" in p for p in calls):
        raise NotCuttable(
            f"The module at {path!r} runs {len(calls)} times in one forward (shared or looped), so the place is ambiguous. "
            "Cut after a module that runs once.",
            reason="repeated",
            path=path,
        )
    inside = [n for n in nodes if n.op not in ("placeholder", "get_attr") and path in _paths(n)]
    if not inside:
        raise NotCuttable(
            f"The module at {path!r} leaves no operation in the exported graph (it is skipped, or is an identity). "
            "Cut after the module before or after it.",
            reason="unreached",
            path=path,
        )
    return max(order[n] for n in inside)


def _hidden_nodes(
    graph_module: fx.GraphModule, order: Mapping[fx.Node, int], ends: Mapping[str, int], states: Mapping[str, Tensor], leaves: Sequence[Any]
) -> dict[str, fx.Node]:
    """The node that is each module's output, found by value on the example: the last one inside it, else the last before its end."""
    best: dict[str, tuple[tuple[bool, bool, float, int], fx.Node]] = {}

    class Finder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and n in order and n.op != "get_attr":
                for path, state in states.items():
                    if order[n] <= ends[path] and value.shape == state.shape and value.dtype == state.dtype and rounding(value, state):
                        exact = same(value, state)
                        rank = (exact, path in _paths(n), 0.0 if exact else -gap(value, state), order[n])
                        if path not in best or rank > best[path][0]:
                            best[path] = rank, n
            return value

    with torch.no_grad():
        Finder(graph_module).run(*(t.clone() if isinstance(t, Tensor) else t for t in leaves), enable_io_processing=False)
    for path in ends:
        if path not in best:
            raise NotCuttable(
                f"No value in the exported graph equals the output of {path!r} in an ordinary forward. A model that is random in "
                "evaluation mode cannot be cut.",
                reason="mismatch",
                path=path,
            )
    return {path: node for path, (_, node) in best.items()}


def rounding(got: Tensor, want: Tensor, tolerance: float | None = None) -> bool:
    """Equal up to rounding: other kernels, or the same for another batch size, sum in another order.

    Args:
        got: a tensor.
        want: another.
        tolerance: relative to the largest magnitude; by default 1e-4 in float32 and 5e-2 below.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if not want.is_floating_point():
        return torch.equal(got, want)
    if tolerance is None:
        tolerance = 1e-4 if torch.finfo(want.dtype).eps < 1e-4 else 5e-2
    finite = want.float().nan_to_num(0.0, 0.0, 0.0)
    scale = float(finite.abs().max().clamp_min(1e-6)) if want.numel() else 1.0
    return torch.allclose(got.float(), want.float(), rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def gap(a: Any, b: Any) -> float:
    """Largest difference of two tensors; infinite if they cannot be compared."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return float("inf")
    return float((a.float() - b.float()).abs().max()) if a.numel() else 0.0


def same(left: Any, right: Any) -> bool:
    """Equal bit for bit; a NaN equals a NaN."""
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return bool(left == right) or left is right
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(left, right) or (left.is_floating_point() and bool(((left == right) | (left.isnan() & right.isnan())).all()))


def _batch_dims(node: fx.Node, symbol: Any) -> tuple[int, ...]:
    dims = []
    for dim, expression in enumerate(_sizes(node)):
        if expression == symbol:
            dims.append(dim)
        elif not isinstance(expression, int) and symbol in expression.free_symbols:
            raise NotCuttable(
                f"The tensor {node.name!r} crosses the cut with dimension {dim} = {expression}, in which the batch is folded together "
                "with something else, so its rows cannot be told apart. Cut after an enclosing module that unfolds it.",
                reason="live",
                path=next(iter(_paths(node)[-1:]), None),
            )
    return tuple(dims)


def _extract(
    graph_module: fx.GraphModule, body: Sequence[fx.Node], makes: Sequence[fx.Node], available: Sequence[fx.Node], again: set[fx.Node]
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Copy ``body`` into a graph of its own, reading ``available`` live tensors and giving ``makes``."""
    offered = {n: i for i, n in enumerate(available)}
    inside = set(body)
    body = _used(body, makes, again)
    read = {s for n in (*body, *(m for m in makes if m in offered)) for s in ((n,) if n in offered else n.all_input_nodes) if s in offered}
    # Where a size comes from: its own tensor if that is made or read here, else any tensor read here, else any that crosses.
    provider: dict[fx.Node, tuple[fx.Node, int]] = {}

    def provide(size: fx.Node) -> tuple[fx.Node, int] | None:
        want = size.meta[_SHAPE]
        for tensor in (*sorted(read, key=offered.__getitem__), *available):
            for dim, have in enumerate(_sizes(tensor)):
                if have == want:
                    return tensor, dim
        return None

    seen: set[fx.Node] = set()

    def visit(node: fx.Node) -> None:
        if node in seen or (node in inside and node not in again):
            return
        seen.add(node)
        if node in offered:
            read.add(node)
        elif node in again and not _is_fixed(node):
            source = node.args[0] if node.target is torch.ops.aten.sym_size.int else None
            if source is not None and source not in inside and source not in read and (given := provide(node)) is not None:
                provider[node] = given
                read.add(given[0])
                return
            for parent in node.all_input_nodes:
                visit(parent)

    for node in (*body, *makes):
        for source in (node,) if node in again else node.all_input_nodes if node in inside else (node,):
            visit(source)
    graph = fx.Graph()
    inputs = sorted(read, key=offered.__getitem__)
    mapped: dict[fx.Node, Any] = {}
    for node in inputs:
        mapped[node] = graph.placeholder(node.name)
        mapped[node].meta = dict(node.meta)

    def emit(node: fx.Node) -> Any:
        if node in mapped:
            return mapped[node]
        if node in again and _is_fixed(node):
            mapped[node] = node.meta[_SHAPE]
            return mapped[node]
        if node in provider:
            tensor, dim = provider[node]
            mapped[node] = graph.call_function(torch.ops.aten.sym_size.int, (mapped[tensor], dim))
            mapped[node].meta = dict(node.meta)
            return mapped[node]
        if node.op not in ("get_attr", "call_function", "call_module") or not (node in inside or node in again or node.op == "get_attr"):
            raise NotCuttable(f"The value {node.name!r} is needed after the cut but does not cross it.", reason="live")
        for source in node.all_input_nodes:
            emit(source)
        mapped[node] = graph.node_copy(node, lambda n: mapped[n])
        return mapped[node]

    for node in body:
        emit(node)
    graph.output(tuple(emit(n) for n in makes))
    graph.lint()
    return fx.GraphModule(graph_module, graph), tuple(n.name for n in inputs)


def _used(body: Sequence[fx.Node], makes: Sequence[fx.Node], again: set[fx.Node]) -> list[fx.Node]:
    """The part of a segment that its results depend on; what writes in place is kept."""
    wanted: set[fx.Node] = set()
    stack = [*makes, *(n for n in body if mutated(n))]
    while stack:
        node = stack.pop()
        if node not in wanted:
            wanted.add(node)
            if node.op != "placeholder":
                stack += node.all_input_nodes
    return [n for n in body if n in wanted]


def protect_inputs(segment: Segment, values: Sequence[Tensor]) -> None:
    """Clone, inside the segment, every input that running it once on ``values`` writes to.

    In-place operators would otherwise write into a state that was handed out, and running a segment twice from the same state
    would differ.
    """
    if not any(mutated(n) for n in segment.module.graph.nodes):
        return
    values = [v.clone() for v in values]
    before = [v._version for v in values]
    with torch.no_grad():
        segment.module(*values)
    written = {name for name, v, old in zip(segment.inputs, values, before, strict=True) if v._version != old}
    graph = segment.module.graph
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in written:
            with graph.inserting_after(node):
                copy = graph.call_function(torch.ops.aten.clone.default, (node,))
                copy.meta = dict(node.meta)
            node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
    if written:
        graph.lint()
        segment.module.recompile()
