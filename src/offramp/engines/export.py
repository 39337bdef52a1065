"""Export: the whole adaptive model as one file, leaving rows compacted away inside the graph.

Segments, heads, rule, thresholds and compaction become one graph without branches: after an exit the answers of all
rows still in the batch are written by index and only the survivors' tensors are gathered, so that the next segment runs
on fewer rows, on none if everybody left. The batch is dynamic, and so is the length where the model allows it. Nothing
of offramp is needed to run the result.

The module that is exported is in `offramp.engines.export_module`, tracing it in `export_trace`, the comparison of the file with
the PyTorch model in `export_check`; here the file is written.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from offramp.core.bundle import write_atomic
from offramp.core.certificate import Plan
from offramp.core.errors import ExportError, InvalidInput, MissingExtra
from offramp.core.parts import part_to_dict
from offramp.engines.export_check import Check
from offramp.engines.export_module import THRESHOLDS, AdaptiveModule
from offramp.engines.export_trace import Inputs, export_program, trace_flat
from offramp.network import MultiExit

PROTOBUF_LIMIT = 2**31 - 2**22
"""Bytes of weights that fit in one ONNX file: protobuf stops at 2 GiB, and the graph needs some of it."""


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
    inputs = Inputs(net)
    names = [f"model_{n}" if n in (THRESHOLDS, "output", "exit") else n for n in inputs.names]
    proto = _to_onnx(module, inputs, names, opset)
    _rename_dims(proto, names, inputs)
    _default_thresholds(proto, onnx.numpy_helper.from_array(module.thresholds.cpu().numpy(), THRESHOLDS))
    _describe(proto, net, plan)
    tunable = proto.SerializeToString()
    if not thresholds_as_input or not module.active:
        _drop_input(proto, THRESHOLDS)
    if not module.active:
        proto.graph.initializer.pop()  # nothing reads them
    data = proto.SerializeToString()
    found = Check(net, module, inputs, names, atol).run(runtime, data, tunable) if check else ()
    write_atomic(path, lambda temporary: temporary.write_bytes(data))
    return ExportReport(
        path=os.fspath(path),
        size_bytes=len(data),
        opset=next(o.version for o in proto.opset_import if not o.domain),
        inputs={i.name: _shape(i) for i in proto.graph.input},
        outputs={o.name: _shape(o) for o in proto.graph.output},
        exits=(*(net.at[k] for k in module.active), net.names[-1]),
        operators=dict(Counter(n.op_type for n in proto.graph.node)),
        checked=tuple(c.name for c in found),
        rows=sum(c.rows for c in found),
        largest_difference=max((c.difference for c in found), default=0.0),
        ties=sum(c.ties for c in found),
    )


def _need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtra(package, "onnx", "Exporting to ONNX") from error


def _to_onnx(module: AdaptiveModule, inputs: Inputs, names: Sequence[str], opset: int | None) -> Any:
    program = trace_flat(module, inputs)
    try:
        with torch.no_grad():
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


def _rename_dims(proto: Any, names: Sequence[str], inputs: Inputs) -> None:
    """Give the exporter's symbols the names a reader expects: ``batch``, ``length``."""
    renamed: dict[str, str] = {}
    for value in proto.graph.input:
        if value.name not in names:
            continue
        leaf = inputs.tensors[names.index(value.name)]
        for dim, size in enumerate(value.type.tensor_type.shape.dim):
            if size.dim_param and size.dim_param not in renamed:
                batch = dim == 0 and inputs.has_batch(leaf)
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


__all__ = ["PROTOBUF_LIMIT", "THRESHOLDS", "AdaptiveModule", "ExportReport", "export_onnx", "export_program"]
