"""The cut: any exportable PyTorch model as resumable segments, without an adapter.

The model is exported with its batch dimension dynamic and its flat graph is split after the last node of each
requested module. What crosses a split is the state: tensors whose batch dimension is known by its symbol, so that
choosing rows is an ``index_select`` on exactly those dimensions, masks, conditioning and skip connections included.
Integers computed from shapes never cross: each segment reads them again from the tensors it is given, so they are right
after rows have left. Parameters and buffers stay shared with the user's model.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils._pytree import SUPPORTED_NODES, TreeSpec, tree_flatten, tree_map, tree_unflatten

from offramp.backbones.graph import Segment, Split, gap, protect_inputs, rounding, same, split
from offramp.backbones.taps import Stream, Taps, first_tensor, resolve
from offramp.core.errors import InvalidInput, NotCuttable, OfframpWarning
from offramp.core.flops import counter
from offramp.core.modes import evaluating
from offramp.core.types import BackboneSpec, SegmentSpec
from offramp.core.warn import warn
from offramp.core.whole import as_whole


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
class LiveTensor:
    """One tensor that crosses a cut.

    Attributes:
        name: key in `CutState.values`.
        shape: its shape; ``None`` where the batch is, ``-1`` where another size varies.
        dtype: its type.
        batch_dims: dimensions that hold the batch; ``()`` if it is the same for every row.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype
    batch_dims: tuple[int, ...]


class Cut:
    """A model as resumable segments (a `Backbone`). Made by `cut`.

    Attributes:
        segments: in execution order.
        spec: names, FLOPs and bytes of each.
        batch_dims: for each live tensor the dimensions that hold the batch (usually ``(0,)``, ``()`` if it has none).
        example_rows: rows of the batch that the model was exported and measured with.
        exact: whether states and outputs equalled the model's bit for bit on the example; else they did up to rounding, and a
            warning was given.
    """

    def __init__(
        self,
        found: Split,
        spec: BackboneSpec,
        placeholders: Sequence[tuple[str, Any]],
        in_spec: TreeSpec,
        out_spec: TreeSpec,
        example_rows: int,
    ) -> None:
        self.segments = found.segments
        self.spec = spec
        self.batch_dims = dict(found.batch_dims)
        self.example_rows = example_rows
        self.exact = True
        self._shapes = found.shapes
        self._symbol = found.symbol
        self._placeholders = tuple(placeholders)
        self._in_spec = in_spec
        self._out_spec = out_spec
        self._output_constants = dict(found.constants)
        self._made: dict[tuple[int, int], tuple[str, ...]] = {}

    def live(self, boundary: int) -> tuple[LiveTensor, ...]:
        """What crosses from segment ``boundary - 1`` to segment ``boundary``; 0 asks for the tensor inputs.

        Raises:
            InvalidInput: ``boundary`` is not in ``[0, number of segments)``.
        """
        if not 0 <= boundary < len(self.segments):
            raise InvalidInput(f"boundary must be in [0, {len(self.segments)}), got {boundary}.")
        names = self.segments[boundary - 1].live if boundary else [n for n, v in self._placeholders if isinstance(v, Tensor)]
        found = []
        for name in names:
            sizes, dtype = self._shapes[name]
            shape = tuple(None if s == self._symbol else s if isinstance(s, int) else -1 for s in sizes)
            found.append(LiveTensor(name, shape, dtype, self.batch_dims[name]))
        return tuple(found)

    def begin(self, *args: Any, **kwargs: Any) -> CutState:
        """Bind inputs, given as they are given to the model. Whole numbers may be of another width than those of the example.

        Raises:
            InvalidInput: another structure, dtype, rank or constant than the example the model was cut with.
        """
        leaves, spec = _flat(args, kwargs, self._in_spec)
        if spec != self._in_spec:
            raise InvalidInput(
                f"The inputs have another structure than the example: given {_shape_of(args, kwargs)}; expected "
                f"{_shape_of(*tree_unflatten([v for _, v in self._placeholders], self._in_spec))}. Pass inputs as the example was passed."
            )
        values: dict[str, Tensor] = {}
        rows: int | None = None
        for leaf, (name, expected) in zip(leaves, self._placeholders, strict=True):
            if not isinstance(expected, Tensor):
                if leaf is not expected and (isinstance(leaf, Tensor) or leaf != expected):
                    raise InvalidInput(
                        f"Input {name!r} is {leaf!r}; the model was cut with the constant {expected!r}, which is built in. Cut it again, "
                        "or give the example a tensor there if the model takes one."
                    )
                continue
            if isinstance(leaf, Tensor):  # token ids, say, in 32 bits
                whole = as_whole(leaf, expected.dtype)
                leaf = leaf if whole is None else whole
            if not isinstance(leaf, Tensor) or leaf.ndim != expected.ndim or leaf.dtype != expected.dtype:
                given = f"{leaf.dtype} of rank {leaf.ndim}" if isinstance(leaf, Tensor) else type(leaf).__name__
                raise InvalidInput(f"Input {name!r} is {given}; expected a tensor of {expected.dtype} and rank {expected.ndim}.")
            for dim, (size, want) in enumerate(zip(leaf.shape, self._shapes[name][0], strict=True)):
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
        return tree_unflatten(self._leaves(state), self._out_spec)

    def end_as_tuple(self, state: CutState) -> tuple[Any, ...] | None:
        """The same as a tuple, as diffusers' models return it without ``return_dict``; ``None`` if an output consists of several."""
        kind, leaves = self._out_spec.type, self._leaves(state)
        if state.at != len(self.segments) or self._out_spec.num_nodes != len(leaves) + 1:
            return None
        if isinstance(kind, type) and issubclass(kind, Mapping):
            return tuple(leaf for leaf in leaves if leaf is not None)
        return tuple(leaves) if kind is tuple else None

    def _leaves(self, state: CutState) -> list[Any]:
        return [state.values.get(f"out{i}", self._output_constants.get(i)) for i in range(self._out_spec.num_leaves)]

    def take(self, state: CutState, rows: Tensor) -> CutState:
        """The state of the given rows (int64 ``[R]`` on the state's device), in that order."""
        values = {name: self.select(name, value, rows) for name, value in state.values.items()}
        return CutState(values, int(rows.numel()), state.at, self._hidden(values, state.at))

    def select(self, name: str, value: Tensor, rows: Tensor) -> Tensor:
        """Rows (int64 ``[R]`` on its device) of one live tensor, in that order; the tensor itself if it is the same for every row."""
        return select_rows(value, self.batch_dims.get(name, ()), rows)

    def place(self, name: str, whole: Tensor | None, new: Tensor, rows: Tensor, count: int) -> Tensor:
        """One live tensor of ``count`` rows with some of them (int64 ``[R]`` on its device) made anew; what was there is not written to.

        Raises:
            InvalidInput: it holds the batch in two dimensions.
        """
        dims = self.batch_dims.get(name, ())
        if not dims:
            return new
        if len(dims) > 1:
            raise InvalidInput(f"The tensor {name!r} holds the batch in dimensions {dims}, so some rows of it cannot be made anew.")
        return (whole_like(new, dims, count) if whole is None else whole).index_copy(dims[0], rows, new)

    def hidden_name(self, boundary: int) -> str | None:
        """Name of the tensor that an exit reads at a boundary; ``None`` before the first and after the last segment."""
        return str(self.segments[boundary - 1].hidden) if 0 < boundary < len(self.segments) else None

    def names(self, boundary: int) -> tuple[str, ...]:
        """Names of the tensors live at a boundary: the inputs at 0, the flat outputs at the number of segments.

        Raises:
            InvalidInput: there is no such boundary.
        """
        if not 0 <= boundary <= len(self.segments):
            raise InvalidInput(f"boundary must be in [0, {len(self.segments)}], got {boundary}.")
        if boundary == 0:
            return tuple(n for n, v in self._placeholders if isinstance(v, Tensor))
        return self.segments[boundary - 1].live

    def made(self, start: int, stop: int) -> tuple[str, ...]:
        """Names of what segments ``start`` to ``stop - 1`` add: tensors live at ``stop`` that are not live at ``start``.

        This is all that a skip from one boundary to the other has to fill. In a plain transformer it is the hidden state; in a U-Net cut
        after a down block and before the up block that mirrors it, it is the deep feature: skips made and read inside do not appear.

        Raises:
            InvalidInput: the range is empty or not inside the model.
        """
        if not 0 <= start < stop <= len(self.segments):
            raise InvalidInput(f"A skip goes forward inside [0, {len(self.segments)}]; got from {start} to {stop}.")
        if (start, stop) not in self._made:
            have = set(self.names(start))
            self._made[start, stop] = tuple(n for n in self.names(stop) if n not in have)
        return self._made[start, stop]

    def skip(self, state: CutState, stop: int, made: Mapping[str, Tensor]) -> CutState:
        """The state at boundary ``stop`` without running the segments before it: what is live stays, the rest is taken from ``made``.

        Args:
            state: at an earlier boundary.
            stop: where to go on.
            made: a tensor for every name in ``Cut.made(state.at, stop)``, for the same rows; others are not read.

        Raises:
            InvalidInput: the range is empty, or ``made`` lacks a tensor or has one of other rows.
        """
        wanted = self.made(state.at, stop)
        if missing := [n for n in wanted if n not in made]:
            raise InvalidInput(
                f"A skip from boundary {state.at} to {stop} needs a fill for {', '.join(map(repr, wanted))}; missing: "
                f"{', '.join(map(repr, missing))}."
            )
        for name in wanted:
            for dim in self.batch_dims.get(name, ()):
                if made[name].ndim <= dim or made[name].shape[dim] != state.rows:
                    raise InvalidInput(
                        f"The fill for {name!r} is shaped {tuple(made[name].shape)}; dimension {dim} must hold {state.rows} rows."
                    )
        values = {n: made[n] if n in wanted else state.values[n] for n in self.names(stop)}
        return CutState(values, state.rows, stop, self._hidden(values, stop))

    def _hidden(self, values: Mapping[str, Any], boundary: int) -> Tensor | None:
        name = self.hidden_name(boundary)
        return None if name is None else values[name]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The whole model: begin, run everything, end."""
        return self.end(self.run(self.begin(*args, **kwargs), 0, len(self.segments)))


def whole_like(tensor: Tensor, dims: tuple[int, ...], rows: int) -> Tensor:
    """Zeros for other rows with the same order of strides: segments may view it as they viewed the whole batch's."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    if tensor.is_contiguous() or 0 in tensor.stride():
        order = list(range(tensor.ndim))
    room = tensor.new_zeros([rows if d in dims else tensor.shape[d] for d in order])
    return room.permute(sorted(range(tensor.ndim), key=order.__getitem__))


def select_rows(value: Tensor, dims: Sequence[int], rows: Tensor) -> Tensor:
    """Rows (int64 ``[R]``) of a tensor that holds the batch in these dimensions.

    The order of its strides is kept: later segments may view it as they viewed the whole batch's.
    """
    for dim in dims:
        if value.is_contiguous():
            value = value.index_select(dim, rows)
            continue
        order = sorted(range(value.ndim), key=value.stride, reverse=True)
        back = sorted(range(value.ndim), key=order.__getitem__)
        value = value.permute(order).index_select(order.index(dim), rows).permute(back)
    return value


def _shape_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """How a forward is called, in words: ``(tensor, tuple of 2, mask=tensor)``."""

    def word(value: Any) -> str:
        if isinstance(value, Tensor):
            return "tensor"
        if isinstance(value, Mapping):
            return f"{type(value).__name__} of {', '.join(map(str, value)) or 'nothing'}"
        return f"{type(value).__name__} of {len(value)}" if isinstance(value, list | tuple) else repr(value)[:60]

    return f"({', '.join([*map(word, args), *(f'{k}={word(v)}' for k, v in kwargs.items())])})"


def _flat(args: tuple[Any, ...], kwargs: Mapping[str, Any], spec: TreeSpec) -> tuple[list[Any], TreeSpec]:
    """Flatten inputs with keywords in the order of the exported model, whatever order they are given in."""
    children = spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs
    names = children[1].context or []
    if not args and children[0].num_leaves == 0 and len(names) == len(kwargs) == children[1].num_leaves:
        leaves = [kwargs.get(n) for n in names]
        if all(isinstance(v, Tensor) for v in leaves):  # nothing is nested
            return leaves, spec
    order = [k for k in names if k in kwargs]
    return tree_flatten((args, {k: kwargs[k] for k in order} | dict(kwargs)))


def cut(
    model: nn.Module,
    at: Sequence[str],
    example: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    batch_size: int | None = None,
    verify: bool = True,
    streams: Mapping[str, Stream] | None = None,
    ahead: bool = False,
) -> Cut:
    """Split ``model`` after each module in ``at``.

    Args:
        model: any PyTorch module that ``torch.export`` accepts. It is exported in evaluation mode and left as it was.
        at: module paths, each run exactly once per forward; any order.
        example: positional inputs. The batch is dimension 0 of the tensors whose size there equals ``batch_size``. Sequence
            length (dimension 1 of integer and boolean tensors of rank 2 or more) is dynamic too. Its rows are repeated or
            dropped to a batch size that no other dimension has.
        example_kwargs: keyword inputs.
        batch_size: size of the batch in the example, if it is not dimension 0 of the first tensor.
        verify: run the example and compare states and outputs with the uncut model, also for some of its rows alone.
        streams: where the state at a path is, if it is not the first floating-point tensor that the module there returns; such as the
            image's beside the text's.
        ahead: whether what runs after a place, does not depend on the state there and is read beyond the next place is computed before
            that place, so that a skip from it need not fill it: the time embedding of a denoiser that embeds patches first.

    Returns:
        The cut model, its parameters shared with ``model``.

    Raises:
        NotCuttable: a path is missing, never reached or runs more than once; the model cannot be exported; its batch
            dimension is specialised away; or the segments do not give the model's output.
        InvalidInput: no tensor in the example, or no path.
    """
    kwargs = dict(example_kwargs or {})
    if isinstance(at, str) or not at:
        raise InvalidInput(f"`at` is a list of at least one module path to cut after, got {at!r}.")
    if len(set(at)) != len(at):
        raise InvalidInput(f"`at` names a module twice: {list(at)}.")
    for path in at:
        resolve(model, path)
    with torch.no_grad(), evaluating(model):
        return _cut(model, tuple(at), example, kwargs, batch_size, verify, streams or {}, ahead)


# Tried in order until the exporter keeps the batch dynamic: a batch size that equals a size inside the model (heads, a buffer) can
# be confused with it, so another is tried; the strict tracer accepts some models that the other does not. Deferring the exporter's
# guards to run time is not tried: it would keep the input dynamic where forward holds for one batch size only.
_ATTEMPTS: tuple[tuple[int, bool], ...] = ((0, False), (1, False), (0, True))  # (which batch size, strict)


def _cut(
    model: nn.Module,
    at: tuple[str, ...],
    example: tuple[Any, ...],
    example_kwargs: dict[str, Any],
    batch_size: int | None,
    verify: bool,
    streams: Mapping[str, Stream],
    ahead: bool,
) -> Cut:
    first: NotCuttable | None = None
    for which, strict in _ATTEMPTS:
        args, kwargs, batch = _rows(example, example_kwargs, batch_size, which)
        reference, states = _tapped(model, at, args, kwargs, streams)
        try:
            made = _segments(_export(model, args, kwargs, batch, strict), at, states, args, kwargs, batch, ahead)
        except NotCuttable as error:
            if error.reason not in ("export", "batch"):
                raise
            first = first or error
            continue
        if verify:
            _verify(made, args, kwargs, reference, states)
        return made
    assert first is not None  # the loop either returned or failed
    raise first


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int | None, which: int) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """The example with at least two rows (the exporter specialises a batch of one) and a batch size that no other size equals."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and t.ndim > 0]
    if not tensors:
        raise InvalidInput("The example holds no tensor with a batch dimension. Pass example=(inputs,) or example_kwargs={...}.")
    batch = batch_size if batch_size is not None else tensors[0].shape[0]
    if batch < 1 or not any(t.shape[0] == batch for t in tensors):
        raise InvalidInput(f"No tensor of the example has {batch} rows; their first dimensions are {[t.shape[0] for t in tensors]}.")
    others = {s for t in tensors for s in t.shape[1:]} | {t.shape[0] for t in tensors if t.shape[0] != batch}
    rows = [n for n in (3, 2, 5, 7, 11, 13) if n not in others][which]
    index = torch.arange(rows) % batch

    def resize(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch:
            return leaf.detach().index_select(0, index.to(leaf.device))
        return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf

    args, kwargs = tree_map(resize, (args, kwargs))
    return args, kwargs, rows


def _tapped(model: nn.Module, at: Sequence[str], args: Any, kwargs: Any, streams: Mapping[str, Stream]) -> tuple[Any, dict[str, Tensor]]:
    args, kwargs = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, (args, kwargs))  # forward may write into its inputs
    with Taps(model, at, copy=True, streams=streams) as taps:
        output = model(*args, **kwargs)
        states = dict(zip(at, taps.states, strict=True))
    _register_dataclasses(output)
    return output, states


def _register_dataclasses(output: Any) -> None:
    """Plain dataclasses must be known to pytree before export can return them."""
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        if type(output) not in SUPPORTED_NODES:
            torch.export.register_dataclass(type(output), serialized_type_name=f"{type(output).__module__}.{type(output).__qualname__}")
        for item in dataclasses.fields(output):
            _register_dataclasses(getattr(output, item.name))
    elif isinstance(output, Mapping):
        for item in output.values():
            _register_dataclasses(item)
    elif isinstance(output, tuple | list):
        for item in output:
            _register_dataclasses(item)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, strict: bool) -> fx.GraphModule:
    def dims(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        dynamic: dict[int, Any] = {}
        if leaf.ndim and leaf.shape[0] == batch:
            dynamic[0] = Dim.AUTO
        if leaf.ndim >= 2 and not leaf.is_floating_point() and not leaf.is_complex() and leaf.shape[1] > 1:
            dynamic[1] = Dim.AUTO
        return dynamic

    # Keyword inputs are matched by name and positional ones by the names of forward's parameters.
    shapes = _named_shapes(model, tree_map(dims, (args, kwargs)))
    try:
        exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=strict)
        return exported.module(check_guards=False)
    except Exception as error:  # every exporter failure is the same to the caller: this model cannot be cut
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "not a known type" in reason:  # the rest of that message speaks to developers of PyTorch
            reason = reason.partition(" in output")[0] + " in the output."
            advice = "Let the model return tensors: a transformers model that returns a cache does with model.config.use_cache = False."
        else:
            advice = "Cut a submodule that it can export, or remove data-dependent Python control flow from forward."
        raise NotCuttable(f"torch.export cannot export {type(model).__name__}: {reason} {advice}", reason="export") from error


def _named_shapes(model: nn.Module, shapes: tuple[Any, dict[str, Any]]) -> Any:
    positional, keyword = shapes
    if not keyword:
        return positional
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


def _segments(
    graph_module: fx.GraphModule, at: Sequence[str], states: Mapping[str, Tensor], args: Any, kwargs: Any, batch: int, ahead: bool
) -> Cut:
    info: Any = graph_module.graph._codegen.pytree_info  # type: ignore[attr-defined]  # the exporter keeps input and output structure here
    leaves = _flat(args, kwargs, info.in_spec)[0]
    nodes = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    placeholders = [
        (n.name, n.meta["val"] if isinstance(n.meta.get("val"), Tensor) else leaf) for n, leaf in zip(nodes, leaves, strict=True)
    ]
    found = split(graph_module, at, states, leaves, batch, ahead=ahead)
    spec = _spec(found, placeholders, leaves, batch)
    return Cut(found, spec, placeholders, info.in_spec, info.out_spec, batch)


def _spec(found: Split, placeholders: Sequence[tuple[str, Any]], leaves: Sequence[Any], batch: int) -> BackboneSpec:
    """Run the segments once on the example, counting."""
    values = {name: leaf for (name, kind), leaf in zip(placeholders, leaves, strict=True) if isinstance(kind, Tensor)}
    done: list[SegmentSpec] = []
    for segment in found.segments:
        given = [values[n] for n in segment.inputs]
        protect_inputs(segment, given)
        with counter() as counted:
            made = segment.module(*given)
        values = {n: v for n, v in {**values, **dict(zip(segment.outputs, made, strict=True))}.items() if n in segment.live}
        tensors = {(t.data_ptr(), t.shape): t for t in (*segment.module.parameters(), *segment.module.buffers())}.values()
        live_bytes, hidden_shape = 0, None
        if segment.hidden is not None:
            live_bytes = sum(values[n].numel() * values[n].element_size() for n in segment.live if found.batch_dims[n]) // batch
            hidden_shape = tuple(s if isinstance(s, int) else -1 for s in found.shapes[segment.hidden][0][1:])
        done.append(
            SegmentSpec(
                segment.name,
                counted.get_total_flops() // batch,
                sum(t.numel() * t.element_size() for t in tensors),
                live_bytes,
                hidden_shape,
            )
        )
    inputs = [found.shapes[name][0] for name, kind in placeholders if isinstance(kind, Tensor)]
    return BackboneSpec(tuple(done), any(not isinstance(s, int) and s != found.symbol for shape in inputs for s in shape))


def _verify(made: Cut, args: Any, kwargs: Any, reference: Any, states: Mapping[str, Tensor]) -> None:
    """Segments must give the model's own states and output, and the same for some rows alone, taken anew at every cut."""
    state = made.begin(*args, **kwargs)
    device = next(iter(state.values.values())).device
    rows = torch.tensor([made.example_rows - 1, 0][: made.example_rows - 1], device=device)  # fewer than all: means over rows change
    some = made.take(state, rows)
    off = 0.0
    for k, segment in enumerate(made.segments):
        state = made.run(state, k, k + 1)
        some = made.run(some, k, k + 1)
        if segment.hidden is not None and not same(state.hidden, states[segment.name]):
            off = max(off, gap(state.hidden, states[segment.name]))
        if state.hidden is not None and not rounding(state.hidden, states[segment.name]):
            raise NotCuttable(
                f"The state after {segment.name!r} differs from the module's output in an ordinary forward "
                f"(largest difference {gap(state.hidden, states[segment.name]):.3g}). A model that is random in evaluation mode "
                "cannot be cut.",
                reason="mismatch",
                path=segment.name,
            )
        if k + 1 < len(made.segments):
            some, rows = made.take(some, torch.arange(rows.numel() - 1, -1, -1, device=device)), rows.flip(0)
    whole = made.end(state)
    for got, want in zip(tree_flatten(whole)[0], tree_flatten(reference)[0], strict=True):
        if same(got, want):
            continue
        off = max(off, gap(got, want))
        if not isinstance(want, Tensor) or not rounding(got, want):
            raise NotCuttable(
                f"The segments give another output than the model (largest difference {gap(got, want):.3g}). A model that is random in "
                "evaluation mode cannot be cut.",
                reason="mismatch",
            )
    if off:
        made.exact = False
        warn(
            f"The segments equal the model up to rounding only (largest difference {off:.3g}): exported, it takes other kernels than in an "
            "ordinary forward. torch.nn.TransformerEncoder does so unless torch.backends.mha.set_fastpath_enabled(False).",
            OfframpWarning,
        )
    for i, (got, want) in enumerate(zip(tree_flatten(made.end(some))[0], tree_flatten(whole)[0], strict=True)):
        for dim in made.batch_dims.get(f"out{i}", ()):
            want = want.index_select(dim, rows)
        if isinstance(want, Tensor) and not rounding(got, want, 1e-3 if want.dtype == torch.float32 else None):
            raise NotCuttable(
                f"Some rows alone give another output than the same rows in a batch (largest difference {gap(got, want):.3g}). A model "
                "that mixes the rows of a batch in evaluation mode cannot be cut: an answer would depend on which other rows have left.",
                reason="mismatch",
            )


__all__ = ["Cut", "CutState", "LiveTensor", "Segment", "cut", "first_tensor"]
