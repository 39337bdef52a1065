"""The app, and what several commands do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import typer
from rich.table import Table
from rich.text import Text

from offramp import policies
from offramp.cli import models
from offramp.cli.data import Records
from offramp.cli.options import DataFlags, ModelFlags, RunFlags, console
from offramp.cli.parts import parse_part
from offramp.core.batches import unpack_batch
from offramp.core.bundle import load_bundle, read_json, write_json
from offramp.core.errors import InvalidInput, OfframpWarning
from offramp.core.protocols import Rule
from offramp.core.system import System
from offramp.core.trace import LatencyTable, Trace
from offramp.core.warn import warn
from offramp.engines.classify.record import record as record_trace
from offramp.network import MultiExit, load
from offramp.policies.threshold import Confidence

app = typer.Typer(
    name="offramp",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Give a trained network only as much compute as each input needs: attach exits, train them, choose when to leave, run.\n\n"
    "The usual order is fit, record, calibrate, evaluate, bench, report, all with the same --out folder. "
    "`offramp COMMAND --help` has an example of each. Every flag can come from a TOML file: `--config run.toml`.",
)
LANGUAGE = (
    "a language model answers with a row for every token, and the commands from fit to report are for models that answer each item with "
    'one. Its exits are trained in Python: lm = offramp.attach(model, exits=[4]); offramp.fit(lm, "folder/of/texts", tokenizer=tokenizer); '
    "lm.save(folder). `offramp generate --heads FOLDER` then writes with them. See docs/language-models.md. For classes, take "
    "hf:PATH:AutoModelForSequenceClassification."
)
"""Why a language model is none for the commands of `WORK`."""
WORK, OTHER, METHODS = "Work, in this order", "Models", "Published methods"


def device_of(run: RunFlags) -> torch.device:
    name = run.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(f"The device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def open_model(model: ModelFlags, items: DataFlags, width: int | None = None, labels_needed: bool = True) -> tuple[models.Loaded, Records]:
    """The model, and the items prepared for it."""
    if model.model.startswith("hf:") and model.model.endswith(("ForCausalLM", "LMHeadModel")):
        raise InvalidInput(f"{model.model}: {LANGUAGE}")
    plain = items.read(None, labels_needed=labels_needed)
    scheme = model.model.partition(":")[0]
    classes = model.num_classes or width or (len(plain.classes) if scheme in ("timm", "python") and plain.classes else None)
    loaded = models.load_model(
        model.model,
        kind="text" if plain.kind == "text" else "image",
        num_classes=classes,
        weights=model.weights,
        pretrained=model.pretrained,
    )
    ending = getattr(loaded.model, "get_output_embeddings", None)
    if callable(ending) and ending() is not None:
        raise InvalidInput(f"{type(loaded.model).__name__}: {LANGUAGE}")
    records = items.read(loaded, labels_needed=labels_needed)
    _check_fit(loaded, records)
    return loaded, records


def _check_fit(loaded: models.Loaded, records: Records) -> None:
    """Run the model once on two items, so that inputs it does not take are an error that says so and not one from inside it."""
    inputs = records.inputs(2)
    try:
        with torch.no_grad():
            loaded.model(**inputs) if isinstance(inputs, dict) else loaded.model(inputs)
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        named = {k: tuple(v.shape) for k, v in inputs.items()} if isinstance(inputs, dict) else tuple(inputs.shape)
        raise InvalidInput(
            f"{type(loaded.model).__name__} does not take the items of {records.source}, a batch {named}: {str(error).splitlines()[0]}. "
            "Check --model, --image-size, --channels, --tokenizer and --max-length."
        ) from error


def open_run(model: ModelFlags, items: DataFlags, run: RunFlags, labels_needed: bool = True) -> tuple[MultiExit, Records]:
    """The network that `fit` saved in the run's folder, and items prepared for it."""
    content, _ = load_bundle(inside(run.out, "adapter", "fit"), "adapter", "adapter")
    loaded, records = open_model(model, items, int(content["num_outputs"]), labels_needed)
    net = load(loaded.model, run.out / "adapter", example=records.inputs(2))
    records.check_labels(net.num_outputs)
    return net.to(device_of(run)), records


def inside(out: Path, name: str, made_by: str) -> Path:
    if not (out / name).is_dir():
        raise InvalidInput(f"{out} has no {name}/: run `offramp {made_by} --out {out}` first.")
    return out / name


def note_items(run: RunFlags, verb: str, items: DataFlags) -> None:
    """Keep in the run's folder which items a command used, and warn where an earlier one used some of them.

    Thresholds chosen on training items trust the exits too much, and figures of items that chose thresholds are flattered.
    """
    path = run.out / "items.json"
    used: dict[str, dict[str, Any]] = read_json(path) if path.is_file() else {}
    location, _, keys = items.data.partition("::")
    mine = {"data": str(Path(location).resolve()), "keys": keys, "split": items.split, "part": items.part, "part_seed": items.part_seed}
    for earlier, why in (("fit", "was trained on"), ("record", "chose the thresholds")):
        if earlier == verb:
            break
        if earlier in used and _overlap(used[earlier], mine):
            warn(
                f"These items (part {items.part}) include some of what {why} (part {used[earlier]['part']} in `{earlier}`): what they "
                "show is flattered, and a promise made on them does not hold. Give each command its own --part.",
                OfframpWarning,
            )
    write_json(path, {**used, verb: mine})


def _overlap(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether two parts of the same data share items; parts of different orders are taken to."""
    if any(one[k] != two[k] for k in ("data", "keys", "split")):
        return False
    (a, b), (c, d) = (tuple(map(float, each["part"].split(":"))) for each in (one, two))
    return max(a, c) < min(b, d) or one["part_seed"] != two["part_seed"]


def rule_named(text: str | None, system: System | None) -> Rule:
    if text is not None:
        rule: Rule = parse_part(text, policies.PARTS, "rule")
        return rule
    return system.rule if system is not None and system.rule is not None else Confidence()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], justify: Literal["left", "right"] = "right") -> None:
    """Print a table. Numbers that the terminal is too narrow for go on in a further table with the same first column."""
    cells = [[c if isinstance(c, str) else f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    parts, heads = [list(range(len(columns)))], list(columns)
    if justify == "right" and 1 + sum(max(w, len(name)) + 3 for w, name in zip(least_widths(columns, cells), columns)) > console.width:
        parts, heads = fitting(least_widths(columns, cells), console.width), [name.replace(" ", "\n") for name in columns]
    for part in parts:
        drawn = Table(title=title or None, title_justify="left", header_style="bold")
        for index in part:
            drawn.add_column(heads[index], justify="left" if index == 0 else justify, overflow="fold", no_wrap=index == 0)
        for row in cells:
            drawn.add_row(*(row[index] for index in part))
        console.print(drawn)
        title = ""


def least_widths(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """Characters that each column needs: a heading may be broken between words, a cell may not."""
    return [
        max([*map(len, name.split()), *(Text.from_markup(row[k]).cell_len for row in rows)], default=0) for k, name in enumerate(columns)
    ]


def fitting(widths: Sequence[int], most: int) -> list[list[int]]:
    """Numbers of columns in parts that fit into so many characters, as far as one column beside the first does, the first in each."""
    parts: list[list[int]] = [[0]] if widths else []
    for k in range(1, len(widths)):
        if len(parts[-1]) > 1 and 1 + sum(widths[j] + 3 for j in (*parts[-1], k)) > most:
            parts.append([0])
        parts[-1].append(k)
    return parts


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def trace_of(net: MultiExit, records: Records, items: DataFlags, rules: Sequence[Rule], latency: LatencyTable | None = None) -> Trace:
    loader = records.loader(items.batch_size, workers=items.workers)
    return record_trace(
        net, loader, rules=rules, latency=latency, provenance={"data": records.source, "part": items.part, "part_seed": items.part_seed}
    )


def without_labels(loader: Iterable[Any]) -> Iterable[Any]:
    for batch in loader:
        args, kwargs, _ = unpack_batch(batch)
        yield args, kwargs
