"""Probe: run the cut over model families, or over a user's model, and say what it can do and where each value comes from."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

import offramp.backbones.diffusers
import offramp.backbones.timm
import offramp.backbones.transformers
from offramp.backbones import cut, repeated_blocks
from offramp.backbones.families import Family, Inputs
from offramp.backbones.graph import same
from offramp.core.bundle import write_json, write_text
from offramp.core.errors import InvalidInput, MissingExtra, NotCuttable
from offramp.core.modes import evaluating
from offramp.exits.placement import Evenly

BATCHES = (1, 3, 7)
"""Batch sizes at which the cut is compared with the uncut model."""

_LIBRARIES: Mapping[str, Any] = {
    "timm": offramp.backbones.timm,
    "transformers": offramp.backbones.transformers,
    "diffusers": offramp.backbones.diffusers,
}

Source = Literal["measured", "declared by the exporter", "unknown"]


@dataclass(frozen=True)
class Value:
    """One cell of the capability matrix.

    Attributes:
        value: JSON data; ``None`` when unknown.
        source: ``measured`` (it was run), ``declared by the exporter`` (read off the exported program), or ``unknown``.
    """

    value: Any = None
    source: Source = "unknown"


@dataclass(frozen=True)
class Capability:
    """What the cut can do with one model.

    Attributes:
        family: ``library/family``, or the class of a user's model.
        kind: in words.
        library: where the model comes from.
        version: of the library.
        model: class name.
        supported: the model was cut and is bit-exact at every batch size and length that was tried.
        reason: why not, if not.
        exits: module paths chosen by default.
        batch_dynamic: whether the batch size may vary.
        length_dynamic: whether the sequence length may vary.
        outputs: structure that forward returns, which the cut restores.
        bit_exact: by batch size, all output tensors equal bit for bit (float32, eager).
        live_bytes: per item, what crosses each exit.
        hidden_bytes: per item, the state that each exit reads.
    """

    family: str
    kind: str
    library: str
    version: str
    model: Value = Value()
    supported: bool = False
    reason: str = ""
    exits: Value = Value()
    batch_dynamic: Value = Value()
    length_dynamic: Value = Value()
    outputs: Value = Value()
    bit_exact: Value = Value()
    live_bytes: Value = Value()
    hidden_bytes: Value = Value()

    def to_dict(self) -> dict[str, Any]:
        return {k: {"value": v.value, "source": v.source} if isinstance(v, Value) else v for k, v in vars(self).items()}


def _families() -> dict[str, Family]:
    return {f.name: f for module in _LIBRARIES.values() for f in module.families()}


def probe_families() -> list[str]:
    """Names of the families that `probe` knows, ``library/family``. Imports no model library."""
    return list(_families())


def probe_model(model: nn.Module, example: Any, *, at: Sequence[str] | None = None, name: str = "") -> Capability:
    """Probe a user's model.

    Args:
        model: any PyTorch module.
        example: a tensor, a tuple of positional inputs, a mapping of keyword inputs, or ``(args, kwargs)``; the batch is dimension 0
            of the first tensor. Other batch sizes repeat its rows.
        at: module paths; by default three, evenly by counted cost.
        name: shown as the family; by default the model's class.

    Raises:
        InvalidInput: there is no tensor in the example.
    """
    args, kwargs = _bound(example)
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim]
    if not tensors:
        raise InvalidInput("The example holds no tensor with a batch dimension.")
    batch = tensors[0].shape[0]

    def inputs(rows: int, length: int | None) -> Inputs:
        index = torch.arange(rows) % batch
        resize = lambda t: t.index_select(0, index.to(t.device)) if isinstance(t, Tensor) and t.ndim and t.shape[0] == batch else t  # noqa: E731
        return Inputs(*tree_map(resize, (args, kwargs)))

    family = Family(f"user/{name or type(model).__name__}", "user's model", lambda: model, inputs)
    return _probe(family, type(model).__module__.split(".")[0], "", at)


def _bound(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple) and len(example) == 2 and isinstance(example[0], tuple) and isinstance(example[1], Mapping):
        return example[0], dict(example[1])
    if isinstance(example, tuple | list):
        return tuple(example), {}
    raise InvalidInput(f"example must be a tensor, a tuple, a mapping or (args, kwargs); got {type(example).__name__}.")


def probe_family(name: str) -> Capability:
    """Probe one family in this process. An error of the model, the exporter or the cut becomes the row's reason.

    Raises:
        InvalidInput: no such family.
    """
    known = _families()
    if name not in known:
        raise InvalidInput(f"No family {name!r}; known: {', '.join(known)}.")
    family = known[name]
    try:
        version = str(_LIBRARIES[family.library].version())
    except MissingExtra as error:
        return Capability(name, family.kind, family.library, "not installed", reason=str(error))
    return _probe(family, family.library, version, None)


def _probe(family: Family, library: str, version: str, at: Sequence[str] | None) -> Capability:
    row: dict[str, Any] = {"family": family.name, "kind": family.kind, "library": library, "version": version}
    stage = "making the model"
    generator = torch.random.get_rng_state()
    flags = contextlib.ExitStack()
    try:
        torch.manual_seed(0)
        model = family.build()
        flags.enter_context(evaluating(model))  # it may be a user's own
        row["model"] = Value(type(model).__name__, "measured")
        args, kwargs = family.inputs(2, None)
        stage = "an ordinary forward"
        with torch.no_grad():
            output = model(*args, **kwargs)
        row["outputs"] = Value(_describe(output), "measured")
        stage = "placing exits"
        paths = list(at) if at is not None else Evenly(3).choose(repeated_blocks(model, args, kwargs))
        row["exits"] = Value(paths, "measured")
        stage = "cutting"
        made = cut(model, paths, args, kwargs)
        row["exits"] = Value([s.name for s in made.segments[:-1]], "measured")
        row["batch_dynamic"] = Value(True, "declared by the exporter")
        row["length_dynamic"] = Value(made.spec.dynamic_length, "declared by the exporter")
        early = made.spec.segments[:-1]
        row["live_bytes"] = Value([s.live_bytes for s in early], "measured")
        row["hidden_bytes"] = Value([_hidden_bytes(made, k, args, kwargs) for k in range(len(early))], "measured")
        exact: dict[str, bool] = {}
        for rows in BATCHES:
            stage = f"batch {rows}"
            exact[str(rows)] = _equal(model, made, family.inputs(rows, None))
        row["bit_exact"] = Value(exact, "measured")
        row["batch_dynamic"] = Value(True, "measured")  # three sizes have just run
        lengths_exact = True
        if family.lengths and made.spec.dynamic_length:
            for length in family.lengths:
                stage = f"length {length}"
                lengths_exact &= all(_equal(model, made, family.inputs(rows, length)) for rows in BATCHES)
            row["length_dynamic"] = Value(True, "measured")
        row["supported"] = all(exact.values()) and lengths_exact
        if not row["supported"]:
            row["reason"] = "outputs differ from the uncut model's" + ("" if lengths_exact else " at another length")
    except NotCuttable as error:
        row["reason"] = f"{stage}: {error.reason}: {_brief(error)}"
        if error.reason == "batch":
            row["batch_dynamic"] = Value(False, "declared by the exporter")
    except Exception as error:  # a third-party model may fail in any way, and the other families must still be probed
        row["reason"] = f"{stage}: {type(error).__name__}: {_brief(error)}"
    finally:
        torch.random.set_rng_state(generator)
        flags.close()
    return Capability(**row)


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""


def _equal(model: nn.Module, made: Any, inputs: Inputs) -> bool:
    with torch.no_grad():
        want, want_spec = tree_flatten(model(*inputs.args, **inputs.kwargs))
        got, got_spec = tree_flatten(made(*inputs.args, **inputs.kwargs))
    return want_spec == got_spec and all(same(a, b) for a, b in zip(want, got, strict=True))


def _hidden_bytes(made: Any, exit_index: int, args: Any, kwargs: Any) -> int:
    with torch.no_grad():
        state = made.run(made.begin(*args, **kwargs), 0, exit_index + 1)
    return state.hidden[0].numel() * state.hidden.element_size()


def _describe(output: Any) -> str:
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return f"{type(output).__name__} of {len(leaves)} tensor{'s' if len(leaves) != 1 else ''}"


def _worker(connection: Connection) -> None:
    torch.set_num_threads(1)
    while (name := connection.recv()) is not None:
        connection.send(probe_family(name))


class _Workers:
    """One worker process, started again when a family kills it or outlives its time."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._process: Any = None
        self._connection: Any = None

    def probe(self, name: str) -> Capability:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_worker, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        self._connection.send(name)
        family = _families()[name]
        try:
            if self._connection.poll(self.timeout_s):
                row: Capability = self._connection.recv()
                return row
            reason = f"took more than {self.timeout_s:g} s"
        except EOFError:
            self._process.join()
            reason = f"the process died with exit code {self._process.exitcode}"
        self.close(kill=True)
        return Capability(name, family.kind, family.library, "unknown", reason=reason)

    def close(self, kill: bool = False) -> None:
        if self._process is not None:
            if kill:
                self._process.kill()
            else:
                self._connection.send(None)
            self._process.join()
            self._connection.close()
            self._process = None


def probe(
    families: Iterable[str] | None = None,
    *,
    json_path: str | os.PathLike[str] | None = None,
    markdown_path: str | os.PathLike[str] | None = None,
    progress: bool = True,
    isolate: bool = True,
    timeout_s: float = 300.0,
) -> list[Capability]:
    """Run the cut over model families and write the capability matrix.

    Args:
        families: names from `probe_families`; all by default.
        json_path: where the matrix goes as JSON, written atomically; ``None`` for nowhere.
        markdown_path: the same as a Markdown page.
        progress: show a progress bar.
        isolate: run the families in a process of their own, so that one that crashes the interpreter costs its row only.
        timeout_s: time that one family may take, with ``isolate``.

    Returns:
        One row per family, in the order asked for.

    Raises:
        InvalidInput: an unknown family.
    """
    known = probe_families()
    names = list(families) if families is not None else known
    if unknown := [n for n in names if n not in known]:
        raise InvalidInput(f"No families {unknown}; see probe_families(), e.g. {known[:3]}.")
    workers = _Workers(timeout_s)
    rows: list[Capability] = []
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, disable=not progress) as bar:
            task = bar.add_task("probe", total=len(names))
            for name in names:
                bar.update(task, description=name)
                row = workers.probe(name) if isolate else probe_family(name)
                rows.append(row)
                bar.console.print(f"{'supported' if row.supported else 'not supported':<14} {name}  {row.reason}") if progress else None
                bar.advance(task)
    finally:
        workers.close()
    if json_path is not None:
        write_json(json_path, matrix(rows))
    if markdown_path is not None:
        write_text(markdown_path, markdown(matrix(rows)))
    return rows


def matrix(rows: Sequence[Capability]) -> dict[str, Any]:
    """Rows as JSON data with what they were measured on."""
    return {
        "what": "the cut over model families: small random configurations, float32, eager, CPU",
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "batch_sizes": list(BATCHES),
        "supported": sum(r.supported for r in rows),
        "families": len(rows),
        "rows": [r.to_dict() for r in rows],
    }


def markdown(data: Mapping[str, Any]) -> str:
    """The capability matrix as a Markdown page, from what `matrix` gives (or its JSON)."""
    versions = sorted({f"{r['library']} {r['version']}" for r in data["rows"]})
    lines = [
        "# Capability matrix",
        "",
        "Generated by `offramp.engines.probe.probe` from a run; not edited by hand. Each family is a small random configuration, cut at "
        "three exits placed evenly by counted cost, and compared with the uncut model (float32, eager, CPU). "
        f"PyTorch {data['torch']}, {', '.join(versions)}.",
        "",
        f"{data['supported']} of {data['families']} families are supported: every output tensor equals the uncut model's bit for bit at "
        f"batch {', '.join(str(b) for b in data['batch_sizes'])}, and at other sequence lengths where the length is dynamic.",
        "",
        "Source of each value: m = measured, e = declared by the exporter, ? = unknown.",
        "",
        "| family | kind | model | exits | batch varies | length varies | outputs | bit-exact | crossing / state, bytes per item |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in data["rows"]:
        if r["supported"]:
            pairs = ", ".join(f"{a:,} / {b:,}" for a, b in zip(r["live_bytes"]["value"], r["hidden_bytes"]["value"], strict=True))
            exact = ", ".join(k for k, v in r["bit_exact"]["value"].items() if v)
            cells = [
                r["family"],
                r["kind"],
                _cell(r["model"]),
                _cell(r["exits"], ", ".join(f"`{p}`" for p in r["exits"]["value"])),
                _cell(r["batch_dynamic"]),
                _cell(r["length_dynamic"]),
                _cell(r["outputs"]),
                _cell(r["bit_exact"], exact),
                _cell(r["live_bytes"], pairs),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Not supported", "", "| family | kind | model | why |", "|---|---|---|---|"]
    for r in data["rows"]:
        if not r["supported"]:
            why = str(r["reason"]).replace("|", "\\|")
            lines.append(f"| {r['family']} | {r['kind']} | {_cell(r['model'])} | {why} |")
    return "\n".join(lines) + "\n"


_MARKS = {"measured": "m", "declared by the exporter": "e", "unknown": "?"}


def _cell(value: Mapping[str, Any], text: str | None = None) -> str:
    shown = text if text is not None else {True: "yes", False: "no", None: ""}.get(value["value"], value["value"])
    return f"{shown} ({_MARKS[value['source']]})".strip()


__all__ = ["BATCHES", "Capability", "Value", "markdown", "matrix", "probe", "probe_families", "probe_family", "probe_model"]
