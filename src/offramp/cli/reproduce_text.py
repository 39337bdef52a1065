"""Reproductions of language-model systems: train small on real text, write, measure the claim, and set beside it what it must beat.

The full model is trained on the text alone. A system's exits are then trained by its recipe, from those weights; where that trains the
model too, a copy of it is trained as long without exits, and is what perplexities are compared with. The baselines: plain decoding by the
same engine; smaller models trained alone; a fixed schedule, which is a fixed number of drafts for systems that draft, a fixed exit for
those that leave, and a constant depth, trained for it, for those that run a schedule. Nothing is tuned after the fact: the verdict is the
card's predicate on the measured numbers (what they are: `offramp.core.system.Predicate`; how they are measured: `offramp.cli.text_runs`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from offramp import systems
from offramp.budget.depth_schedule import LinearDepth
from offramp.budget.targets import Risk
from offramp.cli.progress import Say
from offramp.cli.reproduce_common import Reproduction, claim_of, in_words, rows_by_name, to_try
from offramp.cli.text_runs import Meter, Written, agreeing, by_position, calibrated, perplexities, plain, write
from offramp.cli.text_training import Bases, Corpus, TextSettings, bare, load_corpus, train, windows
from offramp.core.system import System
from offramp.engines.text.generate import generate
from offramp.language import LanguageModel, attach_lm
from offramp.measure.clock import compare
from offramp.measure.pareto import Point, curve, interpolate, upper_hull
from offramp.policies.decoding import Accept, Adapting, Copy, Plain, Scheduled, Verify, Way
from offramp.policies.draft_stop import FixedLength
from offramp.policies.threshold import Confidence
from offramp.train.text_recipes import Skipping

# ---- one repetition ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """What one repetition measures.

    Attributes:
        system: as composed for the variant.
        lm: its model, trained.
        base: the full model that it was trained from.
        control: the full model, trained as long without exits.
        smaller: models trained alone, by their blocks.
        prompts: that are continued.
    """

    system: System
    lm: LanguageModel
    base: nn.Module
    control: nn.Module
    smaller: Mapping[int, nn.Module]
    prompts: list[list[int]]


def prepare(name: str, settings: TextSettings, corpus: Corpus, seed: int, device: str, bases: Bases) -> Trained:
    """Train what a repetition needs."""
    system = systems.build(name, **settings.system)
    base = bases.get(settings, corpus, seed, device, settings.blocks)
    recipe = system.recipe
    further = settings.exit_steps if recipe is not None and recipe.trains_model else 0
    control = bases.get(settings, corpus, seed, device, settings.blocks, further) if further else base
    smaller = {b: bases.get(settings, corpus, seed, device, b) for b in settings.smaller}
    bases.say(f"seed {seed}: {name}")
    torch.manual_seed(seed)
    lm = attach_lm(copy.deepcopy(base) if further else base, system=system)
    if recipe is not None:
        train(settings, corpus, lm, recipe, settings.exit_steps, settings.exit_learning_rate, seed + 1000, device)
    return Trained(system, lm, base, control, smaller, windows(corpus.test, settings.prompts, settings.prompt_length, seed).tolist())


def measure_seed(name: str, settings: TextSettings, corpus: Corpus, seed: int, trained: Trained, say: Say) -> dict[str, Any]:
    """What one repetition gave: raw numbers as JSON data."""
    system, lm = trained.system, trained.lm
    held = windows(corpus.test, settings.evaluated, settings.length, seed + 1)
    full = perplexities(bare(trained.control), held)[-1]
    reached = perplexities(lm, held, system.recipe if isinstance(system.fill, Scheduled) else None)
    rows = [_submodel(lm, k, p / full) for k, p in enumerate(reached[:-1])] if _asks_for_perplexity(system) else []
    say(f"seed {seed}: smaller models")
    smaller = [_smaller(settings, trained, blocks, model, held, full) for blocks, model in trained.smaller.items()]
    say(f"seed {seed}: fixed schedules")
    if isinstance(system.draft, Verify):
        fixed = _fixed_lengths(settings, trained, system.draft)
    elif isinstance(system.fill, Scheduled):
        fixed = _constant_depth(settings, corpus, seed, trained, system.fill, held, full)
    else:
        fixed = _fixed_depths(settings, trained)
    tables: dict[str, Any] = {}
    for change in to_try(settings.sweep):
        say(f"seed {seed}: {name} {change or ''}")
        rows.append(_row(name, settings, corpus, seed, trained, change, fixed, smaller, reached[-1] / full, tables))
    return {
        "seed": seed,
        "tokens": {"train": len(corpus.train), "calibration": len(corpus.calibration), "test": len(corpus.test)},
        "exits": list(lm.exits),
        "full": {"perplexity": full, "weights_per_token": Meter(lm).plain},
        "exit_perplexity": reached,
        "static": smaller,
        "fixed": fixed,
        "budgets": rows,
    }


def _asks_for_perplexity(system: System) -> bool:
    return system.card.predicate is not None and system.card.predicate.metric == "perplexity_ratio"


def _submodel(lm: LanguageModel, exit_index: int, ratio: float) -> dict[str, Any]:
    """An exit as a model of its own."""
    meter, after = Meter(lm), lm.exits[exit_index]
    share = after / len(lm.decoder)
    return {
        "setting": f"the first {after} blocks",
        "budget": share,
        "blocks_share": share,
        "cost": (sum(meter.blocks[:after]) + meter.heads[exit_index]) / meter.plain,
        "perplexity_ratio": ratio,
    }


def _smaller(settings: TextSettings, trained: Trained, blocks: int, model: nn.Module, held: Tensor, full: float) -> dict[str, Any]:
    lm = bare(model)
    found = write(lm, Plain(), trained.prompts, settings.new_tokens, together=True)
    return {
        "name": f"{blocks} blocks trained alone",
        "blocks_share": blocks / settings.blocks,
        "cost": Meter(lm).plain / Meter(trained.lm).plain,
        "agreement": float(agreeing(trained.control, found).float().mean()),
        "perplexity_ratio": perplexities(lm, held)[-1] / full,
    }


def _fixed_lengths(settings: TextSettings, trained: Trained, draft: Verify) -> list[dict[str, Any]]:
    """The same exit with every number of drafts up to the system's."""
    out = []
    for length in range(1, draft.draft_length + 1):
        found = write(trained.lm, replace(draft, draft_length=length, stop=FixedLength()), trained.prompts, settings.new_tokens)
        out.append({"name": f"{length} drafts", **_counts(found)})
    return out


def _fixed_depths(settings: TextSettings, trained: Trained) -> list[dict[str, Any]]:
    """Every exit as a model of its own, for every token."""
    meter, out = Meter(trained.lm), []
    for k, after in enumerate(trained.lm.exits):
        way = Accept(-math.inf, Confidence(), Copy(), exits=(k,))
        found = write(trained.lm, way, trained.prompts, settings.new_tokens, together=True)
        agreed = agreeing(trained.lm.model, found)[:, 1:]  # the prompt's pass is a whole one
        cost = (sum(meter.blocks[:after]) + meter.heads[k]) / meter.plain
        share = after / len(meter.blocks)
        out.append({"name": f"exit after {after}", "blocks_share": share, "cost": cost, "agreement": float(agreed.float().mean())})
    return out


def _counts(found: Written) -> dict[str, Any]:
    return {
        "cost": found.cost,
        "blocks_share": found.blocks_share,
        "acceptance": sum(found.accepted) / max(1, sum(found.drafted)),
        "acceptance_by_place": list(found.acceptance),
        "tokens_per_round": found.tokens_per_round,
    }


def _row(
    name: str,
    settings: TextSettings,
    corpus: Corpus,
    seed: int,
    trained: Trained,
    change: Mapping[str, float],
    fixed: Sequence[Mapping[str, Any]],
    smaller: Sequence[Mapping[str, Any]],
    ratio: float,
    tables: dict[str, Any],
) -> dict[str, Any]:
    """One setting of the system, run and timed."""
    lm, prompts, new = trained.lm, trained.prompts, settings.new_tokens
    system = systems.build(name, **{**settings.system, **change})
    row: dict[str, Any] = {"setting": in_words(change)}
    held_out = _held_out(settings, corpus, seed)
    threshold = calibrated(system, lm, held_out, new, settings.thresholds, seed=seed, seen=tables)
    if threshold is not None:
        row["threshold"] = [str(t) for t in threshold] if isinstance(threshold, tuple) else str(threshold)
    way = systems.way(system, threshold)
    if isinstance(way, Accept) and isinstance(way.threshold, Adapting):
        way = replace(way, threshold=_adapted(lm, way, held_out, new))
    found = write(lm, way, prompts, new)
    judge = trained.control if isinstance(way, Scheduled) else lm.model
    agreed = agreeing(judge, found)
    row |= {"budget": found.cost, "cost": found.cost, "blocks_share": found.blocks_share, "agreement": float(agreed[:, 1:].float().mean())}
    row["same_text"] = float((found.tokens == plain(lm, prompts, new)).all(1).float().mean())
    if isinstance(way, Verify):
        row |= _counts(found)
        best = min(f["cost"] for f in fixed)
        row["gain_over_fixed"] = best / found.cost - 1 if not isinstance(way.stop, FixedLength) else None
    elif isinstance(way, Scheduled):
        row |= {"budget": found.blocks_share, "perplexity_ratio": ratio}
    else:
        row |= _left(system, found, agreed, len(lm.decoder))
        row["gain_over_fixed"] = _gain(row, fixed)
        row["gain_over_static"] = _gain(row, smaller)
    row |= _timed(settings, lm, way, prompts)
    return row


def _gain(row: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> float | None:
    """Agreement minus that of the best of some others, or the best mix of two, the full model among them, at equal cost."""
    points = [Point(o["name"], o["cost"], o["agreement"]) for o in others] + [Point("full", 1.0, 1.0)]
    reference = curve("others", upper_hull(points))
    return None if row["cost"] < reference.points[0].cost else row["agreement"] - interpolate(reference, row["cost"])


def _left(system: System, found: Written, agreed: Tensor, blocks: int) -> dict[str, Any]:
    """How many tokens left, how many of them the full model would have chosen otherwise, and how many of all.

    A token that stays may differ too: where keys and values were copied, what it sees is not what the full model would see.
    """
    early = (found.depth < blocks)[:, 1:]
    wrong = ~agreed[:, 1:]
    of_left = float((wrong & early).sum()) / max(1, int(early.sum()))
    of_all = float(wrong.float().mean())
    out: dict[str, Any] = {
        "left": float(early.float().mean()),
        "disagreement_of_left": of_left,
        "disagreement_of_all": of_all,
        "depth_explained_by_place": by_position(found.depth),
    }
    if isinstance(system.target, Risk):
        out["excess"] = of_all - system.target.limit
    elif (tolerance := getattr(system.calibrator, "tolerance", None)) is not None:
        out["excess"] = of_left - tolerance
    return out


def _constant_depth(
    settings: TextSettings, corpus: Corpus, seed: int, trained: Trained, way: Scheduled, held: Tensor, full: float
) -> list[dict[str, Any]]:
    """A constant depth, the nearest at or above the schedule's mean, with the same first blocks and trained as long."""
    schedule = way.schedule
    if not isinstance(schedule, LinearDepth):
        return []
    depth = max(schedule.warmup + 1, math.ceil(schedule.mean_cost(settings.new_tokens) * schedule.blocks - 1e-9))
    recipe = Skipping(LinearDepth(schedule.blocks, depth, depth, schedule.warmup))
    lm = bare(copy.deepcopy(trained.base))
    train(settings, corpus, lm, recipe, settings.exit_steps, settings.exit_learning_rate, seed + 1000, str(lm.decoder.device))
    ratio = perplexities(lm, held, recipe)[-1] / full
    return [{"name": f"{depth} blocks at every token", "blocks_share": depth / schedule.blocks, "perplexity_ratio": ratio}]


def _timed(settings: TextSettings, lm: LanguageModel, way: Way, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Time beside plain decoding of the same model by the same engine, in turn, one text at a time, prompts included."""

    def run(how: Way) -> Callable[[], None]:
        def called() -> None:
            for prompt in prompts[: settings.timed]:
                generate(lm, [list(prompt)], how, max_new_tokens=settings.new_tokens, do_sample=False, eos_token_id=[])

        return called

    timing = compare({"plain": run(Plain()), "ours": run(way)}, warmup=1, repeats=settings.rounds, device=lm.decoder.device)
    written = min(settings.timed, len(prompts)) * settings.new_tokens
    speeds = {f"{n}_tokens_per_second": written / t.median_ms * 1000 for n, t in timing.timings.items()}
    return {"speedup": 1 / timing.ratios["ours"].value, **speeds, "timing": timing.to_dict()}


def _held_out(settings: TextSettings, corpus: Corpus, seed: int) -> list[list[int]]:
    """Prompts to choose thresholds on."""
    found: list[list[int]] = windows(corpus.calibration, settings.calibration_prompts, settings.prompt_length, seed + 2).tolist()
    return found


def _adapted(lm: LanguageModel, way: Accept, prompts: Sequence[Sequence[int]], new: int) -> Any:
    """A threshold that adapts, after it has seen held-out texts written."""
    found = generate(lm, [list(p) for p in prompts], way, max_new_tokens=new, do_sample=False, eos_token_id=[])
    return found.learned if found.learned is not None else way.threshold


# ---- the result ----------------------------------------------------------------------------------------------------------


def counts(system: System, cost: float) -> bool:
    """Whether what was measured at a cost is part of the test: of a lossless system at any, and a cost that is named is met but nearly."""
    predicate = claim_of(system)
    if predicate.budget is None:
        return system.card.lossless or predicate.counts(cost)
    return abs(cost - predicate.budget) <= 0.05  # whole blocks


SHOWN = (
    *("cost", "blocks_share", "agreement", "same_text", "acceptance", "tokens_per_round", "perplexity_ratio", "speedup", "left", "excess"),
    *("gain_over_fixed", "gain_over_static"),
)
"""The numbers of a row that are averaged over seeds, in the order they are shown."""


def summarise(settings: TextSettings, seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds: the system's settings, fixed schedules, and smaller models."""
    parts = (("rows", "budgets", "setting"), ("fixed", "fixed", "name"), ("static", "static", "name"))
    return {part: list(rows_by_name(seeds, given, label, SHOWN)) for part, given, label in parts}


def table_rows(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The summary as a table: columns, then the method, fixed schedules and smaller models."""
    summary = result["summary"]
    every = [("", r) for r in summary["rows"]] + [("fixed: ", r) for r in summary["fixed"]] + [("static: ", r) for r in summary["static"]]
    used = [k for k in SHOWN if any(k in r for _, r in every)]
    rows = [(prefix + r["name"], *(f"{r[k][0]:.3f}" if k in r else "-" for k in used)) for prefix, r in every]
    return ("", *(k.replace("_", " ") for k in used)), rows


TEXTS = Reproduction(
    "generate",
    TextSettings,
    "tiny",
    read=lambda settings, data, device, say: (load_corpus(settings, data), Bases(say)),
    repeat=lambda name, settings, given, seed, device, say: measure_seed(
        name, settings, given[0], seed, prepare(name, settings, given[0], seed, device, given[1]), say
    ),
    summarise=summarise,
    table=table_rows,
    counts=counts,
    nothing="no setting cost less than the full model",
)
"""Methods of language models that write text."""

__all__ = ["TEXTS", "Bases", "TextSettings", "Trained", "load_corpus", "measure_seed", "prepare", "table_rows"]
