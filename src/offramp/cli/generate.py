"""Command: generate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.text import Text

from offramp.cli.base import OTHER, app, device_of, percent, table
from offramp.cli.options import RunFlags, command, console
from offramp.cli.records import optional, reason
from offramp.core.bundle import write_json
from offramp.core.errors import InvalidInput
from offramp.engines.text.generator import text_generator
from offramp.engines.text.written import Generation
from offramp.language import LanguageModel, attach_lm, load_lm
from offramp.measure.text_report import pieces, text_report
from offramp.policies.decoding import Accept, CatchUp, Copy, Fill, Plain, Recompute, Verify, Way
from offramp.policies.draft_stop import BelowProbability, FixedLength

TEXT, HOW = "Text", "How"
EXIT_STYLE, FULL_STYLE, PROMPT_STYLE = "bold green", "yellow", "dim"
MODES = ("plain", "accept", "verify")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class TextFlags:
    """What to write."""

    prompt: Annotated[list[str], typer.Option(help="Text to continue; repeat for more.", rich_help_panel=TEXT)]
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens to add; by default the model's own, else 20.", rich_help_panel=TEXT)
    ] = None
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the writing; repeat for more.", rich_help_panel=TEXT)] = None
    do_sample: Annotated[
        bool | None,
        typer.Option("--do-sample/--greedy", help="Draw tokens, or take the likeliest; by default the model's own.", rich_help_panel=TEXT),
    ] = None
    temperature: Annotated[float | None, typer.Option(help="Divides the logits.", rich_help_panel=TEXT)] = None
    top_k: Annotated[int | None, typer.Option(help="Keep so many candidates; 0 = all.", rich_help_panel=TEXT)] = None
    top_p: Annotated[float | None, typer.Option(help="Keep candidates of so much probability.", rich_help_panel=TEXT)] = None
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: less of what occurred.", rich_help_panel=TEXT)] = None
    seed: Annotated[int, typer.Option(help="Of the drawing.", rich_help_panel=TEXT)] = 0

    def arguments(self) -> dict[str, Any]:
        """Those of `TextGenerator.generate`."""
        names = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
        return {**{name: getattr(self, name) for name in names}, "stop_strings": self.stop or None}


@dataclass
class HowFlags:
    """How to decide."""

    mode: Annotated[
        str,
        typer.Option(
            help="plain: every block for every token. accept: leave at the exit when sure. verify: the exit drafts, the model checks.",
            rich_help_panel=HOW,
        ),
    ] = "plain"
    exit: Annotated[int | None, typer.Option(min=1, help="Blocks before the exit; by default an eighth of them.", rich_help_panel=HOW)] = (
        None
    )
    heads: Annotated[Path | None, typer.Option(help="Folder of trained exits; else the model's own head.", rich_help_panel=HOW)] = None
    draft_length: Annotated[int, typer.Option(min=1, help="verify: most drafts in a round.", rich_help_panel=HOW)] = 4
    stop_below: Annotated[
        float | None, typer.Option(help="verify: no more drafts after one less likely than this.", rich_help_panel=HOW)
    ] = None
    threshold: Annotated[float, typer.Option(help="accept: least probability to leave with.", rich_help_panel=HOW)] = 0.9
    fill: Annotated[
        str,
        typer.Option(
            help="accept: what becomes of the blocks behind. catch-up: tokens wait and run through them together. recompute: they wait and "
            "run again from the first block. copy: keys and values are made from the state at the exit, which the text then differs by.",
            rich_help_panel=HOW,
        ),
    ] = "catch-up"
    cap: Annotated[int, typer.Option(min=1, help="accept: most tokens that wait for the blocks behind.", rich_help_panel=HOW)] = 8
    compile: Annotated[
        bool,
        typer.Option("--compile", help="On CUDA: compile first, which takes a while and pays for long texts.", rich_help_panel=HOW),
    ] = False

    def chosen(self, exit_index: int) -> Way:
        """The mode, at an exit."""
        if self.mode == "plain":
            return Plain()
        if self.mode == "accept":
            fills: dict[str, Fill] = {"catch-up": CatchUp(self.cap), "recompute": Recompute(self.cap), "copy": Copy()}
            if self.fill not in fills:
                raise InvalidInput(f"--fill is one of {', '.join(fills)}, got {self.fill!r}.")
            return Accept(self.threshold, fill=fills[self.fill], exits=(exit_index,))
        if self.mode == "verify":
            stop = FixedLength() if self.stop_below is None else BelowProbability(self.stop_below)
            return Verify(self.draft_length, stop, exit_index=exit_index)
        if self.mode == "audit":
            raise InvalidInput(
                "--mode audit is no mode of its own: accept audits. With --mode accept --show it says of how many tokens that left early "
                "the model would have chosen otherwise (with --fill catch-up or recompute)."
            )
        raise InvalidInput(f"--mode is one of {', '.join(MODES)}, got {self.mode!r}.")


@command(app, "generate", OTHER)
def generate_text(
    model: Annotated[str, typer.Option(help="Folder of a causal language model and its tokenizer, or its hub name.")],
    text: TextFlags,
    how: HowFlags,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; by default CUDA where there is one.")] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Colour tokens by the depth that decided them, and say what the drafts did.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="File for token ids, depths and counts (JSON).")] = None,
    report: Annotated[Path | None, typer.Option(help="File for the texts in colours, with what the drafts did (HTML).")] = None,
) -> None:
    """Continue texts with a language model, each token as deep as it needs.

    On CUDA the steps are captured as graphs, but not those of accept with another fill than catch-up, nor with a repetition penalty.

    Example: `offramp generate --model ./llama --prompt "Once upon a time" --mode verify --exit 4 --draft-length 5 --show`
    """
    how.chosen(0)  # a wrong mode is said before anything is loaded
    loaded, tokenizer = open_language_model(model, dtype, device)
    lm, exit_index = exits_of(loaded, how)
    mode = how.chosen(exit_index)
    found = text_generator(lm, mode, tokenizer=tokenizer, compiled=how.compile).generate(text.prompt, **text.arguments())
    for row, prompt in enumerate(text.prompt):
        added = pieces(tokenizer, found.prompts[row], found.tokens[row])
        if show:
            console.print(coloured(prompt, added, found.depth[row], len(lm.decoder)), soft_wrap=True)
        else:
            console.print(prompt + "".join(added), markup=False, highlight=False, soft_wrap=True)
    if show:
        _summary(found, mode, len(lm.decoder))
    if out is not None:
        write_json(out, _record(found, how.mode))
    if report is not None:
        text_report(report, generation=found, blocks=len(lm.decoder), tokenizer=tokenizer)


def open_language_model(path: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    """The model in evaluation mode and its tokenizer."""
    if dtype not in DTYPES:
        raise InvalidInput(f"--dtype is one of {', '.join(DTYPES)}, got {dtype!r}.")
    where = device_of(RunFlags(out=Path(), device=device))
    transformers = optional("transformers", "hf", "Generating text")
    kind: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        transformers.AutoConfig.from_pretrained(path)  # is there a model at all?
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(f"No causal language model could be loaded from {path}: {reason(error)}") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(
            f"{path} holds a language model and no tokenizer that can be loaded: {reason(error)} Save the model's tokenizer beside it: "
            "tokenizer.save_pretrained(folder)."
        ) from error
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=kind)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(f"No causal language model could be loaded from {path}: {reason(error)}") from error
    return model.to(where).eval(), tokenizer


def exits_of(model: Any, how: HowFlags) -> tuple[LanguageModel, int]:
    """The model with its exits, and which of them is used."""
    if how.heads is not None:
        lm = load_lm(model, how.heads)
        after = how.exit if how.exit is not None else lm.exits[0]
        if after not in lm.exits:
            raise InvalidInput(f"{how.heads} has exits after {', '.join(map(str, lm.exits))} blocks, not after {after}.")
        return lm, lm.exits.index(after)
    return attach_lm(model, [how.exit if how.exit is not None else max(1, model.config.num_hidden_layers // 8)]), 0


def coloured(prompt: str, added: Sequence[str], depths: Sequence[int], blocks: int) -> Text:
    """The prompt, and what tokens added to it in the colours of the depths that decided them."""
    text = Text(prompt, style=PROMPT_STYLE)
    for piece, depth in zip(added, depths, strict=True):
        text.append(piece, style=FULL_STYLE if depth == blocks else EXIT_STYLE)
    return text


def _summary(found: Generation, mode: Way, blocks: int) -> None:
    depths = [d for row in found.depth for d in row]
    styles = {depth: FULL_STYLE if depth == blocks else EXIT_STYLE for depth in sorted(set(depths))}
    rows = [
        (f"[{style}]{depth} of {blocks}[/{style}]", str(depths.count(depth)), percent(depths.count(depth) / len(depths)))
        for depth, style in styles.items()
    ]
    console.print()
    table("Depth that decided", ("blocks", "tokens", "share"), rows)
    if isinstance(mode, Verify):
        places = enumerate(zip(found.drafted, found.accepted, strict=True), 1)
        shares = [(str(place), str(tried), str(kept), percent(kept / tried)) for place, (tried, kept) in places if tried]
        table("Drafts by place in the round", ("place", "tried", "kept", "acceptance"), shares)
        console.print(f"{found.tokens_per_pass:.2f} tokens for each pass over all blocks; {percent(found.acceptance)} of drafts kept.")
    if isinstance(mode, Accept) and not isinstance(mode.fill, Copy):
        share = percent(found.disagreed / found.audited) if found.audited else "none"
        console.print(f"{found.audited} tokens left early; the model would have chosen otherwise for {found.disagreed} ({share}).")
    if found.blocks_plain:
        apart = ", and keys and values alone of others" if found.blocks_projected else ""
        console.print(f"Ran {percent(found.blocks_share)} of the blocks that plain decoding runs{apart}.")


def _record(found: Generation, mode: str) -> dict[str, Any]:
    names = ("prompts", "tokens", "depth", "drafted", "accepted", "audited", "disagreed", "deep_passes", "row_passes", "blocks_run",
             "blocks_projected")  # fmt: skip
    scores = [[None if math.isnan(score) else score for score in row] for row in found.scores]
    return {"mode": mode, **{name: getattr(found, name) for name in names}, "blocks_plain": found.blocks_plain, "scores": scores}
