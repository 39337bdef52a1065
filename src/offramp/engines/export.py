"""Export: the whole adaptive model as one file, leaving rows compacted away inside the graph.

Segments, heads, rule, thresholds and compaction become one graph without branches: after an exit the answers of all
rows still in the batch are written by index and only the survivors' tensors are gathered, so that the next segment runs
on fewer rows, on none if everybody left. The batch is dynamic, and so is the length where the model allows it. Nothing
of offramp is needed to run the result.

Shape legend: ``B`` rows given, ``R`` rows still in the batch, ``C`` width of an answer, ``K`` exits, the model's own output last.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import json
import math
import operator
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten

from offramp.backbones.cut import CutState
from offramp.core.bundle import write_atomic
from offramp.core.certificate import Plan
from offramp.core.errors import ExportError, InvalidInput, MissingExtra
from offramp.core.parts import part_to_dict
from offramp.core.types import Readout
from offramp.network import Example, MultiExit

THRESHOLDS = "thresholds"
"""Name of the thresholds in the file: float32 ``[K - 1]``, exits switched off included."""

PROTOBUF_LIMIT = 2**31 - 2**22
"""Bytes of weights that fit in one ONNX file: protobuf stops at 2 GiB, and the graph needs some of it."""

_CHECKED_ROWS = (1, 2, 7)
_RESHAPES = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default)
_ASSERTIONS = ("_assert_scalar", "sym_constrain_range", "_assert_tensor_metadata")


class AdaptiveModule(nn.Module):
    """A network and a plan as one module without Python control flow on data, to be exported or scripted into a server.

    ``forward`` takes what the model takes and returns ``output`` ``[B, C]`` and ``exit`` int64 ``[B]``, the index of the
    exit each row left at. Call it in evaluation mode. Weights are shared with the network.

    Attributes:
        thresholds: buffer ``[K - 1]`` float32.
        active: indices of the exits that may be left at (threshold below ``inf``); the others are not in the graph unless a
            stateful rule or a later head reads them.

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
        last = max(self.active, default=-1)
        cascade = {k for k in self.active if getattr(net.heads[k], "needs_previous", False)}
        self._scored = frozenset(range(last + 1) if plan.rule.stateful else self.active)
        cascade |= {k for k in self._scored if getattr(net.heads[k], "needs_previous", False)}
        self._read = self._scored | frozenset(range(max(cascade, default=-1) + 1))
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
                return _write(output, exits, rows, self._shaped(logits), k)
            if k not in self._read:
                continue
            hidden = live[segment.hidden]
            logits = self.heads[k](hidden, previous)
            previous = (*previous, logits)
            if k not in self._scored:
                continue
            score, memory = self.rule.score(k, Readout(logits, hidden), memory)
            if k not in self.active:
                continue
            output, exits = _write(output, exits, rows, self._shaped(logits), k)
            if rows is None:
                rows = torch.arange(logits.shape[0], device=device)
            stay = (~(score >= thresholds[k])).nonzero()[:, 0]  # a score that is not a number stays
            _promise_rows(stay)
            rows = rows.index_select(0, stay)
            live = {n: _take(v, self.cut.batch_dims.get(n, ()), stay) for n, v in live.items()}
            previous = tuple(p.index_select(0, stay) for p in previous)
            memory = {n: v.index_select(0, stay) for n, v in memory.items()}
        raise InvalidInput("The cut has no last segment.")

    def _shaped(self, logits: Tensor) -> Tensor:
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
    with _evaluating(net), torch.no_grad():
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


@contextlib.contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    training = {m: m.training for module in modules for m in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for m, flag in training.items():
            m.training = flag


# --- torch.export ----------------------------------------------------------------------------------------------------


def export_program(net: MultiExit, plan: Plan) -> ExportedProgram:
    """The adaptive model as a ``torch.export`` program that takes what the model takes and returns ``(output, exit)``.

    The batch is dynamic, and so is the length where the model allows it. Save it with ``torch.export.save`` if wanted; offramp
    neither writes nor reads that format, whose loader may unpickle.

    Raises:
        ExportError: ``torch.export`` cannot trace the composed model.
        InvalidInput: the plan has other exits than the network.
        FingerprintMismatch: the plan was made for another model.
    """
    module = AdaptiveModule(net, plan)
    example = net.example.to(net.device, net.dtype)
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    for leaf in _tensors(example):
        shapes[leaf] = _dynamic(leaf, example)
    module.forward = _named_forward(module, example)  # type: ignore[method-assign]
    with _evaluating(module):
        program = _trace(module, example.args, example.kwargs, shapes)
    _drop_promises(program)
    return program


def _named_forward(module: AdaptiveModule, example: Example) -> Callable[..., tuple[Tensor, Tensor]]:
    """``forward`` with a parameter for each input, because the exporter takes no shapes for ``**kwargs``."""

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return module.decide(module.thresholds, *args, **kwargs)

    parameters = [inspect.Parameter(f"input_{i}", inspect.Parameter.POSITIONAL_OR_KEYWORD) for i in range(len(example.args))]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in example.kwargs]
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
    """Remove the assertions that `_promise_rows` left, and what only they read."""
    graph = program.graph_module.graph
    for node in reversed(list(graph.nodes)):
        if any(a in str(node.target) for a in _ASSERTIONS):
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _tensors(example: Example) -> list[Tensor]:
    return [leaf for leaf in tree_flatten((example.args, example.kwargs))[0] if isinstance(leaf, Tensor)]


def _rows(example: Example) -> int:
    return next(t.shape[0] for t in _tensors(example) if t.ndim)


def _has_length(leaf: Tensor) -> bool:
    """As in the cut: dimension 1 of integer and boolean inputs may vary."""
    return leaf.ndim >= 2 and not leaf.is_floating_point() and not leaf.is_complex() and leaf.shape[1] > 1


def _dynamic(leaf: Tensor, example: Example) -> dict[int, Any]:
    batch = {0: Dim.AUTO} if leaf.ndim and leaf.shape[0] == _rows(example) else {}
    return {**batch, 1: Dim.AUTO} if _has_length(leaf) else batch


# --- ONNX ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it was checked.

    Attributes:
        path: the file.
        size_bytes: of the file.
        opset: ONNX operator set.
        inputs: names and shapes, a dynamic dimension by name.
        outputs: likewise.
        exits: names of the exits in the file, the model's own output last.
        operators: how often each operator occurs.
        checked: names of the comparisons with the PyTorch model that were made in ONNX Runtime; empty without check.
        rows: rows compared.
        largest_difference: largest absolute difference of an answer.
        ties: rows whose exit differs because their score is within the tolerance of a threshold; excused.
    """

    path: str
    size_bytes: int
    opset: int
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, tuple[int | str, ...]]
    exits: tuple[str, ...]
    operators: Mapping[str, int]
    checked: tuple[str, ...] = ()
    rows: int = 0
    largest_difference: float = 0.0
    ties: int = 0

    def __str__(self) -> str:
        shapes = ", ".join(f"{n} {list(s)}" for n, s in {**self.inputs, **self.outputs}.items())
        head = f"{self.path}: {self.size_bytes / 1e6:.1f} MB, opset {self.opset}, exits {', '.join(self.exits)}\n  {shapes}"
        if not self.checked:
            return f"{head}\n  not checked"
        tied = f", {self.ties} at a tie" if self.ties else ""
        return f"{head}\n  {self.rows} rows checked in ONNX Runtime{tied}: same exits, largest difference {self.largest_difference:.2g}"


class _Flat(nn.Module):
    """`AdaptiveModule` on thresholds and a flat list of tensors, because an ONNX file has no structure and no constants."""

    def __init__(self, module: AdaptiveModule, example: Example) -> None:
        super().__init__()
        self.module = module
        leaves, self._spec = tree_flatten((example.args, example.kwargs))
        self._constants = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        self._count = len(leaves)

    def forward(self, thresholds: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        given = iter(tensors)
        leaves = [self._constants[i] if i in self._constants else next(given) for i in range(self._count)]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return self.module.decide(thresholds, *args, **kwargs)


def export_onnx(
    net: MultiExit,
    plan: Plan,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    thresholds_as_input: bool = False,
    check: bool = True,
    atol: float = 1e-4,
) -> ExportReport:
    """Write the adaptive model as one ONNX file, atomically, after comparing it with the PyTorch model in ONNX Runtime.

    Inputs are named like forward's parameters, outputs ``output`` ``[batch, C]`` and ``exit`` int64 ``[batch]``. The file's
    metadata (``offramp.*``) holds the fingerprint of the base model, the exits, the thresholds, the rule and the certificate.

    The check runs 1, 2 and 7 rows made from the network's example, with the plan's thresholds, with thresholds that every row
    meets at the first exit, that none meets, and that part the rows at every exit, and another length where it is dynamic. The
    reference is one ordinary forward of the untouched model with all heads, nothing compacted.

    Args:
        net: the network with exits.
        plan: rule and thresholds. Exits with threshold ``inf`` are left out of the file.
        path: file to write.
        opset: ONNX operator set; the exporter's default if ``None``.
        thresholds_as_input: keep ``thresholds`` as an optional input with the plan's values as default, so that a server can
            turn the budget without another export. The certificate holds for the plan's values only.
        check: compare before writing.
        atol: largest accepted difference of an answer, relative to its largest absolute value if that is above 1; also how close
            to a threshold a score must be for a different exit to be excused as a tie.

    Raises:
        MissingExtra: onnx, onnxscript or (to check) onnxruntime is not installed.
        ExportError: the model cannot be exported, is too large for one file, or does not give the same exits and answers.
        InvalidInput: the plan has other exits than the network.
        FingerprintMismatch: the plan was made for another model.
    """
    onnx = _need("onnx")
    _need("onnxscript")
    runtime = _need("onnxruntime") if check else None
    module = AdaptiveModule(net, plan)
    weights = sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in (*module.parameters(), *module.buffers())}.values())
    if weights > PROTOBUF_LIMIT:
        raise ExportError(
            f"The model has {weights / 2**30:.2f} GiB of weights, and one ONNX file holds less than 2 GiB. Export it in half precision "
            "(net.half()), or use export_program, which has no limit."
        )
    if check and net.dtype is torch.bfloat16:
        raise ExportError("ONNX Runtime takes no bfloat16 on the CPU, so the file cannot be checked. Export float32, or pass check=False.")
    example = net.example.to(net.device, net.dtype)
    names = _input_names(net, example)
    proto = _to_onnx(module, example, names, opset)
    _rename_dims(proto, names, example)

    _default_thresholds(proto, onnx.numpy_helper.from_array(module.thresholds.cpu().numpy(), THRESHOLDS))
    _describe(proto, net, plan)
    tunable = proto.SerializeToString()
    if not thresholds_as_input or not module.active:
        _drop_input(proto, THRESHOLDS)
    if not module.active:
        proto.graph.initializer.pop()  # nothing reads them
    data = proto.SerializeToString()
    found = _check(runtime, data, tunable, net, module, names, example, atol) if check else _Checked()
    write_atomic(path, lambda temporary: _write_bytes(temporary, data))
    return ExportReport(
        path=os.fspath(path),
        size_bytes=len(data),
        opset=next(o.version for o in proto.opset_import if not o.domain),
        inputs={i.name: _shape(i) for i in proto.graph.input},
        outputs={o.name: _shape(o) for o in proto.graph.output},
        exits=(*(net.at[k] for k in module.active), net.names[-1]),
        operators=dict(Counter(n.op_type for n in proto.graph.node)),
        checked=tuple(found.names),
        rows=found.rows,
        largest_difference=found.difference,
        ties=found.ties,
    )


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtra(package, "onnx", "Exporting to ONNX") from error


def _input_names(net: MultiExit, example: Example) -> list[str]:
    """A name for each tensor: forward's parameter, and the way inside it where the input is nested."""
    parameters = list(inspect.signature(net.model.forward).parameters.values())
    names = []
    for way, leaf in tree_flatten_with_path((example.args, example.kwargs))[0]:
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
    return [f"model_{n}" if n in (THRESHOLDS, "output", "exit") else n for n in names]


def _to_onnx(module: AdaptiveModule, example: Example, names: Sequence[str], opset: int | None) -> Any:
    flat = _Flat(module, example)
    tensors = _tensors(example)
    shapes: Any = ({}, tuple(_dynamic(t, example) for t in tensors))
    with _evaluating(flat), torch.no_grad():
        program = _trace(flat, (module.thresholds, *tensors), {}, shapes)
        try:
            made: Any = torch.onnx.export(
                program,
                dynamo=True,
                external_data=False,
                verbose=False,
                opset_version=opset,
                input_names=[THRESHOLDS, *names],
                output_names=["output", "exit"],
            )
        except Exception as error:  # the exporter wraps its failures in a class that is not public
            lines = [line for line in str(error).strip().splitlines() if line.strip()]
            raise ExportError(f"The ONNX exporter refuses the adaptive model: {lines[-1] if lines else type(error).__name__}") from error
    _count_axes_from_front(made.model)
    return made.model_proto


def _count_axes_from_front(model: Any) -> None:
    """Write axes of reductions as non-negative numbers.

    ONNX Runtime (seen in 1.31) gives a reduction over axis -1 without keepdims the wrong shape when the batch is empty, and the right
    one for the same axis counted from the front.
    """
    ir = _need("onnx_ir")

    for node in model.graph.all_nodes():
        rank = None if not node.inputs or node.inputs[0] is None or node.inputs[0].shape is None else len(node.inputs[0].shape)
        if rank is None or not (node.op_type.startswith("Reduce") or node.op_type in ("ArgMax", "ArgMin")):
            continue
        if "axis" in node.attributes and (axis := node.attributes["axis"].as_int()) < 0:
            node.attributes["axis"] = ir.AttrInt64("axis", axis + rank)
        if "axes" in node.attributes:
            axes = node.attributes["axes"].as_ints()
            node.attributes["axes"] = ir.AttrInt64s("axes", [a % rank for a in axes])
        if len(node.inputs) > 1 and node.inputs[1] is not None and (given := node.inputs[1]).const_value is not None:
            axes = given.const_value.numpy()
            if (axes < 0).any():
                fixed = ir.val(f"{node.name}_axes", const_value=ir.tensor(axes % rank, name=f"{node.name}_axes"))
                model.graph.register_initializer(fixed)
                node.replace_input_with(1, fixed)
                if given.name in model.graph.initializers and not given.uses():
                    del model.graph.initializers[given.name]


def _rename_dims(proto: Any, names: Sequence[str], example: Example) -> None:
    """Give the exporter's symbols the names a reader expects: ``batch``, ``length``."""
    renamed: dict[str, str] = {}
    for value in proto.graph.input:
        if value.name not in names:
            continue
        leaf = _tensors(example)[names.index(value.name)]
        for dim, size in enumerate(value.type.tensor_type.shape.dim):
            if size.dim_param and size.dim_param not in renamed:
                batch = dim == 0 and leaf.shape[0] == _rows(example)
                wanted = "length" if dim == 1 else f"{value.name}_{dim}"
                renamed[size.dim_param] = "batch" if batch else wanted if wanted not in renamed.values() else f"{wanted}_{value.name}"
    if not renamed:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, renamed)) + r")\b")
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = pattern.sub(lambda m: renamed[m[0]], size.dim_param)


def _default_thresholds(proto: Any, default: Any) -> None:
    """Make ``thresholds`` an optional input, the last one, with the plan's values as default."""
    given = next(v for v in proto.graph.input if v.name == THRESHOLDS)
    kept = type(given)()
    kept.CopyFrom(given)
    _drop_input(proto, THRESHOLDS)
    proto.graph.input.append(kept)
    proto.graph.initializer.append(default)


def _drop_input(proto: Any, name: str) -> None:
    del proto.graph.input[next(i for i, v in enumerate(proto.graph.input) if v.name == name)]


def _describe(proto: Any, net: MultiExit, plan: Plan) -> None:
    try:
        version = importlib.metadata.version("offramp")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        version = "unknown"
    try:
        rule = part_to_dict(plan.rule)
    except InvalidInput:  # a rule of the user's own that is not data: its name is all that can be said
        rule = type(plan.rule).__name__
    content = {
        "version": version,
        "fingerprint": net.fingerprint(),
        "exits": list(plan.exits),
        "thresholds": [str(t) for t in plan.thresholds],  # JSON has no infinity
        "shares": list(plan.shares),
        "mean_cost": plan.mean_cost,
        "rule": rule,
        "certificate": None if plan.certificate is None else plan.certificate.to_dict(),
    }
    for key, value in content.items():
        entry = proto.metadata_props.add()
        entry.key = f"offramp.{key}"
        entry.value = value if isinstance(value, str) else json.dumps(value)


def _shape(value: Any) -> tuple[int | str, ...]:
    return tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)


# --- the check -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Checked:
    names: tuple[str, ...] = ()
    rows: int = 0
    difference: float = 0.0
    ties: int = 0

    def plus(self, other: _Checked) -> _Checked:
        return _Checked(self.names + other.names, self.rows + other.rows, max(self.difference, other.difference), self.ties + other.ties)


def _check(
    runtime: Any, data: bytes, tunable: bytes, net: MultiExit, module: AdaptiveModule, names: Sequence[str], example: Example, atol: float
) -> _Checked:
    """Compare the file, and for other thresholds the same file with thresholds as input, with the PyTorch model."""
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # failures are raised below
    try:
        shipped, variant = (runtime.InferenceSession(d, options, providers=["CPUExecutionProvider"]) for d in (data, tunable))
    except Exception as error:  # onnxruntime has no public base class of its errors
        raise ExportError(f"ONNX Runtime cannot load the exported model: {error}") from error
    found = _Checked()
    for rows in _CHECKED_ROWS:
        tensors = _varied(example, rows)
        plan = module.thresholds.cpu()
        found = found.plus(_compare(f"{rows} rows, the plan", shipped, plan, net, module, names, example, tensors, atol, given=False))
        cases = {"all leave at once": torch.full_like(plan, -math.inf), "nobody leaves": torch.full_like(plan, math.inf)}
        if rows > 2:
            cases["rows part at every exit"] = _parting(module, _reference(net, module, example, tensors)[1])
        for name, thresholds in cases.items() if module.active else ():
            found = found.plus(_compare(f"{rows} rows, {name}", variant, thresholds, net, module, names, example, tensors, atol))
    shorter = _shorter(shipped, names, tensors)
    if shorter is not None and module.active:
        thresholds = _parting(module, _reference(net, module, example, shorter)[1])
        found = found.plus(_compare("another length", variant, thresholds, net, module, names, example, shorter, atol))
    return found


def _compare(
    name: str,
    session: Any,
    thresholds: Tensor,
    net: MultiExit,
    module: AdaptiveModule,
    names: Sequence[str],
    example: Example,
    tensors: Sequence[Tensor],
    atol: float,
    *,
    given: bool = True,
) -> _Checked:
    answers, scores = _reference(net, module, example, tensors)
    last = answers.shape[1] - 1
    leaves = scores >= thresholds
    early = torch.cat([leaves, torch.ones(len(leaves), 1, dtype=torch.bool)], 1)
    expected = early.int().argmax(1)
    known = {i.name for i in session.get_inputs()}
    feed = {n: t.cpu().numpy() for n, t in zip(names, tensors, strict=True) if n in known}
    if given:
        feed[THRESHOLDS] = thresholds.numpy()
    try:
        output, exits = (torch.from_numpy(a.copy()) for a in session.run(["output", "exit"], feed))
    except Exception as error:  # onnxruntime has no public base class of its errors
        raise ExportError(f"ONNX Runtime cannot run the exported model ({name}): {error}") from error

    near = (scores - thresholds).abs() <= atol * thresholds.abs().nan_to_num(posinf=1.0).clamp_min(1.0)
    if module.rule.stateful:  # counters meet their thresholds exactly; only what was computed in floating point can be tied
        near &= scores != scores.round()
    reached = torch.arange(last)[None] <= torch.maximum(expected, exits)[:, None]
    moved = exits != expected
    tied = moved & (near & reached).any(1)
    if bool((moved & ~tied).any()):
        row = int((moved & ~tied).nonzero()[0])
        raise ExportError(
            f"The exported model sends rows to other exits than PyTorch ({name}): {int((moved & ~tied).sum())} of {len(moved)} rows, "
            f"e.g. row {row} to exit {int(exits[row])} instead of {int(expected[row])}, where its scores are {scores[row].tolist()}."
        )
    want = answers[torch.arange(len(expected)), expected]
    gap = (output.to(want.dtype) - want).abs()
    gap = torch.where(output.isnan() & want.isnan(), torch.zeros_like(gap), gap)[~tied]
    largest = float(gap.max()) if gap.numel() else 0.0
    if not largest <= atol * max(1.0, float(want.abs().nan_to_num().max())):
        raise ExportError(
            f"The exported model gives other answers than PyTorch ({name}): largest difference {largest:.3g}, accepted {atol:g}. "
            "If the model is meant to differ that much (half precision), pass a larger atol."
        )
    return _Checked((name,), len(expected), largest, int(tied.sum()))


@torch.no_grad()
def _reference(net: MultiExit, module: AdaptiveModule, example: Example, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Answers ``[B, K, ...]`` and scores ``[B, K - 1]`` (NaN, which meets no threshold, where the plan has no exit) of the model."""
    given = iter(tensors)
    leaves, spec = tree_flatten((example.args, example.kwargs))
    args, kwargs = tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
    with _evaluating(net, module):
        answers, states = net.forward_with_states(*args, **kwargs)
    shaped = torch.stack([module._shaped(a).float().cpu() for a in answers], 1)
    scores = torch.full((len(shaped), len(states)), math.nan)
    memory = module.rule.begin(len(shaped), net.device)
    for k in sorted(module._scored):
        score, memory = module.rule.score(k, Readout(answers[k], states[k]), memory)
        if k in module.active:
            scores[:, k] = score.cpu()
    return shaped, scores


def _parting(module: AdaptiveModule, scores: Tensor) -> Tensor:
    """Thresholds midway between the scores, so that about half of the rows still there leave at every exit."""
    thresholds = torch.full((scores.shape[1],), math.inf)
    here = torch.ones(len(scores), dtype=torch.bool)
    for k in module.active:
        levels = scores[here, k].unique()  # type: ignore[no-untyped-call]
        if len(levels) > 1:
            thresholds[k] = (levels[len(levels) // 2 - 1] + levels[len(levels) // 2]) / 2
            here &= ~(scores[:, k] >= thresholds[k])
    return thresholds


def _varied(example: Example, rows: int) -> list[Tensor]:
    """The example's rows over and over, later ones changed: noise on numbers, tokens rolled along the length."""
    batch = _rows(example)
    generator = torch.Generator().manual_seed(0)
    made = []
    for leaf in _tensors(example):
        if not leaf.ndim or leaf.shape[0] != batch:
            made.append(leaf)
            continue
        picked = leaf[torch.arange(rows, device=leaf.device) % batch].clone()
        for row in range(batch, rows):
            if leaf.is_floating_point():
                noise = torch.randn(leaf.shape[1:], generator=generator).to(leaf.device, leaf.dtype)
                picked[row] += noise * leaf.float().std().nan_to_num().to(leaf.dtype)
            elif leaf.ndim == 2 and not leaf.is_complex():
                picked[row] = picked[row].roll(row // batch)
        made.append(picked)
    return made


def _shorter(session: Any, names: Sequence[str], tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """The same rows at half the length, or ``None`` where the length is fixed, too small, or in more than one dimension."""
    shapes = {i.name: i.shape for i in session.get_inputs()}
    varies = [_has_length(t) and isinstance(shapes.get(n, (0, 0))[1], str) for n, t in zip(names, tensors, strict=True)]
    if not any(varies) or any(v and (t.ndim > 2 or t.shape[1] < 4) for v, t in zip(varies, tensors, strict=True)):
        return None
    return [t[:, : t.shape[1] // 2] if v else t for v, t in zip(varies, tensors, strict=True)]


__all__ = ["AdaptiveModule", "ExportReport", "export_onnx", "export_program"]
