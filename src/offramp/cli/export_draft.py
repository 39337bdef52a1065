"""Command: export-draft."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offramp.cli.base import OTHER, app, table
from offramp.cli.generate import HowFlags, exits_of, open_language_model
from offramp.cli.options import command, console
from offramp.core.errors import InvalidInput
from offramp.engines.text.draft_export import export_draft, in_use


@command(app, "export-draft", OTHER)
def export_the_draft(
    model: Annotated[str, typer.Option(help="Folder of a causal language model and its tokenizer, or its hub name.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; must not exist or be empty.")],
    exit: Annotated[  # noqa: A002 - the flag's name
        int | None, typer.Option(min=1, help="Blocks before the exit; by default an eighth of them.")
    ] = None,
    heads: Annotated[Path | None, typer.Option(help="Folder of trained exits; else the model's own head.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16 or float16.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder and all that is in it.")] = False,
) -> None:
    """Write the first blocks and an exit as a checkpoint of their own, which transformers takes as `assistant_model=`.

    It is loaded again and compared with the exit before the folder appears.

    Example: `offramp export-draft --model ./llama --heads runs/exits --exit 4 --out ./llama-draft`
    """
    if in_use(out) and not overwrite:  # said in the words of the shell, and before anything is loaded
        raise InvalidInput(f"{out} exists and is not empty. Choose another folder, or give --overwrite to replace it.")
    loaded, tokenizer = open_language_model(model, dtype, "cpu")
    lm, exit_index = exits_of(loaded, HowFlags(exit=exit, heads=heads))
    found = export_draft(lm, out, exit_index, tokenizer=tokenizer, overwrite=overwrite)
    rows = [("blocks", f"{found.blocks} of {len(lm.decoder)}"), ("parameters", f"{found.parameters:,}")]
    rows.append(("largest difference of logits", f"{found.difference:.3g} of their spread"))
    table(f"Draft in {found.folder}", ("what", "value"), rows, "left")
    if found.remark:
        console.print(found.remark)
