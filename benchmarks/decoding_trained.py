"""How much sooner a trained model writes the same text when an exit drafts: Spec-Bench's six groups of 80 prompts at batch 1.

Plain decoding and verified drafts, both compiled and captured, are timed in turn for every prompt. Which exit drafts and how far is the
planner's choice, from rounds measured here and from how often exits agreed on texts that the model wrote after the first prompts of each
group; those do not count where prediction and measurement are compared. Texts that differ are looked at one by one
(`lm_common.divergence`), and some prompts are written in float32 too, where texts must be equal.

    python benchmarks/decoding_trained.py --data FOLDER --model runs/lm --out benchmarks/results/decoding_trained_h100.json
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from lm_common import (
    Measurement,
    Prompt,
    asked_parts,
    candidate,
    compare_texts,
    exits_in,
    fixed,
    grouped,
    in_turn,
    load_model,
    measurement_arguments,
    numbers,
    over,
    round_ms,
    run_parts,
    seconds,
    tokens_per_round,
)

from offramp.engines.text.agreement import Acceptance, agreement
from offramp.engines.text.draft_lengths import LengthChoice
from offramp.engines.text.planner import Prediction, SpeculationPlan, Times, choose, even_acceptance
from offramp.engines.text.round_prompt import padded
from offramp.engines.text.round_times import Candidate
from offramp.engines.text.rounds import Rounds
from offramp.measure.clock import median_interval

PARTS = ("plan", "groups", "float32")
DRAFT_BLOCKS = {"shared": 0.0, "norm": 0.0, "adapter": 0.5, "block": 1.0}
"""What a head adds to a draft, in blocks: enough to leave out what cannot pay before anything is measured."""


class Measuring(Measurement):
    """Plain decoding and verified drafts over the groups of prompts."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        with self.budget.part("model"):
            self.model = load_model(self.folder, torch.bfloat16).to(self.device)
            self.exact = load_model(self.folder, torch.float32).to(self.device)
            self.lms = exits_in(self.folder, self.model)
            if self.dtype != torch.bfloat16:
                self.model = load_model(self.folder, self.dtype).to(self.device)
                self.lms = {name: over(lm, self.model) for name, lm in self.lms.items()}
        self.blocks = len(next(iter(self.lms.values())).decoder)
        self.prompts = self.spec_bench(args.each)
        self.slots = args.context + 1
        self.runs: dict[tuple[str, tuple[int, ...]], Rounds] = {}
        self.captured: set[tuple[int, int]] = set()
        self.times: dict[str, dict[int, float]] = {}
        trained = json.loads((self.folder / "training.json").read_text())
        shape = {k: trained["settings"][k] for k in ("blocks", "width", "heads", "kv_heads", "inner", "vocabulary")}
        about = {"calibration_prompts_of_a_group": args.calibrate, "model": trained.get("stages"), "shape": shape}
        self.open_sheet("decoding_trained", len(self.prompts), about)
        self.plan: SpeculationPlan | None = None
        self.by_group: dict[str, dict[str, Acceptance]] = {}

    def run(self, name: str, lengths: Sequence[int]) -> Rounds:
        """A decoder at one row for these draft lengths, nothing captured yet."""
        key = (name, tuple(lengths))
        if key not in self.runs:
            self.runs[key] = Rounds(self.lms[name], 1, slots=self.slots, draft_length=lengths, compiled=self.compiled)
        return self.runs[key]

    def ready(self, run: Rounds, drafts: int, what: str) -> bool:
        """Whether a round of so many drafts is captured, or could be in the time that is left."""
        key, name = (id(run), drafts), f"capture: {what}, {drafts} drafts"
        if key not in self.captured and self.budget.fits(name, self.args.capture_guess):
            with self.budget.part(name):
                run.graph(drafts)
            self.captured.add(key)
        return key in self.captured

    def _calibration(self, plain: Rounds) -> dict[str, tuple[list[list[int]], list[int]]]:
        """Texts that the model wrote after the first prompts of each group, and how much of each is prompt."""
        found: dict[str, tuple[list[list[int]], list[int]]] = {}
        for group, prompts in grouped(self.prompts).items():
            chosen = [p.tokens for p in prompts[: self.args.calibrate]]
            texts = [[*p, *plain.generate([p], self.args.new).tokens[0]] for p in chosen]
            found[group] = (texts, [len(p) for p in chosen])
        return found

    @property
    def lengths(self) -> list[int]:
        """Draft lengths that are captured, none among them."""
        return sorted({0, *self.args.drafts})

    @property
    def best(self) -> Prediction:
        """The planner's choice among lengths that were captured; where it would not speculate, the least bad."""
        assert self.plan is not None
        return next(p for p in self.plan.predictions if p.draft_length in self.times[p.head])

    @property
    def plain(self) -> Rounds:
        return self.run(next(iter(self.lms)), [0])

    def choose(self) -> None:
        """The planner's choice among exits that counting blocks does not rule out, from measured rounds and agreement on own texts."""
        plain = self.plain
        if not self.ready(plain, 0, "plain"):
            raise SystemExit("There is no time for plain decoding; give --minutes.")
        most = max(self.args.drafts)
        with self.budget.part("calibration texts"):
            texts = self._calibration(plain)
            everything = [t for group, _ in texts.values() for t in group], [s for _, group in texts.values() for s in group]
        acceptance: dict[str, Acceptance] = {}
        share: dict[str, float] = {}
        with self.budget.part("agreement"):
            for name, lm in self.lms.items():
                seen = agreement(lm, everything[0], starts=everything[1])
                share[name] = float(seen.agreed.float().mean())
                acceptance[name] = Acceptance.of_runs(seen.by_text(0), most)
                self.by_group[name] = {
                    g: Acceptance.of_runs(agreement(lm, t, starts=s).by_text(0), most) for g, (t, s) in texts.items()
                }  # fmt: skip
        counted = [self._counted(name, most) for name in self.lms]
        first = choose(Times(self.blocks + 0.5, tuple(counted)), list(acceptance.values()))
        ranked = list(dict.fromkeys(f"{p.head}" for p in first.predictions))[: self.args.candidates]
        print(f"agreement {share}; by counting blocks: {ranked}", flush=True)
        middle = [sorted((p.tokens for p in self.prompts), key=len)[len(self.prompts) // 2]]
        full = round_ms(plain, middle, 0)
        measured: list[Candidate] = []
        for name in ranked:
            run = self.run(name, self.lengths)
            ready = [k for k in self.lengths if self.ready(run, k, name)]
            self.times[name] = {k: round_ms(run, middle, k) for k in ready}
            if any(ready):
                known = {k: t for k, t in self.times[name].items() if k}
                measured.append(candidate(0, self.lms[name].exits[0], name, full, known))
        if not measured:
            raise SystemExit("There was no time to measure a round with drafts; give --minutes.")
        times = Times(full, tuple(measured), 1, len(middle[0]), str(self.device))
        self.plan = choose(times, [acceptance[c.head] for c in measured])
        print(self.plan, flush=True)
        self.sheet.content |= {
            "plan": self.plan.to_dict(), "agreement": share, "counted": [asdict(p) for p in first.predictions[:12]],
            "acceptance_expected": {n: a.tokens for n, a in acceptance.items()},
        }  # fmt: skip

    def _counted(self, name: str, most: int) -> Candidate:
        depth = self.lms[name].exits[0]
        deep = self.blocks - depth + 0.5
        return Candidate(0, depth, name, float(depth), DRAFT_BLOCKS[name.partition("-")[0]] + 0.5, (deep,) * (most + 1))

    def groups(self) -> None:
        """Every prompt in each way in turn; the time until its first token is taken off."""
        if self.plan is None:
            self.choose()
        assert self.plan is not None
        best, plain, new, found = self.best, self.plain, self.args.new, []
        fast = self.run(best.head, self.lengths)
        start = even_acceptance(best.tokens_per_round, best.draft_length)
        calls = {
            "plain": (plain, fixed(0)),
            "verified": (fast, fixed(best.draft_length)),
            "by_round": (fast, LengthChoice.of(self.times[best.head], start)),
        }
        turns = in_turn(self.prompts)
        for p in {padded(len(p.tokens)): p for p in turns}.values():  # every width of prompts is captured before
            for run, choice in calls.values():
                run.generate([p.tokens], new, choice=choice)
        with self.budget.part("groups"):
            for count, p in enumerate(turns):
                if self.budget.left < 5 + 60 * self.args.reserve:
                    self.budget.skipped.append(f"groups: {len(turns) - count} of {len(turns)} prompts")
                    break
                found.append(self._each(p, calls, new, count))
        differ = [(f, way) for f in found for way in ("verified", "by_round") if f["plain"] != f[way]]
        with self.budget.part("divergences"):
            prompts = {(p.group, p.number): p.tokens for p in self.prompts}
            checked = compare_texts(
                self.model, self.exact, [prompts[f["group"], f["number"]] for f, _ in differ], [f["plain"] for f, _ in differ],
                [f[way] for f, way in differ],
            )  # fmt: skip
        names = [{"group": f["group"], "number": f["number"], "way": way} for f, way in differ]
        self.sheet.content["divergences"] = {
            "texts": 2 * len(found), "equal": 2 * len(found) - len(differ), "not_near_ties": checked["not_near_ties"],
            "each": [{**d, **names[d["text"]]} for d in checked["divergences"]],
        }  # fmt: skip
        self.sheet.content["chosen"] = {"exit": best.depth, "head": best.head, "draft_length": best.draft_length}
        self.sheet.content["planner_speculates"] = self.plan.chosen is not None
        for group, each in {"all": found, **{g: [f for f in found if f["group"] == g] for g in grouped(self.prompts)}}.items():
            for way in ("verified", "by_round") if each else ():
                self.sheet.row(group=group, way=way, rows=1, **self._summary(group, each, best, way))
        self.sheet.content["samples"] = [{k: v for k, v in f.items() if k not in calls} for f in found]

    def _each(self, p: Prompt, calls: Mapping[str, tuple[Rounds, LengthChoice]], new: int, turn: int) -> dict[str, Any]:
        """One prompt in every way, in an order of its own."""
        taken: dict[str, Any] = {"group": p.group, "number": p.number, "prompt_tokens": len(p.tokens), "cut": p.cut}
        for name in random.Random(turn).sample(list(calls), len(calls)):
            run, choice = calls[name]
            taken[f"{name}_s"], answer = seconds(partial(run.generate, [p.tokens], new, choice=choice), self.device)
            taken |= {f"{name}_prompt_s": answer.prompt_s, name: answer.tokens[0]}
            taken |= {f"{name}_drafted": sum(answer.drafted), f"{name}_accepted": sum(answer.accepted)}
        return taken

    def _summary(self, group: str, each: Sequence[dict[str, Any]], best: Prediction, way: str) -> dict[str, Any]:
        """Speeds of a group, prompts apart and with them; the prediction is held against prompts that it was not made from."""
        assert self.plan is not None
        firsts = {(p.group, p.number) for g in grouped(self.prompts).values() for p in g[: self.args.calibrate]}
        fresh = [f for f in each if (f["group"], f["number"]) not in firsts] or list(each)
        times = {w: sum(decoding_s(f, w) for f in each) for w in ("plain", way)}
        median = median_interval([decoding_s(f, "plain") / decoding_s(f, way) for f in each])
        written = sum(len(f["plain"]) - 1 for f in each)
        kept, tried = sum(f[f"{way}_accepted"] for f in each), sum(f[f"{way}_drafted"] for f in each)
        out = {
            "prompts": len(each), "tokens_per_s": written / times[way], "plain_tokens_per_s": written / times["plain"],
            "speedup": times["plain"] / times[way], "speedup_median": [median.value, median.low, median.high, median.level],
            "speedup_with_prompts": sum(f["plain_s"] for f in each) / sum(f[f"{way}_s"] for f in each),
            "acceptance": kept / max(1, tried), "tokens_per_round": tokens_per_round([len(f[way]) for f in each], kept),
        }  # fmt: skip
        if way == "verified":
            expected = self.by_group[best.head].get(group)
            tokens = best.tokens_per_round if expected is None else expected.tokens[best.draft_length]
            predicted = tokens * self.plan.times.full / best.round_time
            measured = sum(decoding_s(f, "plain") for f in fresh) / sum(decoding_s(f, way) for f in fresh)
            out |= {"predicted": predicted, "speedup_fresh": measured, "predicted_over_measured": predicted / measured}
        return out

    def float32(self) -> None:
        """The same exits in float32: texts must be equal token for token."""
        name, drafts = (self.best.head, self.best.draft_length) if self.plan else (next(iter(self.lms)), max(self.args.drafts))
        lm = over(self.lms[name], self.exact)
        prompts = [p.tokens for p in in_turn(self.prompts)][: self.args.exact_prompts]
        texts = []
        for k in (0, drafts):
            part = f"capture: float32, {k} drafts"
            if not self.budget.fits(part, self.args.capture_guess):
                return
            with self.budget.part(part):
                run = Rounds(lm, 1, slots=self.slots, draft_length=k)
                run.graph()
            with self.budget.part(f"float32 texts, {k} drafts"):
                texts.append([run.generate([p], self.args.exact_new).tokens[0] for p in prompts])
        found = compare_texts(self.exact, self.exact, prompts, *texts)
        self.sheet.row(way="float32", group="all", rows=1, new_tokens=self.args.exact_new, head=name, draft_length=drafts, **found)


def decoding_s(sample: dict[str, Any], way: str) -> float:
    """Seconds of a text after its first token."""
    return float(sample[f"{way}_s"] - sample[f"{way}_prompt_s"])


def main() -> None:
    parser = measurement_arguments(__doc__, ",".join(PARTS))
    parser.add_argument("--reserve", type=float, default=0.5, help="minutes kept back from the groups")
    parser.add_argument("--each", type=int, default=80, help="prompts of a group")
    parser.add_argument("--calibrate", type=int, default=8, help="prompts of a group that the planner sees")
    parser.add_argument("--candidates", type=int, default=2, help="exits whose rounds are measured")
    parser.add_argument("--drafts", type=numbers, default=[3, 5], help="draft lengths that are captured")
    parser.add_argument("--capture-guess", type=float, default=50)
    parser.add_argument("--exact-prompts", type=int, default=200)
    parser.add_argument("--exact-new", type=int, default=64)
    args = parser.parse_args()
    asked = asked_parts(args.parts, PARTS)
    run = Measuring(args)
    run_parts({"plan": run.choose, "groups": run.groups, "float32": run.float32}, asked, run.sheet)


if __name__ == "__main__":
    main()
