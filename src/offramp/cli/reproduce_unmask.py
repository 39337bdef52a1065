"""Reproductions of systems that fill in masks: train a small masked-diffusion model on real text, write, and measure what a cache costs.

The text of no cache (everything computed at every step, over the same candidates) is what all others are compared with. Beside the system
stand a refresh at fixed intervals at every interval of a list, the control at equal cost; and the block refresh of Fast-dLLM, whose order
differs, hence compared with no cache in that order. Costs are FLOPs of whole texts over those of no cache, drift tests and logits counted.
Nothing is tuned after the fact: the verdict is the card's predicate on the measured numbers.
"""

from __future__ import annotations

import lzma
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp import systems
from offramp.backbones.masked_lm import MaskedLM, bidirectional, masked_lm
from offramp.cli.progress import Say
from offramp.cli.reproduce_common import Reproduction, VariantSettings, in_words, rows_by_name, to_try
from offramp.core.errors import InvalidInput
from offramp.core.modes import evaluating
from offramp.engines.diffusion.unmask import Unmasked, unmask
from offramp.measure.clock import compare
from offramp.measure.pareto import Point, curve, interpolate, upper_hull
from offramp.policies.refresh import Blocks, EveryN, Full, PerBlock, Unmask
from offramp.train.masked_text import fit_masked, hide, masked_diffusion_loss


@dataclass(frozen=True)
class UnmaskSettings(VariantSettings):
    """One variant of a reproduction of a system that fills in masks.

    Attributes:
        blocks: of the model, a Llama without causal mask.
        width: of its states.
        heads: of attention.
        steps: of training.
        train: the text, ``.txt`` or ``.txt.xz``, its characters are the tokens; ``{data}`` stands for the path given on the command line.
            The last tenth is held out.
        length: characters of a text in training.
        batch_size: texts in a step.
        learning_rate: highest, of AdamW.
        prompts: held-out texts that are continued.
        prompt_length: characters of each.
        new_tokens: that are written.
        intervals: steps between refreshes, the control.
        block_size: of Fast-dLLM's blocks.
        draws: masks under which each written text is judged.
        timed: of the prompts, for the clock.
        rounds: of the clock, after one to warm up.
        sweep: arguments of the system's builder, each with values to try in turn: one row each.
    """

    blocks: int
    width: int
    heads: int
    steps: int
    train: str = "{data}"
    length: int = 96
    batch_size: int = 16
    learning_rate: float = 3e-3
    prompts: int = 16
    prompt_length: int = 32
    new_tokens: int = 64
    intervals: tuple[int, ...] = (2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
    block_size: int = 16
    draws: int = 16
    timed: int = 4
    rounds: int = 3
    sweep: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = (self.blocks, self.steps, self.prompts, self.prompt_length, self.draws, self.timed, self.rounds, self.block_size)
        if min(counts) < 1 or self.new_tokens < 2 or self.length < 2:
            raise InvalidInput(
                "blocks, steps, prompts, prompt_length, draws, timed, rounds and block_size must be at least 1, new_tokens and length 2."
            )
        if not self.intervals:
            raise InvalidInput("intervals must not be empty.")


# ---- text and model ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Characters:
    """A text as character ids (int64 ``[N]``); one more id than there are characters is the mask's."""

    train: Tensor
    test: Tensor
    alphabet: str

    @property
    def mask(self) -> int:
        return len(self.alphabet)


def read_text(settings: UnmaskSettings, data: str | None) -> Characters:
    """Read the text of a variant.

    Raises:
        InvalidInput: it asks for a path and none was given, the file is missing or is too short.
    """
    if "{data}" in settings.train and data is None:
        raise InvalidInput("This variant reads a text: give its path with --data, a .txt or .txt.xz file.")
    path = Path(settings.train.replace("{data}", data or ""))
    if not path.is_file():
        raise InvalidInput(f"No text at {path}; give a .txt or .txt.xz file.")
    raw = path.read_bytes()
    text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    alphabet = "".join(sorted(set(text)))
    ids = torch.tensor([*map({c: i for i, c in enumerate(alphabet)}.__getitem__, text)])
    kept = len(ids) * 9 // 10
    if len(ids) - kept < settings.prompts + settings.prompt_length + settings.new_tokens or kept < settings.length:
        raise InvalidInput(f"The text in {path} has {len(ids)} characters, too few for this variant.")
    return Characters(ids[:kept], ids[kept:], alphabet)


def train(settings: UnmaskSettings, text: Characters, seed: int, device: str) -> tuple[nn.Module, list[float]]:
    """A Llama that was trained to fill in masks, and the loss of each step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(text.alphabet) + 1,
        hidden_size=settings.width,
        intermediate_size=3 * settings.width,
        num_hidden_layers=settings.blocks,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=4 * settings.length,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(device)
    blocks = text.train[: len(text.train) // settings.length * settings.length].view(-1, settings.length)
    losses = fit_masked(
        model,
        blocks,
        text.mask,
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        prefix=0.3,
        seed=seed,
    )
    return model.eval(), losses


# ---- one repetition ------------------------------------------------------------------------------------------------------


def judged(model: nn.Module, tokens: Tensor, given: int, mask: int, draws: int) -> Tensor:
    """Upper bound on the negative log-likelihood per character ``[B]`` of what follows ``given`` characters, by the model itself.

    Shares are spread evenly over (0, 1), and the same is hidden in whatever text is judged, so that texts are compared and not draws.
    """
    answer = (torch.arange(tokens.shape[1], device=tokens.device) >= given).expand(tokens.shape)
    total = torch.zeros(len(tokens), device=tokens.device)
    with torch.no_grad(), evaluating(model):
        for draw in range(draws):
            share = torch.full((len(tokens),), (draw + 0.5) / draws)
            hidden = hide(tokens, mask, torch.Generator().manual_seed(draw), answer, share)
            total += masked_diffusion_loss(bidirectional(model, hidden.tokens), tokens, hidden, answer)
    return total / draws


def measure_seed(name: str, settings: UnmaskSettings, text: Characters, seed: int, device: str, say: Say) -> dict[str, Any]:
    """What one repetition gave: raw numbers as JSON data."""
    say(f"seed {seed}: training")
    model, losses = train(settings, text, seed, device)
    lm = masked_lm(model, text.mask)
    step = max(1, (len(text.test) - settings.prompt_length - settings.new_tokens) // settings.prompts)
    starts = range(0, step * settings.prompts, step)
    prompts = [text.test[s : s + settings.prompt_length].tolist() for s in starts]
    real = torch.stack([text.test[s : s + settings.prompt_length + settings.new_tokens] for s in starts]).to(device)
    default = _way(name, settings, {})
    orders = {"sliding": default.order, "blocks": Blocks(settings.block_size)}
    say(f"seed {seed}: no cache")
    full = {k: unmask(lm, prompts, settings.new_tokens, Unmask(Full(), order, default.confidence)) for k, order in orders.items()}

    def row(label: str, found: Unmasked, order: str) -> dict[str, Any]:
        return _row(label, found, full[order], sum(full["sliding"].flops), model, real, text.mask, settings)

    fixed = []
    for steps in settings.intervals:
        say(f"seed {seed}: every {steps} steps")
        found = unmask(lm, prompts, settings.new_tokens, Unmask(EveryN(steps), default.order, default.confidence))
        fixed.append(row(f"every {steps} steps", found, "sliding"))
    blocks = [row(f"no cache, blocks of {settings.block_size}", full["blocks"], "blocks")]
    for label, refresh in (("dual", PerBlock()), ("prefix", PerBlock(suffix=True))):
        found = unmask(lm, prompts, settings.new_tokens, Unmask(refresh, orders["blocks"], default.confidence))
        blocks.append(row(f"Fast-dLLM, {label} cache", found, "blocks"))
    reference = curve("fixed", upper_hull([Point(r["name"], r["cost"], r["agreement"]) for r in fixed] + [Point("no cache", 1.0, 1.0)]))
    rows = []
    for change in to_try(settings.sweep):
        label = in_words(change)
        say(f"seed {seed}: {label}")
        found = unmask(lm, prompts, settings.new_tokens, _way(name, settings, change))
        mine = row(label, found, "sliding") | {"refreshed": found.refreshed}
        mine["budget"] = mine["cost"]
        mine["gain_over_fixed"] = (
            mine["agreement"] - interpolate(reference, mine["cost"]) if mine["cost"] >= reference.points[0].cost else None
        )
        rows.append(mine)
    say(f"seed {seed}: the clock")
    return {
        "seed": seed,
        "tokens": {"train": len(text.train), "test": len(text.test), "alphabet": len(text.alphabet)},
        "training_loss": {"first": losses[0], "last": statistics.fmean(losses[-max(1, len(losses) // 10) :])},
        "real_text_nll": float(judged(model, real, settings.prompt_length, text.mask, settings.draws).mean()),
        "full": row("no cache", full["sliding"], "sliding"),
        "budgets": rows,
        "fixed": fixed,
        "blocks": blocks,
        "timing": _timed(lm, settings, default, prompts),
    }


def _way(name: str, settings: UnmaskSettings, change: Mapping[str, float]) -> Unmask:
    way = systems.build(name, **{**settings.system, **change}).fill
    if not isinstance(way, Unmask):
        raise InvalidInput(f"{name} does not fill in masks: its fill is {way!r}, not Unmask(...).")
    return way


def _row(
    label: str, found: Unmasked, full: Unmasked, cost: int, model: nn.Module, real: Tensor, mask: int, settings: UnmaskSettings
) -> dict[str, Any]:
    """One way of filling in, against no cache in the same order; ``cost`` is that of no cache over a sliding window."""
    written, wanted = torch.tensor(found.tokens), torch.tensor(full.tokens)
    texts = torch.cat([real[:, : settings.prompt_length], written.to(real.device)], 1)
    return {
        "name": label,
        "cost": sum(found.flops) / cost,
        "share": found.share,
        "flops_share": found.flops_share,
        "agreement": float((written == wanted).float().mean()),
        "same_text": float((written == wanted).all(1).float().mean()),
        "nll": float(judged(model, texts, settings.prompt_length, mask, settings.draws).mean()),
        "as_in_the_book": float((written == real[:, settings.prompt_length :].cpu()).float().mean()),
        "tokens_per_step": found.tokens_per_step,
        "refresh_rate": found.refresh_rate,
        "cache_bytes": found.cache_bytes,
    }


def _timed(lm: MaskedLM, settings: UnmaskSettings, default: Unmask, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Times of whole texts, one at a time, the ways in turn."""
    blocks = Blocks(settings.block_size)
    ways = {
        "no cache": Unmask(Full(), default.order, default.confidence),
        "ours": default,
        "no cache, blocks": Unmask(Full(), blocks, default.confidence),
        "Fast-dLLM, dual cache": Unmask(PerBlock(), blocks, default.confidence),
    }

    def run(way: Unmask) -> Callable[[], None]:
        def called() -> None:
            for prompt in prompts[: settings.timed]:
                unmask(lm, [prompt], settings.new_tokens, way)

        return called

    timing = compare({k: run(w) for k, w in ways.items()}, warmup=1, repeats=settings.rounds, device=lm.device)
    return {"speedup": {k: 1 / r.value for k, r in timing.ratios.items()}, **timing.to_dict()}


# ---- the result ----------------------------------------------------------------------------------------------------------


SHOWN = ("cost", "share", "agreement", "same_text", "nll", "tokens_per_step", "refresh_rate", "gain_over_fixed")
"""The numbers of a row that are averaged over seeds, in the order they are shown."""

PARTS = {"rows": "budgets", "fixed": "fixed", "blocks": "blocks"}
"""Parts of the summary, and which rows of a repetition each is made of."""


def summarise(settings: UnmaskSettings, seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds: the method's settings, fixed intervals, and block refreshes."""
    return {part: list(rows_by_name(seeds, given, "name", SHOWN)) for part, given in PARTS.items()}


def table_rows(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The summary as a table: columns, then the method, fixed intervals and block refreshes."""
    summary = result["summary"]
    every = [("", r) for r in summary["rows"]] + [("control: ", r) for r in summary["fixed"]] + [("", r) for r in summary["blocks"]]
    rows = [(prefix + r["name"], *(f"{r[k][0]:.3f}" if k in r else "-" for k in SHOWN)) for prefix, r in every]
    return ("", *(k.replace("_", " ") for k in SHOWN)), rows


MASKS = Reproduction(
    "unmask",
    UnmaskSettings,
    "tiny",
    read=lambda settings, data, device, say: read_text(settings, data),
    repeat=measure_seed,
    summarise=summarise,
    table=table_rows,
)
"""Methods of masked-diffusion language models."""

__all__ = ["MASKS", "UnmaskSettings", "judged", "measure_seed", "read_text", "table_rows"]
