"""Flags that several commands share, as dataclasses, and the decorator that turns them into a command.

A command is a function of such groups and of its own flags. The decorator flattens the groups into flags, reads ``--config``, and turns
errors into one readable line with an exit code: 2 for bad input, 1 for a failure.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import typing
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from offramp.cli import data as reading
from offramp.cli import models
from offramp.cli.config import defaults_for, read_toml
from offramp.core.errors import FingerprintMismatch, InvalidInput, MissingExtra, NotCuttable, OfframpError, OfframpWarning

console = Console()
errors = Console(stderr=True)

MODEL, DATA, RUN = "Model", "Data", "Run"


def numbers(text: str | None, name: str) -> tuple[float, ...] | None:
    """``0.5,0.5,0.5`` as numbers."""
    if text is None:
        return None
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidInput(f"{name} takes numbers separated by commas, got {text!r}.") from error
    if not all(map(math.isfinite, found)):
        raise InvalidInput(f"{name} takes finite numbers, got {text!r}.")
    return found


def whole_numbers(text: str, name: str) -> tuple[int, ...]:
    """``1,8,32`` as whole numbers of at least 1."""
    found = numbers(text, name) or ()
    if any(n != int(n) or n < 1 for n in found):
        raise InvalidInput(f"{name} takes whole numbers of at least 1 separated by commas, got {text!r}.")
    return tuple(int(n) for n in found)


def size(text: str | None) -> tuple[int, int] | None:
    """``224`` or ``224x160`` (height x width)."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise InvalidInput(f"--image-size is HEIGHTxWIDTH or one number, got {text!r}.")
    return int(parts[0]), int(parts[-1])


@dataclass
class ModelFlags:
    """Which model."""

    model: Annotated[
        str, typer.Option(help="timm:NAME, hf:PATH[:CLASS], python:module:function or python:file.py:function.", rich_help_panel=MODEL)
    ]
    weights: Annotated[Path | None, typer.Option(help="Weights to load into it, a .safetensors file.", rich_help_panel=MODEL)] = None
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Width of its answer; by default the number of classes in the data.", rich_help_panel=MODEL)
    ] = None
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Fetch timm's trained weights.", rich_help_panel=MODEL)] = False


@dataclass
class DataFlags:
    """Which items, and how they become tensors."""

    data: Annotated[
        str,
        typer.Option(
            help="Image folder, .npz, .csv, .tsv, .parquet or a saved data set; PATH::key,key picks arrays or columns.",
            rich_help_panel=DATA,
        ),
    ]
    split: Annotated[str | None, typer.Option(help="A split inside it, such as train.", rich_help_panel=DATA)] = None
    part: Annotated[
        str, typer.Option(help="Items between two fractions of one fixed random order, such as 0:0.6.", rich_help_panel=DATA)
    ] = "0:1"
    part_seed: Annotated[int, typer.Option(help="Seed of that order.", rich_help_panel=DATA)] = 0
    label_column: Annotated[str | None, typer.Option(help="Column of the label.", rich_help_panel=DATA)] = None
    text_column: Annotated[list[str] | None, typer.Option(help="Column of the text; twice for pairs.", rich_help_panel=DATA)] = None
    classes: Annotated[
        list[str] | None, typer.Option(help="Class names in the order of the answers; by default sorted.", rich_help_panel=DATA)
    ] = None
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder, hub name or tokenizer.json; by default the hf model's own.", rich_help_panel=DATA)
    ] = None
    max_length: Annotated[int, typer.Option(min=1, help="Tokens that are kept of a text.", rich_help_panel=DATA)] = 128
    image_size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH or one number; by default what the model was made for.", rich_help_panel=DATA)
    ] = None
    mean: Annotated[
        str | None, typer.Option(help="Subtracted per channel, such as 0.5,0.5,0.5; by default the model's.", rich_help_panel=DATA)
    ] = None
    std: Annotated[str | None, typer.Option(help="Divided by per channel; by default the model's.", rich_help_panel=DATA)] = None
    channels: Annotated[int | None, typer.Option(min=1, max=3, help="1 or 3; by default the model's.", rich_help_panel=DATA)] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Items of a batch.", rich_help_panel=DATA)] = 32
    workers: Annotated[int, typer.Option(min=0, help="Processes that read data.", rich_help_panel=DATA)] = 0

    def read(self, loaded: models.Loaded | None, *, labels_needed: bool = True) -> reading.Records:
        """The items, prepared for a model; with ``None`` prepared for nothing, to look at labels only."""
        images = self._images(loaded)
        texts = reading.Texts(lambda items: {"input_ids": [[0]] * len(items)}) if loaded is None else self._texts(loaded)
        records = reading.read(
            self.data,
            split=self.split,
            images=images,
            texts=texts,
            text_columns=self.text_column or (),
            label_column=self.label_column,
            classes=self.classes or (),
            labels_needed=labels_needed,
        )
        start, _, stop = self.part.partition(":")
        try:
            bounds = float(start), float(stop)
        except ValueError as error:
            raise InvalidInput(f"--part is START:STOP, such as 0:0.6, got {self.part!r}.") from error
        return records if bounds == (0.0, 1.0) else records.part(*bounds, seed=self.part_seed)

    def _images(self, loaded: models.Loaded | None) -> reading.Images:
        own = loaded.images if loaded is not None and loaded.images is not None else reading.Images()
        wanted = size(self.image_size)
        return reading.Images(
            wanted or own.size,
            numbers(self.mean, "--mean") or own.mean,
            numbers(self.std, "--std") or own.std,
            self.channels or own.channels,
            own.crop,
        )

    def _texts(self, loaded: models.Loaded) -> reading.Texts | None:
        spec = self.tokenizer or loaded.tokenizer
        return None if spec is None else reading.tokenizer(spec, self.max_length)


@dataclass
class RunFlags:
    """Where and on what."""

    out: Annotated[Path, typer.Option(help="Folder of the run: adapter/, trace/, plan/, report.html and so on.", rich_help_panel=RUN)]
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; by default CUDA where there is one.", rich_help_panel=RUN)] = None


def _read_config(ctx: typer.Context, value: Path | None) -> Path | None:
    """Make the values of a configuration file the defaults of this command's flags."""
    if value is None or ctx.resilient_parsing or ctx.parent is None:
        return value
    try:
        commands: Any = ctx.parent.command
        known = {name: [p.name for p in c.params if p.name not in ("config", "help")] for name, c in commands.commands.items()}
        found = defaults_for(str(ctx.info_name), read_toml(value), known, str(value))
        params = {p.name: p for p in ctx.command.params}
        for name, setting in found.items():
            multiple = bool(getattr(params[name], "multiple", False))
            if isinstance(setting, list) and not multiple:
                found[name] = ",".join(map(str, setting))
            elif multiple and not isinstance(setting, list):
                found[name] = [setting]
    except OfframpError as error:
        fail(error)
    ctx.default_map = {**(ctx.default_map or {}), **found}
    return value


ConfigFlag = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="TOML file with values for any flags; flags on the command line win.",
        callback=_read_config,
        is_eager=True,
        rich_help_panel=RUN,
    ),
]


def fail(error: OfframpError) -> typing.NoReturn:
    """Print an error in one paragraph and exit: 2 for bad input, 1 for a failure."""
    bad_input = isinstance(error, InvalidInput | FingerprintMismatch | NotCuttable | MissingExtra)
    errors.print(f"[bold red]error:[/bold red] {_plain(str(error))}", highlight=False, soft_wrap=True)
    raise typer.Exit(2 if bad_input else 1)


def _plain(text: str) -> str:
    """Square brackets in messages are no markup."""
    return text.replace("[", "\\[")


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None
) -> None:
    if issubclass(category, OfframpWarning):
        errors.print(f"[bold yellow]warning:[/bold yellow] {_plain(str(message))}", highlight=False, soft_wrap=True)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def command(app: typer.Typer, name: str, panel: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function to an app; its parameters that are dataclasses of flags are flattened into flags."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(function, include_extras=True)
        groups: dict[str, type] = {}
        flags: list[inspect.Parameter] = []
        for parameter in inspect.signature(function).parameters.values():
            hint = hints[parameter.name]
            if inspect.isclass(hint) and is_dataclass(hint):
                groups[parameter.name] = hint
                inner = typing.get_type_hints(hint, include_extras=True)
                for field in inspect.signature(hint).parameters.values():
                    flags.append(
                        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=inner[field.name])
                    )
            else:
                flags.append(inspect.Parameter(parameter.name, inspect.Parameter.KEYWORD_ONLY, default=parameter.default, annotation=hint))
        flags.append(inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ConfigFlag))
        flags.sort(key=lambda p: p.default is not inspect.Parameter.empty)

        @functools.wraps(function)
        def run(**given: Any) -> None:
            given.pop("config", None)
            made = {key: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for key, kind in groups.items()}
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                try:
                    function(**made, **given)
                except OfframpError as error:
                    fail(error)

        del run.__wrapped__  # typer would read the signature behind it
        run.__signature__ = inspect.Signature(flags)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in flags}
        return app.command(name, rich_help_panel=panel)(run)

    return add
