"""One self-contained HTML file about written texts: each token in the colour of the depth that decided it, and what became of drafts.

Text and numbers say everything that colour says: each token carries its depth as a title, and tables follow. Needs the extra ``report``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any, Protocol

import torch

from offramp.core.bundle import write_text
from offramp.core.errors import InvalidInput
from offramp.measure import plots
from offramp.measure.clock import environment as this_environment
from offramp.measure.page import figure, page, paragraph, table, tiles
from offramp.measure.plots import percent
from offramp.measure.statistics import wilson

_SHOWN = 24
"""Texts shown at most; counts are over all."""
_CONTEXT = 8
"""Tokens of the prompt that are decoded before the first new one, so that its piece has the space that belongs to it."""


class Written(Protocol):
    """What a decoding run gives back: `offramp.engines.text.written.Generation`."""

    tokens: list[list[int]]
    depth: list[list[int]]
    drafted: list[int]
    accepted: list[int]
    audited: int
    disagreed: int
    blocks_run: int
    blocks_plain: int
    prompts: list[list[int]]

    @property
    def tokens_per_pass(self) -> float: ...


def pieces(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> list[str]:
    """What each token adds to the text, special tokens nothing.

    A token that only begins a character adds nothing; the one that ends it adds all of it.

    Args:
        tokenizer: of transformers, or anything with ``decode(ids, skip_special_tokens=...)``.
        before: ids of the prompt, so that the first piece has the space that belongs to it.
        ids: the tokens.
    """
    tokens = list(before[-_CONTEXT:])
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    out = []
    for place, token in enumerate(ids):
        tokens.append(token)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if text.endswith("\ufffd") and place + 1 < len(ids):
            out.append("")
            continue
        out.append(text[len(whole) :])
        whole = text
    return out


def text_report(
    path: str | os.PathLike[str],
    *,
    generation: Written,
    blocks: int,
    tokenizer: Any = None,
    title: str = "Texts: how deep each token went",
    environment: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report.

    Args:
        path: the HTML file; written atomically, its folder is made if missing.
        generation: what was written.
        blocks: of the model.
        tokenizer: of transformers; without it token ids are shown.
        title: of the page.
        environment: machine and versions; this machine's by default.

    Returns:
        The path.

    Raises:
        InvalidInput: nothing was written, or a depth is not of a model with so many blocks.
        MissingExtra: matplotlib is not installed.
    """
    depths = [d for row in generation.depth for d in row]
    if not depths:
        raise InvalidInput("The generation holds no tokens; there is nothing to report.")
    if not all(0 < d <= blocks for d in depths):
        raise InvalidInput(f"Depths go from {min(depths)} to {max(depths)}; a model of {blocks} blocks was said to have written the text.")
    used = sorted(set(depths))
    about = f"{len(generation.tokens):,} texts, {len(depths):,} new tokens; model of {blocks} blocks"
    sections = [
        ("summary", "Summary", _summary(generation, depths, blocks)),
        ("texts", "Texts", _legend(used, blocks) + _texts(generation, used, blocks, tokenizer)),
        ("depth", "Depth", _depth(depths, used, blocks)),
        ("drafts", "Drafts by place in the round", _drafts(generation)),
        ("positions", "Depth by position in the text", _positions(generation.depth, blocks)),
        ("machine", "Machine and versions", _machine(environment)),
    ]
    body = page(title, about, [(key, heading, html) for key, heading, html in sections if html])
    write_text(path, body.replace("</head>", f"<style>{_CSS}</style></head>", 1))
    return Path(path)


# ---- texts ---------------------------------------------------------------------------------------------------------------


def _shade(depth: int, blocks: int) -> str:
    """Class of a depth: ``full``, or one of four shades from shallow to deep."""
    return "full" if depth == blocks else f"d{min(3, 4 * (depth - 1) // max(1, blocks - 1))}"


def _legend(used: Sequence[int], blocks: int) -> str:
    marks = "".join(
        f'<li><span class="t {_shade(d, blocks)}">after {d}</span>{" all blocks" if d == blocks else f" of {blocks} blocks"}</li>'
        for d in used
    )
    return f'<ul class="legend" aria-label="Colours">{marks}</ul>'


def _texts(generation: Written, used: Sequence[int], blocks: int, tokenizer: Any) -> str:
    out = []
    rows = list(zip(generation.tokens, generation.depth, strict=True))
    prompts = generation.prompts or [[]] * len(rows)
    for number, ((tokens, depths), prompt) in enumerate(zip(rows[:_SHOWN], prompts, strict=False), 1):
        if tokenizer is None:
            before, added = " ".join(map(str, prompt)), [f" {t}" for t in tokens]
        else:
            before, added = tokenizer.decode(prompt, skip_special_tokens=True) if prompt else "", pieces(tokenizer, prompt, tokens)
        spans = "".join(
            f'<span class="t {_shade(d, blocks)}" title="token {t}, decided after {d} of {blocks} blocks">{escape(piece)}</span>'
            for t, d, piece in zip(tokens, depths, added, strict=True)
        )
        mean = sum(depths) / max(1, len(depths))
        out.append(
            f'<li><blockquote dir="auto" class="written"><span class="prompt">{escape(before)}</span>{spans}</blockquote>'
            f"<small>text {number}: {len(tokens)} new tokens, decided after {mean:.1f} blocks on average</small></li>"
        )
    more = len(rows) - _SHOWN
    rest = paragraph(f"{more} more texts are counted and not shown.", "fine") if more > 0 else ""
    return f'<ul class="written-list">{"".join(out)}</ul>{rest}'


# ---- numbers -------------------------------------------------------------------------------------------------------------


def _summary(generation: Written, depths: Sequence[int], blocks: int) -> str:
    early = sum(d < blocks for d in depths)
    items = [
        ("decided before the end", percent(early / len(depths)), f"{early:,} of {len(depths):,} tokens"),
        ("mean depth", f"{sum(depths) / len(depths):.2f}", f"of {blocks} blocks"),
    ]
    if sum(generation.drafted):
        tried, kept = sum(generation.drafted), sum(generation.accepted)
        items.append(("drafts kept", percent(kept / tried), f"{kept:,} of {tried:,}"))
        items.append(("tokens for each full pass", f"{generation.tokens_per_pass:.2f}", "of a row, its last rounds included"))
    if generation.audited:
        off = wilson(generation.disagreed, generation.audited)
        items.append(
            (
                "left early and disagreed",
                percent(generation.disagreed / generation.audited),
                f"{generation.disagreed:,} of {generation.audited:,} that a full pass has seen ({percent(off.low)} to {percent(off.high)})",
            )
        )
    if generation.blocks_plain:
        share = generation.blocks_run / generation.blocks_plain
        items.append(
            ("blocks run", percent(share), "of plain decoding's, counted token by token; rejected drafts and catching up included")
        )
    return tiles(items)


def _depth(depths: Sequence[int], used: Sequence[int], blocks: int) -> str:
    counts = [sum(d == u for d in depths) for u in used]
    names = [f"after {u}" if u < blocks else f"all {blocks}" for u in used]
    shares = torch.tensor(counts, dtype=torch.float64) / len(depths)
    drawn = plots.exit_histogram(shares, names, key="depth", title="Depth that decided a token", words=("tokens", "depth"))
    numbers = tuple((name, f"{count:,}", percent(count / len(depths))) for name, count in zip(names, counts, strict=True))
    alt = drawn.alt.replace("leaving at", "decided at")
    return f'<div class="pair">{figure(replace(drawn, alt=alt, header=("blocks", "tokens", "share"), rows=numbers))}</div>'


def _drafts(generation: Written) -> str:
    rows = []
    for place, (tried, kept) in enumerate(zip(generation.drafted, generation.accepted, strict=True), 1):
        if tried:
            share = wilson(kept, tried)
            rows.append((str(place), f"{tried:,}", f"{kept:,}", percent(share.value), f"{percent(share.low)} to {percent(share.high)}"))
    if not rows:
        return ""
    return table(("place", "tried", "kept", "acceptance", "interval"), rows, "Drafts by their place in a round") + paragraph(
        "A draft is kept only if those before it in its round were, so acceptance falls with the place. Intervals are 95 %, as if drafts "
        "were independent, which drafts of one text are not.",
        "fine",
    )


def _positions(depth: Sequence[Sequence[int]], blocks: int) -> str:
    """Mean depth over stretches of the texts."""
    longest = max(map(len, depth))
    parts = min(8, longest)
    rows = []
    for part in range(parts):
        first, last = part * longest // parts, (part + 1) * longest // parts
        here = [d for row in depth for d in row[first:last]]
        if here:
            early = sum(d < blocks for d in here) / len(here)
            rows.append((f"{first + 1} to {last}", f"{len(here):,}", f"{sum(here) / len(here):.2f}", percent(early)))
    return table(("new tokens", "tokens", "mean depth", "decided before the end"), rows, "Along the texts")


def _machine(environment: Mapping[str, Any] | None) -> str:
    found = environment if environment is not None else this_environment()
    rows = [(str(k), str(v)) for k, v in found.items() if v is not None and not (isinstance(v, float) and math.isnan(v))]
    return table(("what", "value"), rows, "This report was written on", text_columns=2)


_CSS = """
.written{white-space:pre-wrap;line-height:1.9}
.written .prompt{color:var(--muted)}
.t{border-radius:3px;padding:.08em 0;border-bottom:2px solid transparent}
.t.d0{background:color-mix(in srgb,var(--c3) 30%,transparent);border-color:var(--c3)}
.t.d1{background:color-mix(in srgb,var(--c1) 26%,transparent);border-color:var(--c1)}
.t.d2{background:color-mix(in srgb,var(--c4) 26%,transparent);border-color:var(--c4)}
.t.d3{background:color-mix(in srgb,var(--c5) 22%,transparent);border-color:var(--c5)}
.legend{list-style:none;padding:0;margin:.2rem 0 .8rem;display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;font-size:.875rem}
.legend .t{padding:.05em .35em}
.written-list{list-style:none;padding:0;margin:0;display:grid;gap:1rem}
"""

__all__ = ["Written", "pieces", "text_report"]
