"""Command: probe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from offramp.cli import models
from offramp.cli.base import (
    OTHER,
    app,
    table,
)
from offramp.cli.options import command
from offramp.core.bundle import write_json
from offramp.core.errors import InvalidInput


@command(app, "probe", OTHER)
def probe(
    model: Annotated[
        str | None, typer.Option(help="Your model, as for fit; by default the families of timm, transformers and diffusers.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Shape of one input of --model, such as 3x224x224; by default what it was made for.")
    ] = None,
    at: Annotated[list[str] | None, typer.Option(help="Module path to exit after, with --model; repeat for more.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Width of the answer of --model.")] = None,
    family: Annotated[list[str] | None, typer.Option(help="Only this family, such as timm/vit; repeat for more.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for capabilities.json and capabilities.md.")] = None,
) -> None:
    """Say whether models can be cut for early exits, and what of it was measured.

    Each is exported, cut after some blocks, and compared bit for bit with the uncut model at batch 1, 3 and 7.

    Example: `offramp probe --model timm:resnet18` or `offramp probe --family timm/resnet --out capabilities`
    """
    from offramp.engines import probe as probing  # imports the lists of families

    if model is None:
        if shape or at or num_classes:
            raise InvalidInput("--shape, --at and --num-classes describe a --model; families have their own.")
        rows = probing.probe(
            family or None,
            json_path=None if out is None else out / "capabilities.json",
            markdown_path=None if out is None else out / "capabilities.md",
        )
    else:
        loaded = models.load_model(model, num_classes=num_classes)
        rows = [probing.probe_model(loaded.model, _example(loaded, shape), at=at, name=model)]
        if out is not None:
            write_json(out / "capabilities.json", probing.matrix(rows))
    shown = [(r.family, "yes" if r.supported else "no", _said(r.bit_exact), _said(r.exits), r.reason or "-") for r in rows]
    table("", ("model", "supported", "bit-exact", "exits", "reason"), shown, "left")
    if model is not None and not rows[0].supported:
        raise typer.Exit(1)


def _said(value: Any) -> str:
    """A probed value; what was not found out is unknown."""
    if value.source == "unknown":
        return "unknown"
    found = value.value
    if isinstance(found, Mapping):
        return ", ".join(f"{key}: {_yes(v)}" for key, v in found.items())
    return ", ".join(map(_yes, found)) if isinstance(found, list | tuple) else _yes(found)


def _yes(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _example(loaded: models.Loaded, shape: str | None) -> Any:
    """Random inputs for a model: images or vectors of a shape, or token ids."""
    if shape is not None:
        parts = shape.lower().split("x")
        if not all(p.strip().isdigit() and int(p) > 0 for p in parts):
            raise InvalidInput(f"--shape is sizes joined by x, such as 3x224x224, got {shape!r}.")
        return torch.randn(2, *map(int, parts))
    if loaded.images is not None and loaded.images.size is not None:
        return torch.randn(2, loaded.images.channels or 3, *loaded.images.size)
    if loaded.tokenizer is not None:
        config: Any = loaded.model.config
        return {"input_ids": torch.randint(0, int(config.vocab_size), (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    raise InvalidInput("The model does not say what it takes: give --shape, such as 3x224x224.")
