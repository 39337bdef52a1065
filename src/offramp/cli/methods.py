"""Commands about published methods."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from offramp import systems
from offramp.cli.base import METHODS, app, table
from offramp.cli.options import command, console
from offramp.cli.progress import stages
from offramp.cli.reproduce import CLASSIFIERS
from offramp.cli.reproduce_common import Reproduction, save
from offramp.cli.reproduce_images import DENOISERS
from offramp.cli.reproduce_text import TEXTS
from offramp.cli.reproduce_unmask import MASKS
from offramp.core.errors import InvalidInput

REPRODUCTIONS: dict[str, Reproduction] = {kind.engine: kind for kind in (CLASSIFIERS, TEXTS, MASKS, DENOISERS)}
"""How methods are reproduced, by their engine."""


@command(app, "systems", METHODS)
def list_them(
    engine: Annotated[
        str | None, typer.Option(help="Only those of one engine: classify, generate, unmask, denoise, stream, split.")
    ] = None,
) -> None:
    """List the published methods.

    Example: `offramp systems --engine classify`
    """
    rows = []
    for card in map(systems.load_card, systems.list_systems()):
        if engine is None or card.engine == engine:
            claims = [
                word
                for word, holds in (("lossless", card.lossless), ("guaranteed", card.guaranteed), ("no training", not card.trained))
                if holds
            ]
            rows.append((card.name, str(card.year), card.venue, card.engine, card.delta_from or "-", ", ".join(claims) or "-", card.status))
    table("", ("name", "year", "venue", "engine", "delta from", "claims", "status"), rows, "left")


@command(app, "show", METHODS)
def show(name: Annotated[str, typer.Argument(help="Of the system.")]) -> None:
    """Print what a method is: its card, the parts it is made of, what deviates from the authors' code.

    Example: `offramp show pabee`
    """
    console.print(systems.show(name), highlight=False, markup=False, soft_wrap=True)


@command(app, "diff", METHODS)
def diff(
    left: Annotated[str, typer.Argument(help="A system.")],
    right: Annotated[str, typer.Argument(help="Another.")],
) -> None:
    """Print where two methods differ, computed from the parts they are made of.

    Example: `offramp diff branchynet pabee`
    """
    found = systems.diff(left, right)
    if not found:
        console.print(f"{left} and {right} are made of the same parts.")
        return
    table("", ("axis", left, right), [(d.axis, d.left, d.right) for d in found], "left")


@command(app, "cite", METHODS)
def cite(names: Annotated[list[str], typer.Argument(help="Systems.")]) -> None:
    """Print BibTeX.

    Example: `offramp cite branchynet pabee`
    """
    typer.echo(systems.cite(*names))


def _configs(folder: Path | None) -> Path:
    """Folder of the reproductions: as given, else ``benchmarks/configs`` here or in the checkout of this package."""
    places = (
        [folder] if folder is not None else [Path("benchmarks/configs"), Path(__file__).resolve().parents[3] / "benchmarks" / "configs"]
    )
    found = next((p for p in places if p.is_dir()), None)
    if found is None:
        raise InvalidInput(
            f"No folder {places[0]}. Reproductions are configured in a checkout's benchmarks/configs; name another with --configs."
        )
    return found


@command(app, "reproduce", METHODS)
def reproduce(
    name: Annotated[str, typer.Argument(help="Of the system.")],
    variant: Annotated[
        str | None,
        typer.Option(
            help="A table of benchmarks/configs/NAME.toml. By default digits, which runs in a minute, or tiny, which takes some; for a "
            "language model that needs --data, as do all others."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Path of the data, for variants that read a path; for a language model a text file or a folder.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default CUDA where there is one.")] = None,
    configs: Annotated[Path | None, typer.Option(help="Folder of the configurations.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder for the result; by default benchmarks/results beside the configurations.")
    ] = None,
) -> None:
    """Train a method small on real data and measure the claim its paper makes, beside what it must beat.

    Example: `offramp reproduce msdnet-budget --variant cifar --data cifar10.npz --device cuda`
    """
    card = systems.load_card(name)
    folder = _configs(configs)
    kind = REPRODUCTIONS.get(card.engine)
    if kind is None:
        raise InvalidInput(f"Methods of the {card.engine} engine cannot be reproduced; those of {', '.join(REPRODUCTIONS)} can.")
    variant = variant or kind.default
    settings = kind.settings.load(folder / f"{card.name}.toml", variant)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with stages(card.name) as say:
        result = kind.run(card.name, settings, variant=variant, data=data, device=where, say=say)
    table(f"{card.name}, {variant}: {kind.averages} over {len(result['seeds'])} seeds", *kind.table(result))
    _show_verdict(result)
    path = save(result, results or folder.parent / "results")
    console.print(f"Saved {path}.")


def _show_verdict(result: Mapping[str, Any]) -> None:
    measured = result["measured"]
    console.print(f"claim     {result['claim']}", highlight=False, markup=False)
    p = result["predicate"]
    where = f"at cost {p['budget']:g}" if p["budget"] is not None else f"{p['over']} over budgets"
    if measured is not None:
        console.print(
            f"measured  {p['metric']} ({where}) {measured['value']:.4f} [{measured['low']:.4f}, {measured['high']:.4f}]; "
            f"claimed {p['relation']} {p['value']:g}",
            highlight=False,
            markup=False,
        )
    console.print(f"verdict   {result['verdict']}", highlight=False, markup=False)
