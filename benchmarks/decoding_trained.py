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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lm_common import (
    Budget,
    Prompt,
    Sheet,
    asked_parts,
    candidate,
    compare_texts,
    exits_in,
    grouped,
    in_turn,
    load_model,
    numbers,
    over,
    round_ms,
    run_parts,
    seconds,
    spec_bench,
    tokens_per_round,
    tuned,
    tuning_argument,
)

from offramp.engines.agreement import Acceptance, agreement
from offramp.engines.planner import SpeculationPlan, Times, choose
from offramp.engines.round_times import Candidate
from offramp.engines.rounds import Rounds
from offramp.measure.clock import environment, median_interval

PARTS = ("plan", "groups", "float32")
DRAFT_BLOCKS = {"shared": 0.0, "norm": 0.0, "adapter": 0.5, "block": 1.0}
"""What a head adds to a draft, in blocks: enough to leave out what cannot pay before anything is measured."""


class Measuring:
    """Plain decoding and verified drafts over the groups of prompts."""

    def __init__(self, args: argparse.Namespace) -> None:
        from tokenizers import Tokenizer

        self.args, self.budget, self.folder = args, Budget(args.minutes), Path(args.model)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, args.dtype)
        self.compiled = tuned(args.tuning, self.device)
        with self.budget.part("model"):
            self.model = load_model(self.folder, torch.bfloat16).to(self.device)
            self.exact = load_model(self.folder, torch.float32).to(self.device)
            self.lms = exits_in(self.folder, self.model)
            if self.dtype != torch.bfloat16:
                self.model = load_model(self.folder, self.dtype).to(self.device)
                self.lms = {name: over(lm, self.model) for name, lm in self.lms.items()}
        self.blocks = len(next(iter(self.lms.values())).decoder)
        encode = Tokenizer.from_file(str(self.folder / "model" / "tokenizer.json")).encode
        most = args.context - args.new
        self.prompts = spec_bench(Path(args.data) / "prompts" / "spec_bench.jsonl.xz", lambda t: encode(t).ids, most, args.each)
        self.slots = args.context + 1
        self.runs: dict[tuple[str, int], Rounds] = {}
        trained = json.loads((self.folder / "training.json").read_text())
        self.sheet = Sheet(
            args.out,
            {
                "benchmark": "decoding_trained", "dtype": args.dtype, "rows": [], "new_tokens": args.new, "context": args.context,
                "prompts": len(self.prompts), "tuning": args.tuning,
                "calibration_prompts_of_a_group": args.calibrate,
                "model": trained.get("stages"),
                "shape": {k: trained["settings"][k] for k in ("blocks", "width", "heads", "kv_heads", "inner", "vocabulary")},
                "environment": environment(self.device),
            },
            self.budget,
        )  # fmt: skip
        self.plan: SpeculationPlan | None = None
        self.by_group: dict[str, dict[str, Acceptance]] = {}

    def run(self, name: str, drafts: int) -> Rounds | None:
        """A captured decoder at one row, if there is time to make one; of plain decoding whatever the name."""
        key = (name if drafts else "", drafts)
        if key not in self.runs:
            part = f"capture: {name if drafts else 'plain'}, {drafts} drafts"
            if not self.budget.fits(part, self.args.capture_guess):
                return None
            with self.budget.part(part):
                made = Rounds(self.lms[name], 1, slots=self.slots, draft_length=drafts, compiled=self.compiled)
                made.graph()
            self.runs[key] = made
        return self.runs[key]

    def _calibration(self, plain: Rounds) -> dict[str, tuple[list[list[int]], list[int]]]:
        """Texts that the model wrote after the first prompts of each group, and how much of each is prompt."""
        found: dict[str, tuple[list[list[int]], list[int]]] = {}
        for group, prompts in grouped(self.prompts).items():
            chosen = [p.tokens for p in prompts[: self.args.calibrate]]
            texts = [[*p, *plain.generate([p], self.args.new).tokens[0]] for p in chosen]
            found[group] = (texts, [len(p) for p in chosen])
        return found

    def choose(self) -> None:
        """The planner's choice among exits that counting blocks does not rule out, from measured rounds and agreement on own texts."""
        plain = self.run(next(iter(self.lms)), 0)
        if plain is None:
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
        full = round_ms(plain, middle)
        measured: list[Candidate] = []
        for name in ranked:
            known = {}
            for drafts in self.args.drafts:
                if (made := self.run(name, drafts)) is not None:
                    known[drafts] = round_ms(made, middle)
            if known:
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
        """Every prompt: both ways in turn, then both prompts alone, whose time is taken off."""
        if self.plan is None:
            self.choose()
        assert self.plan is not None
        best = self.plan.chosen or self.plan.predictions[0]
        plain, fast = self.run(best.head, 0), self.run(best.head, best.draft_length)
        if plain is None or fast is None:
            raise SystemExit("There is no time left to capture what the planner chose; give --minutes.")
        new, found = self.args.new, []
        turns = in_turn(self.prompts)
        for p in turns[:2]:
            for run in (plain, fast):
                run.generate([p.tokens], new)
        with self.budget.part("groups"):
            for count, p in enumerate(turns):
                if self.budget.left < 5 + 60 * self.args.reserve:
                    self.budget.skipped.append(f"groups: {len(turns) - count} of {len(turns)} prompts")
                    break
                found.append(self._both(p, plain, fast, new, count % 2 == 1))
        differ = [f for f in found if f["plain"] != f["verified"]]
        with self.budget.part("divergences"):
            prompts = {(p.group, p.number): p.tokens for p in self.prompts}
            checked = compare_texts(
                self.model, self.exact, [prompts[f["group"], f["number"]] for f in differ], [f["plain"] for f in differ],
                [f["verified"] for f in differ],
            )  # fmt: skip
        self.sheet.content["divergences"] = {
            "texts": len(found), "equal": len(found) - len(differ), "not_near_ties": checked["not_near_ties"],
            "each": [{**d, "group": differ[d["text"]]["group"], "number": differ[d["text"]]["number"]} for d in checked["divergences"]],
        }  # fmt: skip
        self.sheet.content["chosen"] = {"exit": best.depth, "head": best.head, "draft_length": best.draft_length}
        self.sheet.content["planner_speculates"] = self.plan.chosen is not None
        for group, each in {"all": found, **{g: [f for f in found if f["group"] == g] for g in grouped(self.prompts)}}.items():
            if each:
                self.sheet.row(group=group, way="verified", rows=1, **self._summary(group, each, best.head, best.draft_length))

    def _both(self, p: Prompt, plain: Rounds, fast: Rounds, new: int, backwards: bool) -> dict[str, Any]:
        taken: dict[str, Any] = {"group": p.group, "number": p.number, "prompt_tokens": len(p.tokens), "cut": p.cut}
        calls = [("plain", plain, new), ("verified", fast, new), ("plain_prompt", plain, 1), ("verified_prompt", fast, 1)]
        for name, run, count in reversed(calls) if backwards else calls:
            taken[f"{name}_s"], answer = seconds(lambda run=run, count=count: run.generate([p.tokens], count), self.device)
            if count == new:
                taken[name] = answer.tokens[0]
            if name == "verified":
                taken |= {"drafted": sum(answer.drafted), "accepted": sum(answer.accepted)}
        return taken

    def _summary(self, group: str, each: Sequence[dict[str, Any]], head: str, drafts: int) -> dict[str, Any]:
        """Speeds of a group, prompts apart and with them; the prediction is held against prompts that it was not made from."""
        assert self.plan is not None
        firsts = {(p.group, p.number) for g in grouped(self.prompts).values() for p in g[: self.args.calibrate]}
        fresh = [f for f in each if (f["group"], f["number"]) not in firsts] or list(each)
        acceptance = self.by_group[head].get(group)
        chosen = next(p for p in self.plan.predictions if p.head == head and p.draft_length == drafts)
        predicted = chosen.speedup if acceptance is None else acceptance.tokens[drafts] * self.plan.times.full / chosen.round_time
        ratios = [decode(f, "plain") / decode(f, "verified") for f in each]
        median = median_interval(ratios)
        measured = sum(decode(f, "plain") for f in fresh) / sum(decode(f, "verified") for f in fresh)
        written = sum(len(f["plain"]) - 1 for f in each)
        kept, tried = sum(f["accepted"] for f in each), sum(f["drafted"] for f in each)
        return {
            "prompts": len(each), "tokens_per_s": written / sum(decode(f, "verified") for f in each),
            "plain_tokens_per_s": written / sum(decode(f, "plain") for f in each),
            "speedup": sum(decode(f, "plain") for f in each) / sum(decode(f, "verified") for f in each),
            "speedup_with_prompts": sum(f["plain_s"] for f in each) / sum(f["verified_s"] for f in each),
            "speedup_median": [median.value, median.low, median.high, median.level], "acceptance": kept / max(1, tried),
            "tokens_per_round": tokens_per_round([len(f["verified"]) for f in each], kept), "predicted": predicted,
            "speedup_fresh": measured, "predicted_over_measured": predicted / measured,
            "samples": [{k: v for k, v in f.items() if k not in ("plain", "verified")} for f in each] if group == "all" else None,
        }  # fmt: skip

    def float32(self) -> None:
        """The same exits in float32: texts must be equal token for token."""
        best = self.plan and (self.plan.chosen or self.plan.predictions[0])
        name, drafts = (best.head, best.draft_length) if best else (next(iter(self.lms)), max(self.args.drafts))
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


def decode(sample: dict[str, Any], way: str) -> float:
    """Seconds of a text after its first token."""
    return max(1e-9, float(sample[f"{way}_s"] - sample[f"{way}_prompt_s"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with prompts/")
    parser.add_argument("--model", default="runs/lm")
    parser.add_argument("--out", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--parts", default="plan,groups,float32")
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--reserve", type=float, default=0.5, help="minutes kept back from the groups")
    parser.add_argument("--context", type=int, default=512, help="most tokens of prompt and text")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--each", type=int, default=80, help="prompts of a group")
    parser.add_argument("--calibrate", type=int, default=8, help="prompts of a group that the planner sees")
    parser.add_argument("--candidates", type=int, default=2, help="exits whose rounds are measured")
    parser.add_argument("--drafts", type=numbers, default=[3, 6], help="draft lengths that are measured; those between lie on the line")
    parser.add_argument("--capture-guess", type=float, default=50)
    parser.add_argument("--exact-prompts", type=int, default=200)
    parser.add_argument("--exact-new", type=int, default=64)
    tuning_argument(parser)
    args = parser.parse_args()
    asked = asked_parts(args.parts, PARTS)
    run = Measuring(args)
    run_parts({"plan": run.choose, "groups": run.groups, "float32": run.float32}, asked, run.sheet)


if __name__ == "__main__":
    main()
